"""Router statistics and balance losses that leave a scan through gradients, against the same model written out."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_models import LAYERS, Stack, example

from mor_jax.adapters import AdapterInputs, MoR
from mor_jax.injection import Adapted, init_leaves, init_probes, resolve_sites

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXPERTS, TASKS = 4, 3
NAMES = ("query", "key", "out")
SEGMENTS = jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 0, 0], [1, 2, 0, 0, 0], [1, 1, 1, 1, 0]])
TASK_IDS = jnp.array([[0, 0, 0, 2, 2], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [2, 2, 2, 2, 0]])


def numpy_mor():
    path = pathlib.Path(__file__).parents[1] / "oracles" / "numpy_mor.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def switch(gates, mask):
    """N sum_i f_i p_i over the tokens of the mask."""
    total = jnp.maximum(mask.sum(), 1)
    share = (jax.nn.one_hot(gates.argmax(-1), EXPERTS) * mask[..., None]).sum((0, 1)) / total
    return EXPERTS * jnp.sum(share * (gates * mask[..., None]).sum((0, 1)) / total)


def written_out(params, adapters, h, method, scan_axis):
    """The stack's output and, for each gate, (layers, B, S, N) gates."""
    kept = {}
    for layer in range(LAYERS):
        base = jax.tree.map(lambda v, i=layer: v.take(i, min(scan_axis, v.ndim - 1)), params["layers"])
        block_gate = None
        if method.scope == "block":
            block_gate = jax.nn.softmax(h @ adapters["layers"]["router"][layer])
            kept.setdefault("layers", []).append(block_gate)

        def linear(name, x, base=base, block_gate=block_gate, layer=layer):
            p = {k: v[layer] for k, v in adapters[f"layers/{name}"].items()}
            gates = block_gate
            if gates is None:
                gates = jax.nn.softmax(x @ p["router"])
                kept.setdefault(f"layers/{name}", []).append(gates)
            experts = jnp.einsum("bsi,ir,nr,ro,no->bsno", x, p["a"], p["lam_a"], p["b"], p["lam_b"])
            change = method.alpha / method.rank * jnp.einsum("bsn,bsno->bso", gates, experts)
            return x @ base[name]["kernel"] + base[name].get("bias", 0) + change

        h = h + linear("out", jnp.tanh(linear("query", h)) * linear("key", h))
    return h, {path: jnp.stack(gates) for path, gates in kept.items()}


CASES = {"scan axis 1, remat": (Stack(1, remat=True), {}), "one gate a block": (Stack(0), {"scope": "block"})}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    model, options = CASES[request.param]
    method = MoR(rank=2, alpha=2.0, num_experts=EXPERTS, router="balanced", balance_weight=0.3, **options)
    x = example(batch=4)
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, method, NAMES, x)
    leaves = init_leaves(jax.random.key(1), plan, params).params
    keys = iter(jax.random.split(jax.random.key(2), 50))
    leaves = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(next(keys), v.shape), leaves)
    probes = init_probes(plan, TASKS)

    def loss(adapters, probes, x, segments, tasks, weight):
        inputs = AdapterInputs(segment_ids=segments, task_ids=tasks, num_tasks=TASKS, auxiliary_scale=weight)
        variables = {"params": params, "adapters": adapters, "adapter_probes": probes}
        y = Adapted(model, plan).apply(variables, x, adapter_inputs=inputs)
        return jnp.sum(jnp.sin(y) * (segments > 0)[..., None])

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return model, method, params, plan, leaves, probes, x, gradient


def test_statistics_are_those_of_the_gates(case):
    model, method, params, plan, leaves, probes, x, gradient = case
    _, found = gradient(leaves, probes, x, SEGMENTS, TASK_IDS, jnp.float32(0))
    _, gates = written_out(params, leaves, x, method, model.scan_axis)
    assert set(found) == set(gates) == ({"layers"} if method.scope == "block" else {f"layers/{n}" for n in NAMES})
    mask = np.asarray(SEGMENTS > 0)
    tasks = np.eye(TASKS)[np.asarray(TASK_IDS)] * mask[..., None]
    options = {"num_experts": EXPERTS, "balance_weight": method.balance_weight}
    for path, g in gates.items():
        g = np.asarray(g, np.float64)
        entropy = -(g * np.log(g)).sum(-1)
        balance = [[numpy_mor().balance(layer.reshape(-1, EXPERTS), mask.ravel(), options)] for layer in g]
        expected = {
            "load": np.einsum("lbsn,bs->ln", g, mask),
            "entropy": np.einsum("lbs,bs->l", entropy, mask)[:, None],
            "count": np.full((LAYERS, 1), mask.sum()),
            "task_load": np.einsum("lbsn,bst->ltn", g, tasks),
            "task_count": np.tile(tasks.sum((0, 1)), (LAYERS, 1)),
            "balance": np.array(balance),
        }
        assert set(found[path]) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[path][name], value, rtol=1e-5, atol=1e-5, err_msg=f"{path} {name}")


def test_statistics_do_not_depend_on_accumulation(case):
    _, _, _, _, leaves, probes, x, gradient = case
    _, whole = gradient(leaves, probes, x, SEGMENTS, TASK_IDS, jnp.float32(0))
    parts = [gradient(leaves, probes, x[i : i + 1], SEGMENTS[i : i + 1], TASK_IDS[i : i + 1], 0.0)[1] for i in range(4)]
    summed = jax.tree.map(lambda *micro: sum(micro), *parts)
    for path, found in whole.items():
        for name in set(found) - {"balance"}:  # a product of means
            np.testing.assert_allclose(summed[path][name], found[name], rtol=1e-5, atol=1e-5)


def test_balance_enters_the_gradient_weighted_by_tokens(case):
    """As a loss of the mean over gates, per micro-batch of one row, times the share of the tokens that it holds."""
    model, method, params, plan, leaves, probes, x, gradient = case
    mask = SEGMENTS > 0
    share = mask.sum(1) / mask.sum()

    def injected(weights):
        rows = [slice(i, i + 1) for i in range(len(x))]
        parts = [gradient(leaves, probes, x[r], SEGMENTS[r], TASK_IDS[r], weights[r][0])[0] for r in rows]
        return jax.tree.map(lambda *micro: sum(micro), *parts)

    @jax.jit
    @jax.grad
    def expected(adapters):
        _, gates = written_out(params, adapters, x, method, model.scan_axis)
        gates = jnp.concatenate(list(gates.values()))  # a token's gates do not depend on other rows
        assert len(gates) == plan.num_gate_sites
        balance = jax.vmap(lambda gate: jax.vmap(lambda g, m: switch(g[None], m[None]))(gate, mask))(gates)
        return method.balance_weight * jnp.sum(balance.mean(0) * share)

    with_balance, without = injected(share), injected(jnp.zeros(4))
    actual = jax.tree.map(jnp.subtract, with_balance, without)
    wanted = expected(leaves)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(without))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted)) > 1e-4 * largest
    # a difference of two gradients, each with float32 rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6 * largest), actual, wanted)


def test_output_and_gradient_are_those_of_the_model_written_out(case):
    model, method, params, _, leaves, probes, x, gradient = case
    actual, _ = gradient(leaves, probes, x, SEGMENTS, TASK_IDS, jnp.float32(0))

    @jax.jit
    @jax.grad
    def expected(adapters):
        y, _ = written_out(params, adapters, x, method, model.scan_axis)
        return jnp.sum(jnp.sin(y) * (SEGMENTS > 0)[..., None])

    wanted = expected(leaves)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), actual, wanted)
