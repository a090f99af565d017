"""Flags from a frozen dataclass: its fields are the flags, its comments are the help, its checks are the errors.

A field `learning_rate: float = 1e-3  # peak` becomes `--learning-rate`, with "peak" as its help. Only flags that were
given are returned, so that they can be laid over a configuration file. Booleans have a twin (`--scan-layers`,
`--no-scan-layers`). A flag is given once. Tuples are split at commas, except within brackets, where a regular
expression has its own; fields that hold paths are never split but may be repeated (`--data a.jsonl --data b.jsonl`, or
`--data a.jsonl b.jsonl`).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from mor_jax.unique_yaml import load_yaml

PATH_LISTS = ("data", "eval_data", "calibration")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


class UsageError(ValueError):
    """The command line itself is wrong: one line, exit code 2."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as a `UsageError` that names the command and its help."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


class _Once(argparse.Action):
    """Keeps a value; a second is an error and does not replace it."""

    def __call__(self, parser, namespace, values, option_string=None):
        _check_first(parser, namespace, self.dest, option_string)
        setattr(namespace, self.dest, values)


class _Switch(argparse.BooleanOptionalAction):
    """True or false, told once."""

    def __call__(self, parser, namespace, values, option_string=None):
        _check_first(parser, namespace, self.dest, option_string)
        super().__call__(parser, namespace, values, option_string)


def _check_first(parser: argparse.ArgumentParser, namespace: argparse.Namespace, field: str, flag: str | None) -> None:
    if hasattr(namespace, field):
        parser.error(f"{flag} is given twice, and keeps one value: {getattr(namespace, field)!r} was the first")


def split_list(text: str) -> tuple[str, ...]:
    """The parts between commas; commas within (), [] or {} belong to a part, as in a regular expression.

    >>> split_list("q_proj,layers_[0-9]{1,2}/.*")
    ('q_proj', 'layers_[0-9]{1,2}/.*')
    """
    parts, current, closing = [], "", []
    for index, sign in enumerate(text):
        escaped = index > 0 and text[index - 1] == "\\"
        if sign == "," and not closing:
            parts.append(current)
            current = ""
            continue
        if not escaped and sign in _BRACKETS:
            closing.append(_BRACKETS[sign])
        elif not escaped and closing and sign == closing[-1]:
            closing.pop()
        current += sign
    return tuple(part.strip() for part in [*parts, current] if part.strip())


def parse_options(text: str) -> dict[str, Any]:
    """`name=value,name=value`, or a YAML mapping in braces, as a dict with YAML's scalar types.

    >>> parse_options("router=softmax,lam_std=0.02")
    {'router': 'softmax', 'lam_std': 0.02}

    Raises:
      ValueError: when a part has no `=`, a name is there twice, or the braces hold no mapping.
    """
    if text.lstrip().startswith("{"):
        try:
            mapping = load_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(f"not a YAML mapping: {text} ({getattr(error, 'problem', error)})") from error
        if not isinstance(mapping, dict):
            raise ValueError(f"not a YAML mapping: {text}")
        return mapping
    options = {}
    for part in split_list(text):
        name, sign, value = part.partition("=")
        if not sign or not name:
            raise ValueError(f"expected name=value, got {part!r}")
        if name.strip() in options:
            raise ValueError(f"{name.strip()!r} is there twice")
        options[name.strip()] = yaml.safe_load(value)
    return options


def field_comments(cls: type) -> dict[str, str]:
    """The trailing comment of each field in the source of the class and its bases; empty where there is none."""
    try:
        lines = [line for base in cls.__mro__[-2::-1] for line in inspect.getsource(base).splitlines()]
    except OSError:
        return {}
    found = (re.match(r"    (\w+)\s*:.*?\s#\s(.+)$", line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def add_flags(parser: argparse.ArgumentParser, cls: type, positional: Sequence[str] = ()) -> None:
    """Adds one flag for each field of the dataclass `cls`; fields named in `positional` become positional arguments.

    Nothing has a default here: what is not given is not in the namespace.
    """
    kinds = typing.get_type_hints(cls)
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        options: dict[str, Any] = {"help": _help(field, comments.get(field.name, "")), "default": argparse.SUPPRESS}
        options |= _reading(field.name, kinds[field.name])
        if field.name in positional:
            parser.add_argument(field.name, metavar=field.name.upper(), help=options["help"])
        else:
            parser.add_argument(flag_of(field), dest=field.name, **options)


def flag_of(field: dataclasses.Field) -> str:
    """The flag that sets a field: its name, unless its metadata have another under "flag"."""
    return field.metadata.get("flag", "--" + field.name.replace("_", "-"))


def given_flags(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that the command line named, with their values."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


def _reading(name: str, kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return _reading(name, kind)
    if kind is bool:
        return {"action": _Switch}
    if origin is tuple and name in PATH_LISTS:
        return {"action": "extend", "nargs": "+", "metavar": "[TASK=]PATH[:WEIGHT]"}
    return {"action": _Once} | _value(kind)


def _value(kind: Any) -> dict[str, Any]:
    """How argparse reads one value of this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"choices": list(arguments)}
    if origin is tuple and arguments[0] is int:
        return {"type": _whole_numbers, "metavar": "N,N"}
    if origin is tuple:
        return {"type": split_list, "metavar": "A,B"}
    if origin is dict:
        return {"type": _options_argument, "metavar": "NAME=VALUE,..."}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in split_list(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers between commas, got {text!r}") from error


def _options_argument(text: str) -> dict[str, Any]:
    try:
        return parse_options(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _help(field: dataclasses.Field, comment: str) -> str:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        text = f"{comment} (required)"
    elif default in (dataclasses.MISSING, None, "", ()):
        text = comment
    elif isinstance(default, bool):
        text = f"{comment} (default: {'on' if default else 'off'})"
    else:
        text = f"{comment} (default: {','.join(default) if isinstance(default, tuple) else default})"
    return text.strip().replace("%", "%%")
