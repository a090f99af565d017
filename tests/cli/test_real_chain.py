"""Every command on the real models, where they are: two steps of training, an export that transformers reads, text."""

import json

import pytest
import tiny_bert
import tiny_llama

from mor_jax.cli.main import main
from tests.models.real_models import model_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

METHOD = ("--method", "lora", "--rank", "2")
LORA = (*METHOD, "--steps", "2", "--mesh", "data=1", "--learning-rate", "0.01")
SMOLLM2 = pytest.param("smollm2", marks=pytest.mark.slow)  # 135 million parameters, read five times
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]


def run_json(capsys, *words):
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def exported(capsys, folder, run):
    """The folder of `mor export --verify`."""
    result = run_json(capsys, "export", run, "--output-dir", str(folder / "exported"), "--verify", "--batches", "1")
    assert (result["verified"], result["verified_with"]) == (True, "transformers")
    assert result["max_logit_difference"] < 1e-3
    assert result["fidelity"]["exact"] is True
    return str(folder / "exported")


def merge_exactly(capsys, folder, run):
    result = run_json(capsys, "merge", run, "--output-dir", str(folder / "merged"), "--batches", "1")
    assert result["exact"] is True
    assert result["kl"] < 1e-5
    assert result["tokens"] > 0


@pytest.mark.parametrize("name", ["stories260k", SMOLLM2])
def test_decoders(capsys, tmp_path, name):
    model, run = model_folder(name), str(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    golden = json.loads((model / "golden.json").read_text(encoding="utf-8"))
    frozen, golden = golden["parameters"], golden["prompts"][0]
    start = len(golden["input_ids"])
    asked = ("--prompt", golden["text"], "--max-new-tokens", "12", "--greedy")
    told = run_json(capsys, "generate", str(model), *asked)
    known = golden["greedy_ids"][start : start + 12]
    text = tokenizer.decode(known, skip_special_tokens=True)
    assert told == {"text": text, "tokens": len(known), "token_ids": known}

    listed = run_json(capsys, "inspect", str(model), *METHOD)
    assert listed["frozen_parameters"] == frozen
    assert listed["mergeable"] == "exact"

    words = ("--model", str(model), "--data", tiny_llama.write_records(tmp_path / "add.jsonl"), "--output-dir", run)
    sizes = ("--batch-size", "2", "--sequence-length", "32", "--targets", "v_proj,down_proj")
    assert run_json(capsys, "train", *words, *sizes, *LORA)["steps"] == 2
    merge_exactly(capsys, tmp_path, run)
    folder = exported(capsys, tmp_path, run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ids = theirs.generate(torch.tensor([golden["input_ids"]]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    new = ids[0, start:]
    written = run_json(capsys, "generate", run, *asked)
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert written == {"text": text, "tokens": len(new), "token_ids": new.tolist()}
    assert written != told  # two steps of this rate are felt


@pytest.mark.slow
def test_minilm(capsys, tmp_path):
    model, run = model_folder("minilm"), str(tmp_path / "run")
    data = tiny_bert.write_pairs(tmp_path / "train.jsonl", 24, 0)
    listed = run_json(capsys, "inspect", str(model), *METHOD)
    assert listed["frozen_parameters"] == 22_713_216
    words = ("--model", str(model), "--data", data, "--output-dir", run, "--objective", "classification")
    trained = run_json(capsys, "train", *words, *LORA, "--batch-size", "8", "--targets", "query,value")
    assert trained["steps"] == 2
    assert trained["trainable_parameters"] == 6 * 2 * 2 * (384 + 384) + 384 * 2 + 2
    merge_exactly(capsys, tmp_path, run)
    folder = exported(capsys, tmp_path, run)
    asked = ("--data", tiny_bert.write_pairs(tmp_path / "test.jsonl", 20, 1), "--task", "classification")
    live = run_json(capsys, "eval", run, *asked)["metrics"]
    assert run_json(capsys, "eval", folder, *asked)["metrics"] == pytest.approx(live, rel=1e-4)
