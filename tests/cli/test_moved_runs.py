"""Runs used from other working directories, copied runs, and bases that have moved."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_llama as tiny
import yaml
from commands import run_bad, run_json
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRAINING = ("--method", "lora", "--rank", "2", "--targets", "up_proj", "--batch-size", "2", "--sequence-length", "32")
ASKED = ("--prompt", "add 3:", "--greedy", "--max-new-tokens", "4")


def every_command(run, out):
    """The words of each command that opens a run."""
    return {
        "eval": ("eval", run, "--data", Path(__file__).parent / "none.jsonl"),
        "generate": ("generate", run, *ASKED),
        "merge": ("merge", run, "--output-dir", out),
        "export": ("export", run, "--output-dir", out, "--format", "peft"),
    }


@pytest.fixture
def places(tmp_path, monkeypatch, model_dir):
    """(where the run is trained, with base/ and data/ in it; another working directory)."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(model_dir, here / "base")
    (here / "data").mkdir()
    there.mkdir()
    tiny.write_records(here / "data" / "add.jsonl")
    tiny.write_records(here / "data" / "held.jsonl", count=4)
    monkeypatch.chdir(here)
    return here, there


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, model_dir):
    """A finished run on a base of its own, to be copied."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(model_dir, folder / "base")
    tiny.make_run(folder / "run", str(folder / "base"), method="lora", targets=("up_proj",))
    return folder


@pytest.fixture
def moved(tmp_path, lora_run):
    """(run, base): copies, and the run does not know where the copy of its base is."""
    run, base = tmp_path / "run", tmp_path / "new_base"
    shutil.copytree(lora_run / "run", run)
    shutil.copytree(lora_run / "base", base)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(lora_run / "base"), str(tmp_path / "gone")))
    return run, base


def test_a_run_trained_with_relative_paths_is_usable_from_anywhere(capsys, monkeypatch, places):
    here, there = places
    words = ("--model", "base/", "--data", "sums=data/add.jsonl:2.0", "--eval-data", "data/held.jsonl")
    run_json(capsys, "train", *words, *TRAINING, "--steps", "2", "--output-dir", "run", "--mesh", "data=1")
    recorded = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert recorded["model"] == str(here / "base")
    assert recorded["data"] == [f"sums={here}/data/add.jsonl:2.0"]
    assert recorded["eval_data"] == [f"{here}/data/held.jsonl"]
    assert recorded["output_dir"] == str(here / "run")
    assert json.loads((here / "run" / "adapter" / "adapter.json").read_text())["model"] == str(here / "base")

    held = here / "data" / "held.jsonl"
    before = run_json(capsys, "eval", "run", "--data", held)
    monkeypatch.chdir(there)
    assert run_json(capsys, "eval", "../here/run", "--data", held) == before
    assert run_json(capsys, "generate", "../here/run", *ASKED)["tokens"] > 0
    assert run_json(capsys, "merge", "../here/run", "--output-dir", "merged")["tokens"] > 0
    result = run_json(capsys, "export", "../here/run", "--output-dir", "lora", "--format", "peft")
    assert result["output_dir"] == "lora"
    assert json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"] == str(here / "base")
    shutil.copytree(here / "run", "copied")
    assert run_json(capsys, "train", "copied/config.yaml", "--resume", "--steps", "2")["steps"] == 2
    assert sorted(path.name for path in there.iterdir()) == ["copied", "lora", "merged"]


def test_a_base_that_is_gone_is_named_and_may_be_given(capsys, tmp_path, moved, lora_run):
    run, base = moved
    for words in every_command(run, tmp_path / "out").values():
        error = run_bad(capsys, *words)
        assert str(tmp_path / "gone") in error
        assert "--model DIR" in error
    data = tiny.write_records(tmp_path / "held.jsonl", count=4)
    given = ("--model", base)
    for words in (("eval", run, "--data", data), ("generate", run, *ASKED)):
        assert run_json(capsys, *words, *given) == run_json(capsys, words[0], lora_run / "run", *words[2:])
    run_json(capsys, "merge", run, "--output-dir", tmp_path / "merged", *given)
    run_json(capsys, "merge", lora_run / "run", "--output-dir", tmp_path / "expected")
    for name, value in load_file(tmp_path / "expected" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "merged" / "model.safetensors")[name], value)
    result = run_json(capsys, "export", run, "--output-dir", tmp_path / "lora", "--format", "peft", "--verify", *given)
    assert result["verified"] is True
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def other_weights(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def other_config(base):
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"rope_theta": 5e5}))


def other_shape(base):
    shutil.rmtree(base)
    from dataclasses import replace

    tiny.make_model(base, replace(tiny.CONFIG, num_layers=1))


def other_family(base):
    shutil.rmtree(base)
    import tiny_bert

    tiny_bert.make_model(base)


def no_config(base):
    (base / "config.json").unlink()


WRONG = [  # (what is done to the base, whether the run was made by hand, without a record of its configuration)
    (other_weights, False, "its weights are not those that the run was trained on"),
    (other_weights, True, "its weights are not those that the run was trained on"),
    (other_config, False, "rope_theta=500000.0, and the run was trained with 10000.0"),
    (other_shape, False, "num_layers=1, and the run was trained with 2"),
    (other_shape, True, "its weights are not those that the run was trained on"),
    (other_family, False, "model_type='bert', and the run was trained with 'llama'"),
    (other_family, True, "its weights are not those that the run was trained on"),
    (no_config, False, "config.json: no such file"),
    (shutil.rmtree, False, "no such folder"),
]


@pytest.mark.parametrize(("spoil", "older", "named"), WRONG)
def test_another_base_is_refused_in_one_sentence(capsys, tmp_path, moved, spoil, older, named):
    run, base = moved
    if not older:
        describe(run, base)
    spoil(base)
    commands = every_command(run, tmp_path / "out")
    for name in commands if spoil is other_weights else ("generate",):
        error = run_bad(capsys, *commands[name], "--model", base)
        assert named in error
        assert str(base) in error
    assert not (tmp_path / "out").exists()


def describe(run, base):
    """Adds to a run made by hand what `mor train` records of a base."""
    from mor_jax.models import make_model, read_config
    from mor_jax.training.integrity import write_manifest
    from mor_jax.training.recorded_base import describe_base

    path = run / "adapter" / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | describe_base(make_model(read_config(base)))))
    write_manifest(run / "adapter")


def test_a_run_of_before_with_relative_paths_is_opened_where_it_was_trained(capsys, monkeypatch, tmp_path, moved):
    run, base = moved
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(tmp_path / "gone"), "new_base"))
    monkeypatch.chdir(tmp_path)
    assert run_json(capsys, "generate", "run", *ASKED)["tokens"] > 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    error = run_bad(capsys, "generate", "../run", *ASKED)
    assert "its base new_base is not there" in error
    assert "--model DIR" in error
    assert run_json(capsys, "generate", "../run", *ASKED, "--model", "../new_base/")["tokens"] > 0


def test_the_base_of_a_plain_model_is_itself(capsys, model_dir):
    assert "no run" in run_bad(capsys, "generate", model_dir, *ASKED, "--model", model_dir)


@pytest.mark.parametrize("spelling", ["../base", "link", "link/../base", "base/.", "~/base", "~"])
def test_every_spelling_of_a_path_is_recorded_as_the_place_it_was(monkeypatch, tmp_path, spelling):
    from mor_jax.training.recorded_base import absolute_path

    (tmp_path / "work" / "base").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "far" / "base").mkdir()
    (tmp_path / "work" / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    meant = os.path.realpath(os.path.expanduser(spelling))
    found = absolute_path(spelling)
    assert os.path.isabs(found)
    assert "~" not in found
    monkeypatch.chdir("/")
    assert os.path.realpath(found) == meant


def test_data_are_recorded_with_their_tasks_and_weights(monkeypatch, tmp_path):
    from mor_jax.data import parse_sources
    from mor_jax.training.config import TrainConfig
    from mor_jax.training.recorded_base import located

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jsonl", "b=c.jsonl", "d:3", "e"):
        (tmp_path / name).write_text("{}")
    texts = ("a.jsonl", "x=a.jsonl:0.1", "b=c.jsonl", "default=e:3", "d:3", "hub:owner/name@train", "gone.jsonl")
    texts = (*texts, "home=~/e:1e-3")
    config = TrainConfig(model="hub-like/name", data=texts, output_dir="~/out", compile_cache="cache")
    found, before = located(config), parse_sources(texts)
    monkeypatch.chdir("/")
    after = parse_sources(found.data)
    for old, new in zip(before, after, strict=True):
        assert (new.task, new.weight) == (old.task, old.weight)
        stays = old.path.startswith("hub:") or old.path == "gone.jsonl"
        assert new.path == (old.path if stays else str(tmp_path / old.path))
    assert (found.model, found.output_dir) == ("hub-like/name", f"{tmp_path}/out")
    assert found.compile_cache == f"{tmp_path}/cache"
    assert located(found) == found


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by an old name
def test_peft_finds_the_base_from_another_folder(capsys, monkeypatch, tmp_path, moved):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    run, base = moved
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(tmp_path / "gone"), "new_base"))
    monkeypatch.chdir(tmp_path)
    run_json(capsys, "export", "run", "--output-dir", "lora", "--format", "peft")
    run_json(capsys, "merge", "run", "--output-dir", "merged")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "lora"))
    named = peft.PeftConfig.from_pretrained(str(tmp_path / "lora")).base_model_name_or_path
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), str(tmp_path / "lora"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(2, 26)[None]
    with torch.inference_mode():
        expected = merged(ids).logits
        for model in (found, again):
            torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=0, atol=1e-4)
    assert str(base) == named


def test_training_goes_on_from_anywhere_and_on_its_own_base_alone(capsys, monkeypatch, places):
    here, there = places
    words = ("--model", "base", "--data", "data/add.jsonl", "--output-dir", "run", "--mesh", "data=1")
    run_json(capsys, "train", *words, *TRAINING, "--schedule", "constant", "--steps", "1", "--save-every", "1")
    monkeypatch.chdir(there)
    more = ("train", "../here/run/config.yaml", "--resume", "--steps", "2")
    (here / "base").rename(there / "base")
    error = run_bad(capsys, *more)
    assert str(here / "base") in error
    assert "--model DIR" in error
    shutil.copytree(there / "base", there / "other")
    other_config(there / "other")
    assert "rope_theta=500000.0" in run_bad(capsys, *more, "--model", "other")
    assert run_json(capsys, *more, "--model", "base")["steps"] == 2
    assert yaml.safe_load((here / "run" / "config.yaml").read_text())["model"] == str(there / "base")
    (there / "base").rename(here / "base")
    (here / "data").rename(there / "data")
    error = run_bad(capsys, "train", "../here/run/config.yaml", "--resume", "--steps", "3", "--model", "../here/base")
    assert f"{here}/data/add.jsonl: no such file" in error


def test_calibration_data_that_are_gone_may_be_named(capsys, tmp_path, model_dir):
    run = tiny.make_run(tmp_path / "run", model_dir, method="mor", num_experts=2, targets=("up_proj",))
    for name in ("add", "shout"):
        (tmp_path / "run" / f"{name}.jsonl").unlink()
    error = run_bad(capsys, "merge", run, "--output-dir", tmp_path / "out", "--gates", "mean")
    assert "add.jsonl: no such file" in error
    assert "--calibration FILE" in error
