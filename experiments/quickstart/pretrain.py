"""Trains the demo's base: a Llama of 0.7 million parameters on short exercises that this script makes up.

    python experiments/quickstart/pretrain.py --output mor_jax/cli/demo/base

A document is one exercise: `copy:bkd=bkd`, `at:bkdz,3=d`, `map:k=4,z=sort;z=sort` and the like (`EXERCISES`). They
teach the alphabet and how to find, copy and compare symbols. None of the five tasks of the demo is among them; their
names occur as bare symbols of `map`, so that their embeddings are trained. Documents are drawn anew at
every step.

Writes a Hugging Face directory (bfloat16 weights, config, tokenizer), `pretraining.jsonl` (loss at each 10th step),
`pretraining.png` and `pretraining.json` (command, accuracy of each exercise, versions, seconds).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mor_jax.cli.demo.tasks import TASKS
from mor_jax.models import Decoder, DecoderConfig, save_params
from mor_jax.report.plots import plot_curves
from mor_jax.training.losses import cross_entropy

LETTERS = string.ascii_lowercase
DIGITS = string.digits[1:]
SPECIAL = ("<pad>", "<eos>", "<unk>")
ROW = 96  # tokens of a row


def _letters(draw: random.Random, low: int = 3, high: int = 8) -> str:
    return "".join(draw.sample(LETTERS, draw.randint(low, high)))


def _at(draw: random.Random) -> tuple[str, str]:
    text = _letters(draw)
    place = draw.randrange(len(text))
    return f"{text},{place + 1}", text[place]


def _after(draw: random.Random) -> tuple[str, str]:
    text = _letters(draw)
    place = draw.randrange(len(text) - 1)
    return f"{text},{text[place]}", text[place + 1]


def _before(draw: random.Random) -> tuple[str, str]:
    text = _letters(draw)
    place = draw.randrange(len(text) - 1)
    return f"{text},{text[place + 1]}", text[place]


def _run(draw: random.Random) -> tuple[str, str]:
    start, step = draw.randrange(26), draw.choice((1, 2, 3))
    return f"{LETTERS[start]},{step}", "".join(LETTERS[(start + step * i) % 26] for i in range(6))


def _map(draw: random.Random) -> tuple[str, str]:
    names = [*LETTERS, *TASKS]
    keys = draw.sample(names, draw.randint(2, 4))
    values = [draw.choice([*names, *DIGITS]) for _ in keys]
    chosen = draw.randrange(len(keys))
    return ",".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)) + f";{keys[chosen]}", values[chosen]


def _neighbour(step: int) -> Callable[[random.Random], tuple[str, str]]:
    def exercise(draw: random.Random) -> tuple[str, str]:
        start = draw.randrange(26)
        return LETTERS[start], LETTERS[(start + step) % 26]

    return exercise


def _on_text(answer: Callable[[str], str], low: int = 3) -> Callable[[random.Random], tuple[str, str]]:
    def exercise(draw: random.Random) -> tuple[str, str]:
        text = _letters(draw, low)
        return text, answer(text)

    return exercise


EXERCISES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _on_text(lambda text: text),
    "drop": _on_text(lambda text: text[1:]),
    "last": _on_text(lambda text: text[-1]),
    "len": _on_text(lambda text: str(len(text))),
    "min": _on_text(min, 2),
    "max": _on_text(max, 2),
    "at": _at,
    "after": _after,
    "before": _before,
    "run": _run,
    "map": _map,
    "next": _neighbour(1),
    "prev": _neighbour(-1),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter, digit, sign and name; decoding puts nothing between them."""
    names = [*EXERCISES, *TASKS]
    vocabulary = [*SPECIAL, *LETTERS, *string.digits, *":=,;", *names]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    pieces = rf"\b(?:{'|'.join(sorted(names, key=len, reverse=True))})\b|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk, model_max_length=512
    )


def make_config(vocab_size: int) -> DecoderConfig:
    """Four layers of width 128."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )


def draw_document(draw: random.Random, name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """(tokens with the end token, how many of them are the question) of one exercise."""
    question, answer = EXERCISES[name](draw)
    before = tokenizer(f"{name}:{question}=")["input_ids"]
    return [*before, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id], len(before)


def make_batch(draw: random.Random, rows: int, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """Rows of whole documents; a question's tokens weigh a tenth in the loss, for most of them cannot be known."""
    names = ("input_ids", "positions", "segment_ids", "targets")
    batch = {name: np.zeros((rows, ROW), np.int32) for name in names}
    batch["weights"] = np.zeros((rows, ROW), np.float32)
    kinds = list(EXERCISES)
    for row in range(rows):
        start = segment = 0
        while True:
            tokens, question = draw_document(draw, draw.choice(kinds), tokenizer)
            end, segment = start + len(tokens), segment + 1
            if end > ROW:
                break
            batch["input_ids"][row, start:end] = tokens
            batch["positions"][row, start:end] = np.arange(len(tokens))
            batch["segment_ids"][row, start:end] = segment
            batch["targets"][row, start : end - 1] = tokens[1:]
            batch["weights"][row, start : end - 1] = np.where(np.arange(1, len(tokens)) < question, 0.1, 1.0)
            start = end
    return batch


def pretrain(model: Decoder, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace, log: Path) -> dict:
    """The trained parameters; writes a line of `log` each 10th step."""
    draw = random.Random(arguments.seed)
    params = model.init(jax.random.key(arguments.seed), jnp.zeros((1, ROW), jnp.int32))["params"]
    rate = optax.warmup_cosine_decay_schedule(0.0, arguments.learning_rate, 50, arguments.steps, 0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    def loss_of(params, batch):
        logits = model.apply({"params": params}, batch["input_ids"], batch["positions"], batch["segment_ids"])
        total, count = cross_entropy(logits, batch["targets"], batch["weights"])
        return total / count

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    with log.open("w", encoding="utf-8") as stream:
        for number in range(1, arguments.steps + 1):
            params, state, loss = step(params, state, make_batch(draw, arguments.rows, tokenizer))
            losses.append(float(loss))
            if number % 10 == 0:
                mean = sum(losses[-10:]) / 10
                stream.write(json.dumps({"step": number, "loss": round(mean, 4)}) + "\n")
                stream.flush()
            if number % 100 == 0:
                print(f"step {number} loss {mean:.4f}", file=sys.stderr, flush=True)
    return params


def exercise_accuracy(model: Decoder, params: dict, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Share of fresh documents of each exercise whose whole answer is found greedily."""
    forward = jax.jit(lambda params, batch: model.apply({"params": params}, batch))
    draw, found = random.Random(seed), {}
    for name in EXERCISES:
        tokens, question = np.zeros((100, 40), np.int32), np.zeros(100, np.int32)
        lengths = np.zeros(100, np.int32)
        for row in range(100):
            ids, question[row] = draw_document(draw, name, tokenizer)
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        guess = np.asarray(forward(params, jnp.asarray(tokens)).argmax(-1))[:, :-1]
        place = np.arange(1, 40)
        answer = (place >= question[:, None]) & (place < lengths[:, None])
        found[name] = float(np.mean(np.all((guess == tokens[:, 1:]) | ~answer, axis=1)))
    return found


def save(params: dict, config: DecoderConfig, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """The Hugging Face directory, weights in bfloat16."""
    save_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), config, output)
    tokenizer.save_pretrained(output)
    settings = output / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # known to all releases
    settings.write_text(json.dumps(values, indent=2) + "\n")
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(output)


def main() -> None:
    """Trains, measures and writes the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to be made")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    config = make_config(len(tokenizer))
    model = Decoder(config)
    log = arguments.output.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    start, cpu = time.time(), time.process_time()
    params = pretrain(model, tokenizer, arguments, log)
    spent = {"seconds": round(time.time() - start), "cpu_seconds": round(time.process_time() - cpu)}
    save(params, config, tokenizer, arguments.output)
    log = log.rename(arguments.output / "pretraining.jsonl")
    plot_curves({"pretraining": log}, arguments.output / "pretraining.png", smooth=1)
    facts = {
        "command": f"python experiments/quickstart/pretrain.py --output {arguments.output} --steps {arguments.steps} "
        f"--rows {arguments.rows} --learning-rate {arguments.learning_rate} --seed {arguments.seed}",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "exercise_accuracy": exercise_accuracy(model, params, tokenizer, arguments.seed + 1),
        **spent,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    (arguments.output / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
