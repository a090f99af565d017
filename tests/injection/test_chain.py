"""ResLoRA through whole models: our decoder scanned, as a loop, with remat and packed; its merges; foreign models."""

import dataclasses
import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import AdapterInputs, Leaves, ResLoRA
from mor_jax.injection import Adapted, InjectionError, resolve_sites
from mor_jax.merging import earlier_shares, measure_fidelity, merge, merge_routed
from mor_jax.models import Decoder, DecoderConfig
from tests.merging.models import Stack, random_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS = 3
CONFIG = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=LAYERS, num_heads=2)
IDS = np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32)
TARGETS = ("q_proj", "down_proj")


def _oracle():
    where = pathlib.Path(__file__).parents[1] / "oracles" / "numpy_reslora.py"
    spec = importlib.util.spec_from_file_location("numpy_reslora", where)
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    return oracle


def _made(method, config=CONFIG, targets=TARGETS, spread=0.3):
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    params = jax.tree.map(lambda v: v + spread * jax.random.normal(jax.random.key(3), v.shape), params)
    plan = resolve_sites(model, method, targets, IDS)
    return model, params, random_leaves(jax.random.key(1), plan, params), plan


def _loop(tree):
    """A scanned model's parameters, or leaves by path, as those of the loop."""
    own = {}
    for path, value in tree.items():
        if not path.startswith("layers"):
            own[path] = value
            continue
        for n in range(LAYERS):
            name = path.replace("layers", f"layers_{n}", 1)
            own[name] = jax.tree.map(lambda v, n=n: v[n], value)
    return own


def _loss(model, plan, params, adapters, *args, **kwargs):
    return jnp.sum(jnp.sin(_logits(model, plan, params, adapters, *args, **kwargs)))


def _logits(model, plan, params, adapters, *args, **kwargs):
    variables = {"params": params, "adapters": adapters}
    return Adapted(base=model, plan=plan).apply(variables, *args, adapter_inputs=AdapterInputs(), **kwargs)


def _captured(model, plan, params, leaves):
    """Logits of the loop, and (x, delta) of each visit."""

    @jax.jit
    def run(adapters):
        visits = {}
        capture = lambda path, x, delta: visits.setdefault(path, (x, delta))  # noqa: E731
        return _logits(model, plan, params, adapters, IDS, capture=capture), visits

    return run(leaves.params)


@pytest.mark.parametrize(
    "options", [{"form": "input"}, {"form": "block"}, {"form": "middle"}, {"form": "middle", "previous": -1}], ids=str
)
def test_loop_equals_the_oracle_and_scan_and_remat_equal_the_loop(options):
    oracle = _oracle()
    method = ResLoRA(rank=2, **options)
    model, params, leaves, plan = _made(method)
    loop_config = dataclasses.replace(CONFIG, scan_layers=False)
    loop, loop_params, loop_leaves = Decoder(loop_config), _loop(params), Leaves(_loop(leaves.params))
    loop_plan = resolve_sites(loop, method, TARGETS, IDS)
    assert loop_plan.num_params() == plan.num_params()
    logits, visits = _captured(loop, loop_plan, loop_params, loop_leaves)
    for name in ("self_attn/q_proj", "mlp/down_proj"):
        paths = [f"layers_{n}/{name}" for n in range(LAYERS)]
        inputs = [np.asarray(visits[p][0]).reshape(12, -1) for p in paths]
        factors = [[loop_leaves.params[p][leaf] for p in paths] for leaf in ("a", "b")]
        given = {"alpha": 16.0, "rank": 2, "form": method.form, "previous": method.previous}
        for path, delta in zip(paths, oracle.changes(*factors, inputs, given), strict=True):
            found = np.asarray(visits[path][1]).reshape(12, -1)
            np.testing.assert_allclose(found, delta, rtol=0, atol=2e-5 * np.abs(delta).max())
    scanned, gradient = jax.jit(
        lambda adapters: (
            _logits(model, plan, params, adapters, IDS),
            jax.grad(lambda a: _loss(model, plan, params, a, IDS))(adapters),
        )
    )(leaves.params)
    np.testing.assert_allclose(scanned, logits, rtol=0, atol=2e-5 * float(jnp.abs(logits).max()))
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(gradient))
    if method.form == "input":
        remat = Decoder(dataclasses.replace(CONFIG, remat="full"))
        again = jax.jit(jax.grad(lambda a: _loss(remat, plan, params, a, IDS)))(leaves.params)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * largest), again, gradient)


def test_gradients_flow_through_the_chain():
    """With one layer's b alone not zero, the earlier layer's a gets its gradient through the chain only."""
    model, params, leaves, plan = _made(ResLoRA(rank=2, form="middle"))
    adapters = {path: dict(own, b=own["b"].at[:-1].set(0)) for path, own in leaves.params.items()}
    gradient = jax.jit(jax.grad(lambda a: _loss(model, plan, params, a, IDS)))(adapters)
    for own in gradient.values():
        assert bool((own["a"][1] != 0).any())
        assert not bool((own["a"][0] != 0).any())  # two layers away, with previous = 1


@pytest.mark.parametrize("form", ["input", "middle"])
def test_packed_examples_do_not_see_each_other(form):
    model, params, leaves, plan = _made(ResLoRA(rank=2, form=form))
    run = jax.jit(
        lambda ids, positions, segments: _logits(model, plan, params, leaves.params, ids, positions, segments)
    )
    packed = np.concatenate([IDS[:1, :3], IDS[1:, :3]], axis=1)
    positions, segments = np.array([[0, 1, 2, 0, 1, 2]], np.int32), np.array([[1, 1, 1, 2, 2, 2]], np.int32)
    both = run(packed, positions, segments)
    changed = packed.copy()
    changed[0, 3:] = (changed[0, 3:] + 1) % 32
    np.testing.assert_array_equal(both[:, :3], run(changed, positions, segments)[:, :3])
    alone = jnp.concatenate([run(IDS[i : i + 1, :3], None, None) for i in range(2)], axis=1)
    np.testing.assert_allclose(both, alone, rtol=0, atol=2e-5 * float(jnp.abs(alone).max()))


def _batches(count, seed):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, 32, (4, 8)).astype(np.int32)} for _ in range(count)]


def _scaled(leaves, scale):
    return leaves._replace(params={p: dict(own, b=scale * own["b"]) for p, own in leaves.params.items()})


@pytest.mark.parametrize("scan", [True, False])
def test_block_merges_exactly(scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    model, params, leaves, plan = _made(ResLoRA(rank=2, previous=2), config)
    merged = merge(params, leaves, plan)
    adapted = jax.jit(lambda a: _logits(model, plan, params, a, IDS))(leaves.params)
    base = jax.jit(lambda params: model.apply({"params": params}, IDS))
    plain = base(merged)
    assert float(jnp.abs(adapted - base(params)).max()) > 0.1
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=5e-5 * float(jnp.abs(adapted).max()))


def test_approximate_merges_and_their_measured_error():
    """Where layers change the residual stream little, both come close; without the earlier layer a half is missing."""
    model, params, leaves, plan = _made(ResLoRA(rank=2, form="input"), targets=("q_proj",), spread=0.05)
    leaves = _scaled(leaves, 0.1)
    calibration, heldout = _batches(2, 1), _batches(1, 2)
    frozen = jax.tree.map(np.asarray, params)
    reports = {}
    for by in ("input", "weight"):
        shares = earlier_shares(model, params, leaves, plan, calibration, by=by)
        merged = merge(params, leaves, plan, shares)
        reports[by] = measure_fidelity(model, params, leaves, plan, merged, heldout, method=by)
    left_out = {path: jnp.zeros_like(share) for path, share in shares.items()}
    nothing = measure_fidelity(model, params, leaves, plan, merge(params, leaves, plan, left_out), heldout)
    for report in reports.values():
        assert not report.exact
        for path, errors in report.site_errors.items():
            assert errors[0] < 1e-4  # the first layer has x_0 twice: exact
            assert all(1e-4 < error < 0.4 for error in errors[1:])
            assert all(error > 0.45 for error in nothing.site_errors[path][1:])
    jax.tree.map(np.testing.assert_array_equal, params, frozen)
    with pytest.raises(ValueError, match="at least one calibration batch"):
        earlier_shares(model, params, leaves, plan)


@pytest.mark.parametrize("scan", [True, False])
def test_shares_by_weight_need_no_data(scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    model, params, leaves, plan = _made(ResLoRA(rank=2, form="input"), config, targets=("q_proj",))
    names = ["layers"] if scan else [f"layers_{n}" for n in range(LAYERS)]
    rows = lambda v: list(v) if scan else [v]  # noqa: E731
    kernels = [k for name in names for k in rows(params[name]["self_attn"]["q_proj"]["kernel"])]
    own = [leaves.params[f"{name}/self_attn/q_proj"] for name in names]
    factors = [[row for each in own for row in rows(each[leaf])] for leaf in ("a", "b")]
    flat = [np.reshape(k, (k.shape[0], -1)) for k in kernels]
    expected = _oracle().shares_by_weight(flat, *factors, {"alpha": 16.0, "rank": 2})
    found = earlier_shares(model, params, leaves, plan, by="weight")
    np.testing.assert_allclose(np.concatenate([np.ravel(v) for v in found.values()]), expected, rtol=1e-4)


def test_the_merge_of_routed_methods_takes_chains_too():
    model, params, leaves, plan = _made(ResLoRA(rank=2, form="middle"), targets=("q_proj",), spread=0.05)
    data = {"calibration": _batches(2, 1), "heldout": _batches(1, 2)}
    errors = {}
    for gates in ("mean", "least_squares"):
        _, report = merge_routed(model, params, _scaled(leaves, 0.1), plan, gates=gates, **data)
        assert not report.exact
        assert np.isfinite(report.kl)
        (errors[gates],) = report.site_errors.values()
        assert errors[gates][0] < 0.05  # no earlier layer to miss
    # x_{n-1} a_{n-1} need not resemble x_n a_n, which the shares take for granted and least squares does not
    assert all(fitted < mean for fitted, mean in zip(errors["least_squares"][1:], errors["mean"][1:], strict=True))


def test_a_model_that_carries_nothing_runs_block_and_refuses_the_others():
    ids = jnp.zeros((2, 4), jnp.int32)
    model = Stack()
    params = model.init(jax.random.key(0), ids)["params"]
    plan = resolve_sites(model, ResLoRA(rank=2), ("up",), ids)
    leaves = random_leaves(jax.random.key(1), plan, params)
    adapted = _logits(model, plan, params, leaves.params, ids)
    plain = model.apply({"params": merge(params, leaves, plan)}, ids)
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=2e-5 * float(jnp.abs(adapted).max()))
    plan = resolve_sites(model, ResLoRA(rank=2, form="input"), ("up",), ids)
    with pytest.raises(InjectionError, match=r"Stack.__call__ has no argument 'carry_extra'.*form='block'"):
        _logits(model, plan, params, leaves.params, ids)


def test_the_decoder_passes_on_what_it_does_not_know():
    """Without a chain the carry is None; with one, nobody but the interceptor looks inside."""
    model = Decoder(CONFIG)
    params = model.init(jax.random.key(0), IDS)["params"]
    plain = model.apply({"params": params}, IDS)
    carried = model.apply({"params": params}, IDS, carry_extra={"anything": jnp.ones(3)})
    np.testing.assert_array_equal(plain, carried)
    assert isinstance(model, nn.Module)
