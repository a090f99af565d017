"""The facts of ResLoRA (arXiv 2402.18039) that concern one site; tests/injection/test_chain.py runs whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, Kernel, LoRA, NotMergeable, ResLoRA

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
LAYERS, IN, OUT = 4, 7, 5


def _stack(adapter, layers=LAYERS):
    keys = jax.random.split(KEY, layers)
    kernels = [one_layer.kernel_of(k, IN, OUT) for k in keys]
    each = [one_layer.scramble(one_layer.start(adapter, k, w), k) for k, w in zip(keys, kernels, strict=True)]
    return kernels, each, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _layer(leaves, n):
    return jax.tree.map(lambda v: v[n], leaves)


def test_start_and_defaults():
    adapter = ResLoRA()
    assert (adapter.previous, adapter.form) == (1, "block")
    params = one_layer.start(ResLoRA(rank=3, form="input"), KEY, one_layer.kernel_of(KEY, 400, OUT)).params
    assert 0.99 * 0.05 < float(jnp.abs(params["a"]).max()) <= 0.05  # 1 / sqrt(400)
    np.testing.assert_array_equal(params["b"], 0)


@pytest.mark.parametrize("options", [{}, {"form": "middle"}])
def test_a_chain_of_one_layer_is_lora(options):
    adapter = ResLoRA(rank=3, **options)
    (kernel,), (leaves,), stacked = _stack(adapter, layers=1)
    x = jax.random.normal(KEY, (4, IN))
    lora = one_layer.delta(LoRA(rank=3), leaves, x, kernel)
    np.testing.assert_allclose(one_layer.delta(adapter, leaves, x, kernel), lora, rtol=1e-5, atol=1e-6)
    assert adapter.link(stacked) is stacked


def test_input_of_one_layer_is_lora_on_twice_x():
    adapter = ResLoRA(rank=3, form="input")
    (kernel,), (leaves,), _ = _stack(adapter, layers=1)
    x = jax.random.normal(KEY, (4, IN))
    lora = one_layer.delta(LoRA(rank=3), leaves, 2 * x, kernel)
    np.testing.assert_allclose(one_layer.delta(adapter, leaves, x, kernel), lora, rtol=1e-5, atol=1e-6)


FORMS = [
    {"form": "input"},
    {"form": "block"},
    {"form": "block", "previous": 2},
    {"form": "block", "previous": -1},
    {"form": "middle"},
    {"form": "middle", "previous": 2},
    {"form": "middle", "previous": -1},
]


@pytest.mark.parametrize("options", FORMS, ids=lambda o: f"{o['form']}{o.get('previous', 1)}")
def test_each_form_equals_the_paper_s_sums(options):
    adapter = ResLoRA(rank=3, **options)
    kernels, each, stacked = _stack(adapter)
    inputs = jax.random.normal(KEY, (LAYERS, 2, 3, IN))
    linked = adapter.link(stacked)
    chain = adapter.init_chain(one_layer.site_of(kernels[0]), (2, 3), jnp.float32) if adapter.chained else None
    changes = []
    for n in range(LAYERS):
        leaves, x = _layer(linked, n), inputs[n]
        factor = adapter.input_factor(leaves)
        x = x if factor is None else x @ factor
        found = adapter.delta(leaves, x, jnp.zeros((2, 3, OUT)), kernels[n], None, AdapterInputs(chain=chain))
        if adapter.chained:
            found, following = found
            assert jax.tree.map(jnp.shape, following) == jax.tree.map(jnp.shape, chain)  # a scan can carry it
            chain = following
        changes.append(found)
    factors = [[leaves.params[name] for leaves in each] for name in ("a", "b")]
    given = {"alpha": adapter.alpha, "rank": 3, "form": adapter.form, "previous": adapter.previous}
    expected = one_layer.oracle("reslora").changes(*factors, list(inputs.reshape(LAYERS, 6, IN)), given)
    np.testing.assert_allclose(np.reshape(changes, (LAYERS, 6, OUT)), expected, rtol=1e-4, atol=1e-4)
    if not adapter.chained:
        jax.tree.map(np.testing.assert_array_equal, adapter.link(linked), linked)
        for n in range(LAYERS):
            merged = adapter.merge(_layer(linked, n), kernels[n]) - kernels[n].dense()
            np.testing.assert_allclose(inputs[n] @ merged, changes[n], rtol=1e-4, atol=1e-4)


def test_all_earlier_layers_cost_their_rank_and_say_so(caplog):
    adapter = ResLoRA(rank=3, previous=-1)
    _, _, stacked = _stack(adapter)
    with caplog.at_level("INFO"):
        linked = adapter.link(stacked)
    assert "ResLoRA over all 3 earlier layers computes with rank 12" in caplog.text
    assert linked.params["chain_a"].shape == (LAYERS, IN, 9)


@pytest.mark.parametrize("form", ["input", "middle"])
def test_approximate_merges_need_the_earlier_layers_share(form):
    adapter = ResLoRA(rank=3, form=form)
    kernels, _, stacked = _stack(adapter)
    leaves = _layer(adapter.link(stacked), 2)
    with pytest.raises(NotMergeable, match="approximation"):
        adapter.merge(leaves, kernels[2])
    merged = adapter.merge(leaves, kernels[2], jnp.array([0.5]))
    expected = kernels[2].dense() + adapter.scale * 1.5 * leaves.params["a"] @ leaves.params["b"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    norms = jnp.array([2.0, 4.0, 1.0, 2.0])
    share = [1.0 if form == "input" else 0.0, 0.5, 4.0, 0.5]  # f_{n-1} / f_n; the first layer of input has x_0 twice
    np.testing.assert_allclose(adapter.earlier_share(norms), share)


def test_shares_of_several_earlier_layers_add_up():
    norms = jnp.array([2.0, 4.0, 1.0])
    np.testing.assert_allclose(ResLoRA(form="middle", previous=-1).earlier_share(norms), [0, 0.5, 6])
    np.testing.assert_allclose(ResLoRA(form="middle", previous=2).earlier_share(norms), [0, 0.5, 6])


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_shares_by_weight_are_those_of_the_released_code(layers):
    """W_{n-1}, not W_n, decides how long x_n is: f_{n-2} / f_{n-1}, and 1 where a layer has not two before it."""
    adapter = ResLoRA(rank=3, form="input", alpha=4.0)
    kernels, each, stacked = _stack(adapter, layers)
    norms = adapter.weight_norm(stacked, Kernel(jnp.stack([k.value for k in kernels])))
    factors = [[leaves.params[name] for leaves in each] for name in ("a", "b")]
    given = {"alpha": 4.0, "rank": 3}
    expected = one_layer.oracle("reslora").shares_by_weight([k.value for k in kernels], *factors, given)
    np.testing.assert_allclose(adapter.earlier_share(norms, by="weight"), expected, rtol=1e-5)
    assert layers < 3 or np.abs(expected[2:] - 1).min() > 0.01


def test_norms_by_input_and_by_weight():
    x = jax.random.normal(KEY, (2, 9, IN))
    second_moments = jnp.einsum("lti,ltj->lij", x, x)
    kernels, _, stacked = _stack(ResLoRA(rank=3), layers=2)
    by_x = ResLoRA(rank=3, form="input").input_norm(stacked, second_moments)
    np.testing.assert_allclose(by_x, jnp.linalg.norm(x, axis=(1, 2)), rtol=1e-5)
    by_hidden = ResLoRA(rank=3, form="middle").input_norm(stacked, second_moments)
    np.testing.assert_allclose(by_hidden, jnp.linalg.norm(x @ stacked.params["a"], axis=(1, 2)), rtol=1e-5)
    both = Kernel(jnp.stack([k.value for k in kernels]))
    merged = both.dense() + ResLoRA(rank=3).scale * stacked.params["a"] @ stacked.params["b"]
    by_weight = ResLoRA(rank=3, form="input").weight_norm(stacked, both)
    np.testing.assert_allclose(by_weight, jnp.linalg.norm(merged, axis=(1, 2)), rtol=1e-5)
    with pytest.raises(ValueError, match="merge by input"):
        ResLoRA(rank=3, form="middle").weight_norm(stacked, both)


def test_impossible_options_name_the_field():
    for options, message in (
        ({"form": "output"}, "form must be one of input, block, middle, got 'output'"),
        ({"previous": 0}, "previous must be positive, or -1"),
        ({"form": "input", "previous": 2}, "reads one earlier layer"),
    ):
        with pytest.raises(ValueError, match=message):
            ResLoRA(**options)
