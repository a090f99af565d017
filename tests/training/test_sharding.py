import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny
from jax.sharding import PartitionSpec

from mor_jax.models import DecoderConfig, abstract_params, logical_axes
from mor_jax.models.hf_config import FAMILIES
from mor_jax.optim import plan_rules
from mor_jax.training.build import base_specs
from mor_jax.training.hlo import COLLECTIVES, measure_traffic, type_bytes
from mor_jax.training.mesh import MeshError, make_mesh, put_batch
from mor_jax.training.sharding import ShardingRules, param_specs, spread
from mor_jax.training.step import abstract_state, init_state, make_step

# Sizes that divide by two axes of two; heads enough for tensor=2; attention by blocks, with a window and a soft cap.
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=40, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=1)
CONFIG = dataclasses.replace(CONFIG, attention_block=4, sliding_window=6, attention_softcap=3.0)
METHODS = {
    "mor at sites": ("mor", {}),
    "mor at blocks": ("mor", {"scope": "block"}),
    "dora": ("dora", {}),
    "a rule": ("prilora", {}),  # its state takes in the norms of every token's features
}


@functools.cache
def _start(method):
    """(model, optimiser, rules, state, constants) on one device, the state off its zeros."""
    name, options = METHODS[method]
    adapted = tiny.adapted_decoder(name, CONFIG, rank=2, **options)
    rules = plan_rules(adapted.plan, total_steps=10)
    optimizer = rules.wrap(optax.sgd(1.0))  # the new adapters show the gradient
    state, constants, _ = init_state(jax.random.key(0), adapted, tiny.params_of(CONFIG), optimizer, rules=rules)
    return adapted, optimizer, rules, tiny.nudge(state), constants


@functools.cache
def _run(method, layout=None):
    """((adapters after one step, loss, statistics), base) on one device, or on the mesh of a layout."""
    adapted, optimizer, rules, state, constants = _start(method)
    params, shardings = tiny.params_of(CONFIG), None
    if layout is not None:
        mesh = make_mesh(layout)
        specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
        _, _, shardings = abstract_state(adapted, params, optimizer, mesh, specs, rules)
        places = (shardings.state, shardings.params, shardings.constants)
        state, params, constants = jax.device_put((state, params, constants), places)
    options = {"accumulate": 2, "num_tasks": 2, "constants": constants, "shardings": shardings, "rules": rules}
    step = make_step(adapted, optimizer, loss=tiny.decoder_loss(adapted, CONFIG), **options)
    batch = tiny.packed_batch()
    batch = batch if layout is None else put_batch(batch, mesh)
    state = jax.tree.map(jnp.copy, state)  # it is donated
    # most of this file's time is compiling
    quick = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    quick |= {"xla_llvm_disable_expensive_passes": True}
    state, metrics = step.lower(state, params, batch).compile(quick)(state, params, constants, batch)
    statistics = (metrics["statistics"], state.rule_state)
    return jax.device_get((state.adapters, metrics["loss"], statistics)), params


TRIPLES = ("data=2,fsdp=2,tensor=2", "data=2,fsdp=2,sequence=2", "data=2,sequence=2,tensor=2")
TRIPLES = (*TRIPLES, "fsdp=2,sequence=2,tensor=2")
PAIRS = ("data=4,tensor=2", "fsdp=4,tensor=2", "data=2,sequence=4", "fsdp=2,sequence=4", "sequence=4,tensor=2")
LAYOUTS = (*TRIPLES, *PAIRS, "data=2,fsdp=2", "data=4", "fsdp=4", "sequence=8", "tensor=2")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_combination_of_axes_equals_one_device(layout, method):
    (one, loss, statistics), _ = _run(method)
    (many, many_loss, many_statistics), params = _run(method, layout)
    np.testing.assert_allclose(many_loss, loss, atol=1e-6)
    tiny.close(one, many, 2e-6)
    tiny.close(statistics, many_statistics, 1e-3)  # sums over about a hundred tokens
    mesh = make_mesh(layout)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.size // kernel.addressable_shards[0].data.size == mesh.size // mesh.shape["data"]


@pytest.mark.parametrize(("optimizer", "moments"), [(optax.sgd(1.0), 0), (optax.adam(1.0), 2)])
def test_what_a_rule_remembers_of_a_factor_lies_where_the_factor_lies(optimizer, moments):
    """BeamLoRA keeps its factors of half an interval ago and their moments, each as large as the factors themselves."""
    adapted = tiny.adapted_decoder("beamlora", CONFIG, rank=2)
    rules, mesh, params = plan_rules(adapted.plan, total_steps=100), make_mesh("fsdp=8"), abstract_params(CONFIG)
    specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    _, _, shardings = abstract_state(adapted, params, rules.wrap(optimizer), mesh, specs, rules)
    (kept,) = shardings.state.rule_state.values()
    for site, own in kept.items():
        factors = shardings.state.adapters[site]
        copies = [{name: own[name] for name in ("a", "b")}, *own.get("moments", {}).values()]
        assert len(copies) == 1 + moments
        for copy in copies:
            assert {name: copy[name].spec for name in copy} == {name: factors[name].spec for name in ("a", "b")}
            assert any("fsdp" in str(sharding.spec) for sharding in copy.values())


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
    both = base_specs(config, make_mesh("fsdp=2,sequence=4"))["layers"]["mlp"]["down_proj"]["kernel"]
    assert both == PartitionSpec(None, None, ("fsdp", "sequence"))


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


@pytest.mark.parametrize("layout", ["fsdp=8", "fsdp=2,sequence=4"])
def test_weights_are_gathered_and_activations_stay(layout):
    """With tokens and weights over the same devices the compiler may move either; the constraints say which."""
    config = dataclasses.replace(CONFIG, num_layers=2, hidden_size=64, sliding_window=None)
    adapted = tiny.adapted_decoder("lora", config, rank=2)
    mesh, params = make_mesh(layout), tiny.params_of(config)
    specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=config)
    text = step.lower(state, params, tiny.packed_batch()).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered
    rows = 8 // mesh.shape["fsdp"]
    keys = f"{rows},16,2,8"  # of all tokens of a device's rows: the only activations that travel
    assert (keys in gathered) == (mesh.shape["sequence"] > 1)
    activations = [shape for shape in gathered if shape != keys and len(shape.split(",")) > 2]
    assert not [shape for shape in activations if shape.startswith((f"{rows},16,", "8,16,", "2,64,", "2,32,"))], (
        gathered
    )


def test_what_is_computed_from_factors_once_a_step_is_split_like_a_factor():
    """MoR's b, repeated for each expert, is the largest array of a step that no rule of a stored one reaches."""
    config = dataclasses.replace(CONFIG, num_layers=2, hidden_size=64, intermediate_size=256, sliding_window=None)
    adapted = tiny.adapted_decoder("mor", config, targets=("up_proj",), rank=4, num_experts=8)
    mesh, params = make_mesh("fsdp=8"), tiny.params_of(config)
    specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=config)
    text = step.lower(state, params, tiny.packed_batch()).compile().as_text()
    assert "f32[2,32,32]" in text  # (layers, N r, out / 8)
    assert "f32[2,32,256]" not in text


@pytest.mark.parametrize("layout", ["fsdp=4,tensor=2", "fsdp=2,sequence=2,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_the_embedding_table_is_read_in_parts(layout):
    """By the device that has a part, for all that share it; no device gets more of the table, nor all rows."""
    config = dataclasses.replace(CONFIG, vocab_size=4096, hidden_size=32)
    adapted = tiny.adapted_decoder("lora", config, rank=2)
    mesh, params = make_mesh(layout), tiny.params_of(config)
    specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=config, accumulate=2)
    quick = {"xla_backend_optimization_level": 0}
    text = step.lower(state, params, tiny.packed_batch()).compile(quick).as_text()
    kinds = "|".join(COLLECTIVES)
    sent = re.findall(rf"= (.*?) (?:{kinds})\(.*op_name=\"[^\"]*embed_tokens", text)
    part = 4 * 4096 * 32 // (mesh.size // mesh.shape["data"])
    assert len(sent) > 1
    assert max(map(type_bytes, sent)) <= part
    assert not [shape for shape in measure_traffic(text).gathered if 4096 in shape]  # the head has half of that axis


def test_a_row_of_many_blocks_never_leaves_its_devices():
    """Blocks of queries and chunks of the loss are spread over the row, so that a loop over them gathers nothing."""
    config = dataclasses.replace(CONFIG, sliding_window=None)
    adapted = tiny.adapted_decoder("lora", config, rank=2)
    mesh, params = make_mesh("sequence=8"), tiny.params_of(config)
    specs = param_specs(params, mesh, smallest=10**9, axes=logical_axes(params))
    step, state, params = tiny.setup(adapted, optax.sgd(1.0), mesh=mesh, specs=specs, config=config)
    batch = tiny.packed_batch(rows=1, length=64)
    traffic = measure_traffic(step.lower(state, params, batch).compile().as_text())
    largest = max(math.prod(shape) for shape in traffic.gathered)
    assert largest == 64 * 2 * 8  # the keys of the row
