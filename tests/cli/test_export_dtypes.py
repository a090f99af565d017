"""Exports in the dtype of the base: the oracle is NumPy's sum in float64, rounded once by ml_dtypes."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_bert
import tiny_llama as tiny
from commands import run_bad, run_json
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.usefixtures("quick_compilation")

F32, BF16, F16 = np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("float16")
UP = "model.layers.{}.mlp.up_proj.weight"
ALPHA_OVER_RANK = 8 / 4
KINDS = {  # which dtype a tensor of the base has
    "bfloat16": lambda name: BF16,
    "float16": lambda name: F16,
    "mixed": lambda name: F32 if "norm" in name else BF16,
    "by layer": lambda name: F16 if "layers.1." in name else F32 if name.startswith("lm_head") else BF16,
}


def make_base(source, folder, kind, key="torch_dtype"):
    """A copy of a float32 model whose tensors have the dtypes of `KINDS`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    with np.errstate(over="ignore"):
        tensors = {name: value.astype(KINDS[kind](name)) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values.pop("torch_dtype")
    values[key] = "float16" if kind == "float16" else "bfloat16"
    (folder / "config.json").write_text(json.dumps(values))
    return tensors


def merged_by_hand(tensors, run, dtypes):
    """The base's stored numbers plus the product of the factors, in float64, rounded to `dtypes(name)` at the end."""
    factors = load_file(Path(run) / "adapter" / "adapter.safetensors")
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    a, b = (factors[f"layers/mlp/up_proj/{key}"].astype(np.float64) for key in "ab")
    for layer in range(2):
        wide[UP.format(layer)] += (ALPHA_OVER_RANK * a[layer] @ b[layer]).T
    return {name: value.astype(F32).astype(dtypes(name)) for name, value in wide.items()}


def assert_holds(folder, expected):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    for name, value in expected.items():
        if value.dtype == F32:  # sums in another order
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def make_run(folder, base, **fields):
    return tiny.make_run(folder, str(base), method="lora", targets=("up_proj",), alpha=8.0, **fields)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, model_dir):
    """{kind: (tensors, directory, run trained in float32)}."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for kind in KINDS:
        base = folder / kind.replace(" ", "_")
        tensors = make_base(model_dir, base, kind, "dtype" if kind == "mixed" else "torch_dtype")
        found[kind] = tensors, base, make_run(folder / f"{base.name}_run", base)
    return found


@pytest.mark.parametrize(("command", "kind"), [("merge", "bfloat16"), *(("export", kind) for kind in KINDS)])
def test_each_tensor_has_the_bases_own_dtype(capsys, tmp_path, bases, kind, command):
    tensors, base, run = bases[kind]
    result = run_json(capsys, command, run, "--output-dir", tmp_path / "out")
    assert_holds(tmp_path / "out", merged_by_hand(tensors, run, KINDS[kind]))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    fidelity = result if command == "merge" else result["fidelity"]
    assert fidelity["max_logit_difference"] > 1e-5  # that of what is written, which is rounded
    if command == "export":  # both sides hold the rounded numbers, so that only the order of sums is left
        assert (result["verified"], result["tolerance"]) == (True, 1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("bfloat16", "float32"), ("bfloat16", "float16"), ("mixed", "bfloat16")])
def test_another_dtype_may_be_chosen(capsys, tmp_path, bases, kind, dtype):
    """One rounding, from the stored numbers: a bfloat16 base merged into float32 keeps all of the change."""
    tensors, base, run = bases[kind]
    result = run_json(capsys, "export", run, "--output-dir", tmp_path / "out", "--dtype", dtype)
    assert result["verified"] is True
    assert_holds(
        tmp_path / "out", merged_by_hand(tensors, run, lambda name: np.dtype(getattr(ml_dtypes, dtype, dtype)))
    )
    kept = json.loads((base / "config.json").read_text())
    key = "dtype" if kind == "mixed" else "torch_dtype"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == kept | {key: dtype}


HALVES = {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("kind", "fields"), [("float32", HALVES), ("float16", {"param_dtype": "bfloat16"}), ("mixed", HALVES)]
)
def test_what_training_rounded_is_taken_from_the_base_again(capsys, tmp_path, model_dir, bases, kind, fields):
    if kind == "float32":
        base, tensors, dtypes = Path(model_dir), load_file(Path(model_dir) / "model.safetensors"), lambda name: F32
    else:
        (tensors, base, _), dtypes = bases[kind], KINDS[kind]
    run = make_run(tmp_path / "run", base, **fields)
    result = run_json(capsys, "export", run, "--output-dir", tmp_path / "out")
    assert result["verified"] is True
    assert_holds(tmp_path / "out", merged_by_hand(tensors, run, dtypes))
    for form in ("peft", "safetensors"):
        result = run_json(capsys, "export", run, "--output-dir", tmp_path / form, "--format", form, "--verify")
        assert result["verified"] is True
        (file,) = (tmp_path / form).glob("*.safetensors")
        assert {value.dtype for value in load_file(file).values()} == {F32}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["mixed", "float16"])
def test_transformers_loads_the_export_as_it_does_the_base(capsys, tmp_path, bases, kind):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tensors, base, run = bases[kind]
    result = run_json(capsys, "export", run, "--output-dir", tmp_path / "out", "--verify")
    assert (result["verified"], result["verified_with"]) == (True, "transformers")
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base))
    assert {n: v.dtype for n, v in model.state_dict().items()} == {n: v.dtype for n, v in before.state_dict().items()}
    expected = merged_by_hand(tensors, run, KINDS[kind])
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name].astype(F32), err_msg=name)


def test_a_split_model_is_rounded_as_one_on_one_device(capsys, tmp_path, bases):
    tensors, _, run = bases["by layer"]
    result = run_json(capsys, "export", run, "--output-dir", tmp_path / "out", "--mesh", "data=2,fsdp=2,tensor=2")
    assert result["verified"] is True
    assert_holds(tmp_path / "out", merged_by_hand(tensors, run, KINDS["by layer"]))


def test_a_new_head_has_the_dtype_of_most_of_its_encoder(capsys, tmp_path):
    """Modules trained whole, the head and a norm, are rounded like the rest; in an adapter they stay as trained."""
    base = tmp_path / "base"
    tiny_bert.make_model(base)
    tensors = load_file(base / "model.safetensors")
    kept = {name: F32 if "LayerNorm" in name else F16 for name in tensors}
    rounded = {name: value.astype(kept[name]) for name, value in tensors.items()}
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    words = ("--model", base, "--data", tiny_bert.write_pairs(tmp_path / "train.jsonl", 24, 0), "--method", "lora")
    words = (*words, "--objective", "classification", "--targets", "query", "--trained-modules", "embeddings/LayerNorm")
    words = (*words, "--steps", "2", "--batch-size", "8", "--mesh", "data=1", "--output-dir", tmp_path / "run")
    run_json(capsys, "train", *words, "--learning-rate", "0.05")
    result = run_json(capsys, "export", tmp_path / "run", "--output-dir", tmp_path / "out")
    assert result["verified"] is True
    found = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert {value.dtype for value in trained.values()} == {F32}
    np.testing.assert_array_equal(found["classifier.weight"], trained["classifier/kernel"].T.astype(F16))
    norm = found["bert.embeddings.LayerNorm.weight"]
    np.testing.assert_array_equal(norm, trained["embeddings/LayerNorm/scale"])
    assert (norm != tensors["embeddings.LayerNorm.weight"]).any()
    assert {name: value.dtype for name, value in found.items()} == {
        **{f"bert.{name}": dtype for name, dtype in kept.items()},
        **dict.fromkeys(("classifier.weight", "classifier.bias"), F16),
    }


def test_numbers_beyond_float16_are_refused_by_the_name_of_the_tensor(capsys, tmp_path, bases):
    tensors, base, _ = bases["mixed"]
    shutil.copytree(base, tmp_path / "base")
    large = {**tensors, "model.norm.weight": np.full(32, 1e6, np.float32)}
    save_file(large, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", tmp_path / "base")
    for command in ("merge", "export"):
        error = run_bad(capsys, command, run, "--output-dir", tmp_path / "out", "--dtype", "float16")
        assert "norm/scale" in error
        assert "--dtype bfloat16" in error
        assert not (tmp_path / "out").exists()


def test_dtype_is_for_merged_models(capsys, tmp_path, bases):
    run = bases["bfloat16"][2]
    for form in ("peft", "safetensors"):
        words = ("export", run, "--output-dir", tmp_path / "out", "--format", form, "--dtype", "bfloat16")
        assert "--format hf" in run_bad(capsys, *words)
    assert "float64" in run_bad(capsys, "merge", run, "--output-dir", tmp_path / "out", "--dtype", "float64")
    assert not (tmp_path / "out").exists()
