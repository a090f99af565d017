"""Tokens that the model has not, and figures that are not finite, end every command with one line that names them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_bert
import tiny_llama as tiny
from safetensors.numpy import load_file, save_file

from mor_jax.cli.main import main
from mor_jax.training.integrity import write_manifest

pytestmark = pytest.mark.usefixtures("quick_compilation")
BEYOND = tiny.CONFIG.vocab_size  # the id of a token that is added to the tokenizer alone
TOKENS = len(tiny.make_tokenizer())


def failed(capsys, code, *words):
    """The one line that a command prints which ends with this code and no result."""
    found = main([*words, "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("mor: ")]
    assert "Traceback" not in captured.err
    return line


def add_tokens(directory, tokenizer, size):
    """Gives the tokenizer in a directory tokens up to one beyond the model's `size`: the last is `<beyond>`."""
    tokenizer.add_tokens([f"<more{number}>" for number in range(len(tokenizer), size)] + ["<beyond>"])
    assert tokenizer.convert_tokens_to_ids("<beyond>") == size
    tokenizer.save_pretrained(str(directory))


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A model whose tokenizer has a token more than the embedding."""
    directory = tmp_path_factory.mktemp("longer") / "model"
    tiny.make_model(directory)
    add_tokens(directory, tiny.make_tokenizer(), BEYOND)
    return str(directory)


@pytest.fixture(scope="module")
def longer_run(tmp_path_factory, longer):
    return tiny.make_run(tmp_path_factory.mktemp("run") / "run", longer, num_experts=3, targets=("up_proj",))


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path):
    ordinary = {"prompt": "a", "completion": "b"}
    asked = {"prompt": "a", "options": ["b", "c"], "answer": 0}
    return {
        "GOOD": lines(tmp_path / "good.jsonl", ordinary, ordinary | {"prompt": "c"}),
        "PAIRS": lines(tmp_path / "pairs.jsonl", ordinary, {"prompt": "x <beyond>", "completion": "b"}),
        "ANSWERS": lines(tmp_path / "answers.jsonl", ordinary, {"prompt": "x", "completion": "<beyond>"}),
        "OPTIONS": lines(tmp_path / "options.jsonl", asked, asked | {"options": ["b", "<beyond>"]}),
        "PROMPTS": lines(tmp_path / "prompts.jsonl", asked, asked | {"prompt": "<beyond>"}),
        "OUT": str(tmp_path / "out"),
    }


SAID = rf"token {BEYOND} \('<beyond>'\) is none of the model's, whose vocabulary has {BEYOND} "
MOR = ["--rank", "2", "--steps", "1", "--batch-size", "2", "--sequence-length", "16", "--mesh", "data=1"]


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["train", "--model", "MODEL", "--data", "PAIRS", "--output-dir", "OUT", *MOR], "pairs.jsonl:2"),
        (
            ["train", "--model", "MODEL", "--data", "GOOD", "--eval-data", "ANSWERS", "--output-dir", "OUT", *MOR],
            "answers.jsonl:2",
        ),
        (["eval", "MODEL", "--data", "PAIRS"], "pairs.jsonl:2"),
        (["eval", "RUN", "--data", "ANSWERS"], "answers.jsonl:2"),
        (["eval", "MODEL", "--data", "OPTIONS", "--task", "choice"], "options.jsonl:2"),
        (["eval", "MODEL", "--data", "PROMPTS", "--task", "choice"], "prompts.jsonl:2"),
        (["eval", "MODEL", "--data", "PAIRS", "--task", "generation"], "pairs.jsonl:2"),
        (["generate", "MODEL", "--prompt", "a <beyond>"], "--prompt"),
        (["generate", "RUN", "--prompt", "a <beyond>", "--chat"], "--prompt"),
        (["merge", "RUN", "--calibration", "PAIRS", "--output-dir", "OUT"], "pairs.jsonl:2"),
        (["export", "RUN", "--calibration", "ANSWERS", "--output-dir", "OUT"], "answers.jsonl:2"),
        (
            [
                "export",
                "RUN",
                "--format",
                "peft",
                "--gates",
                "distill",
                "--calibration",
                "PAIRS",
                "--output-dir",
                "OUT",
            ],
            "pairs.jsonl:2",
        ),
    ],
)
def test_a_token_beyond_the_embedding(capsys, longer, longer_run, files, words, place):
    import re

    places = files | {"MODEL": longer, "RUN": longer_run}
    line = failed(capsys, 2, *(places.get(word, word) for word in words))
    assert re.search(f"{place}: {SAID}", line), line
    assert not Path(files["OUT"]).exists()


def test_a_token_beyond_the_embedding_of_a_classifier(capsys, tmp_path):
    from mor_jax.models import with_head

    config = with_head(tiny_bert.CONFIG, ("a", "b"))
    tiny_bert.make_model(tmp_path / "model", config)
    add_tokens(tmp_path / "model", tiny_bert.make_tokenizer(), config.vocab_size)
    data = lines(tmp_path / "data.jsonl", {"text": "red", "label": "a"}, {"text": "red <beyond>", "label": "b"})
    words = ["--model", str(tmp_path / "model"), "--objective", "classification", "--targets", "query"]
    for line in (
        failed(capsys, 2, "eval", str(tmp_path / "model"), "--data", data, "--task", "classification"),
        failed(capsys, 2, "train", *words, "--data", data, "--output-dir", str(tmp_path / "out"), *MOR),
    ):
        assert f"data.jsonl:2: token {config.vocab_size} ('<beyond>') is none of the model's" in line


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, model_dir):
    """A model with one weight that is not a number."""
    directory = tmp_path_factory.mktemp("spoilt") / "model"
    shutil.copytree(model_dir, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        ("PAIRS", "perplexity", "pairs.jsonl, example 1: the loss is nan"),
        ("ASKED", "choice", "asked.jsonl:1: the log-likelihood of option 1 is nan"),
        ("PAIRS", "generation", "pairs.jsonl:1: the logits are not finite after 0 tokens"),
    ],
)
def test_an_evaluation_that_is_not_finite(capsys, tmp_path, spoilt, data, task, said):
    import re

    files = {
        "PAIRS": tiny.write_records(tmp_path / "pairs.jsonl", 3),
        "ASKED": lines(tmp_path / "asked.jsonl", *[{"prompt": "a", "options": ["b", "c"], "answer": 0}] * 3),
    }
    line = failed(capsys, 3, "eval", spoilt, "--data", files[data], "--task", task)
    assert re.search(said, line), line


def test_a_perplexity_that_overflows(capsys, tmp_path, model_dir, monkeypatch):
    from mor_jax.cli import evaluate

    monkeypatch.setattr(evaluate, "perplexity", lambda *_: {"loss": 800.0, "perplexity": float("inf"), "tokens": 1.0})
    data = tiny.write_records(tmp_path / "pairs.jsonl", 3)
    assert "pairs.jsonl: perplexity is inf" in failed(capsys, 3, "eval", model_dir, "--data", data)


@pytest.mark.parametrize("flags", [["--greedy"], ["--seed", "1"], ["--temperature", "0.5", "--top-p", "0.9"]])
def test_text_from_logits_that_are_not_finite(capsys, spoilt, flags):
    assert "not finite after 0 tokens" in failed(capsys, 3, "generate", spoilt, "--prompt", "a", *flags)


def test_a_temperature_that_logits_overflow_by(capsys, model_dir):
    line = failed(capsys, 3, "generate", model_dir, "--prompt", "a", "--temperature", "1e-38")
    assert "not finite after 0 tokens" in line


def run_on(directory, model, spoil=False, **fields):
    """A run on the model; with `spoil` one number of its adapter is infinite."""
    run = Path(tiny.make_run(directory, model, targets=("up_proj",), **fields))
    if spoil:
        tensors = load_file(run / "adapter" / "adapter.safetensors")
        next(iter(tensors.values())).reshape(-1)[5] = np.inf
        save_file(tensors, run / "adapter" / "adapter.safetensors")
        write_manifest(run / "adapter")
    return str(run)


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "RUN", "--output-dir", "OUT"],
        ["export", "RUN", "--output-dir", "OUT"],
        ["export", "RUN", "--output-dir", "OUT", "--format", "peft"],
        ["export", "RUN", "--output-dir", "OUT", "--format", "safetensors"],
        ["eval", "RUN", "--data", "GOOD"],
        ["generate", "RUN", "--prompt", "a"],
    ],
)
def test_an_adapter_that_is_not_finite(capsys, tmp_path, model_dir, files, words):
    run = run_on(tmp_path / "run", model_dir, spoil=True, method="lora")
    line = failed(capsys, 3, *((files | {"RUN": run}).get(word, word) for word in words))
    assert "up_proj" in line
    assert "not finite" in line
    assert not Path(files["OUT"]).exists()


@pytest.mark.parametrize(
    ("command", "method", "flags"),
    [
        ("merge", "lora", []),
        ("merge", "mor", ["--gates", "mean"]),
        ("merge", "mor", ["--gates", "least_squares"]),
        ("merge", "mor", ["--gates", "sequential", "--rank", "2"]),
        ("export", "mor", ["--steps", "2"]),
    ],
)
def test_a_base_that_is_not_finite_is_not_merged(capsys, tmp_path, model_dir, spoilt, command, method, flags):
    from mor_jax.models.hf import load_params, read_config
    from mor_jax.training.checkpoint import fingerprint

    run = Path(run_on(tmp_path / "run", model_dir, method=method))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(model_dir, spoilt))
    described = json.loads((run / "adapter" / "adapter.json").read_text())
    described["base_fingerprint"] = fingerprint(load_params(spoilt, read_config(spoilt)))
    (run / "adapter" / "adapter.json").write_text(json.dumps(described))
    write_manifest(run / "adapter")
    line = failed(capsys, 3, command, str(run), "--output-dir", str(tmp_path / "out"), "--batches", "2", *flags)
    assert "finite" in line
    assert not (tmp_path / "out").exists()


def test_training_that_ends_in_a_held_out_loss_that_is_not_finite(capsys, tmp_path, model_dir, monkeypatch):
    from mor_jax.training import loop

    monkeypatch.setattr(loop, "train", lambda config: {"steps": 1, "loss": 1.0, "eval_loss": float("nan")})
    data = tiny.write_records(tmp_path / "data.jsonl")
    assert main(["train", "--model", model_dir, "--data", data, "--output-dir", str(tmp_path / "out"), "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["eval_loss"] is None
    assert "eval_loss is nan" in captured.err
