"""From a directory and two files to a verified export, each step by its command, with the keys that are a contract."""

import json
from pathlib import Path

import pytest
import tiny_llama as tiny

from mor_jax.cli.main import COMMANDS, main

KEYS = {
    "train": {"steps", "loss", "trainable_parameters", "tokens_per_second"},
    "eval": {"metrics"},
    "generate": {"text", "tokens"},
    "merge": {"exact", "max_logit_difference", "kl"},
    "export": {"verified", "max_logit_difference"},
    "inspect": {"sites", "trainable_parameters", "frozen_parameters"},
    "verify": {"ok", "bad"},
}
ADAPTER = ("--method", "lora", "--rank", "2", "--targets", "up_proj")


def run_json(capsys, *words):
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert set(result) >= KEYS[words[0]]
    return result


def test_every_command_one_after_the_other(capsys, tmp_path, model_dir):
    sums = tiny.write_records(tmp_path / "add.jsonl")
    shouts = tiny.write_records(tmp_path / "shout.jsonl", task="shout")
    run, out = tmp_path / "run", tmp_path / "out"
    data = ("--data", f"add={sums}", f"shout={shouts}:0.5")
    sizes = ("--steps", "3", "--batch-size", "2", "--sequence-length", "32")
    trained = run_json(capsys, "train", "--model", model_dir, *data, *sizes, *ADAPTER, "--output-dir", str(run))
    assert trained["steps"] == 3
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 3
    assert (run / "config.yaml").is_file()
    files = {"adapter.safetensors", "adapter.json", "manifest.json"}
    assert {path.name for path in (run / "adapter").iterdir()} == files
    listed = run_json(capsys, "inspect", model_dir, *ADAPTER)
    assert listed["trainable_parameters"] == trained["trainable_parameters"]
    assert "peft" in listed["exportable"]
    assert run_json(capsys, "merge", str(run), "--output-dir", str(tmp_path / "merged"))["exact"] is True
    assert run_json(capsys, "export", str(run), "--output-dir", str(out))["verified"] is True
    live = run_json(capsys, "eval", str(run), "--data", sums)["metrics"]["loss"]
    merged = run_json(capsys, "eval", str(out), "--data", sums)["metrics"]["loss"]
    assert merged == pytest.approx(live, rel=1e-5)
    assert run_json(capsys, "generate", str(out), "--prompt", "add 1:", "--max-new-tokens", "2")["tokens"] <= 2
    for folder in (run, out, tmp_path / "merged"):
        assert run_json(capsys, "verify", str(folder))["ok"] is True


BAD_TRAINING = [
    (["--learning-rate", "fast"], "--learning-rate"),
    (["--learning-rate", "-1"], "learning_rate"),
    (["--steps", "0"], "steps"),
    (["--batch-size", "3", "--accumulate", "2"], "batch_size"),
    (["--method", "moor"], "did you mean 'mor'"),
    (["--options", "ruoter=mean"], "router"),
    (["--targets", "q_prj"], "q_proj"),
    (["--optimizer", "adamv"], "adamv"),
    (["--mesh", "data=64"], "mesh"),
    (["--mesh", "rows=1"], "rows"),
    (["--objective", "classification"], "use causal"),
    (["--adapters", "somewhere"], "not built yet"),
    (["--model", "/no/model"], "/no/model"),
    (["--data", "/no/file.jsonl"], "/no/file.jsonl"),
    (["--data", "BROKEN"], "broken.jsonl:2"),
    (["CONFIG"], "stps"),
]


@pytest.mark.parametrize(("words", "named"), BAD_TRAINING, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_training_input_is_one_line_and_leaves_nothing(capsys, tmp_path, model_dir, words, named):
    good = tiny.write_records(tmp_path / "good.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (tmp_path / "bad.yaml").write_text("stps: 3\n")
    out = tmp_path / "run"
    places = {"BROKEN": str(tmp_path / "broken.jsonl"), "CONFIG": str(tmp_path / "bad.yaml")}
    words = [places.get(word, word) for word in words]
    given = {"--model": model_dir, "--data": good}
    rest = [part for flag, value in given.items() if flag not in words for part in (flag, value)]
    fixed = ["--sequence-length", "32", "--output-dir", str(out)]
    command = ["train", *words, *rest, *fixed] if words[0].endswith(".yaml") else ["train", *rest, *fixed, *words]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_says_what_each_flag_is(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mor {name}")
    assert COMMANDS[name].about in text


def test_a_run_folder_is_not_a_place_for_another_run(capsys, tmp_path, model_dir):
    good = tiny.write_records(tmp_path / "good.jsonl")
    taken = tmp_path / "run"
    taken.mkdir()
    (taken / "mine").write_text("x")
    words = ("train", "--model", model_dir, "--data", good, "--sequence-length", "32", "--output-dir", str(taken))
    assert main([*words, *ADAPTER, "--steps", "1"]) == 2
    assert [path.name for path in Path(taken).iterdir()] == ["mine"]
    assert "output_dir" in capsys.readouterr().err.replace("-", "_")
