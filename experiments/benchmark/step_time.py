"""Speed and FLOPs of a training step: adapters against the floor that any adapter pays and against full fine-tuning.

    python experiments/benchmark/step_time.py --output experiments/results/step_time_cpu

Programs of one shape, compiled ahead in one process: ``floor`` (frozen weights, gradient of the embedding's output
only), ``full`` (full fine-tuning with AdamW) and a step of each adapter, made by the ``make_step`` that ``mor train``
calls. Two programs are timed in turn, A, B, A, B, after two warm-ups; the figure is the median of the per-round ratios
of process CPU time, with its quartiles. Below 1 means that A is faster. Rows C1 to C4: adapters against the floor, full
fine-tuning and each other. Row C10: programs compiled after the first step of a whole run of 200 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mor_jax
from mor_jax.adapters import LoRA, MoR
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, head_kernel
from mor_jax.optim import plan_rules
from mor_jax.training.build import build_run
from mor_jax.training.config import TrainConfig
from mor_jax.training.loop import run_training
from mor_jax.training.losses import chunked_cross_entropy, cross_entropy
from mor_jax.training.step import init_state, language_model_loss, make_step

DEMO_BASE = pathlib.Path(mor_jax.__file__).parent / "cli" / "demo" / "base"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_config(scan_layers: bool = True, layers: int = 8) -> DecoderConfig:
    """Shape S of the targets: 8 layers, width 512, feed-forward 704, 8 heads, vocabulary 8,192."""
    return DecoderConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=704,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=256,
        scan_layers=scan_layers,
    )


def make_batch(config: DecoderConfig, rows: int = 4, length: int = 256) -> dict[str, jax.Array]:
    """Full rows of random tokens."""
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (rows, length + 1), dtype=np.int32)
    whole = np.ones((rows, length), np.int32)
    return {
        "input_ids": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_mask": jnp.asarray(whole),
        "segment_ids": jnp.asarray(whole),
        "positions": jnp.asarray(np.broadcast_to(np.arange(length, dtype=np.int32), whole.shape)),
        "task_ids": jnp.asarray(0 * whole),
        "prompt_mask": jnp.asarray(0 * whole),
    }


class Program:
    """A compiled program whose ``run`` does one step and waits for it."""

    def __init__(self, name: str, function, state, *rest):
        """Compiles ``function(state, *rest) -> (state, metrics)`` ahead of time."""
        self.name, self.state, self.rest = name, state, rest
        self.compiled = function.lower(state, *rest).compile()

    def run(self) -> None:
        """One step."""
        self.state, metrics = self.compiled(self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))

    @property
    def flops(self) -> float:
        """By XLA's count, which counts a loop's body once: meaningful for unrolled layers."""
        return self.compiled.cost_analysis()["flops"]


def adapter_program(name: str, adapter, model: Decoder, params, batch) -> tuple[Program, int]:
    """The step of ``mor train`` for an adapter on the seven linears; also the number of trained parameters."""
    shape = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plan = resolve_sites(model, adapter, LINEARS, shape)
    adapted = Adapted(base=model, plan=plan)
    rules = plan_rules(plan, total_steps=1000)
    optimizer = rules.wrap(optax.adamw(1e-4))
    state, constants, _ = init_state(jax.random.key(1), adapted, params, optimizer, rules=rules)
    loss = language_model_loss(adapted, lambda p: head_kernel(p, model.config))
    step = make_step(adapted, optimizer, loss=loss, constants=constants, adapters=state.adapters, rules=rules)
    return Program(name, step.function, state, params, step.constants, batch), plan.num_params()


def floor_program(model: Decoder, params, batch) -> Program:
    """Forward and backward to the embedding's output, no weight gradient, no optimiser."""

    def loss(offset, params, batch):
        def add_offset(next_fun, args, kwargs, context):
            output = next_fun(*args, **kwargs)
            embeds = context.module.path == ("embed_tokens",) and context.method_name == "__call__"
            return output + offset if embeds else output

        with nn.intercept_methods(add_offset):
            arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
            hidden = model.apply({"params": params}, *arguments, output="hidden")
        total, count = chunked_cross_entropy(
            hidden, head_kernel(params, model.config), batch["targets"], batch["loss_mask"]
        )
        return total / count

    def step(offset, params, batch):
        value, gradient = jax.value_and_grad(loss)(offset, params, batch)
        return gradient * 0, value

    offset = jnp.zeros((*batch["input_ids"].shape, model.config.hidden_size))
    return Program("floor", jax.jit(step, donate_argnums=0), offset, params, batch)


def full_program(model: Decoder, params, batch) -> Program:
    """Full fine-tuning with AdamW."""
    optimizer = optax.adamw(1e-4)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["input_ids"], batch["positions"], batch["segment_ids"])
        total, count = cross_entropy(logits, batch["targets"], batch["loss_mask"])
        return total / count

    def step(state, batch):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    copy = jax.tree.map(jnp.copy, params)
    return Program("full", jax.jit(step, donate_argnums=0), (copy, optimizer.init(copy)), batch)


def time_ratio(first: Program, second: Program, rounds: int) -> dict[str, float]:
    """Median and quartiles of the per-round ratio of CPU time, and each program's median milliseconds."""
    for program in (first, second, first, second):
        program.run()
    times: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(rounds):
        for key, program in (("first", first), ("second", second)):
            start = time.process_time()
            program.run()
            times[key].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["first"], times["second"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "low": low,
        "high": high,
        "first_ms": 1e3 * statistics.median(times["first"]),
        "second_ms": 1e3 * statistics.median(times["second"]),
    }


def measure_speed(rounds: int) -> list[dict]:
    """Rows C1, C2 and C4."""
    config = make_config()
    model, batch = Decoder(config), make_batch(config)
    params = model.init(jax.random.key(0), batch["input_ids"])["params"]
    make: dict[str, Callable[[], Program]] = {
        "floor": lambda: floor_program(model, params, batch),
        "full": lambda: full_program(model, params, batch),
        "lora r16": lambda: adapter_program("lora r16", LoRA(rank=16), model, params, batch)[0],
        "lora r32": lambda: adapter_program("lora r32", LoRA(rank=32), model, params, batch)[0],
        "mor r4 N8": lambda: adapter_program("mor r4 N8", MoR(rank=4, num_experts=8), model, params, batch)[0],
    }
    pairs = (
        ("C1", "lora r16", "floor", "<= 1.25"),
        ("C1", "mor r4 N8", "floor", "(for comparison)"),
        ("C2", "lora r16", "full", "<= 0.85"),
        ("C2", "mor r4 N8", "full", "(for comparison)"),
        ("C4", "mor r4 N8", "lora r32", "<= 1.20"),
    )
    rows = []
    for row, first, second, target in pairs:
        found = time_ratio(make[first](), make[second](), rounds)
        rows.append({"id": row, "what": f"{first} ÷ {second}", "must": target, **found})
        print(rows[-1], flush=True)
    return rows


def measure_flops() -> list[dict]:
    """Row C3: FLOPs of an adapter's step over those of the floor plus the adapter's own, layers unrolled."""
    config = make_config(scan_layers=False)
    model, batch = Decoder(config), make_batch(config)
    params = model.init(jax.random.key(0), batch["input_ids"])["params"]
    floor = floor_program(model, params, batch).flops
    rows = []
    for name, adapter in (("lora r16", LoRA(rank=16)), ("mor r4 N8", MoR(rank=4, num_experts=8))):
        program, num_params = adapter_program(name, adapter, model, params, batch)
        matmul = num_params
        if isinstance(adapter, MoR):  # bcat is a matmul of N r x out a token; lam_a and lam_b are no matmuls
            sites = resolve_sites(model, adapter, LINEARS, jax.ShapeDtypeStruct((1, 8), jnp.int32)).sites
            inner = adapter.rank + adapter.num_experts
            total = adapter.rank * adapter.num_experts
            matmul = sum(s.site.in_features * inner + total * s.site.out_features for s in sites)
        ratio = program.flops / (floor + 6 * matmul * batch["input_ids"].size)
        rows.append({"id": "C3", "what": f"FLOPs of {name} ÷ (floor + own)", "must": "<= 1.02", "ratio": ratio})
        print(rows[-1], flush=True)
    return rows


class CountingBatches:
    """A run's batches that note, each time one is taken, how many programs were compiled so far."""

    def __init__(self, batches, compiled: list):
        """Wraps ``batches``; ``compiled`` grows elsewhere."""
        self.batches, self.compiled, self.seen = batches, compiled, []

    def __next__(self):
        """The next batch."""
        self.seen.append(len(self.compiled))
        return next(self.batches)

    def get_state(self) -> dict:
        """The batches' own."""
        return self.batches.get_state()

    def set_state(self, state: dict) -> None:
        """The batches' own."""
        self.batches.set_state(state)


def measure_compilations(steps: int = 200) -> list[dict]:
    """Row C10: programs compiled after step one, with evaluation, checkpoints and a last short evaluation batch."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for name, count in (("train", 96), ("held_out", 21)):
            records = [{"prompt": f"copy {n * 7919 % 1000}", "completion": f" {n * 7919 % 1000}"} for n in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for method in ("lora", "mor"):
            config = TrainConfig(
                model=str(DEMO_BASE),
                data=(str(folder / "train.jsonl"),),
                eval_data=(str(folder / "held_out.jsonl"),),
                method=method,
                output_dir=str(folder / method),
                steps=steps,
                sequence_length=64,
                packing=False,
                eval_every=50,
                eval_batches=0,
                save_every=50,
                mesh="data=1",
            )
            run = build_run(config)
            batches = CountingBatches(run.batches, compiled)
            run_training(dataclasses.replace(run, batches=batches))
            after_first = len(compiled) - batches.seen[-steps]
            rows.append(
                {"id": "C10", "what": f"programs compiled after step 1, {method}", "must": "0", "ratio": after_first}
            )
            print(rows[-1], flush=True)
    return rows


def write(rows: list[dict], output: pathlib.Path, command: str) -> None:
    """The table as JSON and Markdown, with machine and versions."""
    machine = {
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    text = [
        f"# Step time\n\n`{command}`\n",
        f"{machine}\n",
        "| id | what | figure | quartiles | must |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        text.append(f"| {row['id']} | {row['what']} | {row['ratio']:.3f} | {spread} | {row['must']} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        for suffix, content in (
            (".json", json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1)),
            (".md", "\n".join(text)),
        ):
            path = pathlib.Path(scratch) / f"table{suffix}"
            path.write_text(content + "\n")
            os.replace(path, output.with_suffix(suffix))


def main() -> None:
    """Measures all rows and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds of each pair (default: 12)")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="table without its suffix")
    arguments = parser.parse_args()
    rows = measure_speed(arguments.rounds) + measure_flops() + measure_compilations()
    write(
        rows,
        arguments.output,
        f"python experiments/benchmark/step_time.py --rounds {arguments.rounds} --output {arguments.output}",
    )


if __name__ == "__main__":
    main()
