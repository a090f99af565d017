"""What transformers makes of a config.json, and whether we make the same of it: the oracle of spellings."""

import json
import logging
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mor_jax.models import DecoderConfig, ModelFileError, read_config
from mor_jax.models.attention import rotary_frequencies
from mor_jax.models.layers import ACTIVATION_FUNCTIONS
from mor_jax.models.tensors import tensor_table

LENGTH = 12
POINTS = np.linspace(-3, 3, 13, dtype=np.float32)


@dataclass(frozen=True)
class Meaning:
    """All that tells one decoder from another of the same weights."""

    tensors: dict  # name -> shape
    windows: tuple  # of each layer
    ropes: tuple  # of each layer: frequencies, and the factor on cos and sin
    scores: tuple  # factor on attention scores, and their cap
    rest: tuple  # norms' epsilon, cap of the logits, factor on embedded tokens
    activation: np.ndarray  # at some points


def write(folder, values):
    """The folder with these values as its config.json."""
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def forward_or_error(make, tokens):
    """The torch model that `make` makes, after a forward pass of these tokens; or the exception that it raises."""
    import torch

    logger = logging.getLogger("transformers")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)  # to start more takes longer than these products
    try:
        model = make().eval()
        with torch.no_grad():
            model(torch.tensor([list(tokens)]))
    except Exception as error:  # of many kinds, none of which it documents
        return error
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
    return model


def torch_model(folder):
    """transformers' decoder of the config.json, random, after a forward pass; or the exception that it raises."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return forward_or_error(
        lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager"),
        range(3, 3 + LENGTH),
    )


def _their_window(model, layer):
    if model.config.model_type == "mistral":
        return model.config.sliding_window
    return getattr(layer.self_attn, "sliding_window", None)


def _their_rope(model, layer):
    rotary, kind = model.model.rotary_emb, getattr(layer.self_attn, "layer_type", None)
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    return getattr(rotary, f"{prefix}inv_freq").numpy(), getattr(rotary, f"{prefix}attention_scaling")


def their_meaning(model) -> Meaning:
    """Read off the modules of the torch model, not off its configuration where there is a module."""
    import torch

    layers = model.model.layers
    tensors = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del tensors["lm_head.weight"]
    caps = {"gemma2": getattr(model.config, "attn_logit_softcapping", None)}  # no other family applies one
    scale = getattr(model.model.embed_tokens, "embed_scale", None)
    return Meaning(
        tensors,
        tuple(_their_window(model, layer) for layer in layers),
        tuple(_their_rope(model, layer) for layer in layers),
        (layers[0].self_attn.scaling, caps.get(model.config.model_type)),
        (
            getattr(model.model.norm, "variance_epsilon", None) or model.model.norm.eps,
            getattr(model.config, "final_logit_softcapping", None) if "gemma" in model.config.model_type else None,
            1.0 if scale is None else float(scale),
        ),
        layers[0].mlp.act_fn(torch.tensor(POINTS)).numpy(),
    )


@lru_cache(maxsize=256)
def _tensors(config: DecoderConfig) -> dict:
    return {entry.name: entry.shape for entry in tensor_table(config)}


def our_meaning(config: DecoderConfig) -> Meaning:
    found = [rotary_frequencies(theta, config.head_dim, scaling) for theta, scaling in config.ropes]
    plain = {"sliding_window": None, "sliding_layers": (), "sliding_rope_theta": None, "sliding_rope_scaling": None}
    plain |= {"rope_theta": 1.0, "rope_scaling": None, "query_scalar": None, "hidden_act": "silu", "dtype": "float32"}
    plain |= {"attention_softcap": None, "logit_softcap": None, "max_position_embeddings": 1, "rms_norm_eps": 1.0}
    return Meaning(
        _tensors(replace(config, **plain)),  # what has no part in names and shapes is left out of the cache's key
        config.windows,
        tuple(found[kind] for kind in config.rope_kinds),
        ((config.query_scalar or config.head_dim) ** -0.5, config.attention_softcap),
        (config.rms_norm_eps, config.logit_softcap, config.embedding_scale or 1.0),
        np.asarray(ACTIVATION_FUNCTIONS[config.hidden_act](POINTS)),
    )


def assert_same_meaning(ours: Meaning, theirs: Meaning, label):
    assert ours.tensors == theirs.tensors, label
    assert ours.windows == theirs.windows, label
    for mine, other in zip(ours.ropes, theirs.ropes, strict=True):
        np.testing.assert_allclose(mine[0], other[0], rtol=2e-6, err_msg=str(label))
        np.testing.assert_allclose(mine[1], other[1], rtol=1e-6, err_msg=str(label))
    np.testing.assert_allclose(ours.activation, theirs.activation, atol=1e-6, err_msg=str(label))
    for mine, other in zip((*ours.scores, *ours.rest), (*theirs.scores, *theirs.rest), strict=True):
        assert (mine is None) == (other is None), label
        assert mine is None or abs(mine - other) <= 1e-6 * abs(other), label


def read_or_error(folder):
    """Our config, or the error that we raise."""
    try:
        return read_config(folder)
    except ModelFileError as error:
        return error


def check(folder, values) -> str:
    """Asserts that a config.json means one thing to both; "same", or "refused" where both refuse it."""
    write(folder, values)
    model, ours = torch_model(folder), read_or_error(folder)
    if isinstance(ours, ModelFileError):
        assert isinstance(model, Exception), f"{values}: {ours}"
        assert str(ours).startswith(f"{folder / 'config.json'}: "), ours
        return "refused"
    assert not isinstance(model, Exception), f"{values}: we read it, transformers raises {model!r}"
    assert_same_meaning(our_meaning(ours), their_meaning(model), values)
    return "same"
