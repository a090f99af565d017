"""Trained parameters of every method on the maps of LLaMA-2-7B and LLaMA-3.2-1B, none of which is allocated."""

import jax
import jax.numpy as jnp
import pytest

from mor_jax.adapters import (
    METHODS,
    HaLoRA,
    Kernel,
    LoRA,
    LoRAMini,
    MELoRA,
    MoR,
    MoRA,
    ResLoRA,
    Site,
    make_adapter,
)

LLAMA_2_7B = 6_738_415_616  # 32 layers of width 4096 and FFN width 11008


def _sites(layers, **sizes):
    return {name: Site(f"layers/{name}_proj", *size, layers) for name, size in sizes.items()}


FFN_7B = {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
FFN_1B = {"gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)}
MODELS = {
    "LLaMA-2-7B": _sites(32, **dict.fromkeys("qkvo", (4096, 4096)), **FFN_7B),
    "LLaMA-3.2-1B": _sites(16, q=(2048, 2048), k=(2048, 512), v=(2048, 512), o=(2048, 2048), **FFN_1B),
}

# Of each method at its defaults, for one map of one layer: what the equations of its paper train.
TRAINED = {
    "lora": lambda i, o: 8 * (i + o),
    "rslora": lambda i, o: 8 * (i + o),
    "dora": lambda i, o: 8 * (i + o) + o,
    "mor": lambda i, o: 8 * (i + o) + 8 * (8 + o) + 8 * i,
    "vera": lambda i, o: 256 + o,
    "lora_mini": lambda i, o: 8 * (256 + 256),
    "melora": lambda i, o: 8 * (i + o),  # of two minis of rank 8 together
    "mora": lambda i, o: _nearest_square((i + o) * 8),
    "halora": lambda i, o: 4 * (i + o),
    "reslora": lambda i, o: 8 * (i + o),
    "dylora": lambda i, o: 8 * (i + o),
    "prilora": lambda i, o: 8 * (i + o),  # ranks of 4 to 12, which average 8 over the depth
    "adalora": lambda i, o: 12 * (i + o + 1),
    "alora": lambda i, o: 8 * (i + o),
    "beamlora": lambda i, o: 8 * (i + o + 1),
}
# Where leaves are padded to the largest rank that a layer has or a site may grow to.
PADDED = {"prilora": lambda i, o: 12 * (i + o), "alora": lambda i, o: 16 * (i + o)}


def _nearest_square(value):
    """The square of the whole number nearest to the root, by search."""
    return min(range(1, 2000), key=lambda k: abs(k - value**0.5)) ** 2


def _total(closed_form, sites):
    return sum(site.num_layers * closed_form(site.in_features, site.out_features) for site in sites.values())


def _count(adapter, sites):
    return sum(adapter.num_params(site) for site in sites.values())


def _shapes(adapter, site):
    """The trained leaves of all layers of a site."""

    def start(kernel):
        init = lambda layer: adapter.init(jax.random.key(0), site, layer, Kernel(kernel)).params  # noqa: E731
        return jax.vmap(init)(jnp.arange(site.num_layers))

    kernel = jax.ShapeDtypeStruct((site.in_features, site.out_features), jnp.float32)
    return jax.tree.leaves(jax.eval_shape(start, kernel))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_all_maps_of_a_model(name, model):
    adapter, sites = make_adapter(name), MODELS[model]
    assert _count(adapter, sites) == _total(TRAINED[name], sites)
    padded = _total(PADDED.get(name, TRAINED[name]), sites)
    assert sum(adapter.padded_params(site) for site in sites.values()) == padded
    assert sum(leaf.size for site in sites.values() for leaf in _shapes(adapter, site)) == padded


@pytest.mark.parametrize("name", ["lora", "rslora", "melora", "reslora", "dylora", "alora"])
def test_rank_8_on_all_maps_of_llama_2_7b(name):
    assert _count(make_adapter(name, rank=8), MODELS["LLaMA-2-7B"]) == 19_988_480


@pytest.mark.parametrize("adapter", [*(MELoRA(num_minis=n) for n in (1, 8, 64)), ResLoRA(form="middle", previous=3)])
def test_what_adds_no_parameters(adapter):
    assert _count(adapter, MODELS["LLaMA-2-7B"]) == 19_988_480


def test_halora_on_the_maps_of_its_paper():
    """Rank 4 on q, k, v, up and down of LLaMA-3.2-1B."""
    sites = {name: MODELS["LLaMA-3.2-1B"][name] for name in ("q", "k", "v", "up", "down")}
    assert _count(HaLoRA(), sites) == 1_900_544


FFN = {name: MODELS["LLaMA-2-7B"][name] for name in FFN_7B}


@pytest.mark.parametrize(("rank", "expected"), [(8, 23_205_888), (32, 58_023_936)])
def test_mor_on_the_ffn_of_llama_2_7b(rank, expected):
    assert _count(MoR(rank=rank, num_experts=8), FFN) == expected
    if rank == 8:
        assert round(100 * expected / LLAMA_2_7B, 4) == 0.3444  # the paper says 0.34 %


def test_eight_loras_with_routers_of_their_own_have_four_times_as_many_as_mor():
    routers = sum(site.num_layers * MoR(num_experts=8).num_gate_params(site.in_features) for site in FFN.values())
    assert 8 * _count(LoRA(rank=8), FFN) + routers == 97_714_176


def test_routers_of_mor():
    """The mean router has no leaf; a router at the block is counted there."""
    without = lambda i, o: 8 * (i + o) + 8 * (8 + o)  # noqa: E731 - like those above
    for options in ({"router": "mean"}, {"scope": "block"}):
        assert _count(MoR(**options), FFN) == _total(without, FFN)
    assert _count(MoR(router="balanced", top_k=2), FFN) == _total(TRAINED["mor"], FFN)
    assert MoR(scope="block").num_gate_params(4096) == 8 * 4096


def test_mora_has_the_parameters_of_lora_in_a_square():
    square = MODELS["LLaMA-2-7B"]["q"]
    assert MoRA(rank=8).size(square) == 256
    assert MoRA(rank=8).num_params(square) == 32 * 65_536 == LoRA(rank=8).num_params(square)
    narrow = MODELS["LLaMA-3.2-1B"]["k"]
    assert MoRA(rank=8).size(narrow) == 143
    assert MoRA(rank=8, group_type="rotation").size(narrow) == 142  # rotation pairs entries, so k is even
    for sites in MODELS.values():
        assert abs(_count(MoRA(), sites) / _count(LoRA(), sites) - 1) < 0.01


def test_lora_mini_is_rank_times_m_plus_n_whatever_the_map():
    sites = MODELS["LLaMA-2-7B"]
    assert _count(LoRAMini(rank=8, inner_in=64, inner_out=32), sites) == 7 * 32 * 8 * (64 + 32)
    assert 20 < _count(LoRA(rank=8), sites) / _count(LoRAMini(rank=8), sites) < 22  # the paper: up to 20 times fewer
