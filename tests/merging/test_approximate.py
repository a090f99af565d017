"""Gates, least squares and fidelity against float64 NumPy that never sees our calibration code."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import LoRA, MoR
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.merging import (
    check_unseen,
    factorize,
    least_squares,
    mean_gates,
    measure_fidelity,
    merge,
    merge_changes,
    merge_routed,
    refactor,
    solve_ridge,
)
from tests.merging.models import CLASSES, INNER, LAYERS, WIDTH, batches, call, make, random_leaves, unrolled

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHOD = MoR(rank=3, num_experts=4, alpha=3)


def float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mor(own, x):
    """(gates, delta) of one MoR layer with s = 1, expert by expert."""
    gates = softmax(x @ own["router"])
    delta = 0
    for i in range(gates.shape[-1]):
        delta = delta + gates[..., i, None] * ((x @ own["a"] * own["lam_a"][i]) @ own["b"]) * own["lam_b"][i]
    return gates, delta


def numpy_stack(params, leaves, ids, changes=None):
    """Tokens -> (logits, {path: one (x, gates, delta) a layer}); with ``changes`` a layer's delta is x @ change."""
    params, leaves, inner = float64(params), float64(leaves.params), {"layers/up": [], "layers/down": []}
    h = params["embed"]["embedding"][ids]

    def layer(name, i, x):
        path, own = f"layers/{name}", params["layers"][name]
        gates, delta = mor({k: v[i] for k, v in leaves[path].items()}, x)
        inner[path].append((x, gates, delta))
        if changes is not None and (path, i) in changes:
            delta = x @ changes[path, i]
        return x @ own["kernel"][i] + (own["bias"][i] if "bias" in own else 0) + delta

    for i in range(LAYERS):
        h = h + layer("down", i, np.tanh(layer("up", i, h)))
    return h @ params["head"]["kernel"] + params["head"]["bias"], inner


def stacked(data, key):
    return np.concatenate([batch[key] for batch in data])


@pytest.fixture(scope="module")
def toy():
    """Gates uneven enough that no merge is close: KL of the mean merge is above 0.01."""
    return make(METHOD, remat=True, scale=0.4)


def test_mean_and_task_gates_equal_a_loop(toy):
    model, params, leaves, plan = toy
    data = batches(3)
    _, inner = numpy_stack(params, leaves, stacked(data, "input_ids"))
    real = stacked(data, "segment_ids") > 0
    for task in (None, 1):
        mask = real if task is None else real & (stacked(data, "task_ids") == task)
        got = mean_gates(model, params, leaves, plan, data, call=call, task=task)
        assert set(got) == {"layers/up", "layers/down"}
        for path, layers in inner.items():
            expected = [gates[mask].mean(0) for _, gates, _ in layers]
            np.testing.assert_allclose(got[path], expected, atol=1e-5)
    with pytest.raises(ValueError, match="task 2"):
        mean_gates(model, params, leaves, plan, data, call=call, task=2)


def test_block_gates_are_keyed_by_their_block():
    model, params, leaves, plan = make(dataclasses.replace(METHOD, scope="block"))
    gates = mean_gates(model, params, leaves, plan, batches(2), call=call)
    assert {k: v.shape for k, v in gates.items()} == {"layers": (LAYERS, 4)}
    np.testing.assert_allclose(gates["layers"].sum(-1), 1, atol=1e-5)
    merge(params, leaves, plan, gates)


def ridge_lstsq(x, target):
    """argmin ||x D - t||^2 / n + eps ||D||^2 by lstsq on the stacked system, not by normal equations."""
    n, width = x.shape
    eps = 1e-4 * (x**2).sum() / n / width
    left = np.concatenate([x / n**0.5, eps**0.5 * np.eye(width)])
    right = np.concatenate([target / n**0.5, np.zeros((width, target.shape[1]))])
    return np.linalg.lstsq(left, right, rcond=None)[0]


def test_least_squares_equals_lstsq_on_tokens_that_are_no_padding(toy):
    model, params, leaves, plan = toy
    data = batches(3)
    got = least_squares(model, params, leaves, plan, data, call=call, sequential=False)
    _, inner = numpy_stack(params, leaves, stacked(data, "input_ids"))
    real = stacked(data, "segment_ids") > 0
    for path, layers in inner.items():
        for i, (x, _, delta) in enumerate(layers):
            expected = ridge_lstsq(x[real], delta[real])
            np.testing.assert_allclose(got.changes[path][i], expected, atol=2e-3 * np.abs(expected).max())
            moment = x[real].T @ x[real] / real.sum()
            np.testing.assert_allclose(got.second_moments[path][i], moment, atol=1e-5 * np.abs(moment).max())


def numpy_sequential(params, leaves, data):
    ids, real = stacked(data, "input_ids"), stacked(data, "segment_ids") > 0
    _, routed = numpy_stack(params, leaves, ids)
    changes = {}
    for i in range(LAYERS):
        for path in ("layers/up", "layers/down"):
            _, partly = numpy_stack(params, leaves, ids, dict(changes))
            changes[path, i] = ridge_lstsq(partly[path][i][0][real], routed[path][i][2][real])
    return changes


def test_sequential_least_squares_equals_an_explicit_site_by_site_calibration(toy):
    model, params, leaves, plan = toy
    data = batches(3)
    got = least_squares(model, params, leaves, plan, data, call=call, sequential=True)
    plain = least_squares(model, params, leaves, plan, data, call=call, sequential=False)
    for (path, i), expected in numpy_sequential(params, leaves, data).items():
        np.testing.assert_allclose(got.changes[path][i], expected, atol=5e-3 * np.abs(expected).max())
    first, last = (np.abs(got.changes["layers/up"][i] - plain.changes["layers/up"][i]).max() for i in (0, LAYERS - 1))
    assert first < 1e-4
    assert last > 1e-2


class Twice(nn.Module):
    """One map on its own output."""

    @nn.compact
    def __call__(self, ids):
        up = nn.Dense(WIDTH, name="up")
        return up(jnp.tanh(up(nn.Embed(64, WIDTH, name="embed")(ids))))


def test_a_map_that_is_called_twice_has_sums_of_both_calls_but_no_place_in_an_order():
    ids = jnp.zeros((2, 4), jnp.int32)
    params = Twice().init(jax.random.key(0), ids)["params"]
    plan = resolve_sites(Twice(), METHOD, ("up",), ids)
    own = (Twice(), params, random_leaves(jax.random.key(1), plan, params), plan, batches(2))
    assert least_squares(*own, call=call, sequential=False).changes["up"].shape == (WIDTH, WIDTH)
    with pytest.raises(ValueError, match="up is called more than once"):
        least_squares(*own, call=call, sequential=True)


def test_loop_layers_give_the_scanned_result(toy):
    model, params, leaves, plan = toy
    loop_model, _, _, loop_plan = make(METHOD, scan_axis=None, scale=0.4)
    loop_params, loop_leaves = unrolled(params, leaves)
    data = batches(2)
    got = least_squares(model, params, leaves, plan, data, call=call)
    loop = least_squares(loop_model, loop_params, loop_leaves, loop_plan, data, call=call)
    for i in range(LAYERS):
        expected = got.changes["layers/down"][i]
        bound = 2e-3 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(loop.changes[f"layers_{i}/down"], expected, atol=bound)


def test_a_gate_that_is_constant_is_recovered():
    model, params, leaves, plan = make(METHOD, scan_axis=None, scale=0.1)
    for own in leaves.params.values():
        own["router"] = jnp.zeros_like(own["router"])
    gates = {path: jnp.full((4,), 0.25) for path in plan.paths}
    exact = merge(params, leaves, plan, gates)
    found = least_squares(model, params, leaves, plan, batches(6), call=call, ridge=1e-9)
    (batch,) = batches(1, seed=5)
    left, right = (
        model.apply({"params": p}, batch["input_ids"])
        for p in (exact, merge_changes(params, leaves, plan, found.changes))
    )
    np.testing.assert_allclose(left, right, atol=2e-2 * float(jnp.abs(left).max()))


def test_solve_ridge_is_zero_without_inputs_and_finite_when_singular():
    assert not solve_ridge(np.zeros((3, 3)), np.zeros((3, 2))).any()
    x = np.ones((5, 3))
    got = solve_ridge(x.T @ x / 5, x.T @ np.full((5, 2), 6.0) / 5)
    np.testing.assert_allclose(x @ got, 6, rtol=1e-4)


def test_the_host_solves_as_the_device_does():
    """TPUs leave the system to the host; both inside a compiled, differentiated scan as the calibration has them."""
    from mor_jax.merging import calibration

    x = jax.random.normal(jax.random.key(0), (3, 30, 5)) * jnp.array([9.0, 5, 1, 0.1, 0.01])
    moments, crosses = jnp.einsum("lti,ltj->lij", x, x) / 30, jax.random.normal(jax.random.key(1), (3, 5, 4))

    def through(solve):
        def layer(h, inputs):
            moment, cross = jax.lax.stop_gradient(inputs)
            return h * 0.5, solve(1e-4, moment, cross)

        return jax.jit(jax.value_and_grad(lambda h: jax.lax.scan(layer, h, (moments, crosses)), has_aux=True))(1.0)

    (_, on_device), gradient = through(calibration._solve_on_device)
    (_, on_host), _ = through(calibration._solve_on_host)
    assert gradient == 0.125
    np.testing.assert_allclose(on_host, on_device, rtol=1e-5, atol=1e-5)
    assert not calibration._solve_on_host(1e-4, jnp.zeros((3, 3)), jnp.zeros((3, 2))).any()


def test_factorize_is_the_best_of_its_rank_in_the_metric_of_the_inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 8)) * np.array([9, 5, 3, 1, 1, 0.3, 0.1, 0.1])
    change, moment = rng.normal(size=(8, 6)), x.T @ x / 500
    a, b = factorize(change, moment, 6)
    np.testing.assert_allclose(a @ b, change, atol=1e-9)
    a, b = factorize(change, moment, 2)
    values = np.linalg.svd(x @ change / 500**0.5, compute_uv=False)
    ours = np.square(x @ (a @ b - change)).sum() / 500
    np.testing.assert_allclose(ours, (values[2:] ** 2).sum(), rtol=1e-3)
    left, s, right = np.linalg.svd(change)
    assert ours < 0.9 * np.square(x @ ((left[:, :2] * s[:2]) @ right[:2] - change)).sum() / 500
    with pytest.raises(ValueError, match="rank"):
        factorize(change, moment, 7)


@pytest.mark.parametrize("scope", ["site", "block"])
def test_refactored_adapter_of_full_rank_is_the_merged_model(scope):
    model, params, leaves, plan = make(dataclasses.replace(METHOD, scope=scope), scale=0.1)
    found = least_squares(model, params, leaves, plan, batches(2), call=call)
    merged = merge_changes(params, leaves, plan, found.changes)
    lora_plan, lora_leaves = refactor(found, leaves, plan, WIDTH)
    assert {s.adapter for s in lora_plan.sites} == {LoRA(rank=WIDTH, alpha=float(WIDTH))}
    assert set(lora_leaves.params) == {"layers/up", "layers/down"}
    (batch,) = batches(1, seed=3)
    out = Adapted(base=model, plan=lora_plan).apply(
        {"params": params, "adapters": lora_leaves.params}, batch["input_ids"]
    )
    expected = model.apply({"params": merged}, batch["input_ids"])
    np.testing.assert_allclose(out, expected, atol=2e-4 * float(jnp.abs(expected).max()))


def test_fidelity_figures_equal_float64_numpy(toy, tmp_path):
    model, params, leaves, plan = toy
    data, unseen = batches(2), batches(2, seed=9)
    gates = mean_gates(model, params, leaves, plan, data, call=call)
    merged = merge(params, leaves, plan, gates)
    report = measure_fidelity(model, params, leaves, plan, merged, unseen, call=call, method="mean")
    ids, real = stacked(unseen, "input_ids"), stacked(unseen, "segment_ids") > 0
    left, inner = numpy_stack(params, leaves, ids)
    changes = {
        (path, i): np.asarray(merged["layers"][path.split("/")[1]]["kernel"][i], np.float64)
        - np.asarray(params["layers"][path.split("/")[1]]["kernel"][i], np.float64)
        for path in inner
        for i in range(LAYERS)
    }
    right, _ = numpy_stack(params, leaves, ids, changes)
    left, right = left[real], right[real]
    p, q = softmax(left), softmax(right)
    kl = (p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300)))).sum(-1).mean()
    assert kl > 0.01
    np.testing.assert_allclose(report.kl, kl, rtol=1e-3)
    np.testing.assert_allclose(report.max_logit_difference, np.abs(left - right).max(), rtol=1e-4)
    np.testing.assert_allclose(report.mean_logit_difference, np.abs(left - right).mean(), rtol=1e-4)
    np.testing.assert_allclose(report.same_token, (left.argmax(-1) == right.argmax(-1)).mean())
    assert report.tokens == real.sum()
    assert not report.exact
    for path, layers in inner.items():
        for i, (x, _, delta) in enumerate(layers):
            miss = np.square((x @ changes[path, i] - delta)[real]).sum() / np.square(delta[real]).sum()
            np.testing.assert_allclose(report.site_errors[path][i], miss**0.5, rtol=1e-3)
    saved = json.loads(report.save(tmp_path).read_text())
    assert saved == dataclasses.asdict(report)


def test_best_is_the_smallest_measured_kl_and_task_merges_fit_their_task(toy):
    model, params, leaves, plan = toy
    data, unseen = batches(6), batches(4, seed=9)
    options = {"calibration": data, "heldout": unseen, "call": call, "tasks": ("first", "second")}
    merged, report = merge_routed(model, params, leaves, plan, **options)
    assert set(report.candidates) == {"mean", "least_squares", "sequential"}
    assert report.method == min(report.candidates, key=report.candidates.get)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    others = {"mine": lambda: merged, "worse": lambda: params}
    _, again = merge_routed(model, params, leaves, plan, others=others, **options)
    assert again.candidates == report.candidates | {"mine": min(report.candidates.values())} | {
        "worse": again.candidates["worse"]
    }
    assert again.candidates["worse"] > again.candidates["mine"]
    assert merge_routed(model, params, leaves, plan, gates="worse", others=others, **options)[0] is params
    task, _ = merge_routed(model, params, leaves, plan, gates="task:second", **options)
    gates = mean_gates(model, params, leaves, plan, data, call=call, task=1)
    jax.tree.map(np.testing.assert_array_equal, task, merge(params, leaves, plan, gates))
    with pytest.raises(ValueError, match="first, second"):
        merge_routed(model, params, leaves, plan, gates="task:third", **options)
    with pytest.raises(ValueError, match="gates"):
        merge_routed(model, params, leaves, plan, gates="median", **options)


def test_a_candidate_that_is_not_finite_is_left_out(toy, caplog):
    model, params, leaves, plan = toy
    options = {"calibration": batches(2), "heldout": batches(2, seed=9), "call": call}

    def fails():
        raise FloatingPointError("step 3 went wrong")

    others = {"fails": fails, "nan": lambda: jax.tree.map(lambda leaf: leaf * jnp.nan, params)}
    _, report = merge_routed(model, params, leaves, plan, others=others, **options)
    assert set(report.candidates) == {"mean", "least_squares", "sequential"}
    assert "fails: step 3 went wrong" in caplog.text
    assert "nan is no candidate" in caplog.text
    broken = leaves._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, leaves.params))
    with pytest.raises(FloatingPointError, match="is the adapter finite"):
        merge_routed(model, params, broken, plan, **options)


def test_exact_methods_report_rounding_only_and_need_no_calibration():
    model, params, leaves, plan = make(LoRA(rank=2))
    _, report = merge_routed(
        model, params, leaves, plan, calibration=(), heldout=batches(1), call=call, evaluate=lambda f: 0.5
    )
    assert report.exact
    assert report.kl < 1e-6
    assert max(max(v) for v in report.site_errors.values()) < 1e-5
    assert report.metrics == {"routed": 0.5, "merged": 0.5}


def test_held_out_rows_among_the_calibration_rows_are_refused():
    data = batches(2)
    with pytest.raises(ValueError, match="4 held-out rows"):
        check_unseen(data, [data[1]])
    check_unseen(data, batches(1, seed=8))


def test_sizes_of_the_toy_are_not_equal():
    assert len({WIDTH, INNER, CLASSES, LAYERS}) == 4
