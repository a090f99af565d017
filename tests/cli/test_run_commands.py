"""Commands on a run folder whose adapter is random: merge, export, eval and generate with adapters, damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_llama as tiny

from mor_jax.cli.main import main


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, model_dir):
    return tiny.make_run(tmp_path_factory.mktemp("lora") / "run", model_dir, method="lora")


@pytest.fixture(scope="module")
def mor_run(tmp_path_factory, model_dir):
    return tiny.make_run(
        tmp_path_factory.mktemp("mor") / "run", model_dir, method="mor", num_experts=3, targets=("up_proj",)
    )


def run_json(capsys, *words, code=0):
    found = main([*words, "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out)


def loss(capsys, model, data):
    return run_json(capsys, "eval", model, "--data", data)["metrics"]["loss"]


def test_an_exact_merge_evaluates_as_the_run_and_unlike_the_base(capsys, tmp_path, model_dir, lora_run):
    out = str(tmp_path / "merged")
    result = run_json(capsys, "merge", lora_run, "--output-dir", out)
    assert result["exact"] is True
    assert result["max_logit_difference"] < 1e-4
    assert result["kl"] < 1e-6
    data = tiny.write_records(tmp_path / "held_out.jsonl", count=4)
    base, adapted, merged = (loss(capsys, model, data) for model in (model_dir, lora_run, out))
    np.testing.assert_allclose(merged, adapted, rtol=1e-5)
    assert abs(adapted - base) > 1e-2
    words = ("--prompt", "add 3:", "--greedy", "--max-new-tokens", "5")
    assert run_json(capsys, "generate", out, *words) == run_json(capsys, "generate", lora_run, *words)
    assert {path.name for path in Path(out).iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "fidelity.json",
        "manifest.json",
    }
    assert run_json(capsys, "verify", out)["ok"] is True


@pytest.mark.parametrize("gates", ["mean", "task:add", "least_squares"])
def test_a_routed_merge_is_approximate_and_says_by_how_much(capsys, tmp_path, mor_run, gates):
    out = tmp_path / "merged"
    result = run_json(capsys, "merge", mor_run, "--output-dir", str(out), "--gates", gates, "--batches", "2")
    assert result["exact"] is False
    assert result["method"] == gates
    assert result["kl"] > 0
    saved = json.loads((out / "fidelity.json").read_text())
    assert saved["kl"] == result["kl"]
    assert set(saved["site_errors"]) == {"layers/mlp/up_proj"}


def test_calibration_and_held_out_rows_share_no_example(mor_run):
    from mor_jax.cli.calibration import merge_batches
    from mor_jax.cli.opening import load_tokenizer, open_run

    live = open_run(mor_run)
    halves = merge_batches(live, load_tokenizer(live.directory), "", 4)

    def segments(batches):
        found = set()
        for batch in batches:
            for ids, segment in zip(batch["input_ids"], batch["segment_ids"], strict=True):
                found |= {tuple(ids[segment == number]) for number in range(1, segment.max() + 1)}
        return found

    calibration, held_out = map(segments, halves)
    assert calibration
    assert held_out
    assert not calibration & held_out
    for batches in halves:  # both tasks are in both
        assert {0, 1} <= set(np.concatenate([b["task_ids"][b["segment_ids"] > 0] for b in batches]).tolist())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gates", "distill"], "not built yet"),
        (["--gates", "task:none"], "add, shout"),
        (["--gates", "medium"], "least_squares"),
        (["--calibration", "/no/file.jsonl"], "/no/file.jsonl"),
    ],
)
def test_bad_merge_options_write_nothing(capsys, tmp_path, mor_run, words, named):
    out = tmp_path / "out"
    assert main(["merge", mor_run, "--output-dir", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_output_that_is_there_is_left_alone(capsys, tmp_path, lora_run):
    (tmp_path / "mine").write_text("x")
    assert main(["merge", lora_run, "--output-dir", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_adapter_is_a_fault(capsys, tmp_path, model_dir):
    run = Path(tiny.make_run(tmp_path / "run", model_dir, method="lora"))
    weights = run / "adapter" / "adapter.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    result = run_json(capsys, "verify", str(run), code=3)
    assert result["bad"] == ["adapter/adapter.safetensors"]
    assert main(["generate", str(run), "--prompt", "x"]) == 3
    assert "adapter.safetensors" in capsys.readouterr().err
    assert main(["merge", str(run), "--output-dir", str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()
