"""What each command can be told, one frozen dataclass a command; `mor train` has `training.config.TrainConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


def path_texts(value: str | Sequence[str]) -> tuple[str, ...]:
    """The texts of an option that takes several, which in Python may be given one alone."""
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a process finds the others of a command that several run together."""

    distributed: Literal["auto", "off"] | None = None  # auto joins what jax detects; auto for mor train, else off
    coordinator: str = ""  # HOST:PORT of process 0, where jax detects no cluster; or JAX_COORDINATOR_ADDRESS
    num_processes: int | None = None  # that take part; or JAX_NUM_PROCESSES
    process_id: int | None = None  # of this one, from 0; or JAX_PROCESS_ID


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `mor demo`."""

    output_dir: str = "mor_demo"  # folder of everything that the demo writes
    seed: int = 0  # of the data, their order and the initial adapters


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `mor eval`."""

    model: str  # Hugging Face directory, or the run folder of `mor train`
    data: tuple[str, ...]  # records, a figure for each task; choice: prompt, options, answer; classification: label
    task: Literal["perplexity", "choice", "classification", "generation"] = "perplexity"  # what is measured
    batch_size: int = 4  # rows at once, or as many more as the devices share evenly
    sequence_length: int = 512  # longest row in tokens
    max_new_tokens: int = 64  # generation only
    limit: int = 0  # examples of each file that are measured; 0 measures all
    chat_date: str = ""  # the day that a chat template prints, YYYY-MM-DD; empty: the run's, or today's
    rank: int = 0  # of an adapter trained for all smaller ranks (dylora); 0 takes its own
    mesh: str = ""  # data=2,fsdp=4,tensor=2; empty: every accelerator, on fsdp as far as the model divides
    dtype: Literal["float32", "bfloat16"] | None = None  # of the computation; the run's own, or float32
    base: str = field(default="", metadata={"flag": "--model"})  # of a run: where its base lies now, if it has moved


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `mor generate`."""

    model: str  # Hugging Face directory, or the run folder of `mor train`
    prompt: str  # text to continue
    max_new_tokens: int = 64  # it may end earlier, at the model's end token
    greedy: bool = False  # the likeliest token each time; else sampling
    temperature: float = 1.0  # of sampling
    top_p: float = 1.0  # sampling keeps the likeliest tokens of this total probability
    chat: bool = False  # the prompt is a user's message for the tokenizer's chat template
    chat_date: str = ""  # the day that the template prints, YYYY-MM-DD; empty: the run's, or today's
    seed: int = 0  # of sampling
    mesh: str = ""  # as in `mor eval`; data=1 is fastest where one device holds the model
    dtype: Literal["float32", "bfloat16"] | None = None  # of the computation; the run's own, or float32
    base: str = field(default="", metadata={"flag": "--model"})  # of a run: where its base lies now, if it has moved


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `mor merge`."""

    run: str  # run folder of `mor train`
    output_dir: str  # Hugging Face directory to be made
    gates: str = ""  # where gates read the input: least_squares, sequential, distill, mean, task:NAME; empty: the best
    rank: int = 0  # of the low-rank merge (0: full rank; distill: the adapter's own); for dylora the rank to cut to
    mergeable: bool = False  # also merge HaLoRA, which is meant to stay beside its base
    calibration: tuple[str, ...] = ()  # records that approximations are fitted on; the run's training data without
    batches: int = 8  # for calibration, as many more for fidelity; sequential runs all calibration rows at once, twice
    steps: int = 200  # of distill
    learning_rate: float = 3e-3  # of distill
    seed: int = 0  # of distill: the order of the calibration batches
    mesh: str = ""  # data=2,fsdp=4,tensor=2; empty: every accelerator, on fsdp as far as the model divides
    model: str = ""  # where the run's base lies now, if it has moved
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; else each tensor's own in the base


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `mor export`."""

    run: str  # run folder of `mor train`
    output_dir: str  # folder to be made
    format: Literal["hf", "peft", "safetensors"] = "hf"  # merged model, PEFT adapter, or our adapter alone
    verify: bool = False  # compare float32 logits in transformers or PEFT, where torch is and one process works alone
    gates: str = ""  # as in `mor merge`; peft: least_squares, sequential or distill
    rank: int = 0  # as in `mor merge`; peft: 0 takes the adapter's own rank
    mergeable: bool = False  # as in `mor merge`
    calibration: tuple[str, ...] = ()  # as in `mor merge`
    batches: int = 8  # as in `mor merge`: sequential runs all calibration rows at once, twice
    steps: int = 200  # as in `mor merge`
    learning_rate: float = 3e-3  # as in `mor merge`
    seed: int = 0  # as in `mor merge`
    mesh: str = ""  # as in `mor merge`
    model: str = ""  # as in `mor merge`
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # hf: of the weights; else each tensor's own


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `mor inspect`."""

    model: str  # Hugging Face directory, a lone config.json, or a name such as Llama-3.1-8B
    method: str = "mor"  # name in the registry of adapters
    rank: int | None = None  # of the factors; the method's own, unless it is given
    alpha: float | None = None
    num_experts: int | None = None
    top_k: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further options of the method, by name
    targets: tuple[str, ...] = ("all-linear",)  # names, or regular expressions over paths
    overrides: dict[str, Any] = field(default_factory=dict)  # {path pattern: {option: value}}
    trained_modules: tuple[str, ...] = ()  # base modules trained whole
    scan_layers: bool = True  # one stacked entry for all layers


@dataclass(frozen=True, kw_only=True)
class PlanOptions(InspectOptions):
    """Options of `mor plan`."""

    topology: str = "cpu:1"  # the slice: v4, v5e, v5p, v6e or tpu7x with its shape (v5e:4x4), or cpu:8
    batch_size: int = 8  # rows of one optimiser step, over all devices and micro-batches
    accumulate: int = 1  # micro-batches a step is computed in
    sequence_length: int = 512  # tokens in a row
    mesh: str = ""  # "data=2,fsdp=4,sequence=2,tensor=2"; empty puts every device on fsdp
    remat: Literal["none", "dots", "full", "offload"] = "none"  # what the backward pass computes again
    attention_implementation: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # auto: the slice's fused kernel
    dtype: Literal["float32", "bfloat16"] | None = None  # of the computation; bfloat16 on a TPU, float32 on the CPU
    param_dtype: Literal["float32", "bfloat16"] | None = None  # of the frozen base; empty is dtype
    optimizer: str = "adamw"  # any optimiser of optax by name
    loss_chunk: int = 1024  # tokens whose logits are alive at a time on each device
    search: bool = False  # compile mesh shapes, remat policies and micro-batches, and show the fastest plan that fits


@dataclass(frozen=True, kw_only=True)
class MethodsOptions:
    """Options of `mor methods`: none."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `mor verify`."""

    path: str  # a checkpoint, adapter or export; or a folder that holds some
