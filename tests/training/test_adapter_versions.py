"""Adapters of an older format: what means the same is read, and what would compute something else says so."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from mor_jax.adapters import LoRA, MoRA
from mor_jax.adapters.beamlora import ExpandStrong
from mor_jax.injection import init_leaves, resolve_sites
from mor_jax.models import Decoder, DecoderConfig
from mor_jax.training import train
from mor_jax.training.adapter_file import AdapterFileError, load_adapter, save_adapter
from mor_jax.training.checkpoint import CheckpointError
from mor_jax.training.integrity import write_manifest

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
IDS = jnp.zeros((1, 4), jnp.int32)


def _saved_as(folder, method, version):
    """(folder, model, base, leaves): an adapter whose file says that it is of ``version``; 16 -> 24 and back."""
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    plan = resolve_sites(model, method, ("up_proj", "down_proj"), IDS)
    leaves = jax.jit(lambda key: init_leaves(key, plan, params))(jax.random.key(5))
    save_adapter(folder, plan, leaves)
    description = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(description | {"version": version}))
    write_manifest(folder)
    return folder, model, params, leaves


# k is 9 for rank 2 (it divides neither 16 nor 24), 6 for rank 1 (24 alone).
CHANGED = (
    MoRA(rank=2, group_type="contiguous"),
    MoRA(rank=2, group_type="contiguous_tiled"),
    MoRA(rank=2, group_type="sharing_repeated"),
    MoRA(rank=2, reset_every=5),
    MoRA(rank=1, group_type="contiguous"),
    MoRA(rank=16),  # k was 25: more than the 16 outputs of down_proj
)
SAME = (LoRA(rank=2), MoRA(rank=2), MoRA(rank=2, group_type="rotation"))
CASES = [(method, True) for method in CHANGED] + [(method, False) for method in SAME]


@pytest.mark.parametrize(("method", "changed"), CASES, ids=[f"{i}-{case[0].name}" for i, case in enumerate(CASES)])
def test_an_adapter_of_version_1_is_read_where_it_means_the_same(tmp_path, method, changed):
    folder, model, params, leaves = _saved_as(tmp_path / "adapter", method, 1)
    if changed:
        message = r"adapter\.json: version=1 and this package writes 2: in layers/mlp/\w+ MoRA.*train it anew"
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(folder, model, params, IDS)
    else:
        _, loaded, _ = load_adapter(folder, model, params, IDS)
        jax.tree.map(np.testing.assert_array_equal, loaded, leaves)


def test_sizes_that_divide_mean_the_same_in_version_1():
    """k = 16 for 16 -> 16 of rank 8: every group has one member, then and now."""
    for group_type in ("contiguous", "contiguous_tiled", "sharing_repeated"):
        method = MoRA(rank=8, group_type=group_type)
        plan = resolve_sites(Decoder(CONFIG), method, ("q_proj", "o_proj"), IDS)
        assert not any(method.read_differently(1, adapted.site) for adapted in plan.sites)


def test_a_newer_version_asks_for_an_upgrade(tmp_path):
    folder, model, params, _ = _saved_as(tmp_path / "adapter", LoRA(rank=2), 3)
    with pytest.raises(AdapterFileError, match="version=3 and this package reads 1 to 2: upgrade mor_jax"):
        load_adapter(folder, model, params, IDS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_runs.make_files(tmp_path_factory.mktemp("files"))


def _older(run, step):
    """A run as an older version left it after ``step``: its checkpoint knows of no version."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    place = run / "checkpoints" / str(step)
    metadata = json.loads((place / "metadata" / "metadata").read_text())
    assert metadata.pop("adapter_version") == 2
    (place / "metadata" / "metadata").write_text(json.dumps(metadata))
    write_manifest(place)


def test_a_checkpoint_without_what_a_rule_remembers_today_says_so(files, tmp_path, monkeypatch):
    """BeamLoRA's runs of before kept no moments."""
    fields = {"mesh": "data=1", "steps": 2, "save_every": 1, "accumulate": 1, "method": "beamlora"}
    with monkeypatch.context() as older:
        older.setattr(ExpandStrong, "remembers_moments", False)
        train(tiny_runs.config_of(files, tmp_path / "run", **fields))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    message = r"checkpoints/1 does not hold the arrays of this run .*expand.*moments.*: resume with the settings"
    with pytest.raises(CheckpointError, match=message):
        train(tiny_runs.config_of(files, tmp_path / "run", resume=True, **fields))


def test_a_run_of_the_older_grouping_is_not_gone_on_with(files, tmp_path):
    fields = {"mesh": "data=1", "steps": 2, "save_every": 1, "accumulate": 1, "method": "mora"}
    fields |= {"options": {"group_type": "contiguous"}}
    train(tiny_runs.config_of(files, tmp_path / "run", **fields))
    _older(tmp_path / "run", 1)
    with pytest.raises(AdapterFileError, match=r"checkpoints/1: version=1 .* MoRA grouped the neighbours"):
        train(tiny_runs.config_of(files, tmp_path / "run", resume=True, **fields))
