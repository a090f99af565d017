"""Where the gradients of micro-batches are reduced, read from the compiled program."""

import dataclasses

import jax
import optax
import pytest
import tiny_training as tiny

from mor_jax.injection.leaves import count_bytes
from mor_jax.models import logical_axes
from mor_jax.training import accumulation
from mor_jax.training.accumulation import LARGEST_SUM, partial_sum_axis
from mor_jax.training.hlo import COLLECTIVES, measure_traffic, parse_computations, type_bytes
from mor_jax.training.mesh import make_mesh
from mor_jax.training.sharding import param_specs

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)


def _compiled(layout, config=CONFIG, **options):
    """(text of two micro-batches on eight devices, base, trained bytes)."""
    adapted = tiny.adapted_decoder("lora", config, rank=2, **options)
    mesh, params = make_mesh(layout), tiny.params_of(config)
    specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=config, accumulate=2)
    quick = {"xla_backend_optimization_level": 0}  # of the machine code alone
    text = step.lower(state, params, tiny.random_batch(16)).compile(quick).as_text()
    return text, params, count_bytes(state.adapters)


def _collectives(text):
    """(reductions inside of loops, all collectives outside)."""
    computations, entry = parse_computations(text)
    found = {
        name: [i for i in body if i.operation.removesuffix("-start") in COLLECTIVES]
        for name, body in computations.items()
    }
    outside = found.pop(entry)
    return [i for own in found.values() for i in own if "reduce" in i.operation], outside


def test_gradients_are_reduced_once_a_step():
    text, _, trained = _compiled("data=8")
    inside, outside = _collectives(text)
    assert not inside
    assert {i.operation.removesuffix("-start") for i in outside} == {"all-reduce"}
    assert trained <= sum(type_bytes(reduction.type) for reduction in outside) < 2 * trained


def test_gradients_are_reduced_once_a_step_where_the_base_is_split_and_gathered_layer_by_layer():
    config = dataclasses.replace(CONFIG, num_layers=2)
    text, params, trained = _compiled("fsdp=8", config)
    inside, outside = _collectives(text)
    assert not inside
    reduced = [i for i in outside if "reduce" in i.operation]
    assert trained <= sum(type_bytes(reduction.type) for reduction in reduced) < 2 * trained
    traffic = measure_traffic(text)
    stacks = [leaf.shape for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3]
    assert traffic.gathered & {tuple(sorted(shape[1:])) for shape in stacks}  # kernels of one layer
    assert not traffic.gathered & {tuple(sorted(shape)) for shape in stacks}


def test_sums_too_large_to_be_whole_on_each_device_are_reduced_as_they_come(monkeypatch):
    monkeypatch.setattr(accumulation, "LARGEST_SUM", 0)
    inside, _ = _collectives(_compiled("fsdp=8")[0])
    assert inside


def test_what_is_no_sum_over_rows_is_reduced_in_every_micro_batch():
    inside, _ = _collectives(_compiled("data=8", dropout=0.1)[0])
    assert inside


@pytest.mark.parametrize(
    ("method", "options", "accumulate", "layout", "axis"),
    [
        ("lora", {}, 2, "data=2,fsdp=4", "data"),
        ("lora", {}, 2, "fsdp=2,sequence=2,tensor=2", "fsdp"),
        ("lora", {}, 2, "sequence=8", None),
        ("lora", {}, 1, "data=8", None),
        ("lora", {"dropout": 0.1}, 2, "data=8", None),
        ("mor", {}, 2, "data=8", "data"),
        ("mor", {"router": "balanced"}, 2, "data=8", None),
    ],
)
def test_partial_sums_are_kept_where_the_loss_is_a_sum_over_rows(method, options, accumulate, layout, axis):
    plan = tiny.adapted_decoder(method, CONFIG, rank=2, **options).plan
    small, large = (jax.ShapeDtypeStruct((size // 4,), "float32") for size in (LARGEST_SUM, LARGEST_SUM + 4))
    assert partial_sum_axis(plan, accumulate, make_mesh(layout), small) == axis
    assert partial_sum_axis(plan, accumulate, make_mesh(layout), large) == (None if axis == "fsdp" else axis)
    assert partial_sum_axis(plan, accumulate, None, small) is None
