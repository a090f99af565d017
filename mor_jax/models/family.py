"""The module that a config describes: what loading, inspecting and training need to know of both kinds of model."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from mor_jax.models.decoder import Decoder
from mor_jax.models.encoder import Encoder

NEW_HEADS = {"bert": "linear", "roberta": "dense"}  # the head that Hugging Face's classifiers of a family have


def make_model(config: ModelConfig) -> Decoder | Encoder:
    """`Decoder(config)` or `Encoder(config)`."""
    return Decoder(config) if isinstance(config, DecoderConfig) else Encoder(config)


def abstract_params(config: ModelConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(make_model(config).init, jax.random.key(0), ids)["params"]


def with_head(config: EncoderConfig, labels: tuple[str, ...]) -> EncoderConfig:
    """The encoder with its family's classification head for these classes, in place of any it has.

    Raises:
      ValueError: fewer than two classes, or the head needs a pooler and there is none.
    """
    if len(labels) < 2:
        raise ValueError(f"a classifier needs at least two classes, got {', '.join(labels) or 'none'}")
    head = NEW_HEADS[config.model_type]
    return replace(config, head=head, labels=labels, pooler=head == "linear")


def add_head(params: dict, config: EncoderConfig, key: jax.Array) -> dict:
    """`params` of the encoder without a head, with a fresh one: normal kernels of `initializer_range`, zero biases."""
    shapes = abstract_params(config)["classifier"]
    leaves = jax.tree.leaves_with_path(shapes)
    drawn = [
        jnp.zeros(shape.shape, shape.dtype)
        if path[-1].key == "bias"
        else (config.initializer_range * jax.random.normal(own, shape.shape)).astype(shape.dtype)
        for (path, shape), own in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
    ]
    return {**params, "classifier": jax.tree.unflatten(jax.tree.structure(shapes), drawn)}
