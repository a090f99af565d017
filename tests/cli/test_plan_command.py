"""`mor plan` from the command line: one JSON object with the keys of the contract, a table, errors in a line."""

import dataclasses
import json
import shlex

import pytest
import tiny_llama as tiny

from mor_jax.cli.main import _parse, main
from mor_jax.cli.plan import train_words
from mor_jax.training.config import TrainConfig, config_from_mapping

WORDS = ("--topology", "cpu:8", "--mesh", "fsdp=2,sequence=2,tensor=2", "--batch-size", "4", "--sequence-length", "16")
SMALL = ("--targets", "up_proj", "--rank", "2", "--remat", "full", "--method", "lora")


@pytest.fixture(scope="module")
def lone_config(tmp_path_factory):
    """A config.json without weights or tokenizer."""
    path = tmp_path_factory.mktemp("lone") / "config.json"
    names = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }
    same = ("vocab_size", "hidden_size", "intermediate_size")
    fields = {name: getattr(tiny.CONFIG, name) for name in same}
    fields |= {name: getattr(tiny.CONFIG, own) for name, own in names.items()}
    path.write_text(json.dumps({"model_type": "llama", **fields}))
    return str(path)


def test_a_plan_from_a_lone_config_is_one_json_object_and_a_table(lone_config, capsys):
    assert main(["plan", lone_config, *WORDS, *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"fits", "peak_bytes_per_device", "capacity_bytes", "flops", "estimated_seconds", "collectives"}
    assert wanted <= set(found)
    assert found["fits"] is True
    assert found["trainable_parameters"] == 2 * 2 * (32 + 48)
    assert found["mesh"] == "data=1,fsdp=2,sequence=2,tensor=2"
    assert found["estimated_seconds"] is None  # nobody knows this machine's peak
    assert 0 < found["peak_bytes_per_device"] < found["capacity_bytes"]
    assert found["advice"] == ""
    assert found["merge"]["fits"] is True
    assert 0 < found["merge"]["peak_bytes_per_device"] < found["capacity_bytes"]
    assert main(["plan", lone_config, *WORDS, *SMALL]) == 0
    table = capsys.readouterr().out
    assert "peak a device: 0.00" in table
    assert "estimate" in table
    assert "all-reduce" in table
    assert "merge, peak a device: 0.00" in table
    assert "--mesh data=1,fsdp=2,sequence=2,tensor=2" in found["train"]
    assert found["train"] in table


def test_the_plan_names_the_training_that_takes_its_step():
    """Parsed by `mor train`, its words are the configuration that was planned."""
    options = {"router": "balanced"}
    planned = TrainConfig(
        method="mor", batch_size=16, mesh="fsdp=4", dtype="bfloat16", scan_layers=False, targets=("q_proj", "up_proj"),
        overrides={".*q_proj": {"rank": 4}}, options=options, learning_rate=3e-4,
    )  # fmt: skip
    mor, train, *words = shlex.split(train_words("some/model", planned))
    assert (mor, train) == ("mor", "train")
    given = {name: value for name, value in vars(_parse("train", words)).items() if name not in ("json", "config")}
    assert config_from_mapping(given) == dataclasses.replace(planned, model="some/model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Llama-3.1-9B"], "did you mean llama-3.1-"),
        (["Llama-3.1-8B", "--topology", "v9:4x4"], "topology 'v9:4x4'"),
        (["Llama-3.1-8B", "--topology", "cpu:8", "--batch-size", "3"], "batch_size=3"),
        (["Llama-3.1-8B", "--topology", "cpu:8", "--mesh", "tensor=16"], "asks for 16 devices"),
        (
            ["Llama-3.1-8B", "--topology", "cpu:8", "--mesh", "data=2,sequence=4", "--sequence-length", "18"],
            "multiple of 4",
        ),
        (["Llama-3.1-8B", "--method", "loro"], "method='loro'"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
