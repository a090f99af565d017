"""From a configuration to everything a run needs: model, data, adapters, mesh, loss and optimiser.

All that can be wrong with the input is found here, before a file is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from mor_jax.data import (
    DataSource,
    Examples,
    PackingPlan,
    Tokenization,
    load_examples,
    load_labelled,
    make_iterator,
    make_plan,
    parse_sources,
    prints_date,
    read_tokenization,
    single_pass,
)
from mor_jax.injection import Adapted, AdapterPlan, resolve_sites
from mor_jax.merging import merge_words
from mor_jax.models import (
    DecoderConfig,
    EncoderConfig,
    HeadKernel,
    ModelConfig,
    abstract_params,
    head_kernel,
    logical_axes,
    make_model,
    read_config,
)
from mor_jax.training.backend import for_backend
from mor_jax.training.classification import (
    HEAD,
    classification_loss,
    classifier_config,
    load_base,
    require_objective,
)
from mor_jax.training.config import ConfigError, TrainConfig
from mor_jax.training.distributed import first_decides
from mor_jax.training.mesh import MeshError, check_batch, check_length, held_rows, make_mesh
from mor_jax.training.metrics import TargetRow
from mor_jax.training.optimizer import make_optimizer, optimizer_bytes, plan_decay_mask
from mor_jax.training.sharding import check_heads, param_specs, shardings_of
from mor_jax.training.step import Loss, language_model_loss

_LOGGER = logging.getLogger(__name__)


class Batches(Protocol):
    """An endless iterator over batches whose place can be saved as JSON."""

    def __next__(self) -> Any:
        """{name: (B, S) int32}; of several processes, each may give the rows alone that it holds."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What decides the next batch."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was taken."""
        ...


@dataclass(frozen=True)
class Run:
    """What the loop runs; `build_run` makes one for a Hugging Face model, anyone may make one for another model.

    Attributes:
      config: of the run; the loop reads steps, seed, accumulate, output_dir and the like.
      adapted: the model with its plan.
      params: the frozen base, on `mesh` as `specs` say.
      mesh: where everything lives.
      specs: pytree of `PartitionSpec` like `params`.
      loss: (variables, batch, adapter_inputs) -> (loss_sum, token_count).
      optimizer: any of optax's.
      batches: of training.
      eval_batches: makes a pass over held-out batches; None where there are none.
      tasks: names of the tasks, in the order of their ids.
    """

    config: TrainConfig
    adapted: Adapted
    params: Any
    mesh: jax.sharding.Mesh
    specs: Any
    loss: Loss
    optimizer: optax.GradientTransformation
    batches: Batches
    eval_batches: Callable[[], Iterable[Any]] | None = None
    tasks: tuple[str, ...] = ()

    @property
    def plan(self) -> AdapterPlan:
        """Where the adapters sit."""
        assert self.adapted.plan is not None
        return self.adapted.plan


def build_run(config: TrainConfig, optimizer: optax.GradientTransformation | None = None) -> Run:
    """The run that `config` describes.

    Args:
      config: names model and data.
      optimizer: made in Python, instead of the one `config` names.

    Raises:
      ConfigError, MeshError, ModelFileError, DataError, InjectionError: bad input; nothing was written.
    """
    if not config.model or not config.data:
        name, remedy = (
            ("data", "at least one file of records") if config.model else ("model", "a Hugging Face directory")
        )
        raise ConfigError(f"{name}={getattr(config, name)!r}: give {remedy}")
    if config.compile_cache:
        use_compile_cache(config.compile_cache)
    mesh = choose_mesh(config)
    stored = for_backend(base_config(config), config, mesh)
    require_objective(config, stored)
    config, tokenization = decided_tokens(config, stored)
    batches, eval_batches, tasks, labels = _data(config, stored, mesh, tokenization)
    shape = classifier_config(stored, labels) if isinstance(stored, EncoderConfig) else stored
    config = dataclasses.replace(config, labels=labels)
    model = make_model(shape)
    head = (HEAD,) if labels and HEAD not in config.trained_modules else ()
    plan = resolve_sites(
        model,
        config.adapter(),
        config.target_modules,
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
        overrides=config.override_adapters(),
        trained_modules=(*config.trained_modules, *head),
    )
    optimizer = make_optimizer(config, optimizer, plan_decay_mask(plan))
    specs = base_specs(shape, mesh)
    params = load_base(config, stored, shape, shardings_of(specs, mesh))
    adapted = Adapted(base=model, plan=plan)
    if isinstance(shape, EncoderConfig):
        loss = classification_loss(adapted)
    else:
        loss = decoder_loss(config, adapted, plan, shape)
    return Run(config, adapted, params, mesh, specs, loss, optimizer, batches, eval_batches, tasks)


def use_compile_cache(folder: str | Path) -> None:
    """Compiled programs are kept in `folder` and found there by later processes, small ones too: a run has dozens."""
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def base_config(config: TrainConfig) -> ModelConfig:
    """The base's shape with the run's dtypes, scan and remat; reads `config.json` only.

    Raises:
      ConfigError: the base is not there.
      ModelFileError: its `config.json` is not as it should be.
    """
    if not Path(config.model).is_dir():
        raise ConfigError(
            f"model={config.model!r}: no such folder: give the base's Hugging Face directory by --model DIR"
        )
    return dataclasses.replace(
        read_config(config.model),
        dtype=config.dtype,
        param_dtype=config.param_dtype or config.dtype,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )


def base_specs(shape: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Where a base's parameters live: a `PartitionSpec` for each, a decoder's by the names of its axes.

    Raises:
      MeshError: an axis or the heads do not divide.
    """
    params = abstract_params(shape)
    if not isinstance(shape, DecoderConfig):
        if mesh.shape["sequence"] > 1:
            raise MeshError(f"sequence={mesh.shape['sequence']}: an encoder's rows are not split, use data or fsdp")
        return param_specs(params, mesh)
    check_heads(shape.num_heads, shape.num_kv_heads, mesh)
    return param_specs(params, mesh, axes=logical_axes(params))


def widest_mesh(shape: ModelConfig, devices: Sequence[Any]) -> tuple[jax.sharding.Mesh, Any]:
    """(a mesh for a model that is not trained, a `PartitionSpec` for each parameter).

    As many of the devices as divide the model are on `fsdp`, the rest on `data`.
    """
    for size in range(len(devices), 0, -1):
        if len(devices) % size == 0:
            mesh = make_mesh(f"data=-1,fsdp={size}", devices)
            with contextlib.suppress(MeshError):
                return mesh, base_specs(shape, mesh)
    raise MeshError("no device is there")


def decoder_loss(config: TrainConfig, adapted: Adapted, plan: AdapterPlan, shape: DecoderConfig) -> Loss:
    """The next-token loss of a run."""
    return language_model_loss(adapted, frozen_head(plan, shape), config.loss_chunk, shape.logit_softcap)


def choose_mesh(config: TrainConfig) -> jax.sharding.Mesh:
    """The mesh of `config`; without one, as many devices on the data axis as divide a micro-batch.

    Raises:
      MeshError: the mesh does not fit the devices or the batch.
    """
    rows, count = config.batch_size // config.accumulate, jax.device_count()
    if config.mesh:
        mesh = make_mesh(config.mesh)
        check_batch(mesh, config.batch_size, config.accumulate)
        check_length(mesh, config.sequence_length)
        used = mesh.size
    else:
        used = max(n for n in range(1, count + 1) if rows % n == 0)
        mesh = make_mesh(f"data={used}")
    if used < count and jax.process_count() > 1:
        raise MeshError(
            f"mesh={config.mesh!r} and batch_size={config.batch_size} use {used} of {count} devices: several processes"
            " must use all of theirs"
        )
    if used < count and not config.mesh:
        _LOGGER.warning("batch_size=%d uses %d of %d devices: a multiple uses all", config.batch_size, used, count)
    return mesh


def frozen_head(plan: AdapterPlan, shape: DecoderConfig) -> Callable[[Any], HeadKernel] | None:
    """params -> the head, or None where the head is adapted or trained and whole logits are needed."""
    head = "embed_tokens" if shape.tie_word_embeddings else "lm_head"
    if head in plan.trained_modules or any(path.endswith("lm_head") for path in plan.paths):
        _LOGGER.warning("the output head is trained: the loss holds whole logits instead of chunks")
        return None
    return lambda params: head_kernel(params, shape)


Held = Callable[[], Iterable[Any]] | None
LoadData = Callable[[Sequence[DataSource], Sequence[str] | None], Examples]


def recorded_tokens(config: TrainConfig) -> dict[str, Any]:
    """What a configuration says of tokens, as `read_tokenization` takes it."""
    given = {"start": config.start_tokens, "end": config.end_tokens, "stop": config.stop_tokens}
    return given | {"chat_date": config.chat_date}


def with_day(tokenization: Tokenization, model: str | Path) -> Tokenization:
    """The tokenization with one day for all processes, process 0's unless it has one, where the template prints it."""
    if not prints_date(tokenization):
        return tokenization
    day = tokenization.chat_date or first_decides(lambda: tokenization.today().date().isoformat())
    _LOGGER.warning("the chat template of %s prints the date: %s for the whole run (--chat-date)", model, day)
    return dataclasses.replace(tokenization, chat_date=day)


def decided_tokens(config: TrainConfig, shape: ModelConfig) -> tuple[TrainConfig, Tokenization]:
    """(the configuration with all that was decided about tokens, the tokenizer that follows it).

    The day that a template prints is process 0's, once a run. What a classifier reads, its tokenizer alone decides.

    Raises:
      DataError: there is no readable tokenizer, or its template is none to rely on.
    """
    found = read_tokenization(config.model, **recorded_tokens(config))
    if isinstance(shape, EncoderConfig):
        return config, found
    found = with_day(found, config.model)
    if not found.end:
        _LOGGER.warning("%s names no end-of-sequence token: texts are not closed; --end-tokens", config.model)
    decided = {"start_tokens": found.start, "end_tokens": found.end, "stop_tokens": found.stop}
    return dataclasses.replace(config, chat_date=found.chat_date, **decided), found


def _data(
    config: TrainConfig, shape: ModelConfig, mesh: jax.sharding.Mesh, tokenization: Tokenization
) -> tuple[Batches, Held, tuple[str, ...], tuple[str, ...]]:
    """(training batches, held-out passes or None, tasks, classes or none)."""
    labels: tuple[str, ...] = ()
    sources = parse_sources(config.data)
    if isinstance(shape, EncoderConfig):
        length = min(config.sequence_length, shape.max_length)
        known = config.labels or shape.labels
        examples, labels = load_labelled(
            sources, tokenization, length, config.overlong, labels=known, vocab_size=shape.vocab_size
        )

        def load(sources, tasks):
            own: dict[str, Any] = {"labels": labels, "tasks": tasks, "vocab_size": shape.vocab_size}
            return load_labelled(sources, tokenization, length, config.overlong, **own)[0]

    else:

        def load(sources, tasks):
            own: dict[str, Any] = {"tasks": tasks, "vocab_size": shape.vocab_size}
            return load_examples(sources, tokenization, config.sequence_length, config.overlong, **own)

        examples = load(sources, None)
    for name in ("truncated", "dropped", "empty"):
        if getattr(examples, name):
            _LOGGER.warning("%d of the examples were %s", getattr(examples, name), name)
    plan = _row_plan(config, examples)
    batches = make_iterator(examples, plan, config.batch_size, config.seed, held_rows(mesh, config.batch_size))
    held = _held_out(config, load, examples.tasks) if config.eval_data else None
    return batches, held, examples.tasks, labels


def _row_plan(config: TrainConfig, examples: Examples) -> PackingPlan:
    """Rows of the run's length; labelled examples have a row each, no longer than the longest needs."""
    if examples.labels is None:
        return make_plan(examples, config.sequence_length, config.seed, "best_fit" if config.packing else "padded")
    return make_plan(examples, -(-int(examples.lengths.max()) // 16) * 16, config.seed, "padded")


def _held_out(config: TrainConfig, load: LoadData, tasks: tuple[str, ...]) -> Callable[[], Iterable[Any]]:
    sources = parse_sources(config.eval_data)
    if len(tasks) == 1:
        sources = tuple(dataclasses.replace(source, task=tasks[0]) for source in sources)
    held_out = [load(own, tasks) for own in _by_task(sources)]
    held_plans = [_row_plan(config, examples) for examples in held_out]
    rows = config.batch_size // config.accumulate  # a whole batch might not fit
    most = config.eval_batches * config.accumulate or None

    def one_pass() -> Iterator[Any]:
        passes = [single_pass(examples, plan, rows) for examples, plan in zip(held_out, held_plans, strict=True)]
        return itertools.islice(_take_turns(passes), most)

    return one_pass


def _by_task(sources: Sequence[DataSource]) -> list[tuple[DataSource, ...]]:
    """The sources of each task: batches of one task each tell its own loss at no further cost."""
    names = dict.fromkeys(source.task for source in sources)
    return [tuple(source for source in sources if source.task == name) for name in names]


def _take_turns(passes: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """One item of each in turn until all are exhausted."""
    nothing = object()
    for turn in itertools.zip_longest(*passes, fillvalue=nothing):
        yield from (item for item in turn if item is not nothing)


def target_rows(run: Run, adapters: Any) -> list[TargetRow]:
    """The table before step one: adapted sites, gates, trained modules, then all that is only frozen."""
    rows, counted = [], 0
    for adapted in run.plan.sites:
        site = adapted.site
        frozen = site.num_layers * site.in_features * site.out_features
        counted += frozen
        shape = f"{site.num_layers} x ({site.in_features}, {site.out_features})"
        rank = str(getattr(adapted.adapter, "rank", ""))
        true, stored = adapted.adapter.num_params(site), adapted.adapter.padded_params(site)
        merges = merge_words([adapted.adapter]).split(":")[0]
        rank = f"{rank} {adapted.adapter.name}".strip() + (f" ({stored:,} padded)" if stored > true else "")
        row = _row(run, adapters, site.path, shape, rank, frozen, merges)
        rows.append(dataclasses.replace(row, trainable=row.trainable - (stored - true)))
    for path, adapted in run.plan.gates.items():
        rows.append(_row(run, adapters, path, f"gate of {adapted.gate_features}", "", 0))
    for path in run.plan.trained_modules:
        rows.append(_row(run, adapters, path, "trained module", "", 0, "exact"))
    total = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    return [*rows, TargetRow("all else", "", "", 0, total - counted, 0)]


def _row(run: Run, adapters: Any, path: str, shape: str, rank: str, frozen: int, merges: str = "") -> TargetRow:
    own = {path: adapters[path]}
    trainable = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(own))
    return TargetRow(path, shape, rank, trainable, frozen, optimizer_bytes(run.optimizer, own), merges)
