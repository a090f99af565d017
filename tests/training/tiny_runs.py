"""Whole training runs of a tiny random Llama: its files, its command line, and what a run leaves behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import tiny_llama

from mor_jax.models import Decoder, DecoderConfig
from mor_jax.models.hf import save_params
from mor_jax.training.config import TrainConfig
from mor_jax.training.integrity import MANIFEST

# The kernels of the feed-forward layers have 2 x 64 x 128 = 2^14 elements, so fsdp does shard them.
SHAPE = DecoderConfig(vocab_size=264, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1)
MIXED_MESH = "data=2,fsdp=2,sequence=2"
VARIES = (
    "tokens_per_second",
    "peak_rss_bytes",
    "peak_device_bytes",
)  # the only figures of a line that may differ between equal runs


def make_files(directory):
    """A model, two training files and two held-out files in `directory`."""
    params = Decoder(SHAPE).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    save_params(params, SHAPE, directory / "model")
    tiny_llama.make_tokenizer().save_pretrained(str(directory / "model"))
    for name, count in (("train", 60), ("held_out", 10)):
        tiny_llama.write_records(directory / f"{name}_add.jsonl", count)
        tiny_llama.write_records(directory / f"{name}_shout.jsonl", count // 2, task="shout")
    return directory


def config_of(files, output_dir, **fields):
    """A packed, weighted mixture of two files; dropout, accumulation and a balanced router where it is MoR."""
    mixture = (f"add={files}/train_add.jsonl", f"shout={files}/train_shout.jsonl:0.5")
    common = {"batch_size": 8, "accumulate": 4, "sequence_length": 48, "rank": 2, "dropout": 0.1, "steps": 8}
    if fields.get("method", "mor") == "mor":
        common |= {"num_experts": 3, "options": {"router": "balanced"}}
    common |= {"model": str(files / "model"), "data": mixture, "output_dir": str(output_dir)}
    common |= {"targets": ("up_proj", "down_proj"), "save_every": 4, "keep_checkpoints": 20}
    return TrainConfig(**common | fields)


def start(*words, cwd=Path(__file__).parents[2], **environment):
    """`mor train` in a process of its own."""
    own = os.environ | {"USE_TORCH": "0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | environment
    command = [sys.executable, "-m", "mor_jax.cli.main", "train", *map(str, words), "--json"]
    return subprocess.Popen(command, cwd=cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process, seconds=120):
    """Returns when `condition()` holds; fails when the process ends or the time is up."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < limit
        time.sleep(0.001)


def lines(run):
    """The lines of `metrics.jsonl` without what a clock or the machine decides; a cut last line is left out."""
    path = run / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in whole]
    return [{name: value for name, value in line.items() if name not in VARIES} for line in found]


def unfinished_save(run):
    """Whether a checkpoint of the run is being written: a temporary folder, or one without its manifest."""
    folders = [path for path in (run / "checkpoints").glob("*") if path.name != "bad"]
    return any(not (path / MANIFEST).exists() for path in folders)


def read_checkpoint(run, step):
    """(arrays of all items as numpy, metadata) of one checkpoint, read by orbax alone."""
    import orbax.checkpoint as ocp

    arrays = {}
    for item in sorted((run / "checkpoints" / str(step)).iterdir()):
        if item.is_dir() and item.name != "metadata":
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(item).item_metadata.tree
                wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                arrays[item.name] = reader.restore(item, restore_args=wanted)
    return arrays, json.loads((run / "checkpoints" / str(step) / "metadata" / "metadata").read_text())


def assert_same_end(first, second, step):
    """Two runs ended bit for bit alike: parameters, moments, counters, place in the data, losses and adapter file."""
    arrays, metadata = read_checkpoint(first, step)
    others, other_metadata = read_checkpoint(second, step)
    assert {"adapters", "opt_state", "counters"} <= set(arrays)
    pairs = zip(jax.tree.leaves_with_path(arrays), jax.tree.leaves_with_path(others), strict=True)
    for (path, value), (other_path, other) in pairs:
        assert path == other_path
        assert value.dtype == other.dtype
        assert value.tobytes() == other.tobytes(), path
    for name in ("iterator", "base_fingerprint", "last_losses"):
        assert metadata[name] == other_metadata[name]
    assert lines(first) == lines(second)
    assert [line["step"] for line in lines(first)] == list(range(1, step + 1))
    name = "adapter/adapter.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
