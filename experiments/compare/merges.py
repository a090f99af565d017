"""Every merge of an input-routed adapter against the routed model itself: imitation, answers, size, latency.

    python experiments/compare/merges.py --output experiments/results/merges
    python experiments/compare/merges.py --output TABLE --run runs/one

Without `--run` the demo's MoR is trained first (and kept in `--kept`, so that a second call finds it). Calibration is
100 training strings in each task, figures are of 100 held-out strings in each; of a run folder, both are what
`mor merge` takes. Seconds to generate depend on the structure alone, so they are measured for the three structures
there are: adapter beside the base with routing, as a plain LoRA, and merged.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tables

from mor_jax.cli.calibration import Batches, merge_batches
from mor_jax.cli.demo import run
from mor_jax.cli.opening import LiveModel, open_run
from mor_jax.merging import (
    compare_logits,
    language_model_call,
    least_squares,
    mean_gates,
    merge,
    merge_changes,
    refactor,
    routed_logits,
)
from mor_jax.models import Decoder
from mor_jax.training.distillation import LEARNING_RATE, STEPS, distill

BATCHES = 8  # of a run folder, as in `mor merge`
NEW_TOKENS, PROMPTS, PROMPT_LENGTH, REPEATS = 32, 4, 16, 7  # of the latency


@dataclass(frozen=True)
class Subject:
    """A routed model with the batches that merges are fitted on, and those that they are judged by."""

    live: LiveModel
    calibration: Batches
    held_out: Batches

    @property
    def call(self) -> Any:
        """How the decoder is called on a batch, its tasks told apart."""
        return functools.partial(language_model_call, num_tasks=len(self.live.tasks))

    @property
    def own(self) -> tuple[Any, ...]:
        """(model, params, leaves, plan), as every function of `merging` begins."""
        return Decoder(self.live.config), self.live.params, self.live.leaves, self.live.plan


def demo_subject(kept: Path, seed: int) -> Subject:
    """The demo's MoR, trained where `kept` has none yet."""
    parts = run.prepare(kept / "data", seed)
    if not (kept / "run" / "adapter").is_dir():
        run.fit(run.make_config("mor", parts["train"], kept / "run", seed))
    pieces = lambda rows: [{k: v[n :: run.PIECES] for k, v in rows.items()} for n in range(run.PIECES)]  # noqa: E731
    return Subject(
        open_run(kept / "run", mesh="data=1"), pieces(parts["calibration"].rows), pieces(parts["held_out"].rows)
    )


def run_subject(folder: Path) -> Subject:
    """Any run of `mor train`, with the batches of `mor merge`."""
    live = open_run(folder, mesh="data=1")
    return Subject(live, *merge_batches(live, live.tokenization(), "", BATCHES))


class Judge:
    """Figures of merged parameters on the held-out batches; the routed model runs over them once."""

    def __init__(self, subject: Subject):
        self._batches, call = subject.held_out, subject.call
        self._routed = [routed_logits(*self._static(subject), *subject.own[1:3], batch) for batch in self._batches]

        @jax.jit
        def compare(params: Any, batch: Any, left: jax.Array, counted: jax.Array) -> Any:
            args, kwargs, _ = call(batch)
            right: Any = subject.own[0].apply({"params": params}, *args, **kwargs)
            return compare_logits(left, right, counted), right.argmax(-1)

        self._compare = compare

    @staticmethod
    def _static(subject: Subject) -> tuple[Any, ...]:
        return subject.own[0], subject.live.plan, subject.call

    def routed(self) -> dict[str, float]:
        """The routed model's own answers."""
        right = [_right(np.asarray(left.argmax(-1)), b) for left, b in zip(self._routed, self._batches, strict=True)]
        return {"kl": 0.0, "exact_match": float(np.concatenate(right).mean())}

    def merged(self, params: Any, task: int | None = None) -> dict[str, float]:
        """`kl` over all tokens and `exact_match` over all examples, or over those of one task."""
        kl, tokens, right = 0.0, 0, []
        for left, batch in zip(self._routed, self._batches, strict=True):
            counted = batch["segment_ids"] > 0
            if task is not None:
                counted = counted & (batch["task_ids"] == task)
            sums, chosen = self._compare(params, batch, left, counted)
            kl, tokens = kl + float(sums["kl"]), tokens + int(sums["tokens"])
            right.append(_right(np.asarray(chosen), batch, task))
        return {"kl": kl / tokens, "exact_match": float(np.concatenate(right).mean())}


def _right(chosen: np.ndarray, batch: dict[str, np.ndarray], task: int | None = None) -> np.ndarray:
    """(examples,) bool: whether greedy decoding gives all that is learned of an example (of the task)."""
    found = []
    for row in range(len(chosen)):
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
            here = batch["segment_ids"][row] == segment
            if task is None or batch["task_ids"][row][here][0] == task:
                asked = here & (batch["loss_mask"][row] > 0)
                found.append(bool((chosen[row] == batch["targets"][row])[asked].all()))
    return np.array(found, bool)


def _parameters(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _kernels(live: LiveModel) -> int:
    """Parameters of all adapted kernels: what a merge without low-rank factors changes."""
    assert live.plan is not None
    sites = [(adapted.stack_sizes, adapted.site) for adapted in live.plan.sites]
    return sum(math.prod(stack) * site.in_features * site.out_features for stack, site in sites)


def compare(subject: Subject, ranks: Sequence[int], steps: int, learning_rate: float) -> list[dict[str, Any]]:
    """One row a merge: `name`, `kl`, `exact_match`, `parameters` to ship, `seconds` to make it, and `structure`."""
    judge, live, call = Judge(subject), subject.live, subject.call
    own, rows = (*subject.own, subject.calibration), []
    first = {"seconds": 0.0, "structure": "routed", "parameters": _parameters(subject.live.leaves)}
    rows.append({"name": "routed, not merged"} | judge.routed() | first)

    def add(name: str, make: Any, task: int | None = None) -> Any:
        started = time.perf_counter()
        params, parameters, extra = make()
        seconds = round(time.perf_counter() - started, 1)
        figures = judge.merged(params, task)
        rows.append({"name": name} | figures | {"seconds": seconds, "structure": "merged", "parameters": parameters})
        print(rows[-1], flush=True)
        return extra

    def constant(task: int | None = None) -> Any:
        return merge(*own[1:4], mean_gates(*own, call=call, task=task)), _kernels(live), None

    def full(sequential: bool) -> Any:
        found = least_squares(*own, call=call, sequential=sequential)
        return merge_changes(*own[1:4], found.changes), _kernels(live), found

    def low(plan: Any, leaves: Any) -> Any:
        return merge(live.params, leaves, plan), _parameters(leaves), (plan, leaves)

    add("mean", constant)
    for number, task in enumerate(live.tasks):
        add(f"task:{task}, on its own task", functools.partial(constant, number), number)
    add("least_squares", functools.partial(full, False))
    found = add("sequential", functools.partial(full, True))
    for rank in ranks:
        add(f"sequential, rank {rank}", lambda rank=rank: low(*refactor(found, *subject.own[2:], rank)))
        trained = functools.partial(distill, *own, rank=rank, call=call, steps=steps, learning_rate=learning_rate)
        add(f"distill, rank {rank}", lambda trained=trained: low(*trained()))
    return rows


def latency(subject: Subject, rank: int) -> dict[str, float]:
    """Median seconds to generate `NEW_TOKENS` tokens for `PROMPTS` prompts, by structure; runs take turns."""
    live = subject.live
    lora_plan, lora_leaves = distill(*subject.own, subject.calibration, rank=rank, call=subject.call, steps=0)
    structures = {
        "routed": live,
        "lora": dataclasses.replace(live, plan=lora_plan, leaves=lora_leaves),
        "merged": dataclasses.replace(live, plan=None, leaves=None),
    }
    never = (-1,)  # all tokens are generated
    ready = {name: one.generate_fn(never, 0, max_new_tokens=NEW_TOKENS) for name, one in structures.items()}
    prompts = np.random.default_rng(0).integers(0, live.config.vocab_size, (PROMPTS, PROMPT_LENGTH)).astype(np.int32)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(REPEATS + 1):
        for name, generate in ready.items():
            started = time.perf_counter()
            generate(prompts, np.ones_like(prompts))
            if repeat:  # the first compiles
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: list[dict[str, Any]], seconds: dict[str, float]) -> list[str]:
    """Markdown: a line a merge, then the latencies."""
    lines = ["| merge | KL, nats | exact match, % | parameters to ship | seconds to make |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{row['kl']:.2g}", f"{100 * row['exact_match']:.1f}", f"{row['parameters']:,}", f"{row['seconds']}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    lines += ["", "KL(routed || merged) a token and exact match of whole answers, on held-out examples; wall seconds."]
    lines += [f"Generating {NEW_TOKENS} tokens for {PROMPTS} prompts, median of {REPEATS}:", ""]
    lines += ["| structure | milliseconds a token |", "|---|---|"]
    return lines + [f"| {name} | {1000 * value / NEW_TOKENS:.2f} |" for name, value in seconds.items()]


def main() -> None:
    """Measures every merge of one run and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="table without its suffix")
    parser.add_argument("--run", type=Path, default=None, help="run folder of `mor train`; without it the demo's MoR")
    parser.add_argument("--kept", type=Path, default=Path("runs/merges"), help="the demo's MoR is kept here")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's data, data order and initial adapters")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], help="of the low-rank merges")
    parser.add_argument("--steps", type=int, default=STEPS, help="of distillation")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of distillation")
    arguments = parser.parse_args()
    given = {name: value for name, value in vars(arguments).items() if value != parser.get_default(name)}
    words = [f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in given.items()]
    command = f"python experiments/compare/merges.py {' '.join(words)}"
    subject = run_subject(arguments.run) if arguments.run else demo_subject(arguments.kept, arguments.seed)
    rows = compare(subject, arguments.ranks, arguments.steps, arguments.learning_rate)
    seconds = latency(subject, arguments.ranks[0])
    settings = {name: getattr(arguments, name) for name in ("seed", "ranks", "steps", "learning_rate")}
    title = "Merges of a routed MoR"
    tables.write(arguments.output, title, command, settings, table(rows, seconds), {"rows": rows, "latency": seconds})


if __name__ == "__main__":
    main()
