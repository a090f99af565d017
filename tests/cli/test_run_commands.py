"""Commands on a run folder whose adapter is random: merge, export, eval and generate with adapters, damaged files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_llama as tiny

from mor_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, model_dir):
    return tiny.make_run(tmp_path_factory.mktemp("lora") / "run", model_dir, method="lora", targets=("up_proj",))


@pytest.fixture(scope="module")
def mor_run(tmp_path_factory, model_dir):
    return tiny.make_run(
        tmp_path_factory.mktemp("mor") / "run", model_dir, method="mor", num_experts=3, targets=("up_proj",)
    )


def run_json(capsys, *words, code=0):
    found = main([*words, "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert captured.out.count("\n") == 1  # one object, nothing else
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
    names = {path.name for path in Path(out).iterdir()}
    assert names >= {"config.json", "tokenizer.json", "fidelity.json", "manifest.json"}
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


def test_a_plain_calibration_file_need_not_name_a_task(capsys, tmp_path, mor_run):
    data = tiny.write_records(tmp_path / "other.jsonl", count=9)
    words = ("--gates", "mean", "--calibration", data, "--batches", "2")
    assert run_json(capsys, "merge", mor_run, "--output-dir", str(tmp_path / "merged"), *words)["kl"] > 0
    out = tmp_path / "out"
    assert main(["merge", mor_run, "--output-dir", str(out), "--gates", "task:add", "--calibration", data]) == 2
    assert "no calibration token" in capsys.readouterr().err
    assert not out.exists()


def test_without_gates_the_merge_that_measures_best_is_taken(capsys, tmp_path, mor_run):
    words = ("--batches", "2", "--steps", "2")
    result = run_json(capsys, "merge", mor_run, "--output-dir", str(tmp_path / "merged"), *words)
    assert set(result["candidates"]) == {"mean", "least_squares", "sequential", "distill"}
    assert result["method"] == min(result["candidates"], key=result["candidates"].get)


def test_people_get_a_table_of_the_merge(capsys, tmp_path, lora_run):
    assert main(["merge", lora_run, "--output-dir", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("exact", "kl", "max logit difference"))


def test_an_exact_merge_needs_no_data(capsys, tmp_path, lora_run):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(lora_run, str(tmp_path / "gone")))
    result = run_json(capsys, "merge", str(run), "--output-dir", str(tmp_path / "merged"))
    assert result["exact"] is True
    assert result["max_logit_difference"] < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["hf", "peft", "safetensors"])
def test_an_export_is_verified_by_whoever_reads_it(capsys, tmp_path, lora_run, form):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    result = run_json(capsys, "export", lora_run, "--output-dir", str(out), "--format", form, "--verify")
    assert result["verified"] is True
    assert result["max_logit_difference"] <= 1e-4
    assert result["verified_with"] == {"hf": "transformers", "peft": "peft", "safetensors": "mor_jax"}[form]
    files = {
        "hf": {"config.json", "model.safetensors", "tokenizer.json", "fidelity.json"},
        "peft": {"adapter_config.json", "adapter_model.safetensors"},
        "safetensors": {"adapter.json", "adapter.safetensors"},
    }
    assert {path.name for path in out.iterdir()} >= files[form] | {"manifest.json"}
    assert run_json(capsys, "verify", str(out))["ok"] is True


def test_without_torch_an_export_is_read_again_by_our_own_reader(capsys, tmp_path, mor_run, monkeypatch):
    from mor_jax.export import verify

    monkeypatch.setattr(verify, "torch_installed", lambda *libraries: False)
    words = ("--gates", "mean", "--batches", "2", "--verify")
    result = run_json(capsys, "export", mor_run, "--output-dir", str(tmp_path / "out"), *words)
    assert (result["verified"], result["verified_with"]) == (True, "mor_jax")
    assert result["max_logit_difference"] <= 1e-4  # against the live merged model
    assert result["fidelity"]["exact"] is False  # merged against routed is told apart
    assert result["fidelity"]["max_logit_difference"] > 1e-3


def test_the_adapter_alone_is_the_runs_own(capsys, tmp_path, mor_run):
    out = tmp_path / "out"
    result = run_json(capsys, "export", mor_run, "--output-dir", str(out), "--format", "safetensors")
    assert (result["verified"], result["max_logit_difference"]) == (None, None)
    for name in ("adapter.safetensors", "adapter.json"):
        assert (out / name).read_bytes() == (Path(mor_run) / "adapter" / name).read_bytes()


@pytest.mark.oracle
@pytest.mark.parametrize("gates", ["least_squares", "distill"])
def test_routed_gates_go_to_peft_as_the_lora_that_imitates_them(capsys, tmp_path, mor_run, gates):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    words = ("--gates", gates, "--rank", "5", "--batches", "2", "--steps", "3")
    result = run_json(capsys, "export", mor_run, "--output-dir", str(out), "--format", "peft", "--verify", *words)
    assert (result["verified"], result["verified_with"]) == (True, "peft")
    assert result["fidelity"]["method"] == f"{gates}, rank 5"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    assert json.loads((out / "fidelity.json").read_text())["kl"] == result["fidelity"]["kl"]
    merged = run_json(capsys, "merge", mor_run, "--output-dir", str(tmp_path / "merged"), *words)
    assert (merged["exact"], merged["method"]) == (False, f"{gates}, rank 5")
    np.testing.assert_allclose(merged["kl"], result["fidelity"]["kl"], rtol=1e-5)  # of the same LoRA


def test_more_steps_of_distillation_imitate_better(capsys, tmp_path, mor_run):
    kl = {}
    for steps in ("0", "40"):
        words = ("--gates", "distill", "--batches", "2", "--steps", steps, "--learning-rate", "0.01")
        kl[steps] = run_json(capsys, "merge", mor_run, "--output-dir", str(tmp_path / steps), *words)["kl"]
    assert kl["40"] < kl["0"]


def test_an_export_that_differs_is_a_fault(capsys, tmp_path, lora_run, monkeypatch):
    from mor_jax.cli import export

    differs = export.Verification(False, 0.5, "mor_jax")
    monkeypatch.setattr(export, "verify_adapter", lambda *_, **__: differs)
    words = ("export", lora_run, "--output-dir", str(tmp_path / "out"), "--format", "safetensors", "--verify")
    result = run_json(capsys, *words, code=3)
    assert result["verified"] is False


def test_calibration_and_held_out_rows_share_no_example(mor_run):
    from mor_jax.cli.calibration import merge_batches
    from mor_jax.cli.opening import open_run
    from mor_jax.data import load_tokenizer

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


BAD_OPTIONS = [
    (["--gates", "mean", "--rank", "3"], "make a LoRA"),
    (["--gates", "task:none"], "add, shout"),
    (["--gates", "medium"], "least_squares"),
    (["--batches", "0"], "--batches"),
    (["--calibration", "/no/file.jsonl"], "/no/file.jsonl"),
    (["--calibration", "EMPTY"], "empty.jsonl"),
    (["--calibration", "BROKEN"], "broken.jsonl:1"),
    (["--gates", "distill", "--steps", "-1"], "--steps"),
    (["--gates", "distill", "--learning-rate", "0"], "--learning-rate"),
]
BAD_EXPORTS = [
    (["--format", "onnx"], "--format"),
    (["--format", "peft"], "--format hf"),
    (["--format", "peft", "--gates", "mean"], "--gates least_squares"),
    (["--format", "peft", "--gates", "least_squares", "--rank", "33"], "--rank 33"),
    (["--rank", "-1"], "--rank"),
]


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [("merge", *case) for case in BAD_OPTIONS] + [("export", *case) for case in BAD_OPTIONS[:3] + BAD_EXPORTS],
)
def test_bad_options_write_nothing(capsys, tmp_path, mor_run, command, words, named):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    out = tmp_path / "out"
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "BROKEN": str(tmp_path / "broken.jsonl")}
    assert main([command, mor_run, "--output-dir", str(out), *(places.get(word, word) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", ["merge", "export"])
def test_an_output_that_is_there_is_left_alone(capsys, tmp_path, lora_run, command):
    (tmp_path / "mine").write_text("x")
    assert main([command, lora_run, "--output-dir", str(tmp_path)]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["merge", "export", "eval", "generate"])
def test_a_run_that_is_not_finished_is_named(capsys, tmp_path, lora_run, command):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(Path(lora_run) / "config.yaml", run)
    rest = {"eval": ["--data", "x.jsonl"], "generate": ["--prompt", "x"]}.get(
        command, ["--output-dir", f"{tmp_path}/o"]
    )
    assert main([command, str(run), *rest]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "adapter/" in error


def test_a_damaged_adapter_is_a_fault(capsys, tmp_path, lora_run):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
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
