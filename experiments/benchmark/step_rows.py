"""Rows about the step itself.

Time against the floor, full fine-tuning and LoRA (C1, C2, C4 to C6), FLOPs (C3), the merged model (C14), bytes (C16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from programs import (
    AdapterStep,
    Program,
    Shape,
    adapter_step,
    floor_program,
    full_program,
    make_batch,
    make_params,
    make_plan,
    sized_adapter,
    time_ratio,
)
from table import is_met

from mor_jax.adapters import METHODS, Adapter, DoRA, LoRA, MoR
from mor_jax.injection import init_leaves
from mor_jax.merging import merge
from mor_jax.models import Decoder

DENSE_MIXTURES = ("mor", "loramoe", "hydralora", "moelora")  # of total rank 32, those that are registered
EXACT = ("lora", "rslora", "dora")


class Bench:
    """One shape with its base, and each program made once, when a row first asks for it."""

    def __init__(self, shape: Shape, rounds: int):
        """Nothing is compiled yet."""
        self.shape, self.rounds = shape, rounds
        self.made: dict[str, Program] = {}

    @cached_property
    def params(self) -> Any:
        """The base's weights."""
        return make_params(self.shape)

    @cached_property
    def batch(self) -> dict[str, jax.Array]:
        """Full rows of random tokens."""
        return make_batch(self.shape)

    def step(self, adapter: Adapter) -> AdapterStep:
        """An adapter's step on this shape."""
        return adapter_step(adapter, self.shape.model, self.params, self.batch)

    def program(self, name: str, adapter: Adapter | None = None) -> Program:
        """The program of this name: floor, full, or the step of ``adapter``."""
        if name not in self.made:
            if adapter is not None:
                self.made[name] = self.step(adapter).compile(name)
            else:
                make = {"floor": floor_program, "full": full_program}[name]
                self.made[name] = make(self.shape.model, self.params, self.batch)
        return self.made[name]

    def compare(self, row: str, must: str, first: Program, second: Program, **more: Any) -> dict[str, Any]:
        """The row of one ratio of times."""
        found = time_ratio(first.run, second.run, self.rounds)
        return {"id": row, "what": f"{first.name} ÷ {second.name}", "must": must, **found, **more}


REFERENCES: dict[str, Adapter] = {  # the targets of C1 and C2 are LoRA's
    "LoRA r16": LoRA(rank=16),
    "DoRA r16": DoRA(rank=16),
    "MoR r4 N8": MoR(rank=4, num_experts=8),
}


def _against(bench: Bench, row: str, must: str, other: str) -> Iterator[dict[str, Any]]:
    for name, adapter in REFERENCES.items():
        yield bench.compare(row, must if name == "LoRA r16" else "", bench.program(name, adapter), bench.program(other))


def against_floor(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C1: a step ÷ the floor."""
    return _against(bench, "C1", "<= 1.25", "floor")


def against_full(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C2: a step ÷ full fine-tuning."""
    return _against(bench, "C2", "<= 0.85", "full")


def _matmul_parameters(step: AdapterStep, adapter: Adapter) -> int:
    """Entries that a token is multiplied with in matmuls: for MoR those of [a | router] and of bcat."""
    if not isinstance(adapter, MoR):
        return step.plan.num_params()
    inner, total = adapter.rank + adapter.num_experts, adapter.rank * adapter.num_experts
    sites = [found.site for found in step.plan.sites]
    return sum(s.num_layers * (s.in_features * inner + total * s.out_features) for s in sites)


def flops(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C3: XLA's FLOPs of a step ÷ (floor + the adapter's own 6 N T); two layers, unrolled."""
    unrolled = Bench(bench.shape.with_model(scan_layers=False, num_layers=2), bench.rounds)
    floor = unrolled.program("floor").flops
    tokens = unrolled.batch["input_ids"].size
    for name, adapter in REFERENCES.items():
        step = unrolled.step(adapter)
        own = 6 * _matmul_parameters(step, adapter) * tokens
        figure = step.compile(name).flops / (floor + own)
        row = {"id": "C3", "what": f"FLOPs of {name} ÷ (floor + own)", "must": "<= 1.02", "figure": figure}
        if isinstance(adapter, DoRA):
            row |= {"must": "", "note": "own is of the factors; the norms of all columns, once a step, come on top"}
        yield row


def mixtures(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C4: dense mixtures of 8 experts of rank 4 ÷ LoRA of rank 32."""
    lora = bench.program("LoRA r32", LoRA(rank=32))
    for method in DENSE_MIXTURES:
        if method in METHODS:
            adapter = METHODS[method](rank=4, num_experts=8)  # pyright: ignore[reportCallIssue]
            program = bench.program(f"{adapter.title} r4 N8", adapter)
            yield bench.compare("C4", "<= 1.20", program, lora)


def top_k_mixture(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C5: MoR with 2 of 8 experts of rank 8 ÷ LoRA of the active rank, 16."""
    program = bench.program("MoR r8, top 2 of 8", MoR(rank=8, num_experts=8, top_k=2))
    yield bench.compare("C5", "<= 1.60", program, bench.program("LoRA r16", REFERENCES["LoRA r16"]))


def against_lora(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C6: each method, sized as LoRA of rank 16, ÷ LoRA of rank 16."""
    lora = bench.program("LoRA r16", REFERENCES["LoRA r16"])
    wanted = make_plan(LoRA(rank=16), bench.shape.model).num_params()
    for method in methods:
        if method == "lora":
            continue
        adapter = sized_adapter(method, bench.shape.model)
        rank = getattr(adapter, "rank", None)
        name = adapter.title if rank is None else f"{adapter.title} r{rank}"
        share = make_plan(adapter, bench.shape.model).num_params() / wanted
        must = "<= 1.30" if method == "dora" else "<= 1.25"
        program = bench.program(name, adapter)
        row = bench.compare("C6", must, program, lora)
        yield row | {"note": f"{share:.2f} of LoRA's parameters, {counted_note(row, program, lora)}"}
        if name not in REFERENCES:
            del bench.made[name]  # all methods' states at once would not be small


def counted_note(row: dict[str, Any], program: Program, lora: Program) -> str:
    """The step's work ÷ LoRA's, counted in the compiled programs, and what it says of a missed target."""
    products, traffic = (own / other for own, other in zip(program.counted, lora.counted, strict=True))
    note = f"{products:.2f} × its matmul FLOPs, {traffic:.2f} × its memory traffic"
    if is_met(row) is not False:
        return note
    limit = float(row["must"].split()[-1])
    if products > limit:
        return f"{note}: missed by arithmetic, {program.counted[0] / 1e9:.4g} against {lora.counted[0] / 1e9:.4g} GFLOP"
    return f"{note}: missed, and not by its matmuls"


def merged_forward(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C14: forward pass of the merged model ÷ of the base, for the methods that merge exactly."""
    config, batch = bench.shape.model, bench.batch

    def forward(params, batch):
        return params, Decoder(config).apply({"params": params}, batch["input_ids"], output="hidden")

    base = Program("base", jax.jit(forward), bench.params, batch)
    for method in EXACT:
        adapter = sized_adapter(method, config)
        plan = make_plan(adapter, config)
        leaves = init_leaves(jax.random.key(2), plan, bench.params)
        merged = merge(bench.params, leaves, plan)
        program = Program(f"merged {adapter.title}", jax.jit(forward), merged, batch)
        yield bench.compare("C14", "0.98 to 1.02", program, base)


def remat(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Time and temporary memory of LoRA's step with each remat policy ÷ without; ``offload`` needs a second memory."""
    kept = bench.program("LoRA r16", REFERENCES["LoRA r16"])
    for policy in ("dots", "full"):
        config = bench.shape.with_model(remat=policy).model
        program = adapter_step(LoRA(rank=16), config, bench.params, bench.batch).compile(f"LoRA r16, remat {policy}")
        flops, traffic = (own / other for own, other in zip(program.counted, kept.counted, strict=True))
        note = f"{flops:.2f} × the matmul FLOPs, {traffic:.2f} × the memory traffic"
        row = bench.compare("remat", "", program, kept, note=note)
        yield row | {"what": f"{row['what']}, remat none: time"}
        bytes_of = program.temporary_bytes, kept.temporary_bytes
        note = f"{bytes_of[0] / 2**20:,.0f} of {bytes_of[1] / 2**20:,.0f} MiB"
        what = f"{row['what']}, remat none: temporary memory"
        yield {"id": "remat", "what": what, "must": "", "figure": bytes_of[0] / bytes_of[1], "note": note}


def bytes_held(bench: Bench, methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """C16: bytes of trained leaves and optimiser ÷ 12 a parameter (float32 and two moments), after a step.

    Counted over the live arrays that appear with the state, less the scalars of step, key and counters.
    """
    params, batch = bench.params, bench.batch
    jax.block_until_ready((params, batch))
    before = jax.live_arrays()  # kept alive, so that no new array has the id of one of these
    program = bench.step(LoRA(rank=16)).compile("LoRA r16")
    program.run()
    program.rest = (params, program.rest[1], batch)
    old = {id(array) for array in before}
    new = [array for array in jax.live_arrays() if id(array) not in old]
    arrays = [array for array in new if array.ndim and jnp.issubdtype(array.dtype, jnp.floating)]
    wanted = 12 * make_plan(LoRA(rank=16), bench.shape.model).num_params()
    figure = sum(array.nbytes for array in arrays) / wanted
    yield {"id": "C16", "what": "LoRA r16: live bytes of adapter and optimiser ÷ 12 N", "must": "0.999 to 1.001"} | {
        "figure": figure
    }


ROWS: dict[str, Callable[[Bench, tuple[str, ...]], Iterator[dict[str, Any]]]] = {
    "C1": against_floor,
    "C2": against_full,
    "C3": flops,
    "C4": mixtures,
    "C5": top_k_mixture,
    "C6": against_lora,
    "C14": merged_forward,
    "C16": bytes_held,
    "remat": remat,
}
