"""Loading never holds more than two tensors beyond the parameters themselves."""

import json
import selectors
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mor_jax.models import DecoderConfig
from mor_jax.models.hf import INDEX_FILE
from mor_jax.models.hf_config import config_to_hf
from mor_jax.models.tensors import tensor_table

# Llama-3.1-8B with its ratios of widths, heads and vocabulary, at about a hundredth of its size.
SHAPE = DecoderConfig(
    vocab_size=64_128,
    hidden_size=1024,
    intermediate_size=3584,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    param_dtype="bfloat16",
)
SLACK = 64 * 2**20  # of the compiler and the allocator; half of the largest tensor

CHILD = """
import sys
import jax
import jax.numpy as jnp
from mor_jax.models.hf import load_params, read_config
jax.jit(lambda x: x + 1)(jnp.ones(8)).block_until_ready()
config = read_config(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
params = load_params(sys.argv[1], config, dtype=jnp.bfloat16)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), flush=True)
sys.stdin.readline()
"""


def _write(directory, rng):
    """Random weights in files of one layer each, as `transformers` splits a large model."""
    table = tensor_table(SHAPE)
    weight_map, groups = {}, {}
    for entry in table:
        groups.setdefault(entry.layer, []).append(entry)
    for number, group in enumerate(groups.values()):
        file = f"model-{number}.safetensors"
        values = {entry.name: rng.integers(0, 2**14, entry.shape, np.uint16).view(jnp.bfloat16) for entry in group}
        save_file(values, directory / file)
        weight_map |= dict.fromkeys(values, file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config_to_hf(SHAPE)))
    return max(int(np.prod(entry.shape)) for entry in table) * 2


def _anonymous_bytes(pid):
    """What a process holds in memory of its own; pages of mapped files belong to the disk's cache."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_a_sharded_checkpoint_loads_with_two_tensors_beyond_the_result(tmp_path):
    largest = _write(tmp_path, np.random.default_rng(0))
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        before = peak = _anonymous_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        selector = selectors.DefaultSelector()
        selector.register(child.stdout, selectors.EVENT_READ)
        while not selector.select(timeout=0.001):
            peak = max(peak, _anonymous_bytes(child.pid))
        result = int(child.stdout.readline())
        child.stdin.write("done\n")
    print(
        f"largest {largest / 2**20:.0f}, result {result / 2**20:.0f}, beyond {(peak - before - result) / 2**20:.0f} MiB"
    )
    assert result > 3 * largest
    assert largest > SLACK
    assert peak - before >= result
    assert peak - before - result <= 2 * largest + SLACK
