"""What "all-linear" leaves out: output heads under any name, and what it can't adapt, which it says."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx import bridge
from linen_models import OWN, WIDTH, Own, Stack, example

from mor_jax.adapters import LoRA
from mor_jax.injection import DEFAULT_KINDS, Contraction, InjectionError, LinearKind, resolve_sites
from mor_jax.injection.heads import named_as_head

LORA = LoRA(rank=2)
VOCABULARY = 11
IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


class LanguageModel(nn.Module):
    """A head of any name, whose output goes through what models do to logits; the MLP is as wide as the vocabulary."""

    head: str = "anything"
    after: str = "nothing"
    table: str = "table"
    tied: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        h = embed(ids)
        wide = jnp.tanh(nn.Dense(VOCABULARY, name="up")(h))
        h = Stack(None, name="body")(h + nn.Dense(WIDTH, name="down")(wide))
        if self.tied:
            return embed.attend(h)
        head = nn.remat(nn.Dense) if self.after == "remat" else nn.Dense
        logits = head(VOCABULARY, name=self.head)(h)
        if self.after == "softcap":
            logits = 5 * jnp.tanh(logits.astype(jnp.float32) / 5)
        if self.after == "bias and mask":
            logits = logits + self.param("prior", nn.initializers.normal(), (VOCABULARY,))
            logits = jnp.where(jnp.arange(VOCABULARY) < 9, logits, -jnp.inf)
        if self.after == "last":
            return {"logits": nn.log_softmax(logits[:, -1]), "hidden": h}
        if self.after == "another map":
            return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(logits)
        return logits


INSIDE = {"up", "down", *(f"body/layers_{i}/{name}" for i in range(3) for name in ("query", "key", "out"))}


@pytest.mark.parametrize("after", ["nothing", "softcap", "bias and mask", "last", "remat"])
def test_what_puts_out_the_logits_is_a_head_whatever_its_name(after):
    plan = resolve_sites(LanguageModel(after=after), LORA, "all-linear", IDS)
    assert set(plan.paths) == INSIDE
    assert dict(plan.skipped)["anything"] == "is an output head"


def test_a_map_before_the_head_is_none():
    plan = resolve_sites(LanguageModel(after="another map"), LORA, "all-linear", IDS)
    assert set(plan.paths) == {*INSIDE, "anything"}
    assert set(resolve_sites(LanguageModel(tied=True), LORA, "all-linear", IDS).paths) == INSIDE


def test_a_stack_whose_hidden_states_are_as_wide_as_the_vocabulary_has_no_head():
    class Hidden(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return Stack(None, name="body")(nn.Embed(WIDTH, WIDTH, name="embed")(ids))

    assert len(resolve_sites(Hidden(), LORA, "all-linear", IDS).paths) == 9


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "head",
        "logits",
        "classifier",
        "score",
        "logits_dense",
        "logitdense",
        "LogitsDense_0",
        "to_logits",
        "mlm_head",
        "LMHead",
        "output_head",
        "classification_head",
        "unembed",
        "embed_out",
        "lm_head_0",
    ],
)
def test_names_of_heads(name):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            return nn.Dense(3, name=name)(nn.Dense(4, name="proj")(h))

    assert resolve_sites(Model(), LORA, "all-linear", example()).paths == ("proj",)
    assert resolve_sites(Model(), LORA, name, example()).paths == (name,)


@pytest.mark.parametrize(
    "path",
    [
        "encoder/layer_0/output/dense",
        "decoder/layers/q_proj",
        "attention/multi_head/query",
        "moe/router_logits",
        "heads_mixer/proj",
        "header/proj",
        "scores/proj",
    ],
)
def test_names_of_no_heads(path):
    assert not named_as_head(path)


class RawExperts(nn.Module):
    """A mixture of experts whose matrices belong to no linear module, beside a linear gate."""

    @nn.compact
    def __call__(self, h):
        gate = nn.softmax(nn.Dense(3, name="gate")(h))
        up = self.param("w1", nn.initializers.normal(0.5), (3, WIDTH, 4))
        down = self.param("w2", nn.initializers.normal(0.5), (3, 4, WIDTH))
        h = jnp.einsum("bsei,eio->bseo", jnp.tanh(jnp.einsum("bsi,eio->bseo", h, up)), down)
        return jnp.einsum("bse,bseo->bso", gate, h)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, h):
        h = nn.scan(nn.remat(RawExpertsLayer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(
            name="layers"
        )(h, None)[0]
        h = Own(name="own")(nn.Conv(WIDTH, (3,), name="conv")(h))
        return bridge.to_linen(nnx.Linear, 4, 4, name="bridged")(h)


class RawExpertsLayer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + RawExperts(name="moe")(nn.LayerNorm(name="norm")(h)), None


def test_what_is_no_linear_module_is_said(caplog):
    with caplog.at_level(logging.INFO, "mor_jax"):
        plan = resolve_sites(Mixed(), LORA, "all-linear", example())
    assert plan.paths == ("layers/moe/gate",)
    told = dict(plan.skipped)
    assert set(told) == {"layers/moe", "own/proj", "conv", "bridged"}
    assert "RawExperts with w1 (2, 3, 6, 4), w2 (2, 3, 4, 6); register its class" in told["layers/moe"]
    assert "Scaled with weight" in told["own/proj"]
    assert "no LinearKind fits it: a convolution" in told["conv"]
    assert "an NNX module inside linen, to whose parameters nothing can be joined (kernel (4, 4))" in told["bridged"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "not adapted: " in record.getMessage()
    assert all(f"{path} (holds a matrix" in record.getMessage() for path in told)
    kind = LinearKind(lambda module: isinstance(module, bridge.ToLinen))
    with pytest.raises(InjectionError, match="bridged, which can't be adapted: it is an NNX module inside linen"):
        resolve_sites(Mixed(), LORA, "bridged", example(), kinds=(kind,))


def test_what_nobody_expects_to_be_adapted_is_no_warning(caplog):
    with caplog.at_level(logging.INFO, "mor_jax"):
        resolve_sites(LanguageModel(), LORA, "all-linear", IDS)
        resolve_sites(LanguageModel(), LORA, "up", IDS)
    (record,) = caplog.records
    assert (record.levelno, "anything (is an output head)" in record.getMessage()) == (logging.INFO, True)
    assert "embed (holds a matrix" in record.getMessage()


def test_only_own_classes_name_the_table():
    with pytest.raises(InjectionError, match="'all-linear' finds nothing to adapt: .* proj, .* with a LinearKind"):
        resolve_sites(Own(), LORA, "all-linear", example())
    assert resolve_sites(Own(), LORA, "all-linear", example(), kinds=(OWN, *DEFAULT_KINDS)).paths == ("proj",)


def test_a_name_that_also_means_what_cannot_be_adapted_is_said(caplog):
    class Both(nn.Module):
        @nn.compact
        def __call__(self, h):
            return nn.Sequential([nn.Dense(WIDTH, name="proj")], name="known")(Own(name="own")(h))

    with caplog.at_level(logging.INFO, "mor_jax"):
        plan = resolve_sites(Both(), LORA, ".*proj", example())
    assert plan.paths == ("proj",) or plan.paths == ("known/proj",)
    assert "own/proj (holds a matrix" in caplog.text


def test_a_raw_kernel_is_a_site_once_its_class_is_named():
    """Experts' matrices of a module that reads x by one of them: a kind finds it, and its batch axis."""
    kind = LinearKind(
        lambda module: isinstance(module, OneMatrix), "w", lambda module, x, shape: Contraction((-1,), (-2,), (-1,))
    )
    with pytest.raises(InjectionError, match=r"proj, .* leaves axis 0 out of a kernel of shape \(3, 6, 4\)"):
        resolve_sites(Matrices(), LORA, "proj", jnp.ones((3, 2, WIDTH)), kinds=(kind,))


class OneMatrix(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.einsum("ebi,eio->ebo", x, self.param("w", nn.initializers.normal(), (3, WIDTH, 4)))


class Matrices(nn.Module):
    @nn.compact
    def __call__(self, x):
        return OneMatrix(name="proj")(x)
