"""What a program moves and multiplies, against closed forms, XLA's own counts of unrolled programs, and fixed text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import PartitionSpec

from mor_jax.adapters import AdapterInputs
from mor_jax.models import DecoderConfig
from mor_jax.training import hlo
from mor_jax.training.hlo import count_compiled_flops, count_flops, measure_traffic, memory_bytes, type_bytes
from mor_jax.training.mesh import make_mesh


def test_products_in_scans_branches_and_checkpoints_are_counted_as_often_as_they_run():
    weights, x = jnp.ones((5, 8, 8)), jnp.ones((3, 8))
    one = 2 * 3 * 8 * 8

    def layer(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: jnp.tanh(x @ w), lambda: x), None

    def forward(weights, x):
        return jax.lax.scan(layer, x, weights)[0].sum()

    def checkpointed(weights, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0].sum()

    assert count_flops(jax.make_jaxpr(forward)(weights, x)) == 5 * one
    assert count_flops(jax.jit(checkpointed).trace(weights, x).jaxpr) == 5 * one
    # the gradient of x: forward, forward again, and dy @ w.T
    assert count_flops(jax.make_jaxpr(jax.grad(checkpointed, argnums=1))(weights, x)) == 3 * 5 * one


def test_compiled_products_are_counted_without_what_the_compiler_drops():
    weights, x = jnp.ones((5, 8, 8)), jnp.ones((2, 3, 8))

    def forward(weights, x):
        def layer(x, w):
            unused = x @ (w + 1)
            return x + 0 * unused.shape[0] + jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    text = jax.jit(forward).lower(weights, x).compile().as_text()
    assert count_compiled_flops(text) == 5 * 2 * (2 * 3) * 8 * 8
    batched = jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b)).lower(jnp.ones((4, 3, 70)), jnp.ones((4, 70, 50)))
    assert count_compiled_flops(batched.compile().as_text()) == 2 * 4 * 3 * 70 * 50


@functools.cache
def _traced(layers, scan):
    """The gradient of a tiny decoder's LoRA leaves."""
    config = DecoderConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=layers, num_heads=2)
    config = dataclasses.replace(config, scan_layers=scan)
    batch = tiny.random_batch(4, 64, vocab=64)
    adapted = tiny.adapted_decoder("lora", config, rank=4)
    loss = tiny.decoder_loss(adapted, config)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), batch["input_ids"])

    def total(trained, params):
        return loss({"params": params, "adapters": trained}, batch, AdapterInputs())[0]

    return jax.jit(jax.grad(total)).trace(shapes["adapters"], shapes["params"])


@functools.cache
def _compiled(layers, scan):
    return _traced(layers, scan).lower().compile()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_second_layer_costs_what_xla_says_it_costs_unrolled(scan_layers):
    ours = [count_flops(_traced(layers, scan_layers).jaxpr) for layers in (1, 2)]
    xla = [_compiled(layers, False).cost_analysis()["flops"] for layers in (1, 2)]
    assert ours[1] - ours[0] == pytest.approx(xla[1] - xla[0], rel=0.05)  # XLA counts what is no product too


def test_bytes_are_those_of_xla_and_a_scan_adds_its_slices_and_stacks(monkeypatch):
    programs = {own: _compiled(*own) for own in ((1, False), (2, False), (2, True), (3, True))}  # one turn is no loop
    ours = {own: measure_traffic(program.as_text()).memory for own, program in programs.items()}
    unrolled, scanned = ours[2, False] - ours[1, False], ours[3, True] - ours[2, True]
    assert 1 < scanned / unrolled < 2  # it copies each layer's kernels, and what the backward pass will read
    monkeypatch.setattr(hlo, "trip_count", lambda *_: 1)  # as XLA counts
    for program in programs.values():
        once = measure_traffic(program.as_text()).memory
        assert once == pytest.approx(program.cost_analysis()["bytes accessed"], rel=1e-3)


def test_a_collective_in_a_loop_is_counted_as_often_as_the_loop_runs():
    mesh = make_mesh("fsdp=8")

    def body(x, _):
        return x + jax.lax.all_gather(x * 2, "fsdp").sum(0), None

    def function(x):
        return jax.lax.psum(jax.lax.scan(body, x, None, length=5)[0], "fsdp")

    mapped = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(None))
    traffic = measure_traffic(jax.jit(mapped).lower(jnp.ones((8, 96))).compile().as_text())
    assert traffic.counts == {"all-gather": 5, "all-reduce": 1}
    assert traffic.collectives == {"all-gather": 5 * 8 * 96 * 4, "all-reduce": 2 * 96 * 4}
    assert traffic.largest == {"all-gather": 8 * 96 * 4, "all-reduce": 96 * 4}
    assert traffic.gathered == {(8, 96), (96,)}


ASYNC = """HloModule step, is_scheduled=true

%start (p: bf16[4,8]) -> (bf16[4,8], bf16[64,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %tuple = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) tuple(%p, %all-gather.1)
}

%go_on (p: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%compare (i: s32[], n: s32[]) -> pred[] {
  %n.1 = s32[] constant(6)
  %i = s32[] parameter(0)
  ROOT %less = pred[] compare(%i, %n.1), direction=LT
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %again = pred[] fusion(%i), kind=kLoop, calls=%compare
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %begun = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %done = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%go_on
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[4,8]{1,0}) while(%first), condition=%condition, body=%body
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_parts_of_an_asynchronous_collective_are_one_collective():
    traffic = measure_traffic(ASYNC)
    assert traffic.counts == {"all-gather": 6}
    assert traffic.collectives == {"all-gather": 6 * 64 * 8 * 2}
    assert traffic.gathered == {(8, 64)}


PIECES = """HloModule step, is_scheduled=true

%condition (state: (bf16[4,8], s32[])) -> pred[] {
  %state = (bf16[4,8]{1,0}, s32[]) parameter(0)
  %pieces = s32[] constant(8)
  %i = s32[] get-tuple-element(%state), index=1
  ROOT %again = pred[] compare(%i, %pieces), direction=LT
}

%body (state: (bf16[4,8], s32[])) -> (bf16[4,8], s32[]) {
  %state = (bf16[4,8]{1,0}, s32[]) parameter(0)
  %chips = s32[] constant(15)
  %two = s32[] constant(2)
  %x = bf16[4,8]{1,0} get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %device = s32[] add(%i, %chips)
  %kernel = bf16[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/attend"}
  %sent = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%kernel), channel_id=3
  %come = bf16[4,8]{1,0} collective-permute-done(%sent)
  %next = s32[] add(%i, %two)
  ROOT %new = (bf16[4,8]{1,0}, s32[]) tuple(%come, %next)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (bf16[4,8]{1,0}, s32[]) tuple(%x, %zero)
  %loop = (bf16[4,8]{1,0}, s32[]) while(%first), condition=%condition, body=%body
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_a_loop_that_counts_by_two_runs_half_as_often_and_a_kernel_does_not_end_its_body():
    traffic = measure_traffic(PIECES)
    assert traffic.counts == {"collective-permute": 4}
    assert traffic.collectives == {"collective-permute": 4 * 4 * 8 * 2}


def test_arrays_in_on_chip_memory_are_no_memory_traffic():
    text = "(f32[3,8]{1,0:T(4,128)S(1)}, bf16[2,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, s32[5])"
    assert type_bytes(text) == 96 + 16 + 4 + 20
    assert memory_bytes(text) == 16 + 20


def test_memory_traffic_of_a_product_is_its_operands_and_its_result():
    x = jnp.ones((64, 64))
    traffic = measure_traffic(jax.jit(jnp.matmul).lower(x, x).compile().as_text())
    np.testing.assert_allclose(traffic.memory, 3 * 64 * 64 * 4)


ASYNC_COPIES = """HloModule step, is_scheduled=true

ENTRY %main (x: bf16[4,8,64]) -> bf16[4,8,64] {
  %x = bf16[4,8,64]{2,1,0} parameter(0)
  %space = bf16[4,8,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %part = ((bf16[4,8,64]{2,1,0}), bf16[1,8,64]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:8], [0:64]}
  %come = bf16[1,8,64]{2,1,0:S(1)} slice-done(%part)
  %near = (bf16[4,8,64]{2,1,0:S(1)}, bf16[4,8,64]{2,1,0}, u32[]{:S(2)}) copy-start(%x)
  %here = bf16[4,8,64]{2,1,0:S(1)} copy-done(%near)
  %far = (bf16[4,8,64]{2,1,0}, bf16[4,8,64]{2,1,0:S(1)}, u32[]{:S(2)}) copy-start(%here)
  ROOT %out = bf16[4,8,64]{2,1,0} copy-done(%far)
}
"""


def test_a_copy_to_or_from_on_chip_memory_is_traffic_once():
    whole = 4 * 8 * 64 * 2
    assert measure_traffic(ASYNC_COPIES).memory == whole // 4 + whole + whole


STACK = """HloModule step, is_scheduled=true

%layer (p: bf16[32,8,64], i: s32[]) -> bf16[8,64] {
  %p = bf16[32,8,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %sliced = bf16[1,8,64]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,64}
  ROOT %one = bf16[8,64]{1,0} bitcast(%sliced)
}

%go_on (p: bf16[4,8], q: bf16[32,8,64], i: s32[]) -> (bf16[8,64], bf16[4,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[32,8,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %own = bf16[8,64]{1,0} fusion(%q, %i), kind=kLoop, calls=%layer
  %all-gather = bf16[64,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %tuple = (bf16[8,64]{1,0}, bf16[4,8]{1,0}) tuple(%own, %p)
}

ENTRY %main (p: bf16[4,8], q: bf16[32,8,64], i: s32[]) -> (bf16[8,64], bf16[4,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[32,8,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %out = (bf16[8,64]{1,0}, bf16[4,8]{1,0}) fusion(%p, %q, %i), kind=kOutput, calls=%go_on
}
"""


def test_a_layer_of_a_stack_is_read_alone_even_by_a_fusion_within_one_that_carries_a_collective_on():
    assert measure_traffic(STACK).memory == 4 + 2 * 8 * 64 * 2  # the index, the layer, and the layer again as output
