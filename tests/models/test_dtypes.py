"""The dtypes of saved tensors: the base's own, one for all, or that of the leaf; ml_dtypes rounds as they should."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mor_jax.models import (
    DecoderConfig,
    DtypeRangeError,
    abstract_params,
    load_params,
    round_params,
    save_params,
    stored_dtypes,
    written_dtypes,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = DecoderConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4)
F32, BF16, F16 = np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("float16")


def own_dtype(name):
    """Norms in float32, one layer in float16, the rest in bfloat16."""
    return F32 if "norm" in name else F16 if "layers.1." in name else BF16


def random_params(scale=1.0):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype), abstract_params(CONFIG)
    )


def read(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(a directory of several dtypes, its parameters in float32, its tensors in float32)."""
    folder = tmp_path_factory.mktemp("mixed")
    params = random_params()
    save_params(params, CONFIG, folder / "whole")
    whole = read(folder / "whole")
    save_params(params, CONFIG, folder / "base")
    tensors = {name: value.astype(own_dtype(name)) for name, value in whole.items()}
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", params, whole


@pytest.mark.parametrize("max_shard_bytes", [4000, 10**9])
def test_each_tensor_is_rounded_to_the_dtype_that_it_has_in_the_source(mixed, tmp_path, max_shard_bytes):
    base, params, whole = mixed
    save_params(params, CONFIG, tmp_path / "out", base, max_shard_bytes)
    found = read(tmp_path / "out")
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert found[name].dtype == own_dtype(name)
        np.testing.assert_array_equal(found[name], value.astype(own_dtype(name)), err_msg=name)
    if max_shard_bytes == 4000:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        sizes = [sum(value.nbytes for value in load_file(file).values()) for file in (tmp_path / "out").glob("*-of-*")]
        assert max(sizes) <= 4000
    else:
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("scan_layers", [True, False])
def test_stored_parameters_are_loaded_and_rounded_without_loss(mixed, scan_layers):
    base, _, whole = mixed
    config = replace(CONFIG, scan_layers=scan_layers)
    stored = load_params(base, config, dtype="stored")
    if scan_layers:  # a layer in float16 beside others in bfloat16: float32 holds them all
        assert {leaf.dtype for leaf in jax.tree.leaves(stored["layers"])} == {F32}
    else:
        kernels = [stored[f"layers_{layer}"]["mlp"]["up_proj"]["kernel"] for layer in range(3)]
        assert [kernel.dtype for kernel in kernels] == [BF16, F16, BF16]
    assert (stored["norm"]["scale"].dtype, stored["embed_tokens"]["embedding"].dtype) == (F32, BF16)
    wide = load_params(base, config, dtype="float32")
    for rounded in (stored, round_params(wide, config, stored_dtypes(base, config))):
        for ours, theirs in zip(jax.tree.leaves(rounded), jax.tree.leaves(wide), strict=True):
            np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = whole[name].T.astype(F16)
    rows = stored["layers"]["mlp"]["up_proj"]["kernel"][1] if scan_layers else kernels[1]
    np.testing.assert_array_equal(np.asarray(rows, F16), expected)


def test_small_numbers_are_rounded_to_the_nearest_of_float16(tmp_path):
    """Most weights of 1e-6 and less are subnormal there, and no device may flush them."""
    params = random_params(scale=3e-7)
    for tree in (params, jax.tree.map(np.asarray, params)):
        rounded = round_params(tree, CONFIG, written_dtypes(CONFIG, dtype="float16"))
        for ours, theirs in zip(jax.tree.leaves(rounded), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(ours, np.asarray(theirs).astype(F16))
    save_params(params, CONFIG, tmp_path / "out", dtype="float16")
    stored = load_params(tmp_path / "out", CONFIG, dtype="float32")
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32)), stored, rounded
    )


def test_numbers_in_float64_are_read_and_written_in_float32(mixed, tmp_path):
    base, params, whole = mixed
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((base / "config.json").read_text())
    save_file(
        {name: value.astype(np.float64) for name, value in whole.items()}, tmp_path / "base" / "model.safetensors"
    )
    assert set(stored_dtypes(tmp_path / "base", CONFIG).values()) == {F32}
    stored = load_params(tmp_path / "base", CONFIG, dtype="stored")
    save_params(stored, CONFIG, tmp_path / "out", tmp_path / "base")
    for name, value in read(tmp_path / "out").items():
        assert value.dtype == F32
        np.testing.assert_array_equal(value, whole[name])


def test_what_config_json_says_of_the_dtype(mixed, tmp_path):
    base, params, _ = mixed
    path = base / "config.json"
    before = json.loads(path.read_text())
    plain = {name: value for name, value in before.items() if name != "torch_dtype"}
    cases = {  # of the base -> of an export in its dtypes, of one in bfloat16
        "none": ({}, {}, {"torch_dtype": "bfloat16"}),
        "old": ({"torch_dtype": "float16"}, {"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        "new": ({"dtype": "float16"}, {"dtype": "float16"}, {"dtype": "bfloat16"}),
    }
    for case, (own, kept, chosen) in cases.items():
        path.write_text(json.dumps(plain | own))
        for dtype, expected in ((None, kept), ("bfloat16", chosen)):
            save_params(params, CONFIG, tmp_path / f"{case}-{dtype}", base, dtype=dtype)
            assert json.loads((tmp_path / f"{case}-{dtype}" / "config.json").read_text()) == plain | expected
    path.write_text(json.dumps(before))


def test_without_weights_to_follow_each_tensor_keeps_the_dtype_of_its_leaf(mixed, tmp_path):
    base, params, _ = mixed
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text((base / "config.json").read_text())
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    halves = {**halves, "norm": params["norm"]}
    for name, source in (("alone", None), ("described", tmp_path / "source")):
        save_params(halves, CONFIG, tmp_path / name, source)
        dtypes = {tensor: value.dtype for tensor, value in read(tmp_path / name).items()}
        assert dtypes.pop("model.norm.weight") == F32
        assert set(dtypes.values()) == {BF16}
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == "bfloat16"  # of most numbers


def test_what_cannot_be_written_is_refused(mixed, tmp_path):
    base, params, _ = mixed
    with pytest.raises(ValueError, match="dtype='int8': weights are written in float32, float16, bfloat16"):
        save_params(params, CONFIG, tmp_path / "out", base, dtype="int8")
    large = {**params, "norm": {"scale": params["norm"]["scale"].at[2].set(7e4)}}
    with pytest.raises(DtypeRangeError, match=r"model.norm.weight: .*float16, \+-65504"):
        save_params(large, CONFIG, tmp_path / "out", base, dtype="float16")
    with pytest.raises(DtypeRangeError, match="norm/scale: "):
        round_params(large, CONFIG, written_dtypes(CONFIG, dtype="float16"))
    save_params(large, CONFIG, tmp_path / "out", base, dtype="bfloat16")
