"""The linear maps of LLaMA-2-7B (32 layers of width 4096 and FFN width 11008; 6,738,415,616 parameters) as sites."""

from mor_jax.adapters import Site

LLAMA_2_7B = 6_738_415_616
ATTENTION = tuple(Site(f"layers/{name}_proj", 4096, 4096, 32) for name in "qkvo")
FFN = (
    Site("layers/gate_proj", 4096, 11008, 32),
    Site("layers/up_proj", 4096, 11008, 32),
    Site("layers/down_proj", 11008, 4096, 32),
)


def count(adapter, sites):
    return sum(adapter.num_params(site) for site in sites)
