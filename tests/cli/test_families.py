"""Every command on one model of every family; transformers reads what was trained, merged and exported.

The oracle of a merge is made here, in torch: the base's own weights, and to each the product of the two factors that
lie in the adapter file.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bert
import tiny_families as families
import tiny_llama
from safetensors.numpy import load_file

from mor_jax.cli.main import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

RANK, ALPHA = 2, 8.0
LORA = ("--method", "lora", "--rank", str(RANK), "--alpha", str(ALPHA))
TRAINING = ("--steps", "3", "--mesh", "data=1", "--learning-rate", "0.05")
KEYS = {
    "inspect": {"sites", "trainable_parameters", "frozen_parameters"},
    "train": {"steps", "loss", "trainable_parameters", "tokens_per_second"},
    "eval": {"metrics"},
    "merge": {"exact", "max_logit_difference", "kl"},
    "export": {"verified", "max_logit_difference"},
    "generate": {"text", "tokens"},
    "verify": {"ok", "bad"},
}


def run_json(capsys, *words):
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out)
    assert set(result) >= KEYS[words[0]]
    return result


def merged_by_hand(model, run):
    """Adds to each weight of the torch model what the run's adapter file says, and returns how many it changed."""
    tensors = load_file(Path(run) / "adapter" / "adapter.safetensors")
    own = dict(model.named_parameters())
    changed = 0
    for path in sorted({name.removesuffix("/a") for name in tensors if name.endswith("/a")}):
        deltas = ALPHA / RANK * tensors.pop(f"{path}/a") @ tensors.pop(f"{path}/b")
        stack = "layers" if path.startswith("layers/") else "layer"
        for layer, delta in enumerate(deltas if f"{stack}/" in path else [deltas]):
            module = path.replace(f"{stack}/", f"{stack}/{layer}/").replace("/", ".")
            (name,) = [name for name in own if name.endswith(f"{module}.weight")]
            with torch.no_grad():
                own[name] += torch.tensor(delta.T)
            changed += 1
    for name, value in tensors.items():  # modules that were trained whole
        module, _, leaf = name.replace("/", ".").rpartition(".")
        weight = own[f"{module}.{'weight' if leaf == 'kernel' else leaf}"]
        with torch.no_grad():
            weight.copy_(torch.tensor(value.T))
    return changed


def logits_of(model, batch):
    with torch.inference_mode():
        return model.eval()(**batch).logits.numpy()


@pytest.mark.parametrize("family", families.DECODERS)
def test_decoders(capsys, tmp_path, family):
    model = families.make_family(family, tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    layers = base.config.num_hidden_layers
    linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    listed = run_json(capsys, "inspect", model, *LORA)
    assert {site["layers"] for site in listed["sites"]} == {layers}
    assert len(listed["sites"]) * layers == len(linear) == 7 * layers
    assert listed["trainable_parameters"] == RANK * sum(sum(module.weight.shape) for module in linear)
    assert listed["frozen_parameters"] == sum(parameter.numel() for parameter in base.parameters())
    assert (listed["mergeable"], listed["exportable"]) == ("exact", ["hf", "peft", "safetensors"])

    data, run = tiny_llama.write_records(tmp_path / "add.jsonl"), str(tmp_path / "run")
    words = ("--model", model, "--data", data, "--output-dir", run, "--batch-size", "2", "--sequence-length", "32")
    trained = run_json(capsys, "train", *words, *LORA, *TRAINING)
    assert trained["steps"] == 3
    assert np.isfinite(trained["loss"])
    assert trained["trainable_parameters"] == listed["trainable_parameters"]

    merged, exported = str(tmp_path / "merged"), str(tmp_path / "exported")
    result = run_json(capsys, "merge", run, "--output-dir", merged)
    assert result["exact"] is True
    assert result["max_logit_difference"] < 1e-4
    assert result["kl"] < 1e-6
    result = run_json(capsys, "export", run, "--output-dir", exported, "--verify")
    assert (result["verified"], result["verified_with"]) == (True, "transformers")
    assert result["max_logit_difference"] < 1e-4

    batch = {"input_ids": torch.as_tensor(np.random.default_rng(0).integers(2, 258, (2, 24)))}
    before = logits_of(base, batch)
    assert merged_by_hand(base, run) == len(linear)
    expected = logits_of(base, batch)
    assert np.abs(expected - before).max() > 0.05  # training moved what is compared
    for folder in (merged, exported):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        np.testing.assert_allclose(logits_of(theirs, batch), expected, atol=1e-4, rtol=0)
        assert run_json(capsys, "verify", folder)["ok"] is True

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("add 10:", return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        new = base.generate(**prompt, do_sample=False, max_new_tokens=8, pad_token_id=0)[
            0, prompt["input_ids"].shape[1] :
        ]
    written = run_json(capsys, "generate", run, "--prompt", "add 10:", "--max-new-tokens", "8", "--greedy")
    assert written == {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)}


@pytest.mark.parametrize("family", families.ENCODERS)
def test_encoders(capsys, tmp_path, family):
    model = families.make_family(family, tmp_path / "model")
    data = tiny_bert.write_pairs(tmp_path / "train.jsonl", 24, 0)
    held_out = tiny_bert.write_pairs(tmp_path / "test.jsonl", 20, 1)
    labels = {"id2label": {0: "first", 1: "second"}, "label2id": {"first": 0, "second": 1}}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, **labels)
    head = [p for n, p in base.named_parameters() if n.startswith("classifier.")]
    linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith("classifier")]
    listed = run_json(capsys, "inspect", model, *LORA)
    assert listed["trainable_parameters"] == RANK * sum(sum(module.weight.shape) for module in linear)
    assert listed["frozen_parameters"] == sum(p.numel() for p in base.parameters()) - sum(p.numel() for p in head)

    run = str(tmp_path / "run")
    words = (
        "--model",
        model,
        "--data",
        data,
        "--output-dir",
        run,
        "--batch-size",
        "8",
        "--objective",
        "classification",
    )
    trained = run_json(capsys, "train", *words, *LORA, *TRAINING)
    assert trained["steps"] == 3
    assert trained["trainable_parameters"] == listed["trainable_parameters"] + sum(p.numel() for p in head)

    merged, exported = str(tmp_path / "merged"), str(tmp_path / "exported")
    result = run_json(capsys, "merge", run, "--output-dir", merged)
    assert result["exact"] is True
    assert result["max_logit_difference"] < 1e-4
    result = run_json(capsys, "export", run, "--output-dir", exported, "--verify")
    assert (result["verified"], result["verified_with"]) == (True, "transformers")
    assert result["max_logit_difference"] < 1e-4
    tensors = load_file(Path(run) / "adapter" / "adapter.safetensors")
    new = {name: value for name, value in tensors.items() if name.startswith("classifier/")}
    assert sum(value.size for value in new.values()) == sum(p.numel() for p in head)
    weights = load_file(Path(exported) / "model.safetensors")
    for name, value in new.items():
        module, _, leaf = name.replace("/", ".").rpartition(".")
        np.testing.assert_array_equal(weights[f"{module}.{'weight' if leaf == 'kernel' else leaf}"], value.T)

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    records = [json.loads(line) for line in Path(held_out).read_text().splitlines()]
    pairs = [[record[name] for record in records] for name in ("sentence1", "sentence2")]
    batch = tokenizer(*pairs, padding=True, return_tensors="pt")
    truth = torch.tensor([labels["label2id"][record["label"]] for record in records])
    assert merged_by_hand(base, run) == len(linear)
    expected = logits_of(base, batch)
    for folder in (merged, exported):
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert theirs.config.id2label == labels["id2label"]
        np.testing.assert_allclose(logits_of(theirs, batch), expected, atol=1e-4, rtol=0)
        assert run_json(capsys, "verify", folder)["ok"] is True
    loss = torch.nn.functional.cross_entropy(torch.tensor(expected), truth).item()
    accuracy = (expected.argmax(-1) == truth.numpy()).mean()
    for asked in (run, exported):
        metrics = run_json(capsys, "eval", asked, "--data", held_out, "--task", "classification")["metrics"]
        assert metrics["accuracy"] == pytest.approx(accuracy)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)

    assert main(["generate", run, "--prompt", "x", "--json"]) == 2
    assert "needs a decoder" in capsys.readouterr().err
