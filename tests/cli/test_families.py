"""Every command on one model of every family; transformers reads what was trained, merged and exported.

The oracle of a merge is made here, in torch: the base's own weights, to each of which the product of the two factors
in the adapter file is added, and the head that lies there.
"""

import json
import os
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
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

RANK, ALPHA = 2, 8.0
LORA = ("--method", "lora", "--rank", str(RANK), "--alpha", str(ALPHA))
TRAINING = ("--steps", "3", "--mesh", "data=1", "--learning-rate", "0.05")
LABELS = {"id2label": {0: "first", 1: "second"}, "label2id": {"first": 0, "second": 1}}
KEYS = {
    "inspect": {"sites", "trainable_parameters", "frozen_parameters"},
    "train": {"steps", "loss", "trainable_parameters", "tokens_per_second"},
    "eval": {"metrics"},
    "merge": {"exact", "max_logit_difference", "kl"},
    "export": {"verified", "max_logit_difference"},
    "generate": {"text", "tokens"},
    "verify": {"ok", "bad"},
}


@pytest.fixture(autouse=True)
def umask():
    """One that no default is like."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def run_json(capsys, *words):
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out)
    assert set(result) >= KEYS[words[0]]
    return result


def weight_of(name):
    """The torch name of a leaf of ours that is not stacked."""
    module, _, leaf = name.replace("/", ".").rpartition(".")
    return f"{module}.{'weight' if leaf == 'kernel' else leaf}"


def merge_by_hand(model, run):
    """Adds to the weights of the torch model what the run's adapter file says; returns how many of them it changed."""
    tensors = load_file(Path(run) / "adapter" / "adapter.safetensors")
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    changed = 0
    for path in sorted({name.removesuffix("/a") for name in tensors if name.endswith("/a")}):
        deltas = ALPHA / RANK * tensors.pop(f"{path}/a") @ tensors.pop(f"{path}/b")
        stack = "/layers/" if path.startswith("layers/") else "/layer/"
        for layer, delta in enumerate(deltas if deltas.ndim == 3 else [deltas]):
            module = f"/{path}".replace(stack, f"{stack}{layer}/").replace("/", ".")
            (name,) = [name for name in own if f".{name}".endswith(f"{module}.weight")]
            own[name] += torch.tensor(delta.T)
            changed += 1
    for name, value in tensors.items():  # modules that were trained whole
        own[weight_of(name)].copy_(torch.tensor(value.T))
    return changed


def logits_of(model, batch):
    with torch.inference_mode():
        return model.eval()(**batch).logits.numpy()


def merge_and_export(capsys, folder, run):
    """Folders of `mor merge` and `mor export --verify`, whose figures are those of an exact merge."""
    merged, exported = str(folder / "merged"), str(folder / "exported")
    result = run_json(capsys, "merge", run, "--output-dir", merged)
    assert result["exact"] is True
    assert result["max_logit_difference"] < 1e-4
    assert result["kl"] < 1e-6
    result = run_json(capsys, "export", run, "--output-dir", exported, "--verify")
    assert (result["verified"], result["verified_with"]) == (True, "transformers")
    assert result["max_logit_difference"] < 1e-4
    for each in (run, merged, exported):
        assert run_json(capsys, "verify", each)["ok"] is True
        written = [path for path in Path(each).rglob("*") if path.is_file()]
        assert {oct(path.stat().st_mode & 0o777) for path in written} == {"0o640"}
    return merged, exported


@pytest.mark.parametrize("family", families.DECODERS)
def test_decoders(capsys, tmp_path, family):
    model, run = families.make_family(family, tmp_path / "model"), str(tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    listed = run_json(capsys, "inspect", model, *LORA)
    assert len(listed["sites"]) * base.config.num_hidden_layers == len(linear)
    assert listed["trainable_parameters"] == RANK * sum(sum(module.weight.shape) for module in linear.values())
    assert listed["frozen_parameters"] == sum(parameter.numel() for parameter in base.parameters())
    assert (listed["mergeable"], listed["exportable"]) == ("exact", ["hf", "peft", "safetensors"])

    chosen = [module for name, module in linear.items() if name.endswith(("q_proj", "down_proj"))]
    words = ("--model", model, "--data", tiny_llama.write_records(tmp_path / "add.jsonl"), "--output-dir", run)
    sizes = ("--batch-size", "2", "--sequence-length", "32", "--targets", "q_proj,down_proj")
    trained = run_json(capsys, "train", *words, *sizes, *LORA, *TRAINING)
    assert trained["steps"] == 3
    assert np.isfinite(trained["loss"])
    assert trained["trainable_parameters"] == RANK * sum(sum(module.weight.shape) for module in chosen)

    folders = merge_and_export(capsys, tmp_path, run)
    batch = {"input_ids": torch.as_tensor(np.random.default_rng(0).integers(2, 258, (2, 24)))}
    before = logits_of(base, batch)
    assert merge_by_hand(base, run) == len(chosen)
    expected = logits_of(base, batch)
    assert np.abs(expected - before).max() > 0.05  # training moved what is compared
    for folder in folders:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        np.testing.assert_allclose(logits_of(theirs, batch), expected, atol=1e-4, rtol=0)
    assert_writes_as(base, capsys, run, folders[1])


def assert_writes_as(theirs, capsys, run, exported):
    """`mor generate --greedy` on the run, out of its cache, writes what transformers' model does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("add 10:", return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        whole = theirs.generate(**prompt, do_sample=False, max_new_tokens=8, pad_token_id=0)
    new = whole[0, prompt["input_ids"].shape[1] :]
    written = run_json(capsys, "generate", run, "--prompt", "add 10:", "--max-new-tokens", "8", "--greedy")
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert written == {"text": text, "tokens": len(new), "token_ids": new.tolist()}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize(("family", "scope"), [("gemma2", "site"), ("gemma3", "block")])
def test_routed_ranks_of_a_gemma(capsys, tmp_path, family, scope):
    """Trained, merged as the LoRA that imitates the gates, and the same LoRA read by PEFT on transformers' Gemma."""
    peft = pytest.importorskip("peft")
    model, run = families.make_family(family, tmp_path / "model"), str(tmp_path / "run")
    method = ("--method", "mor", "--rank", "3", "--alpha", "12", "--num-experts", "4", "--options", f"scope={scope}")
    words = ("--model", model, "--data", tiny_llama.write_records(tmp_path / "add.jsonl"), "--output-dir", run)
    trained = run_json(capsys, "train", *words, "--batch-size", "2", "--sequence-length", "32", *method, *TRAINING)
    assert np.isfinite(trained["loss"])

    gates = ("--gates", "least_squares", "--rank", "6", "--batches", "2")
    merged, exported, adapter = (str(tmp_path / name) for name in ("merged", "exported", "adapter"))
    result = run_json(capsys, "merge", run, "--output-dir", merged, *gates)
    assert result["exact"] is False
    assert 0 < result["kl"] < 0.05
    for folder, form in ((exported, "hf"), (adapter, "peft")):
        result = run_json(capsys, "export", run, "--output-dir", folder, "--format", form, "--verify", *gates)
        assert result["verified"] is True

    read = transformers.AutoModelForCausalLM.from_pretrained
    batch = {"input_ids": torch.as_tensor(np.random.default_rng(0).integers(2, 258, (2, 24)))}
    expected = logits_of(read(merged, attn_implementation="eager"), batch)
    base = read(model, attn_implementation="eager")
    assert np.abs(expected - logits_of(base, batch)).max() > 0.05  # training moved what is compared
    for theirs in (read(exported, attn_implementation="eager"), peft.PeftModel.from_pretrained(base, adapter)):
        np.testing.assert_allclose(logits_of(theirs, batch), expected, atol=1e-4, rtol=0)
    written = run_json(capsys, "generate", run, "--prompt", "add 10:", "--max-new-tokens", "8", "--greedy")
    assert 0 < written["tokens"] <= 8


@pytest.mark.parametrize("family", families.ENCODERS)
def test_encoders(capsys, tmp_path, family):
    model, run = families.make_family(family, tmp_path / "model"), str(tmp_path / "run")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, **LABELS)
    sizes = {name: parameter.numel() for name, parameter in base.named_parameters()}
    head = sum(size for name, size in sizes.items() if name.startswith("classifier."))
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith("class")}
    listed = run_json(capsys, "inspect", model, *LORA)
    assert listed["trainable_parameters"] == RANK * sum(sum(module.weight.shape) for module in linear.values())
    assert listed["frozen_parameters"] == sum(sizes.values()) - head

    chosen = [module for name, module in linear.items() if name.endswith(("query", "output.dense"))]
    words = ("--model", model, "--data", tiny_bert.write_pairs(tmp_path / "train.jsonl", 24, 0), "--output-dir", run)
    words += ("--objective", "classification", "--batch-size", "8", "--targets", "query,output.dense")
    trained = run_json(capsys, "train", *words, *LORA, *TRAINING)
    assert trained["steps"] == 3
    assert trained["trainable_parameters"] == head + RANK * sum(sum(module.weight.shape) for module in chosen)

    folders = merge_and_export(capsys, tmp_path, run)
    tensors = load_file(Path(run) / "adapter" / "adapter.safetensors")
    new = {name: value for name, value in tensors.items() if name.startswith("classifier/")}
    assert sum(value.size for value in new.values()) == head
    for folder in folders:
        weights = load_file(Path(folder) / "model.safetensors")
        for name, value in new.items():
            np.testing.assert_array_equal(weights[weight_of(name)], value.T)
    assert merge_by_hand(base, run) == len(chosen)
    assert_judges_as(base, capsys, tiny_bert.write_pairs(tmp_path / "test.jsonl", 20, 1), run, folders)
    assert main(["generate", run, "--prompt", "x", "--json"]) == 2
    assert "needs a decoder" in capsys.readouterr().err


def assert_judges_as(theirs, capsys, held_out, run, folders):
    """Merged folders have the logits of transformers' model, and `mor eval` its accuracy and its loss."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1])
    records = [json.loads(line) for line in Path(held_out).read_text().splitlines()]
    pairs = [[record[name] for record in records] for name in ("sentence1", "sentence2")]
    batch = tokenizer(*pairs, padding=True, return_tensors="pt")
    truth = torch.tensor([LABELS["label2id"][record["label"]] for record in records])
    expected = logits_of(theirs, batch)
    for folder in folders:
        read = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert read.config.id2label == LABELS["id2label"]
        np.testing.assert_allclose(logits_of(read, batch), expected, atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(torch.tensor(expected), truth).item()
    accuracy = (expected.argmax(-1) == truth.numpy()).mean()
    for asked in (run, folders[1]):
        metrics = run_json(capsys, "eval", asked, "--data", held_out, "--task", "classification")["metrics"]
        assert metrics["accuracy"] == pytest.approx(accuracy)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
