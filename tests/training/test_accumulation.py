"""Where the gradients of micro-batches are reduced, read from the compiled program."""

import dataclasses

import optax
import pytest
import tiny_training as tiny

from mor_jax.injection.leaves import count_bytes
from mor_jax.models import logical_axes
from mor_jax.training.accumulation import count_partial_sums
from mor_jax.training.hlo import parse_computations, type_bytes
from mor_jax.training.mesh import make_mesh
from mor_jax.training.sharding import param_specs

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)


def _reductions(**options):
    """(reductions inside of loops, those outside, trained bytes): two micro-batches on eight data devices."""
    adapted = tiny.adapted_decoder("lora", CONFIG, rank=2, **options)
    mesh, params = make_mesh("data=8"), tiny.params_of(CONFIG)
    specs = param_specs(params, mesh, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=CONFIG, accumulate=2)
    text = step.lower(state, params, tiny.random_batch(16)).compile().as_text()
    computations, entry = parse_computations(text)
    found = {name: [i for i in body if i.operation.startswith("all-reduce")] for name, body in computations.items()}
    outside = found.pop(entry)
    assert not any("all-gather" in i.operation or "reduce-scatter" in i.operation for i in computations[entry])
    return [i for own in found.values() for i in own], outside, count_bytes(state.adapters)


def test_gradients_are_reduced_once_a_step():
    inside, outside, trained = _reductions()
    assert not inside
    assert trained <= sum(type_bytes(reduction.type) for reduction in outside) < 2 * trained


def test_what_is_no_sum_over_rows_is_reduced_in_every_micro_batch():
    inside, _, _ = _reductions(dropout=0.1)
    assert inside


@pytest.mark.parametrize(
    ("method", "options", "accumulate", "layout", "parts"),
    [
        ("lora", {}, 2, "data=2,fsdp=4", 2),
        ("lora", {}, 1, "data=8", 1),
        ("lora", {}, 2, "fsdp=8", 1),
        ("lora", {"dropout": 0.1}, 2, "data=8", 1),
        ("mor", {}, 2, "data=8", 8),
        ("mor", {"router": "balanced"}, 2, "data=8", 1),
    ],
)
def test_partial_sums_are_kept_where_the_loss_is_a_sum_over_rows(method, options, accumulate, layout, parts):
    adapted = tiny.adapted_decoder(method, CONFIG, rank=2, **options)
    assert count_partial_sums(adapted.plan, accumulate, make_mesh(layout)) == parts
    assert count_partial_sums(adapted.plan, accumulate, None) == 1
