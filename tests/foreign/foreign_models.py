"""Models that others wrote, small: how each is called and where its linear maps are.

Google's `gemma` is imported from its package, 2.0.8: later releases import TensorFlow before any model can be made. The
others are shapes of flax's own examples, out of flax's own layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.injection import DEFAULT_KINDS, Contraction, LinearKind

ROWS, LENGTH = 4, 6
GEMMA_MISSING = "the package gemma is missing: pip install --no-deps gemma==2.0.8"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 40, (ROWS, LENGTH)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 8, 8, 3)), jnp.float32)


@dataclass(frozen=True)
class Foreign:
    """A model, its example inputs, and what a person who knows it would write down by hand.

    Attributes:
      model: The module.
      args: Of its call.
      targets: Names of the linear maps to adapt.
      logits: Its output -> logits (..., classes).
      layout: End of a path -> (change (in, out), kernel's shape) -> the change in the kernel's layout.
      kernel: Name of the kernel leaf.
      kwargs: More arguments of its call.
      kinds: Its linear modules.
    """

    model: nn.Module
    args: tuple
    targets: tuple[str, ...]
    logits: Callable[[Any], jax.Array] = lambda out: out
    layout: dict[str, Callable] = field(default_factory=lambda: {"": plain})
    kernel: str = "kernel"
    kwargs: dict = field(default_factory=dict)
    kinds: tuple[LinearKind, ...] = DEFAULT_KINDS


def plain(change, shape):
    return change.reshape(shape)


# Gemma's own linear class takes the equation as an argument, so its sites are told by name.
GEMMA_CONTRACTIONS = {
    "q_einsum": Contraction(out_axes=(-3, -1)),  # BTD,NDH->BTNH
    "kv_einsum": Contraction(out_axes=(-4, -3, -1), y_order=(1, 2, 0, 3, 4)),  # BSD,CKDH->CBSKH
    "attn_vec_einsum": Contraction(x_axes=(-2, -1), in_axes=(-3, -2)),  # BTNH,NHD->BTD
}


def gemma() -> Foreign:
    """Two layers of Gemma 2's kind, one with a window; google's linen code."""
    transformer = pytest.importorskip("gemma.transformer", reason=GEMMA_MISSING)
    from gemma.layers import Einsum
    from gemma.modules import AttentionType

    config = transformer.TransformerConfig(
        num_layers=2,
        num_embed=40,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=6,
        num_kv_heads=2,
        final_logit_softcap=5.0,
        attn_logits_soft_cap=4.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
        sliding_window_size=3,
    )
    kind = LinearKind(
        lambda module: isinstance(module, Einsum) and module.name in GEMMA_CONTRACTIONS,
        kernel_leaf="w",
        contraction=lambda module, x, shape: GEMMA_CONTRACTIONS[module.name],
    )
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (ROWS, LENGTH, LENGTH))
    return Foreign(
        model=transformer.Transformer(config=config),
        args=(TOKENS, positions),
        kwargs={"cache": None, "attention_mask": causal},
        logits=lambda out: out[0],
        targets=tuple(GEMMA_CONTRACTIONS),
        kernel="w",
        layout={
            "q_einsum": lambda d, s: jnp.transpose(d.reshape(s[1], s[0], s[2]), (1, 0, 2)),
            "kv_einsum": lambda d, s: jnp.transpose(d.reshape(s[2], s[0], s[1], s[3]), (1, 2, 0, 3)),
            "attn_vec_einsum": plain,
        },
        kinds=(kind, *DEFAULT_KINDS),
    )


class PatchClassifier(nn.Module):
    """A vision transformer's shape: patches by a convolution, flax's own attention (DenseGeneral), an MLP, a head."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, 16)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(16, name="mlp_out")(nn.gelu(nn.Dense(24, name="mlp_in")(nn.LayerNorm()(x))))
        return nn.Dense(5, name="head")(x.mean(axis=1))


class ConvolutionalNet(nn.Module):
    """The shape of flax's MNIST example: convolutions, pooling, dense layers."""

    @nn.compact
    def __call__(self, images):
        x = nn.avg_pool(nn.relu(nn.Conv(8, (3, 3))(images)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(12, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(24, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(5, name="head")(x)


class LanguageModel(nn.Module):
    """The shape of flax's LM1B example: causal attention of flax's own, the table of the input as the output's head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(40, 16, name="shared_embedding")
        x = embed(ids) + nn.Embed(LENGTH, 16, name="position")(jnp.arange(ids.shape[1]))
        attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
        x = x + nn.Dense(16, name="mlp_out")(nn.relu(nn.Dense(24, name="mlp_in")(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x)) / 4


class MixtureOfExperts(nn.Module):
    """Soft mixtures: every expert reads every token, by one kernel (experts, in, out), and one of them under vmap."""

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(40, 16, name="table")(ids)
        gates = nn.softmax(nn.Dense(3, name="gate")(h))
        spread = jnp.broadcast_to(h, (3, *h.shape))
        inner = nn.gelu(nn.DenseGeneral(24, batch_dims=(0,), name="up")(spread))
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        outer = nn.vmap(nn.Dense, **axes)(16, use_bias=False, name="down")(inner)
        h = h + jnp.einsum("ebsd,bse->bsd", outer, gates)
        return nn.Dense(40, name="vocabulary")(h)


def mixture_of_experts() -> Foreign:
    return Foreign(MixtureOfExperts(), (TOKENS,), ("gate", "up", "down"))


def language_model() -> Foreign:
    return Foreign(LanguageModel(), (TOKENS,), ("query", "value", "attention.out", "mlp_in", "mlp_out"))


def vision_transformer() -> Foreign:
    return Foreign(PatchClassifier(), (IMAGES,), ("query", "value", "attention.out", "mlp_in", "head"))


def convolutional_net() -> Foreign:
    return Foreign(ConvolutionalNet(), (IMAGES,), ("hidden", "head"))


MODELS = {
    "gemma": gemma,
    "language_model": language_model,
    "mixture_of_experts": mixture_of_experts,
    "vision_transformer": vision_transformer,
    "convolutional_net": convolutional_net,
}
