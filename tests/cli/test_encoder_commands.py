"""Every command on an encoder: a classifier trained with its adapter, judged, merged, exported, read elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bert as tiny
from safetensors.numpy import load_file

from mor_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run_json(capsys, *words, code=0):
    found = main([*words, "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out)


def run_bad(capsys, *words):
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return tiny.write_pairs(folder / "train.jsonl", 160, 0), tiny.write_pairs(folder / "test.jsonl", 40, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder, data):
    """A run folder of `mor train`."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    words = ["--model", encoder, "--data", data[0], "--eval-data", data[1], "--output-dir", out, "--method", "lora"]
    words += ["--objective", "classification", "--targets", "query,value,dense", "--rank", "4", "--steps", "60"]
    words += ["--batch-size", "16", "--accumulate", "2", "--learning-rate", "1e-2", "--mesh", "data=1"]
    assert main(["train", *words, "--json"]) == 0
    return out


def test_training_beats_chance_by_far(capsys, run, data):
    metrics = run_json(capsys, "eval", run, "--data", data[1], "--task", "classification")["metrics"]
    assert metrics["examples"] == 40
    assert metrics["accuracy"] >= 0.9
    assert {"accuracy/first", "accuracy/second", "macro_f1"} <= metrics.keys()
    last = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])
    np.testing.assert_allclose(last["eval_loss"], metrics["loss"], rtol=1e-4)
    assert last["tokens"] == 16  # examples of a step
    described = json.loads((Path(run) / "adapter" / "adapter.json").read_text())
    assert described["trained_modules"] == ["classifier"]


def test_accumulation_equals_one_batch(capsys, tmp_path, encoder, data):
    """With plain gradient descent, what moves is the gradient; texts of all lengths, and a head that is trained too."""
    found = {}
    for parts in ("1", "4"):
        out = tmp_path / parts
        words = ["--model", encoder, "--data", data[0], "--output-dir", str(out), "--method", "lora", "--rank", "2"]
        words += ["--objective", "classification", "--targets", "query", "--steps", "2", "--batch-size", "16"]
        words += ["--optimizer", "sgd", "--learning-rate", "1", "--schedule", "constant", "--mesh", "data=1"]
        result = run_json(capsys, "train", *words, "--accumulate", parts)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found[parts] = load_file(out / "adapter" / "adapter.safetensors"), [line["loss"] for line in lines], result
    np.testing.assert_allclose(found["4"][1], found["1"][1], rtol=1e-5)
    whole, parts = found["1"][0], found["4"][0]
    assert whole.keys() == parts.keys()
    assert {"classifier/kernel", "classifier/bias"} < whole.keys()
    assert np.abs(whole["classifier/bias"]).max() > 0.01  # it began at zero
    assert all(value.any() for value in whole.values())
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, atol=1e-5, rtol=0, err_msg=name)


def test_the_merged_model_is_a_classifier_of_transformers(capsys, tmp_path, run, data):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = str(tmp_path / "merged")
    result = run_json(capsys, "merge", run, "--output-dir", out)
    assert result["exact"] is True
    assert result["max_logit_difference"] < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    records = [json.loads(line) for line in Path(data[1]).read_text().splitlines()]
    assert model.config.id2label == {0: "first", 1: "second"}
    batch = tokenizer(
        [r["sentence1"] for r in records], [r["sentence2"] for r in records], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**batch).logits
    truth = torch.tensor([model.config.label2id[r["label"]] for r in records])
    ours = run_json(capsys, "eval", run, "--data", data[1], "--task", "classification")["metrics"]
    np.testing.assert_allclose(ours["loss"], torch.nn.functional.cross_entropy(logits, truth).item(), rtol=1e-4)
    assert ours["accuracy"] == pytest.approx((logits.argmax(-1) == truth).float().mean().item())
    assert run_json(capsys, "eval", out, "--data", data[1], "--task", "classification")["metrics"] == pytest.approx(
        ours, rel=1e-4
    )
    assert run_json(capsys, "verify", out)["ok"] is True


@pytest.mark.oracle
@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT asks transformers by its old name
@pytest.mark.parametrize(("kind", "reader"), [("hf", "transformers"), ("peft", "peft"), ("safetensors", "mor_jax")])
def test_exports_compute_the_same_elsewhere(capsys, tmp_path, run, kind, reader):
    if reader != "mor_jax":
        pytest.importorskip("peft" if reader == "peft" else "torch")
    result = run_json(capsys, "export", run, "--output-dir", str(tmp_path / kind), "--format", kind, "--verify")
    assert result["verified"] is True
    assert result["verified_with"] == reader
    assert result["max_logit_difference"] < 1e-4


def test_a_routed_merge_is_measured_on_classes(capsys, tmp_path, encoder, data):
    out = str(tmp_path / "run")
    words = ["--model", encoder, "--data", data[0], "--output-dir", out, "--method", "mor", "--num-experts", "2"]
    words += [
        "--objective",
        "classification",
        "--targets",
        "query",
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--mesh",
        "data=1",
    ]
    assert run_json(capsys, "train", *words)["steps"] == 2
    result = run_json(
        capsys, "merge", out, "--output-dir", str(tmp_path / "merged"), "--gates", "mean", "--batches", "2"
    )
    assert result["exact"] is False
    assert result["tokens"] == 8  # rows


def test_inspect_names_the_sites(capsys, encoder):
    result = run_json(capsys, "inspect", encoder, "--method", "lora", "--rank", "2", "--targets", "query,output.dense")
    assert [site["path"] for site in result["sites"]] == [
        "encoder/layer/attention/self/query",
        "encoder/layer/attention/output/dense",
        "encoder/layer/output/dense",
    ]
    assert result["trainable_parameters"] == 2 * 2 * (2 * (32 + 32) + (48 + 32))


def test_what_encoders_cannot_do_is_refused(capsys, tmp_path, encoder, model_dir, data):
    assert "needs a decoder" in run_bad(capsys, "generate", encoder, "--prompt", "x")
    assert "needs a decoder" in run_bad(capsys, "eval", encoder, "--data", data[1])
    assert "no classification head" in run_bad(capsys, "eval", encoder, "--data", data[1], "--task", "classification")
    out = str(tmp_path / "out")
    for model, objective, named in ((encoder, "causal", "classification"), (model_dir, "classification", "causal")):
        words = ["--model", model, "--data", data[0], "--output-dir", out, "--objective", objective]
        assert f"use {named}" in run_bad(capsys, "train", *words)
    bad = tmp_path / "bad.jsonl"
    for record, named in (
        ({"text": "house", "label": 1.5}, "bad.jsonl:2"),
        ({"label": 1}, "sentence1"),
        ({"text": "house", "label": "third"}, "third"),
    ):
        bad.write_text(json.dumps({"text": "boat", "label": "first"}) + "\n" + json.dumps(record) + "\n")
        words = ["--model", encoder, "--data", str(bad), "--output-dir", out, "--objective", "classification"]
        assert named in run_bad(capsys, "train", *words, "--labels", "first,second")
    assert not Path(out).exists()
