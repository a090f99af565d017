"""Classification on an encoder: its classes, its head, and the loss of each example."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.injection import Adapted
from mor_jax.models import EncoderConfig, ModelConfig, add_head, load_params, with_head
from mor_jax.training.config import ConfigError, TrainConfig
from mor_jax.training.losses import cross_entropy
from mor_jax.training.step import Batch, Loss

HEAD = "classifier"


def require_objective(config: TrainConfig, shape: ModelConfig) -> None:
    """Returns when the model can be trained for the objective.

    Raises:
      ConfigError: a decoder is to classify, or an encoder to predict the next token.
    """
    is_encoder = isinstance(shape, EncoderConfig)
    if is_encoder != (config.objective == "classification"):
        kind, other = ("encoder", "classification") if is_encoder else ("decoder", "causal")
        raise ConfigError(f"objective={config.objective!r}: {config.model} is a {shape.model_type} {kind}: use {other}")


def classifier_config(shape: EncoderConfig, labels: tuple[str, ...]) -> EncoderConfig:
    """The encoder with a head for these classes: its own where it has one of them, else a new one."""
    return shape if shape.labels == labels else with_head(shape, labels)


def load_base(
    config: TrainConfig, stored: ModelConfig, shape: ModelConfig, shardings: Any = None, dtype: str | None = None
) -> dict:
    """The frozen parameters of a run: its model directory's, and a fresh head where that has none for the classes.

    Args:
      config: of the run; a fresh head is drawn from its seed.
      stored: what the directory's `config.json` describes.
      shape: what is trained.
      shardings: as `load_params` takes them; a fresh head follows them too.
      dtype: likewise; a fresh head always has that of `shape`.
    """
    if not isinstance(shape, EncoderConfig) or not isinstance(stored, EncoderConfig) or stored.labels == shape.labels:
        return load_params(config.model, shape, shardings, dtype)
    bare = dataclasses.replace(shape, head="none", labels=())
    params = load_params(config.model, bare, shardings, dtype)
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), 2)
    params = add_head(params, shape, key)
    if isinstance(shardings, dict):
        params[HEAD] = jax.device_put(params[HEAD], shardings[HEAD])
    return params


def label_of_rows(batch: Batch) -> tuple[Array, Array]:
    """(class ids (B,) int32, 1 where a row has one (B,) float32) of a batch of labelled rows, one example each."""
    counts = batch["loss_mask"].max(axis=1)
    place = jnp.argmax(batch["loss_mask"], axis=1)[:, None]
    return jnp.take_along_axis(batch["targets"], place, axis=1)[:, 0], counts.astype(jnp.float32)


def classification_loss(adapted: Adapted) -> Loss:
    """The cross-entropy of each example's class, for an adapted `Encoder` with a head; see `Loss`."""

    def loss(variables, batch, inputs):
        arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"], batch["token_type_ids"])
        logits = adapted.apply(variables, *arguments, output="logits", adapter_inputs=inputs)
        return cross_entropy(logits, *label_of_rows(batch))

    return loss
