import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
import tiny_training as tiny
from jax.sharding import PartitionSpec

from mor_jax.models import DecoderConfig, abstract_params, logical_axes
from mor_jax.models.hf_config import FAMILIES
from mor_jax.training.build import base_specs
from mor_jax.training.mesh import MeshError, make_mesh
from mor_jax.training.sharding import ShardingRules, param_specs, spread

# Sizes that divide by two axes of two; heads enough for tensor=2.
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=40, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=1)
METHODS = {"mor at sites": ("mor", {}), "mor at blocks": ("mor", {"scope": "block"}), "dora": ("dora", {})}


@functools.cache
def _run(method, layout=None):
    """(state after one step, metrics) of a step whose gradient shows in the new adapters."""
    name, options = METHODS[method]
    adapted = tiny.adapted_decoder(name, CONFIG, rank=2, **options)
    mesh = None if layout is None else make_mesh(layout)
    params = tiny.params_of(CONFIG)
    specs = None if mesh is None else param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=CONFIG)
    state, metrics = step(tiny.nudge(state), params, tiny.random_batch())
    return jax.device_get((state.adapters, metrics["loss"], metrics["statistics"])), params


MIXED = "data=2,fsdp=2,tensor=2"
PAIRS = ("data=4,tensor=2", "fsdp=4,tensor=2")  # data with fsdp is in test_step.py


@pytest.mark.parametrize(
    ("layout", "method"), [(MIXED, method) for method in METHODS] + [(pair, "mor at sites") for pair in PAIRS]
)
def test_each_combination_of_axes_equals_one_device(layout, method):
    (one, loss, statistics), _ = _run(method)
    (many, many_loss, many_statistics), params = _run(method, layout)
    np.testing.assert_allclose(many_loss, loss, atol=1e-6)
    tiny.close(one, many, 2e-6)
    tiny.close(statistics, many_statistics, 1e-3)  # sums over about a hundred tokens
    mesh = make_mesh(layout)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.size // kernel.addressable_shards[0].data.size == mesh.shape["fsdp"] * mesh.shape["tensor"]


def test_each_axis_is_split_as_the_table_says():
    config = DecoderConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=8, num_kv_heads=4
    )
    specs = base_specs(config, make_mesh("data=2,fsdp=2,tensor=2"))
    layer = specs["layers"]
    assert specs["embed_tokens"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["lm_head"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert layer["self_attn"]["k_proj"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert layer["mlp"]["down_proj"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["norm"]["scale"] == PartitionSpec()
    only = base_specs(config, make_mesh("fsdp=8"))["layers"]["mlp"]["down_proj"]["kernel"]
    assert only == PartitionSpec(None, None, "fsdp")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_of_every_family_has_named_axes(family, scan_layers):
    flags = {name: True for name in FAMILIES[family].bias_fields} | FAMILIES[family].fixed
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers, **flags)
    params = abstract_params(config)
    jax.tree.map(lambda leaf, names: len(names) == leaf.ndim or pytest.fail(str(names)), params, logical_axes(params))


def test_an_axis_that_does_not_divide_is_named_with_parameter_and_sizes():
    config = dataclasses.replace(CONFIG, vocab_size=4099, hidden_size=64)
    with pytest.raises(MeshError, match=r"embed_tokens/embedding of shape \(4099, 64\): 4099 .* tensor=2"):
        base_specs(config, make_mesh("fsdp=4,tensor=2"))
    with pytest.raises(MeshError, match=r"tensor=4 does not divide 4 heads and 2 .* a divisor of 2"):
        base_specs(CONFIG, make_mesh("tensor=4"))


def test_rules_that_collide_or_are_unknown_are_errors():
    with pytest.raises(MeshError, match=r"two axes of \('batch', 'length', 'mlp'\) over fsdp"):
        ShardingRules(mlp=("fsdp",))
    with pytest.raises(MeshError, match="over tensor"):
        ShardingRules(embed=("tensor",)).spec(("embed", "mlp"))
    with pytest.raises(MeshError, match="no sharding rule for the logical axis 'width'"):
        ShardingRules().spec(("width",))


def test_a_large_factor_without_fsdp_is_spread_and_a_small_one_is_left():
    mesh = make_mesh("fsdp=4,tensor=2")
    large = jax.ShapeDtypeStruct((4, 8, 4096), np.float32)
    assert spread(PartitionSpec(None, None, "tensor"), large, mesh) == PartitionSpec(None, None, ("tensor", "fsdp"))
    assert spread(PartitionSpec(None, "fsdp"), large, mesh) == PartitionSpec(None, "fsdp")
    assert spread(PartitionSpec(), jax.ShapeDtypeStruct((4, 8, 16), np.float32), mesh) == PartitionSpec()


def test_weights_are_gathered_and_activations_stay():
    """With rows and weights over fsdp the compiler may move either; the constraints say which."""
    config = dataclasses.replace(CONFIG, num_layers=2, hidden_size=64)
    adapted = tiny.adapted_decoder("lora", config, rank=2)
    mesh, params = make_mesh("fsdp=8"), tiny.params_of(config)
    specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=config)
    text = step.lower(state, params, tiny.random_batch()).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered
    assert not [shape for shape in gathered if shape.startswith(("8,12,", "2,64,", "2,32,"))]  # (B, S, ..), stacks
