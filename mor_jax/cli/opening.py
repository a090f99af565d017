"""Opening what a command is pointed at: a Hugging Face directory, or the run folder of `mor train` with its adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mor_jax.adapters import AdapterInputs, Leaves
from mor_jax.cli.flags import UsageError
from mor_jax.data import Tokenization, check_tokens, read_tokenization
from mor_jax.finite import NotFiniteError
from mor_jax.injection import Adapted, AdapterPlan, cut_to_rank
from mor_jax.models import (
    CachedForward,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    generate,
    init_cache,
    load_params,
    make_model,
    read_config,
    stored_dtypes,
)
from mor_jax.models.dtypes import STORED
from mor_jax.processes import gathered
from mor_jax.training.build import base_specs, recorded_tokens, widest_mesh, with_day
from mor_jax.training.config import TrainConfig, check_day, load_config
from mor_jax.training.distributed import check_same_everywhere
from mor_jax.training.integrity import MANIFEST
from mor_jax.training.mesh import MeshError, make_mesh, put_batch, row_ways
from mor_jax.training.recorded_base import absolute_path, check_base_config, check_base_weights, expanded_path
from mor_jax.training.sharding import RULES, on_devices, shardings_of
from mor_jax.training.step import put_leaves


@dataclass(frozen=True)
class LiveModel:
    """A model in memory, ready to be asked.

    Attributes:
      directory: The Hugging Face directory of the (frozen) model.
      config: Its shape.
      params: Its parameters, on `mesh`.
      mesh: The devices that it lies on.
      run: The run folder, or None for a plain directory.
      train: What the run was trained with.
      plan: Where its adapters sit.
      leaves: Their arrays.
      metadata: What `adapter.json` says beside them.
    """

    directory: Path
    config: ModelConfig
    params: dict
    mesh: jax.sharding.Mesh
    run: Path | None = None
    train: TrainConfig | None = None
    plan: AdapterPlan | None = None
    leaves: Leaves | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The decoder or encoder, with its adapters where there are some."""
        model = make_model(self.config)
        return model if self.plan is None else Adapted(base=model, plan=self.plan)

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes."""
        if self.leaves is None:
            return {"params": self.params}
        own = {"adapters": self.leaves.params, "adapter_state": self.leaves.state}
        return {"params": self.params, **own, "adapter_constants": self.leaves.constants}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that the adapter was trained on, in the order of their ids."""
        return tuple(self.metadata.get("tasks", ()))

    def tokenization(self, chat_date: str = "") -> Tokenization:
        """The tokenizer with what the run decided about tokens, or what the directory's files say.

        Args:
          chat_date: The day that a chat template prints, instead of the run's or today.

        Raises:
          DataError: there is no readable tokenizer.
        """
        recorded = {} if self.train is None else recorded_tokens(self.train)
        if chat_date:
            check_day(chat_date)
            recorded["chat_date"] = chat_date
        return with_day(read_tokenization(self.directory, **recorded), self.directory)

    def on_devices(self) -> contextlib.AbstractContextManager[None]:
        """Within it everything is computed on the model's devices."""
        return on_devices(self.mesh)

    def padded_rows(self, wanted: int) -> int:
        """The least number of rows, no less than `wanted`, that the devices share evenly."""
        ways = row_ways(self.mesh)
        return -(-wanted // ways) * ways

    def require_decoder(self, what: str) -> None:
        """Raises UsageError unless the model predicts next tokens, as `what` needs."""
        if isinstance(self.config, EncoderConfig):
            raise UsageError(f"{self.directory} is a {self.config.model_type} encoder: {what} needs a decoder")

    def logits_fn(self) -> Callable[[Mapping[str, np.ndarray]], jax.Array]:
        """Batch -> next-token logits (B, S, V), or a classifier's (B, classes); compiled once for each shape.

        A batch has as many rows as `padded_rows` gives; one with a token that the model has not raises DataError.
        """
        module, adapted = self.module, self.plan is not None

        @jax.jit
        def run(variables: dict, batch: dict) -> jax.Array:
            extra: dict[str, Any] = {"adapter_inputs": adapter_inputs(batch)} if adapted else {}
            extra |= {name: batch[name] for name in ("token_type_ids",) if name in batch}
            logits: Any = module.apply(variables, batch["input_ids"], batch["positions"], batch["segment_ids"], **extra)
            return logits

        variables = self.variables

        def logits(batch: Mapping[str, np.ndarray]) -> jax.Array:
            check_tokens(batch["input_ids"], self.config.vocab_size, "a batch")
            with self.on_devices():
                return run(variables, put_batch(batch, self.mesh))

        return logits

    def generate_fn(self, eos_ids: tuple[int, ...], pad_id: int, **options: Any) -> Callable[..., np.ndarray]:
        """(prompts (B, S) left-padded, mask (B, S)) -> new tokens (B, T); `options` are those of `generate`.

        The prompts have as many rows as `padded_rows` gives; a token that the model has not raises DataError.
        """
        self.require_decoder("generation")
        config = self.config
        assert isinstance(config, DecoderConfig)
        pad_id = pad_id if pad_id < config.vocab_size else 0  # it fills rows up and is never read
        apply_fn, variables = CachedForward(self.module), self.variables

        def run(prompts: np.ndarray, mask: np.ndarray) -> np.ndarray:
            rows, length = prompts.shape
            prompts = np.where(mask > 0, prompts, pad_id)
            check_tokens(prompts, config.vocab_size, "a prompt")
            cache = _cache_maker(config, rows, length + options["max_new_tokens"], self.mesh)()
            placed = put_batch({"prompts": prompts, "mask": mask}, self.mesh)
            tokens = placed["prompts"], placed["mask"]
            with self.on_devices():
                new = generate(apply_fn, variables, cache, *tokens, eos_ids=eos_ids, pad_id=pad_id, **options)
            return np.asarray(gathered(new))

        return run


@functools.lru_cache(maxsize=8)
def _cache_maker(config: DecoderConfig, rows: int, length: int, mesh: jax.sharding.Mesh) -> Callable[[], dict]:
    """Makes empty key-value caches whose rows and heads lie where those of the activations do."""
    make = functools.partial(init_cache, config, rows, length)

    def spec(leaf: Any) -> PartitionSpec:
        names = ("batch", None) if leaf.ndim < 4 else (*(None,) * (leaf.ndim - 4), "batch", None, "kv_heads", None)
        return RULES.spec(names[: leaf.ndim])

    return jax.jit(make, out_shardings=shardings_of(jax.tree.map(spec, jax.eval_shape(make)), mesh))


def adapter_inputs(batch: Mapping[str, Any]) -> AdapterInputs:
    """What methods may know of a batch: its segments, prompts, tasks and positions."""
    names = ("segment_ids", "prompt_mask", "task_ids", "positions")
    return AdapterInputs(**{name: batch[name] for name in names})


def open_model(path: str | Path, dtype: str | None = None, mesh: str = "", base: str = "") -> LiveModel:
    """The model at a path.

    Args:
      path: a Hugging Face directory, or the run folder of a finished `mor train`.
      dtype: of the computation; None takes the run's own, or float32.
      mesh: of the devices, as in `mor train`; empty is for `choose_devices`.
      base: directory of a run's base, where that is not where the run says.

    Raises:
      UsageError: there is nothing to open at the path, the run has no adapter yet, or its base is not there.
      AdapterFileError: the base is another one than the run was trained on.
      MeshError: the mesh does not fit the devices or the model.
      ModelFileError, ConfigError: a file is not as it should be.
      IntegrityError: the adapter fails its checksums.
      NotFiniteError: a number of the adapter is not finite.
    """
    path = Path(expanded_path(path))
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give a Hugging Face directory or the run folder of `mor train`")
    if (path / "config.yaml").is_file():
        return open_run(path, dtype, mesh, base)
    if base:
        raise UsageError(f"--model {base}: says where the base of a run is, and {path} is no run of `mor train`")
    config = dataclasses.replace(read_config(path), dtype=dtype or "float32", param_dtype=dtype or "float32")
    check_same_everywhere({"config.json": repr(config)})
    devices, specs = choose_devices(config, mesh)
    return LiveModel(path, config, load_params(path, config, shardings_of(specs, devices)), devices)


def choose_devices(config: ModelConfig, description: str = "") -> tuple[jax.sharding.Mesh, Any]:
    """(the mesh that a model is opened on, a `PartitionSpec` for each of its parameters).

    Without a description it is the `widest_mesh` of every device. A CPU's virtual devices share its memory and cores,
    so that a process alone uses one.

    Raises:
      MeshError: the mesh does not fit the devices or the model.
    """
    if description:
        mesh = make_mesh(description)
        if mesh.shape["sequence"] > 1:
            raise MeshError(f"mesh={description!r}: sequence is for training; use data, fsdp or tensor")
        if mesh.size < jax.device_count() and jax.process_count() > 1:
            raise MeshError(f"mesh={description!r}: {jax.device_count()} devices, and several processes must use all")
        return mesh, base_specs(config, mesh)
    one = jax.process_count() == 1 and jax.default_backend() == "cpu"
    return widest_mesh(config, jax.devices()[: 1 if one else None])


def at_rank(live: LiveModel, rank: int) -> LiveModel:
    """The run with its adapter cut to a rank that it was trained for; 0 leaves it as it is.

    Raises:
      UsageError: there is no adapter, or its method does not allow the rank.
    """
    if not rank:
        return live
    if live.plan is None or live.leaves is None:
        raise UsageError(f"--rank {rank}: {live.directory} has no adapter; give the run folder of `mor train`")
    try:
        plan, leaves = cut_to_rank(live.plan, live.leaves, rank)
    except ValueError as error:
        raise UsageError(f"--rank {rank}: {error}") from error
    return dataclasses.replace(live, plan=plan, leaves=leaves)


def open_run(
    path: str | Path, dtype: str | None = None, mesh: str = "", base: str = "", kept: str | None = None
) -> LiveModel:
    """The base of a run with its trained adapter; arguments and errors as of `open_model`.

    Args:
      path: the run folder.
      dtype: of the computation.
      mesh: of the devices.
      base: directory of its base.
      kept: dtype of the base's parameters in memory, or "stored" for that of each in its file; None takes the one that
        they were trained in, in which they are first recognised.
    """
    from mor_jax.training.adapter_file import load_adapter, read_description
    from mor_jax.training.classification import classifier_config, load_base

    run = Path(expanded_path(path))
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run}: no config.yaml in it; give the run folder of `mor train`")
    if not (run / "adapter").is_dir():
        raise UsageError(f"{run}: has no adapter/ yet; finish the run with `mor train {run}/config.yaml --resume`")
    train = load_config(run / "config.yaml")
    train = dataclasses.replace(train, model=_base_directory(run, train.model, base))
    trained = train.param_dtype or train.dtype
    stored = read_config(train.model)
    stored = dataclasses.replace(stored, dtype=dtype or train.dtype, param_dtype=trained, scan_layers=train.scan_layers)
    config = classifier_config(stored, train.labels) if isinstance(stored, EncoderConfig) and train.labels else stored
    manifest = (run / "adapter" / MANIFEST).read_text(encoding="utf-8")  # with the checksums of the other files
    check_same_everywhere({f"adapter/{MANIFEST}": manifest, "config.json": repr(config)})
    where, described = f"{train.model} is not the base of {run}", read_description(run / "adapter")
    check_base_config(where, described, config)
    devices, specs = choose_devices(config, mesh)
    load = functools.partial(load_base, train, stored, config, shardings_of(specs, devices))
    params = load()
    check_base_weights(where, described, params)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plan, leaves, metadata = load_adapter(run / "adapter", make_model(config), params, example, check_base=False)
    _check_finite(leaves.params, run)
    leaves = put_leaves(leaves, plan, specs, devices)
    if kept is not None and _dtypes(train.model, config, kept) != {jnp.dtype(trained)}:
        del params  # never both at once
        params = load(dtype=kept)
    return LiveModel(Path(train.model), config, params, devices, run, train, plan, leaves, metadata)


def _base_directory(run: Path, recorded: str, given: str) -> str:
    """The absolute path of the base that a run names, or of the one given instead.

    Raises:
      UsageError: there is no such folder.
    """
    found = absolute_path(given or recorded)
    if Path(found).is_dir():
        return found
    if given:
        raise UsageError(f"--model {given}: no such folder; give the Hugging Face directory that {run} was trained on")
    relative = "" if Path(recorded).is_absolute() else f" (looked for as {found})"
    raise UsageError(f"{run}: its base {recorded} is not there{relative}; say where it is now by --model DIR")


def _dtypes(directory: str, config: ModelConfig, kept: str) -> set[Any]:
    """Those of the parameters that are loaded as `kept`."""
    return set(stored_dtypes(directory, config).values()) if kept == STORED else {jnp.dtype(kept)}


def _check_finite(params: Mapping[str, Any], run: Path) -> None:
    """Raises NotFiniteError unless all trained numbers, {site path: {leaf: array}}, are finite."""
    for path, own in params.items():
        for place, leaf in jax.tree_util.tree_leaves_with_path(own):
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                name = jax.tree_util.keystr(place, simple=True, separator="/")
                raise NotFiniteError(f"{run}/adapter", f"{path}/{name} is not finite; take an earlier checkpoint")
