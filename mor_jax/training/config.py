"""One frozen dataclass is the YAML file, the command-line flags and the Python call of a training run.

Every field is checked when the object is made: an error names the field, its value and what to do, before any model
is loaded or any file is written. `load_config` and `save_config` are each other's inverse.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mor_jax.unique_yaml import load_yaml

Option = bool | int | float | str
Objective = Literal["causal", "classification"]
Schedule = Literal["cosine", "linear", "constant"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
Attention = Literal["auto", "xla", "splash", "cudnn"]
Overlong = Literal["truncate", "drop", "error"]


class ConfigError(ValueError):
    """A field of a configuration is wrong; the message names field, value and remedy."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. Lists are tuples; `None` leaves the choice to the method.

    Raises:
      ConfigError: a field has an impossible value, or two fields contradict each other.
    """

    __pydantic_config__ = {"extra": "forbid"}

    model: str = ""  # Hugging Face directory of the frozen base
    data: tuple[str, ...] = ()  # [TASK=]PATH[:WEIGHT], mixed by weight
    method: str = "mor"  # name in the registry of adapters
    output_dir: str = "runs/mor"  # the run folder
    chat_date: str = ""  # the day that a chat template prints, YYYY-MM-DD; empty: today's, kept for the whole run
    start_tokens: tuple[int, ...] | None = None  # ids before a text; none given: what the tokenizer puts there
    end_tokens: tuple[int, ...] | None = None  # ids after a text or answer; none given: the end of sequence
    stop_tokens: tuple[int, ...] | None = None  # ids that end generation; none given: all that the model's files name
    objective: Objective = "causal"  # or classification, on an encoder: {"text" or "sentence1", "sentence2", "label"}
    labels: tuple[str, ...] = ()  # classes in the order of their ids; empty takes the model's or the data's
    steps: int = 1000  # optimiser steps
    batch_size: int = 8  # rows of one optimiser step, over all devices and micro-batches
    accumulate: int = 1  # micro-batches a step is computed in; never changes the language-model loss
    sequence_length: int = 512  # tokens in a row
    packing: bool = True  # several examples in a row; their attention is kept apart
    overlong: Overlong = "truncate"  # what becomes of an example longer than a row
    learning_rate: float = 1e-3  # peak, after warm-up
    schedule: Schedule = "cosine"
    warmup_steps: int = 0  # linear, from 0
    final_learning_rate_ratio: float = 0.0  # of the peak, at the last step
    optimizer: str = "adamw"  # any optimiser of optax by name
    optimizer_options: dict[str, Option] = field(default_factory=dict)  # its further arguments, for example b2
    weight_decay: float = 0.0  # of factors, routers and kernels; never of vectors, biases, norms and lam
    clip_norm: float = 1.0  # largest global gradient norm; 0 switches clipping off
    rank: int | None = None  # of the factors; the method's own, unless it is given
    alpha: float | None = None
    num_experts: int | None = None
    top_k: int | None = None
    dropout: float | None = None
    options: dict[str, Option] = field(default_factory=dict)  # further options of the method, by name
    targets: tuple[str, ...] = ("all-linear",)  # names, or regular expressions over paths
    overrides: dict[str, dict[str, Option]] = field(default_factory=dict)  # path pattern -> other method or options
    trained_modules: tuple[str, ...] = ()  # base modules trained whole, in float32
    adapters: tuple[str, ...] = ()  # folders of trained adapters to start from
    dtype: Dtype = "float32"  # of the computation
    param_dtype: Dtype | None = None  # of the frozen base in memory; None is `dtype`
    scan_layers: bool = True  # one compiled layer for all
    remat: Remat = "none"  # what the backward pass computes again
    attention_implementation: Attention = "auto"  # the device's fused kernel; splash: TPU, cudnn: GPU, xla: anywhere
    loss_chunk: int = 1024  # tokens whose logits are alive at a time on each device
    mesh: str = ""  # sizes of data, fsdp, sequence, tensor: "data=2,fsdp=4"; empty puts every device on data
    seed: int = 0
    save_every: int = 0  # steps between checkpoints; 0 saves only at the end
    keep_checkpoints: int = 3  # newest checkpoints that stay
    resume: bool = False  # go on from the newest good checkpoint of output_dir
    eval_data: tuple[str, ...] = ()  # held-out files, written like `data`
    eval_every: int = 0  # steps between evaluations; 0 evaluates only at the end
    eval_batches: int = 16  # batches of one evaluation; 0 takes all
    log_every: int = 1  # steps between lines of the progress bar
    compile_cache: str = ""  # folder of compiled programs that outlives the process

    def __post_init__(self):
        """Checks each field, then each pair that can contradict."""
        for name in ("data", "targets", "trained_modules", "adapters", "eval_data", "labels"):
            _check_strings(name, getattr(self, name))
        self._check_counts()
        self._check_rates()
        self._check_choices()
        self._check_tokens()
        self._check_pairs()
        self.adapter()
        self.override_adapters()

    def _check_counts(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "sequence_length", "loss_chunk", "keep_checkpoints"):
            _check(name, getattr(self, name), _is_int(getattr(self, name), 1), "give a whole number of at least 1")
        for name in ("warmup_steps", "save_every", "eval_every", "seed", "eval_batches"):
            _check(name, getattr(self, name), _is_int(getattr(self, name), 0), "give a whole number of at least 0")
        good = self.rank is None or _is_int(self.rank, 1)
        _check("rank", self.rank, good, "give a whole number of at least 1, or nothing for the method's own")
        _check("log_every", self.log_every, _is_int(self.log_every, 1), "give a whole number of at least 1")

    def _check_rates(self) -> None:
        for name in ("learning_rate", "weight_decay", "clip_norm", "final_learning_rate_ratio"):
            value = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
            _check(name, value, good, "give a finite number of at least 0")

    def _check_choices(self) -> None:
        choices = {"objective": Objective, "schedule": Schedule, "dtype": Dtype, "remat": Remat, "overlong": Overlong}
        for name, kind in choices.items():
            _check_choice(name, getattr(self, name), kind.__args__)
        _check_choice("attention_implementation", self.attention_implementation, Attention.__args__)
        if self.param_dtype is not None:
            _check_choice("param_dtype", self.param_dtype, Dtype.__args__)

    def _check_tokens(self) -> None:
        for name in ("start_tokens", "end_tokens", "stop_tokens"):
            ids = getattr(self, name)
            good = ids is None or (isinstance(ids, tuple) and all(_is_int(token, 0) for token in ids))
            _check(name, ids, good, "give token ids, whole numbers of at least 0")
        check_day(self.chat_date)

    def _check_pairs(self) -> None:
        good = self.batch_size % self.accumulate == 0
        remedy = f"it must divide batch_size={self.batch_size}, which counts the rows of a whole step"
        _check("accumulate", self.accumulate, good, remedy)
        _check(
            "warmup_steps", self.warmup_steps, self.warmup_steps < self.steps or self.steps == 1, "give less than steps"
        )
        _check("targets", self.targets, len(self.targets) > 0, "name at least one module, or all-linear")
        good = not self.labels or (self.objective == "classification" and len(set(self.labels)) == len(self.labels) > 1)
        _check("labels", self.labels, good, "name at least two different classes, for objective=classification only")
        good = self.remat != "offload" or self.objective == "causal"
        _check("remat", self.remat, good, "choose full, dots or none for an encoder")
        if self.adapters:
            raise ConfigError(
                f"adapters={self.adapters!r}: starting from trained adapters is not built yet: leave it out"
            )

    def adapter(self) -> Any:
        """The configured method as a frozen `Adapter`.

        Raises:
          ConfigError: the method or one of its options is unknown or impossible.
        """
        named = {name: getattr(self, name) for name in ("rank", "alpha", "num_experts", "top_k", "dropout")}
        options = {name: value for name, value in named.items() if value is not None}
        return _make_adapter("method", self.method, options | dict(self.options), self.learning_rate)

    def override_adapters(self) -> tuple[tuple[str, Any], ...]:
        """(pattern, Adapter) pairs of `overrides`: what a pattern does not name is as in the main method.

        Raises:
          ConfigError: a method or option of an override is unknown or impossible.
        """
        pairs = []
        for pattern, options in self.overrides.items():
            changed = dict(options)
            name = str(changed.pop("method", self.method))
            base = self.adapter()
            if name == self.method:
                kept = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.init}
            else:
                kept = {} if self.rank is None else {"rank": self.rank}
            pairs.append((pattern, _make_adapter(f"overrides[{pattern!r}]", name, kept | changed, self.learning_rate)))
        return tuple(pairs)

    @property
    def target_modules(self) -> tuple[str, ...] | str:
        """`targets` as injection reads them: the word "all-linear", or a tuple of patterns."""
        return "all-linear" if self.targets == ("all-linear",) else self.targets


def check_day(day: Any) -> None:
    """Raises ConfigError unless `day` is empty or a day as `chat_date` takes it."""
    try:
        good = not day or datetime.date.fromisoformat(day).isoformat() == day
    except (TypeError, ValueError):
        good = False
    _check("chat_date", day, good, "give a day as YYYY-MM-DD")


def _check(name: str, value: Any, good: bool, remedy: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value!r}: {remedy}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    _check(name, value, value in choices, f"choose one of {', '.join(choices)}")


def _check_strings(name: str, value: Any) -> None:
    good = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
    _check(name, value, good, "give a tuple of non-empty strings")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _make_adapter(where: str, name: str, options: Mapping[str, Any], learning_rate: float) -> Any:
    from mor_jax.adapters.registry import get_method, make_adapter

    try:
        return make_adapter(name, **{**get_method(name).defaults_at(learning_rate), **options})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}={name!r}: {error}") from error


@functools.cache
def _adapter_of_type() -> Any:
    import pydantic

    return pydantic.TypeAdapter(TrainConfig)


def config_from_mapping(mapping: Any, where: str = "configuration") -> TrainConfig:
    """A `TrainConfig` of the fields of a mapping, as a YAML file gives them.

    Args:
      mapping: field name -> value; lists stand for tuples, missing fields keep their defaults.
      where: name of the source, for messages.

    Raises:
      ConfigError: a field is unknown (the nearest names are listed), of a wrong type, or impossible.
    """
    import pydantic

    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping of fields, found {type(mapping).__name__}")
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in mapping:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=3) or names
            raise ConfigError(f"{where}: unknown field {name!r}: did you mean {', '.join(near)}?")
    try:
        return _adapter_of_type().validate_python(dict(mapping))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        detail = f"{place}={first['input']!r}: {message}" if place else message
        raise ConfigError(f"{where}: {detail}") from error


def load_config(path: str | Path) -> TrainConfig:
    """The `TrainConfig` in a YAML file.

    Raises:
      ConfigError: the file is missing, is not YAML, or holds a wrong field or one twice; the message starts with the
        path.
    """
    try:
        mapping = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}: give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return config_from_mapping({} if mapping is None else mapping, str(path))


def config_to_mapping(config: TrainConfig) -> dict[str, Any]:
    """All fields of `config` as plain lists, dicts and scalars; `config_from_mapping` gives `config` back."""
    mapping = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in mapping.items()}


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Writes all fields as YAML; `load_config` of that file equals `config`."""
    text = yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
