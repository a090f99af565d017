"""`mor plan` compiles what `mor train` runs: the same program, its memory, and honest words about what does not fit."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_runs
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.adapters import Leaves
from mor_jax.injection import get_path
from mor_jax.merging import merge
from mor_jax.optim import plan_rules
from mor_jax.training.build import base_config, build_run, widest_mesh
from mor_jax.training.hlo import Traffic, measure_traffic
from mor_jax.training.mesh import batch_sharding, make_mesh, put_batch
from mor_jax.training.plan import Forecast, advice, forecast, gathered_stacks, needed_bytes, plan_step, roofline
from mor_jax.training.plan_merge import forecast_merge
from mor_jax.training.plan_search import REMATS
from mor_jax.training.sharding import shardings_of
from mor_jax.training.step import init_state, make_step, put_leaves
from mor_jax.training.topology import (
    CHIPS,
    Topology,
    TopologyError,
    load_topology,
    parse_topology,
    prepare_environment,
    wrap_options,
)


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    data = (f"add={files}/train_add.jsonl",)
    output = tmp_path_factory.mktemp("planned")
    return build_run(
        tiny_runs.config_of(files, output, mesh=tiny_runs.MIXED_MESH, batch_size=16, accumulate=2, data=data)
    )


@pytest.fixture(scope="module")
def trained(run):
    """(the loop's step, its state, a batch on the devices)."""
    rules = plan_rules(run.plan, run.config.steps)
    optimizer = rules.wrap(run.optimizer)
    key = jax.random.key(0, impl="threefry2x32")
    state, constants, shardings = init_state(key, run.adapted, run.params, optimizer, run.mesh, run.specs, rules)
    step = make_step(
        run.adapted,
        optimizer,
        loss=run.loss,
        accumulate=run.config.accumulate,
        num_tasks=len(run.tasks),
        constants=constants,
        shardings=shardings,
        adapters=state.adapters,
        rules=rules,
    )
    return step, state, put_batch(dict(next(run.batches)), run.mesh)


def _main(lowered):
    """The program's main function: signature with shardings, loops and calls, without numbers that tracing hands out.

    The functions that it calls are left out, since how they are shared depends on what was traced before.
    """
    return re.sub(r"(@\w*?[a-z])(_\d+)+\b", r"\1", lowered.as_text()).split("func.func private")[0]


def test_the_planned_program_is_the_one_that_training_runs(run, trained):
    step, state, batch = trained
    planned, arguments, _ = plan_step(run.config, base_config(run.config), run.mesh)
    assert _main(planned.lower(*arguments)) == _main(step.lower(state, run.params, batch))


def test_the_planned_memory_is_that_of_the_step_that_ran(run, trained):
    step, state, batch = trained
    topology = Topology("cpu:8", tuple(run.mesh.devices.ravel()), CHIPS["v5e"])
    found = forecast(run.config, base_config(run.config), topology)
    used = step.lower(state, run.params, batch).compile().memory_analysis()
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    first = jax.devices()[0]

    def held_bytes(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    held = held_bytes((state, run.params, batch, step.constants))
    assert used.alias_size_in_bytes == pytest.approx(held_bytes(state), rel=0.02)  # the whole state is donated
    assert found.argument_bytes == pytest.approx(held, rel=0.02)
    assert found.peak_bytes_per_device == pytest.approx(peak, rel=0.1)
    assert found.fits
    assert found.trainable_parameters == run.plan.num_params()
    assert found.gathered_stacks == ()
    assert {"all-gather", "all-reduce"} <= set(found.collectives)
    tokens = run.config.batch_size * run.config.sequence_length
    kernels = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(run.params) if path[-1].key == "kernel")
    assert found.flops > 4 * kernels * tokens * 0.9  # forward, and back to the activations above the first adapter
    assert found.estimated_seconds == max(found.compute_seconds, found.memory_seconds, found.network_seconds)
    advised = advice(dataclasses.replace(found, fits=False, capacity_bytes=found.argument_bytes + 1))
    assert "--remat full" in advised
    assert "\n" not in advised


def test_adapters_send_factors_and_gradients_but_no_activations(run):
    """Only activations have an axis of the row's length (or ids), and only the table look-up of the base may send them.

    Without a `sequence` axis, whose attention gathers keys and values.
    """
    config = dataclasses.replace(run.config, mesh="data=4,fsdp=2")
    step, (state, params, batch), _ = plan_step(config, base_config(config), make_mesh(config.mesh))
    text = step.function.lower(state, params, step.constants, batch).compile().as_text()
    found = re.findall(r" = (.*?) (all-[\w\-]+|reduce-scatter|collective-permute)\((.*)", text)
    assert {"all-gather", "all-reduce"} <= {kind for _, kind, _ in found}
    length = run.config.sequence_length
    sent = [(shape, kind) for shape, kind, rest in found if "embed_tokens" not in rest and f"{length}" in _axes(shape)]
    assert not [(shape, kind) for shape, kind in sent if not shape.startswith("s32")]  # ids, for the look-up
    factors = {str(size) for leaf in jax.tree.leaves(state.adapters) for size in leaf.shape}
    gathered = [_axes(shape) for shape, kind, rest in found if kind == "all-gather" and "_proj" in rest]
    assert [axes for axes in gathered if min(map(int, axes)) <= 2 * 3 and axes & factors]  # the sharded factors


@pytest.mark.parametrize(
    ("description", "gathered"),
    [("fsdp=8", (None, None)), ("fsdp=4,tensor=2", (None, "tensor")), ("fsdp=4,tensor=2", (None, None))],
)
def test_a_stack_that_a_program_gathers_before_its_loop_is_named(description, gathered):
    mesh = make_mesh(description)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp", "tensor"), (None, *gathered)))
    stack = jax.ShapeDtypeStruct((3, 64, 32), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=batch_sharding(mesh))

    def found(before, inside):
        def function(stack, x):
            def layer(x, kernel):
                return x + (x @ jax.lax.with_sharding_constraint(kernel, inside)).sum(-1, keepdims=True), None

            return jax.lax.scan(layer, x, jax.lax.with_sharding_constraint(stack, before))[0]

        text = jax.jit(function, out_shardings=x.sharding).lower(stack, x).compile().as_text()
        return gathered_stacks({"mlp": {"kernel": stack}}, measure_traffic(text))

    layer = NamedSharding(mesh, PartitionSpec(*gathered))
    assert found(whole, layer) == ("mlp/kernel",)
    assert found(split, layer) == ()  # one layer at a time


def _axes(shape):
    return set(re.findall(r"(?<=[\[,])\d+(?=[,\]])", shape))


def test_the_planned_merge_holds_what_the_merge_holds(run, trained):
    """On the mesh that `mor merge` takes, whatever the run was trained on."""
    _, state, _ = trained
    mesh, specs = widest_mesh(base_config(run.config), run.mesh.devices.ravel())
    params = jax.device_put(run.params, shardings_of(specs, mesh))
    leaves = Leaves(state.adapters, state.adapter_state, trained[0].constants)
    leaves = put_leaves(leaves, run.plan, specs, mesh)
    merged = merge(params, leaves, run.plan, {site.path: jnp.zeros(gates) for site, gates in _gates(run.plan)})
    new = [get_path(merged, adapted.kernel_path) for adapted in run.plan.sites]
    first = jax.devices()[0]
    arrays = jax.tree.leaves((params, leaves, new))
    held = sum(shard.data.nbytes for leaf in arrays for shard in leaf.addressable_shards if shard.device == first)
    topology = Topology("cpu:8", tuple(run.mesh.devices.ravel()), CHIPS["v5e"])
    found = forecast_merge(run.config, base_config(run.config), topology)
    assert found.fits
    assert found.problem == ""
    assert found.largest_site in run.plan.paths
    assert held <= found.peak_bytes_per_device <= held + found.temporary_bytes
    small = dataclasses.replace(CHIPS["v5e"], capacity_bytes=found.peak_bytes_per_device - 1)
    refused = forecast_merge(run.config, base_config(run.config), dataclasses.replace(topology, chip=small))
    assert not refused.fits
    assert "on a larger slice" in refused.problem


def _gates(plan):
    return [(adapted.site, (*adapted.stack_sizes, adapted.adapter.num_gates)) for adapted in plan.sites]


def test_a_method_that_will_not_be_merged_says_so_in_its_plan(run):
    config = dataclasses.replace(run.config, method="halora", options={}, num_experts=None)
    found = forecast_merge(config, base_config(config), Topology("cpu:8", tuple(run.mesh.devices.ravel()), None))
    assert not found.fits
    assert "mergeable=True" in found.problem


def _forecast(**changes):
    common = {"topology": "t", "mesh": "fsdp=8", "remat": "none", "accumulate": 1, "fits": True, "flops": 1.0}
    return Forecast(**(common | {"peak_bytes_per_device": 10, "capacity_bytes": 10} | changes))


def test_the_roofline_is_the_highest_of_three_roofs():
    traffic = Traffic(memory=8.19e9, collectives={"all-gather": 1e9, "all-reduce": 1e9})
    found = roofline(4 * 197e12 * 0.02, traffic, 4, CHIPS["v5e"], useful=4 * 197e12 * 0.01)
    assert found["compute_seconds"] == pytest.approx(0.02)
    assert found["memory_seconds"] == pytest.approx(0.01)
    assert found["network_seconds"] == pytest.approx(0.01)
    assert found["estimated_seconds"] == pytest.approx(0.02)
    assert found["mfu"] == pytest.approx(0.5)
    assert roofline(1.0, traffic, 4, None, 1.0) == {}


def test_what_does_not_fit_says_what_to_change():
    assert advice(_forecast()) == ""
    base = advice(
        _forecast(fits=False, peak_bytes_per_device=4 * 2**30, capacity_bytes=2**30, argument_bytes=3 * 2**30)
    )
    assert "4.0 GiB a device, 3.0 too many" in base
    assert "larger slice" in base
    full = advice(_forecast(fits=False, remat="full", peak_bytes_per_device=0))
    assert "--remat offload, a higher --accumulate" in full
    assert "offload" not in advice(_forecast(fits=False, remat="full", peak_bytes_per_device=0, topology="cpu:8"))


# The words of XLA's TPU compiler, and whether the figure counts the arguments.
REFUSALS = [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 27.20G of 15.75G hbm. Exceeded by 11.45G.", True),
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.20G) exceeds "
        "available HBM (15.75G).",
        False,
    ),
]


@pytest.mark.parametrize(("words", "whole"), REFUSALS)
def test_a_step_that_the_compiler_refuses_comes_back_with_what_it_needs(run, monkeypatch, words, whole):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(words)

    topology = Topology("cpu:8", tuple(run.mesh.devices.ravel()), CHIPS["v5e"])
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = forecast(run.config, base_config(run.config), topology)
    assert not found.fits
    assert found.argument_bytes > 0
    assert found.peak_bytes_per_device == int(27.2 * 2**30) + (0 if whole else found.argument_bytes)
    assert found.problem == words
    assert advice(found).startswith("the step needs 27.2 GiB a device, 11.2 too many: try --remat full")
    refused = forecast_merge(run.config, base_config(run.config), topology)
    assert (refused.fits, refused.problem) == (False, words)


def test_other_errors_of_the_compiler_are_not_hidden(run, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    topology = Topology("cpu:8", tuple(run.mesh.devices.ravel()), CHIPS["v5e"])
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        forecast(run.config, base_config(run.config), topology)
    assert needed_bytes("out of memory", 7) == 7


@pytest.mark.parametrize("name", ["v5e", "v9:4x4", "v5e:4x", "cpu:0", "cpu:-1", ""])
def test_malformed_slices_are_named(name):
    with pytest.raises(TopologyError, match="topology"):
        parse_topology(name)


def test_the_environment_is_set_before_jax_reads_it(monkeypatch):
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    prepare_environment("cpu:4")
    assert os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=4")
    prepare_environment("v5p:2x2x2")
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v5p-16"
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    with pytest.raises(TopologyError, match=r"8 CPU devices; start it with XLA_FLAGS=.*=16"):
        load_topology("cpu:16")


@pytest.mark.parametrize(("name", "wraps"), [("v5p:4x4x8", True), ("v5p:2x4x4", False), ("v5e:16x16", False)])
def test_the_compiler_is_told_of_a_torus(name, wraps):
    assert wrap_options(*parse_topology(name)) == ({"wrap": [1, 1, 1]} if wraps else {})


def _tpu_plan(folder, layers, *words):
    """What `mor plan` says of a small Llama, in a process of its own: a slice is chosen before jax starts."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 8}
    fields = {"model_type": "llama", "vocab_size": 2048, "rms_norm_eps": 1e-5, "head_dim": 64, **shape}
    (folder / "config.json").write_text(json.dumps(fields | {"num_key_value_heads": 1}))
    command = [sys.executable, "-m", "mor_jax.cli.main", "plan", str(folder), *words, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra `tpu`")


@pytest.mark.tpu_compile
@needs_compiler
@pytest.mark.parametrize(
    "layout",
    [(), ("--mesh", "fsdp=4,sequence=4", "--sequence-length", "1024", "--remat", "offload")],
    ids=["fsdp", "sequence and offload"],
)
def test_a_tpu_slice_is_compiled_without_one(tmp_path, layout):
    found = _tpu_plan(tmp_path, 4, "--topology", "v5e:4x4", "--batch-size", "16", "--remat", "full", *layout)
    assert found["fits"]
    assert found["gathered_stacks"] == []
    assert 0 < found["peak_bytes_per_device"] < found["capacity_bytes"] == 16 * 2**30
    assert found["estimated_seconds"] > 0
    assert found["collectives"]["all-gather"]["count"] >= 4
    assert bool(layout) or "collective-permute" not in found["collectives"]  # kernels are gathered before they multiply
    assert (found["host_bytes"] > 0) == ("offload" in layout)
    assert found["merge"]["fits"]
    assert 0 < found["merge"]["peak_bytes_per_device"] < found["capacity_bytes"]


@pytest.mark.tpu_compile
@needs_compiler
def test_rows_split_over_a_tpu_slice_wait_in_the_hosts_memory(tmp_path):
    words = ("--topology", "v5e:4x4", "--mesh", "fsdp=4,sequence=4", "--sequence-length", "1024", "--remat", "offload")
    found = _tpu_plan(tmp_path, 2, *words, "--batch-size", "16", "--method", "lora")
    assert found["fits"]
    assert found["gathered_stacks"] == []
    assert found["host_bytes"] == 2 * 16 * 1024 * 512 * 2 // 16  # the bfloat16 inputs of two layers, over all chips


@pytest.mark.tpu_compile
@needs_compiler
def test_what_the_tpu_compiler_refuses_is_said_in_a_line(tmp_path):
    """512 rows of 512 tokens a chip: the scores of 8 heads alone are 4 GiB a layer, all kept for the backward pass."""
    found = _tpu_plan(tmp_path, 4, "--topology", "v5e:2x2", "--batch-size", "2048", "--method", "lora")
    assert not found["fits"]
    assert found["peak_bytes_per_device"] > 16 * 2**30
    assert "GiB a device" in found["advice"]
    assert "--remat full" in found["advice"]
    assert "\n" not in found["advice"]
    assert found["problem"]


@pytest.mark.tpu_compile
@needs_compiler
def test_the_search_compiles_for_a_tpu(tmp_path):
    words = ("--targets", "up_proj", "--batch-size", "4", "--sequence-length", "128", "--search")
    found = _tpu_plan(tmp_path, 1, "--topology", "v5e:2x2", *words)
    tried = [(plan["mesh"], plan["remat"]) for plan in found["tried"]]
    # tensor does not divide one key-value head
    meshes = [f"data={n},fsdp={4 // n},sequence=1,tensor=1" for n in (1, 2, 4)]
    assert tried == [(mesh, remat) for mesh in meshes for remat in REMATS]
    assert found["fits"]
    assert found["estimated_seconds"] == min(plan["estimated_seconds"] for plan in found["tried"])
    assert found["merge"]["fits"]
