import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny

from mor_jax.training.mesh import make_mesh
from mor_jax.training.sharding import param_specs

pytestmark = pytest.mark.usefixtures("quick_compilation")

SGD = optax.sgd(1.0)  # the new adapters show the gradient
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), SGD)


@functools.cache
def _run(accumulate=1, method="mor", optimizer=SGD, layout=None, **options):
    """(state after one step, metrics, state before, model); what was run already is not run again."""
    mesh = None if layout is None else make_mesh(layout)
    return _run_on(tiny.random_batch(), accumulate, method, optimizer, mesh, **options)


def _run_on(batch, accumulate=1, method="mor", optimizer=SGD, mesh=None, **options):
    adapted = tiny.adapted_decoder(method, rank=2, **options)
    specs = None if mesh is None else param_specs(tiny.params_of(), mesh, smallest=1)
    step, state, params = tiny.setup(adapted, optimizer, accumulate=accumulate, mesh=mesh, specs=specs)
    state = tiny.nudge(state)
    before = jax.tree.map(np.asarray, state)
    return (*step(state, params, batch), before, adapted)


@pytest.mark.parametrize("method", ["lora", "dora", "mor"])
def test_gradient_equals_naive_autodiff(method):
    targets = "all-linear" if method == "mor" else tiny.TARGETS
    new, metrics, before, adapted = _run(2, method=method, targets=targets)
    batch, params = tiny.random_batch(), tiny.params_of()
    loss, gradient = jax.jit(jax.value_and_grad(lambda a: tiny.naive_loss(adapted, params, a, batch)))(before.adapters)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
    tiny.close(jax.tree.map(lambda a, b: a - np.asarray(b), before.adapters, new.adapters), gradient, 2e-6)
    assert float(metrics["tokens"]) == batch["loss_mask"].sum()
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_the_big_batch(accumulate):
    whole, metrics, _, _ = _run(1)
    parts, part_metrics, _, _ = _run(accumulate)
    np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], atol=1e-6)
    tiny.close(whole.adapters, parts.adapters, 1e-6)
    tiny.close(metrics["statistics"], part_metrics["statistics"], 1e-3)  # sums over about a hundred tokens


def test_packed_equals_padded():
    rng = np.random.default_rng(3)
    examples = [rng.integers(1, 37, size) for size in (5, 7, 4, 8, 6, 6)]
    padded = {name: np.zeros((6, 12), np.int32) for name in tiny.FIELDS}
    packed = {name: np.zeros((3, 12), np.int32) for name in tiny.FIELDS}
    for number, tokens in enumerate(examples):
        tiny.fill(padded, number, 0, tokens, 1, task=number % 2)
        row, second = divmod(number, 2)
        tiny.fill(packed, row, len(examples[number - 1]) if second else 0, tokens, 1 + second, task=number % 2)
    first, metrics, _, _ = _run_on(padded)
    second, packed_metrics, _, _ = _run_on(packed)
    np.testing.assert_allclose(packed_metrics["loss"], metrics["loss"], atol=1e-6)
    tiny.close(first.adapters, second.adapters, 1e-6)


@pytest.mark.parametrize("layout", ["data=8", "data=2,fsdp=4", "fsdp=8"])
def test_eight_devices_equal_one(layout):
    one, metrics, _, _ = _run(optimizer=CLIPPED)
    many, many_metrics, _, _ = _run(optimizer=CLIPPED, layout=layout)
    np.testing.assert_allclose(many_metrics["loss"], metrics["loss"], atol=1e-6)
    tiny.close(jax.device_get(one.adapters), jax.device_get(many.adapters), 1e-6)
    assert all(leaf.sharding.mesh.shape == make_mesh(layout).shape for leaf in jax.tree.leaves(many))


def test_fsdp_shards_the_base_its_adapters_and_their_moments():
    mesh = make_mesh("data=2,fsdp=4")
    specs = param_specs(tiny.params_of(), mesh, smallest=1)
    _, state, params = tiny.setup(mesh=mesh, specs=specs)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    for tree in (state.adapters, state.opt_state[0].mu):
        b = tree["layers/mlp/up_proj"]["b"]
        assert b.addressable_shards[0].data.size == b.size // 4


def test_the_second_step_compiles_nothing():
    mesh = make_mesh("data=2,fsdp=4")
    step, state, params = tiny.setup(mesh=mesh, specs=param_specs(tiny.params_of(), mesh, smallest=1), accumulate=1)
    for seed in range(3):
        state, _ = step(state, params, tiny.random_batch(seed=seed))
    assert step.cache_size() == 1
    step, state, params = tiny.setup()
    for seed in range(3):
        state, _ = step(state, params, tiny.random_batch(seed=seed))
    assert step.cache_size() == 1


def test_the_state_is_donated_and_the_base_is_untouched():
    step, state, params = tiny.setup()
    old = jax.tree.leaves(state.adapters)[0]
    base = jax.tree.map(np.asarray, params)
    for seed in range(3):
        state, _ = step(state, params, tiny.random_batch(seed=seed))
    assert old.is_deleted()
    assert tiny.same(base, params)


def test_a_non_finite_gradient_leaves_the_state_as_it_was():
    step, state, params = tiny.setup(accumulate=2)
    state, _ = step(state, params, tiny.random_batch())
    before = jax.tree.map(np.asarray, state)
    broken = jax.tree.map(jnp.copy, params)
    broken["layers"]["mlp"]["down_proj"]["kernel"] = (
        params["layers"]["mlp"]["down_proj"]["kernel"].at[0, 0, 0].set(jnp.nan)
    )
    state, metrics = step(state, broken, tiny.random_batch())
    assert step.names[int(metrics["bad_leaf"])] == "loss"
    assert tiny.same(before, state)
    state, metrics = step(state, params, tiny.random_batch(seed=1))
    assert int(metrics["bad_leaf"]) == -1
    assert int(state.step) == 2


def test_the_first_bad_leaf_is_named():
    adapted = tiny.adapted_decoder("lora", rank=2)
    step, state, params = tiny.setup(adapted, optax.adam(1e-2))
    state = jax.tree.map(jnp.asarray, state)
    huge = jax.tree.map(lambda leaf: leaf, state.adapters)
    huge["layers/mlp/up_proj"]["b"] = jnp.full_like(huge["layers/mlp/up_proj"]["b"], 3e38)
    state = state._replace(adapters=huge)
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, params, tiny.random_batch())
    assert int(metrics["bad_leaf"]) >= 0
    assert tiny.same(before, state)


def test_a_non_finite_update_is_named_too():
    broken = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda g, s, p=None: (jax.tree.map(lambda x: x / 0.0, g), s)
    )
    step, state, params = tiny.setup(tiny.adapted_decoder("lora", rank=2), broken)
    _, metrics = step(state, params, tiny.random_batch())
    assert step.names[int(metrics["bad_leaf"])].startswith("update of layers/")


def test_dropout_draws_anew_each_step_and_micro_batch_and_repeats_with_the_seed():
    first, _, _, _ = _run(2, dropout=0.5)
    again, _, _, _ = _run_on(tiny.random_batch(), 2, dropout=0.5)
    without, _, _, _ = _run(2)
    assert tiny.same(first.adapters, again.adapters)
    assert not tiny.same(first.adapters, without.adapters)
    step, state, params = tiny.setup(tiny.adapted_decoder(rank=2, dropout=0.5), optax.sgd(0.0))
    losses = []
    state = tiny.nudge(state)
    for _ in range(2):
        state, metrics = step(state, params, tiny.random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]


def test_router_statistics_are_sums_over_real_tokens():
    _, metrics, _, _ = _run(4, num_experts=3)
    batch = tiny.random_batch()
    real = (batch["segment_ids"] > 0).sum()
    found = metrics["statistics"]["layers/mlp/up_proj"]
    np.testing.assert_allclose(found["count"], np.full((2, 1), real))
    np.testing.assert_allclose(found["load"].sum(-1), np.full((2,), real), rtol=1e-5)
    tasks = [((batch["segment_ids"] > 0) & (batch["task_ids"] == task)).sum() for task in range(2)]
    np.testing.assert_allclose(found["task_count"], np.tile(tasks, (2, 1)))
    np.testing.assert_allclose(found["task_load"].sum(1), found["load"], rtol=1e-5)


def test_balance_losses_weigh_their_micro_batches_by_tokens():
    balanced, _, before, adapted = _run(2, router="balanced", num_experts=3, balance_weight=0.5)
    plain, _, _, _ = _run(2, router="softmax", num_experts=3)
    moved = {
        path: np.abs(balanced.adapters[path]["router"] - plain.adapters[path]["router"]).max()
        for path in plain.adapters
    }
    assert min(moved.values()) > 0


def test_trained_modules_move_and_the_base_head_does_not():
    adapted = tiny.adapted_decoder("lora", rank=2, trained_modules=("lm_head",))
    optimizer = optax.sgd(0.1)
    from mor_jax.training.step import init_state, language_model_loss, make_step

    params = tiny.params_of()
    state, constants, _ = init_state(jax.random.key(0), adapted, params, optimizer)
    step = make_step(adapted, optimizer, loss=language_model_loss(adapted, None), constants=constants)
    before = np.asarray(state.adapters["lm_head"]["kernel"])
    state, _ = step(state, params, tiny.random_batch())
    assert np.abs(np.asarray(state.adapters["lm_head"]["kernel"]) - before).max() > 0
