"""The facts of Mixture of Ranks (arXiv 2410.13408) that its description states."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, Leaves, LoRA, MoR, NotMergeable

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def random_case(adapter, in_features=12, out_features=10, tokens=6, dtype=jnp.float32):
    keys = jax.random.split(KEY, 4)
    kernel = one_layer.kernel_of(keys[0], in_features, out_features, dtype)
    leaves = one_layer.scramble(one_layer.start(adapter, keys[1], kernel), keys[2])
    return kernel, leaves, jax.random.normal(keys[3], (tokens, in_features), dtype)


def test_the_defaults_are_those_of_the_description():
    adapter = MoR()
    assert (adapter.rank, adapter.num_experts, adapter.alpha) == (8, 8, 16.0)
    assert (adapter.router, adapter.scope, adapter.top_k) == ("softmax", "site", 0)


def test_start():
    adapter = MoR(rank=16)
    kernel = one_layer.kernel_of(KEY, 256, 300)
    params = one_layer.start(adapter, KEY, kernel).params
    bound = 256**-0.5
    assert float(jnp.abs(params["a"]).max()) <= bound
    # standard deviation of U(-1, 1), within five standard errors of 256 * 16 draws
    np.testing.assert_allclose(params["a"].std(), bound / 3**0.5, rtol=0.04)
    np.testing.assert_array_equal(params["b"], 0)
    np.testing.assert_array_equal(params["lam_a"], 1)
    np.testing.assert_array_equal(params["lam_b"], 1)
    np.testing.assert_allclose(params["router"].std(), 0.02, rtol=0.08)


@pytest.mark.parametrize(("options", "std"), [({"router": "mean"}, 0.02), ({"lam_std": 0.05}, 0.05)])
def test_lam_may_start_spread(options, std):
    kernel = one_layer.kernel_of(KEY, 8, 300)
    params = one_layer.start(MoR(**options), KEY, kernel).params
    np.testing.assert_allclose(params["lam_b"].mean(), 1, atol=5 * std / 2400**0.5)
    np.testing.assert_allclose(params["lam_b"].std(), std, rtol=0.08)
    assert float(params["lam_a"].std()) > std / 2


def test_all_forms_agree():
    adapter = MoR(rank=3, num_experts=4, alpha=5.0)
    kernel, leaves, x = random_case(adapter)
    p = {k: np.asarray(v, np.float64) for k, v in leaves.params.items()}
    x64 = np.asarray(x, np.float64)
    logits = x64 @ p["router"]
    g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    h = x64 @ p["a"]
    experts = sum(g[:, i : i + 1] * (((h * p["lam_a"][i]) @ p["b"]) * p["lam_b"][i]) for i in range(4))
    z = (g[:, :, None] * h[:, None, :] * p["lam_a"]).reshape(len(x), -1)
    bcat = (p["lam_b"][:, None, :] * p["b"]).reshape(-1, 10)
    per_token = np.einsum("tk,tko->to", h, np.einsum("tn,nk,no->tko", g, p["lam_a"], p["lam_b"]) * p["b"])
    low_ranks = sum(g[:, i : i + 1] * (x64 @ (p["a"] * p["lam_a"][i]) @ (p["b"] * p["lam_b"][i])) for i in range(4))
    for form in (z @ bcat, per_token, low_ranks):
        np.testing.assert_allclose(form, experts, rtol=1e-12, atol=1e-12)
    actual = one_layer.delta(adapter, leaves, x, kernel)
    np.testing.assert_allclose(actual, 5 / 3 * experts, rtol=1e-5, atol=1e-5 * np.abs(experts).max())


def test_one_expert_is_lora_exactly():
    adapter, lora = MoR(rank=3, num_experts=1), LoRA(rank=3)
    kernel, leaves, x = random_case(adapter)
    params = {**leaves.params, "lam_a": jnp.ones((1, 3)), "lam_b": jnp.ones((1, 10))}
    plain = Leaves({k: params[k] for k in "ab"})
    actual = one_layer.delta(adapter, Leaves(params), x, kernel)
    np.testing.assert_array_equal(actual, one_layer.delta(lora, plain, x, kernel))


@pytest.mark.parametrize("options", [{}, {"router": "mean"}, {"top_k": 2}])
def test_equal_experts_are_lora_whatever_the_router_says(options):
    adapter, lora = MoR(rank=3, num_experts=4, **options), LoRA(rank=3)
    kernel, leaves, x = random_case(adapter)
    lam_a, lam_b = leaves.params["lam_a"][:1], leaves.params["lam_b"][:1]
    params = {**leaves.params, "lam_a": jnp.tile(lam_a, (4, 1)), "lam_b": jnp.tile(lam_b, (4, 1))}
    plain = Leaves({"a": params["a"] * lam_a, "b": params["b"] * lam_b})
    expected = one_layer.delta(lora, plain, x, kernel)
    actual = one_layer.delta(adapter, Leaves(params), x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * float(jnp.abs(expected).max()))


def test_rank_of_one_token_and_of_many():
    """One token sees a map of rank at most r = 4; the outputs of many span min(N r, out) = 20 dimensions."""
    adapter = MoR(rank=4, num_experts=5)
    kernel, leaves, x = random_case(adapter, in_features=32, out_features=24, tokens=200)
    leaves = leaves._replace(params={**leaves.params, "router": 3 * leaves.params["router"]})
    gates, _ = one_layer.gates_of(adapter, leaves, x)
    zero = kernel.replace(jnp.zeros(kernel.shape))
    for token in range(3):
        one_map = adapter.merge(leaves, one_layer.Kernel(zero), gates[token])
        singular = np.linalg.svd(np.asarray(one_map, np.float64), compute_uv=False)
        assert singular[3] > 1e-2 * singular[0]
        assert singular[4] < 1e-6 * singular[0]
    singular = np.linalg.svd(np.asarray(one_layer.delta(adapter, leaves, x, kernel), np.float64), compute_uv=False)
    assert singular[19] > 1e-3 * singular[0]
    assert singular[20] < 1e-6 * singular[0]


def _descend(params, steps):
    """Gradients of each of ``steps`` SGD steps of regression, in float64."""
    adapter = MoR(rank=3, num_experts=4)
    keys = jax.random.split(jax.random.key(5), 3)
    kernel = one_layer.kernel_of(keys[0], 12, 10, jnp.float64)
    x, target = jax.random.normal(keys[1], (64, 12)), jax.random.normal(keys[2], (64, 10))

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.mean(jnp.square(one_layer.forward(adapter, Leaves(params), x, kernel) - target))

        return jax.grad(loss)(params)

    found = []
    for _ in range(steps):
        found.append(gradient(params))
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, found[-1])
    return params, found


def test_symmetry_trap():
    """Gradients reach b, then a and lam, then the router; with a router of zeros the experts never separate."""
    with jax.enable_x64(True):
        kernel = one_layer.kernel_of(KEY, 12, 10)
        start = one_layer.start(MoR(rank=3, num_experts=4), KEY, kernel).params
        start = {k: v.astype(jnp.float64) for k, v in start.items()}
        _, found = _descend(start, 3)
        # Gates are float32, so equal experts leave 1e-7 of the largest gradient in the router.
        reached = [{k for k, g in step.items() if float(jnp.abs(g).max()) > 1e-6} for step in found]
        assert reached[0] == {"b"}
        assert reached[1] == {"a", "b", "lam_a", "lam_b"}
        assert reached[2] == {"a", "b", "lam_a", "lam_b", "router"}

        after, found = _descend({**start, "router": jnp.zeros((12, 4))}, 10)
        assert float(jnp.abs(after["lam_b"] - 1).max()) > 1e-3, "the experts train"
        for name in ("lam_a", "lam_b"):
            np.testing.assert_allclose(after[name], jnp.broadcast_to(after[name][:1], after[name].shape), rtol=1e-12)
        assert all(float(jnp.abs(step["router"]).max()) < 1e-9 for step in found)


def test_a_small_lam_is_not_lost_in_bfloat16():
    """bfloat16(1.003) is 1, but the products with lam are formed in float32 and rounded once."""
    adapter = MoR(rank=8, num_experts=2)
    kernel, leaves, x = random_case(adapter, 64, 256, 64, jnp.bfloat16)
    ones = {**leaves.params, "lam_a": jnp.ones((2, 8)), "lam_b": jnp.ones((2, 256))}
    assert jnp.bfloat16(1.003) == 1
    plain = jnp.float32(one_layer.delta(adapter, Leaves(ones), x, kernel))
    for name in ("lam_a", "lam_b"):
        scaled = jnp.float32(one_layer.delta(adapter, Leaves({**ones, name: 1.003 * ones[name]}), x, kernel))
        ratio = float(jnp.vdot(scaled, plain) / jnp.vdot(plain, plain))
        assert abs(ratio - 1.003) < 5e-4, name


def test_gates_are_float32_and_sum_to_one():
    adapter = MoR(num_experts=5)
    kernel, leaves, x = random_case(adapter, dtype=jnp.bfloat16)
    gates, _ = one_layer.gates_of(adapter, leaves, x)
    assert gates.dtype == jnp.float32
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)
    logits = np.asarray(x, np.float64) @ np.asarray(leaves.params["router"].astype(jnp.bfloat16), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(gates, expected, rtol=1e-5)


def test_merge_with_constant_gates_is_the_closed_form():
    adapter = MoR(rank=3, num_experts=4, alpha=5.0)
    kernel, leaves, x = random_case(adapter)
    gates = jnp.array([0.1, 0.2, 0.3, 0.4])
    p = {k: np.asarray(v, np.float64) for k, v in leaves.params.items()}
    mixed = sum(g * np.outer(p["lam_a"][i], p["lam_b"][i]) for i, g in enumerate(np.asarray(gates, np.float64)))
    expected = np.asarray(kernel.value, np.float64) + 5 / 3 * p["a"] @ (mixed * p["b"])
    np.testing.assert_allclose(adapter.merge(leaves, kernel, gates), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotMergeable, match="least_squares"):
        adapter.merge(leaves, kernel)


def test_only_the_balanced_router_has_a_balance_loss():
    gates = jax.nn.softmax(jax.random.normal(KEY, (3, 7, 4)))
    mask = jnp.arange(7) < jnp.array([[7], [5], [2]])
    assert MoR(num_experts=4).balance(gates, mask) is None
    assert MoR(num_experts=4, router="mean").balance(gates, mask) is None
    adapter = MoR(num_experts=4, router="balanced", balance_weight=0.3)
    expected = one_layer.oracle("mor").balance(
        np.reshape(gates, (-1, 4)), np.ravel(mask), {"num_experts": 4, "balance_weight": 0.3}
    )
    np.testing.assert_allclose(adapter.balance(gates, mask), expected, rtol=1e-5)


def test_statistics_only_where_there_is_a_router():
    gates = jnp.full((2, 3, 8), 1 / 8)
    assert MoR(router="mean").statistics(Leaves({}), gates, gates, AdapterInputs()) == {}
    found = MoR().statistics(Leaves({}), gates, gates, AdapterInputs())
    np.testing.assert_allclose(found["load"], 6 / 8, rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], [6 * np.log(8)], rtol=1e-6)
    np.testing.assert_allclose(found["count"], [6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "MoR.rank must be positive, got 0"),
        ({"num_experts": 0}, "MoR.num_experts must be positive"),
        ({"alpha": -1.0}, "MoR.alpha must be positive"),
        ({"router": "hard"}, "MoR.router must be one of softmax, mean, balanced, got 'hard'"),
        ({"scope": "network"}, "MoR.scope must be one of site, block"),
        ({"top_k": 9}, "MoR.top_k must be between 0 and num_experts = 8, got 9"),
        ({"top_k": 1}, "MoR.top_k = 1 leaves every token one expert, .* choose 2 or more, or 0"),
        ({"router": "mean", "top_k": 2}, "MoR.router 'mean' has no gate"),
        ({"lam_std": -0.1}, "must not be negative"),
        ({"dropout": 1.0}, r"MoR.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        MoR(**options)
