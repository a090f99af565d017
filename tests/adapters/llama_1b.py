"""The adapted maps of LLaMA-3.2-1B (16 layers of width 2048, FFN width 8192, keys and values of width 512) as sites."""

from mor_jax.adapters import Site

QUERY_KEY_VALUE = (
    Site("layers/q_proj", 2048, 2048, 16),
    Site("layers/k_proj", 2048, 512, 16),
    Site("layers/v_proj", 2048, 512, 16),
)
UP = Site("layers/up_proj", 2048, 8192, 16)
DOWN = Site("layers/down_proj", 8192, 2048, 16)
