"""Flags from dataclasses: what is given is read, lists split, nothing else has a value."""

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mor_jax.cli.flags import Parser, UsageError, add_flags, field_comments, given_flags, parse_options, split_list


@dataclass(frozen=True, kw_only=True)
class Example:
    name: str  # what it is called
    learning_rate: float = 1e-3  # peak, 100 % of it
    steps: int | None = None
    scan_layers: bool = True
    data: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("all",)
    kind: Literal["a", "b"] = "a"
    options: dict[str, Any] = field(default_factory=dict)


def parse(*words: str) -> dict[str, Any]:
    parser = Parser(prog="mor example", allow_abbrev=False)
    add_flags(parser, Example, positional=("name",))
    return given_flags(parser.parse_args(list(words)), Example)


def test_only_what_was_given_is_returned():
    assert parse("x") == {"name": "x"}


def test_every_kind_of_field():
    given = parse("x", "--learning-rate", "2e-4", "--steps", "3", "--no-scan-layers", "--kind", "b")
    assert given == {"name": "x", "learning_rate": 2e-4, "steps": 3, "scan_layers": False, "kind": "b"}


def test_paths_repeat_and_are_never_split():
    given = parse("x", "--data", "a,b.jsonl", "t=c.jsonl:0.5", "--data", "d.jsonl")
    assert given["data"] == ["a,b.jsonl", "t=c.jsonl:0.5", "d.jsonl"]


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "3", "--steps", "4"],
        ["--steps", "3", "--steps=3"],
        ["--kind", "a", "--kind", "b"],
        ["--learning-rate", "1", "--learning-rate", "2"],
        ["--scan-layers", "--no-scan-layers"],
        ["--targets", "q", "--targets", "k"],
        ["--options", "a=1", "--options", "b=2"],
    ],
)
def test_a_flag_that_keeps_one_value_refuses_a_second(words):
    with pytest.raises(UsageError, match="given twice") as caught:
        parse("x", *words)
    assert words[-2 if len(words) > 3 else -1].partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["a=1,a=2", "{a: 1, b: 2, a: 3}", "{x: {a: 1, a: 2}}"])
def test_an_option_named_twice(text):
    with pytest.raises(ValueError, match="'a' is there twice"):
        parse_options(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("q_proj,up_proj", ("q_proj", "up_proj")),
        (r"layers_[0-9]{1,2}/.*,o_proj", (r"layers_[0-9]{1,2}/.*", "o_proj")),
        (r".*/(q_proj,k_proj)", (".*/(q_proj,k_proj)",)),
        (r"a\(b,c", (r"a\(b", "c")),
        ("", ()),
    ],
)
def test_lists_split_at_commas_outside_brackets(text, parts):
    assert split_list(text) == parts


def test_options_are_pairs_or_a_mapping():
    assert parse_options("router=mean,lam_std=0.5,on=true") == {"router": "mean", "lam_std": 0.5, "on": True}
    assert parse_options("{mlp/.*: {rank: 4}}") == {"mlp/.*": {"rank": 4}}
    with pytest.raises(ValueError, match="name=value"):
        parse_options("router")


@pytest.mark.parametrize(
    "words", [["--stps", "1"], ["--steps", "x"], ["--kind", "c"], ["--step", "1"], ["--options", "x"]]
)
def test_a_wrong_flag_is_one_line_that_names_it(words):
    with pytest.raises(UsageError, match=words[0]) as caught:
        parse("x", *words)
    assert "\n" not in str(caught.value)
    assert "mor example --help" in str(caught.value)


def test_help_is_the_fields_comment():
    parser = Parser(prog="mor example")
    add_flags(parser, Example)
    assert field_comments(Example)["name"] == "what it is called"
    text = " ".join(parser.format_help().split())
    assert "peak, 100 % of it (default: 0.001)" in text
    assert "what it is called (required)" in text
    assert "--scan-layers, --no-scan-layers (default: on)" in text


def test_every_flag_of_the_contract_is_there():
    from mor_jax.training.config import TrainConfig

    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert flags >= {
        *(
            "--model",
            "--data",
            "--method",
            "--output-dir",
            "--steps",
            "--batch-size",
            "--accumulate",
            "--sequence-length",
        ),
        *("--learning-rate", "--rank", "--alpha", "--num-experts", "--top-k", "--targets", "--objective", "--adapters"),
        *(
            "--dtype",
            "--seed",
            "--mesh",
            "--scan-layers",
            "--no-scan-layers",
            "--save-every",
            "--eval-every",
            "--resume",
        ),
    }
