"""Frozen random factors are not in the adapter file; their checksum is, and a load that rebuilds others is an error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mor_jax.adapters import LoRAMini, VeRA
from mor_jax.injection import init_leaves, resolve_sites
from mor_jax.models import Decoder, DecoderConfig
from mor_jax.training.adapter_file import AdapterFileError, constants_sha256, load_adapter, save_adapter
from mor_jax.training.integrity import write_manifest

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
IDS = jnp.zeros((1, 4), jnp.int32)


@pytest.mark.parametrize("method", [VeRA(rank=4), LoRAMini(rank=2, inner_in=6, inner_out=5)], ids=lambda m: m.name)
def test_constants_are_rebuilt_and_checked(tmp_path, method):
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    plan = resolve_sites(model, method, ("q_proj", "down_proj"), IDS)
    leaves = jax.jit(lambda key: init_leaves(key, plan, params))(jax.random.key(5))
    folder = save_adapter(tmp_path / "adapter", plan, leaves)
    stored = load_file(folder / "adapter.safetensors")
    assert not [name for name in stored if name.endswith(("outer_a", "outer_b", "shared/vera/a"))]
    assert sum(v.size for v in stored.values()) == plan.num_params()
    _, loaded, metadata = load_adapter(folder, model, params, IDS)
    assert metadata["constants_sha256"] == constants_sha256(leaves.constants)
    jax.tree.map(np.testing.assert_array_equal, loaded, leaves)

    description = json.loads((folder / "adapter.json").read_text())
    for site in description["sites"].values():
        site["options"]["seed"] = 1  # as another version of the generator would
    (folder / "adapter.json").write_text(json.dumps(description))
    write_manifest(folder)
    with pytest.raises(AdapterFileError, match=r"adapter.json: constants_sha256=.* rebuilding"):
        load_adapter(folder, model, params, IDS)
