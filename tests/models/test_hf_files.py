"""Reading and writing of Hugging Face directories: equal tensors, target shardings, and every damage named."""

import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from mor_jax.models import DecoderConfig, ModelFileError, abstract_params, config_to_hf, load_params, save_params
from mor_jax.models import hf as hf_file

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, qkv_bias=True,
    model_type="qwen2",
)  # fmt: skip
UP = "model.layers.1.mlp.up_proj.weight"


def random_params(config):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), abstract_params(config))


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def originals(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    save_params(params, CONFIG, folder / "single")
    save_params(params, CONFIG, folder / "sharded", max_shard_bytes=4000)
    return folder


@pytest.fixture
def single(originals, tmp_path):
    return shutil.copytree(originals / "single", tmp_path / "model")


@pytest.fixture
def sharded(originals, tmp_path):
    return shutil.copytree(originals / "sharded", tmp_path / "model")


def change(folder, edit):
    """Rewrites the single file after `edit` changed its dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_saved_tensors_come_back(params, originals, kind, scan_layers):
    assert (originals / "single" / "model.safetensors").exists()
    assert len(list((originals / "sharded").glob("*.safetensors"))) > 3
    found = load_params(originals / kind, replace(CONFIG, scan_layers=scan_layers))
    if not scan_layers:
        layers = [found.pop(f"layers_{number}") for number in range(CONFIG.num_layers)]
        found["layers"] = jax.tree.map(lambda *rows: jnp.stack(rows), *layers)
    assert_same(found, params)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_transformers_loads_every_tensor(originals, kind):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(originals / kind, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = load_file(originals / "single" / "model.safetensors")
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.oracle
def test_files_of_transformers_come_back_from_us(tmp_path):
    """transformers writes shards, we read and write them, in bfloat16: the same bits under the same names."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Qwen3Config

    from mor_jax.models import read_config

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    settings = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    config = read_config(tmp_path / "theirs")
    assert config.param_dtype == jnp.bfloat16
    save_params(
        load_params(tmp_path / "theirs", config), config, tmp_path / "ours", tmp_path / "theirs", max_shard_bytes=4000
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        assert again.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(again.state_dict()[name], value), name
    kept = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == kept


def mesh_shardings(config):
    """fsdp over the input axis where it divides, tensor over the output axis of kernels; vectors everywhere."""
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def of(leaf):
        axes = ("fsdp", "tensor") if leaf.ndim >= 2 and leaf.shape[-2] % 4 == 0 else (None,)
        return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes))

    return jax.tree.map(of, abstract_params(config))


def test_each_tensor_is_read_straight_into_its_shards(params, originals, monkeypatch):
    shardings = mesh_shardings(CONFIG)
    sizes = {}
    read = hf_file._read

    def watched(source, entry, dtype, index):
        value = read(source, entry, dtype, index)
        sizes.setdefault(entry.name, []).append(value.size)
        return value

    monkeypatch.setattr(hf_file, "_read", watched)
    found = load_params(originals / "sharded", CONFIG, shardings)
    assert_same(found, params)
    for leaf, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    whole = {name: value.size for name, value in load_file(originals / "single" / "model.safetensors").items()}
    assert sizes.keys() == whole.keys()
    assert set(sizes[UP]) == {whole[UP] // 8}  # each device's part alone was read
    assert set(sizes["model.embed_tokens.weight"]) == {whole["model.embed_tokens.weight"] // 8}


def test_one_tensor_at_a_time_is_alive_beside_the_result(tmp_path, monkeypatch):
    config = DecoderConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=8, num_heads=4)
    shapes = abstract_params(config)
    save_params(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes), config, tmp_path / "model")
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    largest = 4 * 1024 * 256
    here = {id(array) for array in jax.live_arrays()}
    alive = []
    read = hf_file._read

    def watched(*arguments):
        alive.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in here))
        return read(*arguments)

    monkeypatch.setattr(hf_file, "_read", watched)
    params = load_params(tmp_path / "model", config)
    assert len(alive) == 3 + 9 * 8  # every tensor was read once
    assert max(alive) <= total + largest
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total


def test_the_dtype_may_be_chosen(params, originals):
    found = load_params(originals / "single", CONFIG, dtype="bfloat16")
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def missing(tensors):
    del tensors[UP]


def extra(tensors):
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors[UP]


def misshapen(tensors):
    tensors[UP] = np.ascontiguousarray(tensors[UP].T)


def integers(tensors):
    tensors[UP] = tensors[UP].astype(np.int8)


def headless(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (missing, f"model: tensor {UP} is missing"),
        (extra, "model: tensor model.layers.3.mlp.up_proj.weight is not part of a qwen2"),
        (misshapen, f"model.safetensors: tensor {UP} has shape (16, 24), config.json asks for (24, 16)"),
        (integers, f"model.safetensors: tensor {UP} is I8; only F64, F32, F16, BF16 are weights"),
        (headless, "tensor lm_head.weight is missing; if the head is the embedding, config.json must say tie_word"),
        (lambda tensors: tensors.clear(), "and 31 more are missing"),
    ],
)
def test_wrong_tensors_are_errors_by_name(single, edit, message):
    change(single, edit)
    with pytest.raises(ModelFileError) as caught:
        load_params(single, CONFIG)
    assert message in str(caught.value)


def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(single):
    def tied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    config = replace(CONFIG, tie_word_embeddings=True)
    with pytest.raises(ModelFileError, match=r"ties the head.*but lm_head.weight differs from model.embed_tokens"):
        load_params(single, config)
    change(single, tied)
    assert "lm_head" not in load_params(single, config)


def test_rotary_tables_of_old_files_are_passed_over(single, params):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(single, lambda tensors: tensors.update({name: np.ones(2, np.float32)}))
    assert_same(load_params(single, CONFIG), params)


@pytest.mark.parametrize(
    "file", ["../model/model-00001-of-00006.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors",
             "..\\x.safetensors", "weights.bin", 3, None]
)  # fmt: skip
def test_an_index_cannot_leave_its_directory(sharded, file):
    change_index(sharded, lambda weight_map: weight_map.update({UP: file}))
    with pytest.raises(ModelFileError, match=f"tensor '{UP}' is said to be in .*, which is no file name here"):
        load_params(sharded, CONFIG)


def test_an_index_and_its_files_must_agree(sharded, originals):
    index = "model.safetensors.index.json"
    weight_map = json.loads((sharded / index).read_text())["weight_map"]
    others = [file for file in sorted(set(weight_map.values())) if file != weight_map[UP]]

    def refused(edit, message):
        shutil.copy(originals / "sharded" / index, sharded / index)
        change_index(sharded, edit)
        with pytest.raises(ModelFileError, match=message):
            load_params(sharded, CONFIG)

    refused(lambda m: m.update({UP: others[0]}), f"the index promises .*{UP}.* in vain|does not know .*{UP}")
    refused(lambda m: m.pop(UP), f"{weight_map[UP]}: the index promises .* and does not know .*{UP}")
    refused(lambda m: m.update({"x": others[0]}), f"{others[0]}: the index promises \\['x'\\] in vain")
    refused(lambda m: m.update({UP: "absent.safetensors"}), f"'{UP}' is said to be in absent.safetensors, .* missing")
    refused(lambda m: m.clear(), "'weight_map' must be an object")
    shutil.copy(originals / "sharded" / index, sharded / index)
    twice = load_file(sharded / others[0])
    twice[UP] = load_file(sharded / weight_map[UP])[UP]
    save_file(twice, sharded / others[0])  # one tensor in two files: which one counts?
    with pytest.raises(ModelFileError, match=f"{others[0]}: .* does not know .*{UP}"):
        load_params(sharded, CONFIG)


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-10], lambda raw: b"\xff" * 16 + raw[16:]])
def test_a_damaged_file_is_an_error(single, damage):
    path = single / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFileError, match="model.safetensors: not a readable safetensors file"):
        load_params(single, CONFIG)


def test_pickles_are_never_opened(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="pytorch_model.bin is a pickle and is never opened"):
        load_params(single, CONFIG)
    (single / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFileError, match="neither model.safetensors nor model.safetensors.index.json is there$"):
        load_params(single, CONFIG)


def test_nothing_is_overwritten_and_nothing_half_written(params, single, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="not empty"):
        save_params(params, CONFIG, single)
    with pytest.raises(ValueError, match="parameter norm/scale is missing"):
        save_params({**params, "norm": {}}, CONFIG, tmp_path / "new")
    with pytest.raises(ValueError, match=r"norm/scale has shape \(3,\), the config asks for \(16,\)"):
        save_params({**params, "norm": {"scale": jnp.ones(3)}}, CONFIG, tmp_path / "new")
    with pytest.raises(ValueError, match=r"parameters \['more'\] have no place"):
        save_params({**params, "more": jnp.ones(3)}, CONFIG, tmp_path / "new")
    with pytest.raises(ModelFileError, match="describes another model"):
        save_params(params, replace(CONFIG, rope_theta=5.0), tmp_path / "new", single)

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(hf_file, "save_tensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_params(params, CONFIG, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("max_shard_bytes", [4000, 10**9], ids=["sharded", "single"])
def test_every_file_has_the_permissions_of_the_users_umask(params, single, tmp_path, max_shard_bytes):
    """Of the weights too, which safetensors alone keeps private, and of tokenizer files whose source was private."""
    (single / "tokenizer.json").write_text("{}")
    (single / "tokenizer.json").chmod(0o600)
    before = os.umask(0o027)
    try:
        save_params(params, CONFIG, tmp_path / "new", single, max_shard_bytes)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert {"config.json", "tokenizer.json"} < modes.keys()
    assert set(modes.values()) == {0o640}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750


def test_a_config_that_no_file_can_express_is_refused():
    for impossible in ({"model_type": "llama"}, {"qk_norm": True}, {"qkv_bias": False}, {"o_bias": True}):
        with pytest.raises(ValueError, match="config.json cannot express this config"):
            config_to_hf(replace(CONFIG, **impossible))
    with pytest.raises(ValueError, match="'gpt2' is not one of .*llama"):
        config_to_hf(replace(CONFIG, model_type="gpt2"))
