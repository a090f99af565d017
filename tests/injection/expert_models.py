"""Models with several maps side by side, as mixtures of experts have them: by nn.vmap, in one kernel, in a loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.injection import DEFAULT_KINDS, Contraction, LinearKind

EXPERTS, LAYERS, ROWS, WIDTH, INNER = 2, 3, 4, 6, 6
AXES = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


class OwnExperts(nn.Module):
    """A class of somebody's own: kernel (in, experts, out), a bias that all experts share."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], x.shape[0], self.features)
        weight = self.param("w", nn.initializers.normal(0.5), shape)
        return jnp.einsum("ebi,ieo->ebo", x, weight) + self.param("b", nn.initializers.normal(0.5), (self.features,))


def _vmapped(features):
    return nn.vmap(nn.Dense, **AXES)(features, name="proj")


def _dense_general(features):
    return nn.DenseGeneral(features, batch_dims=(0,), bias_init=nn.initializers.normal(0.5), name="proj")


def _einsum(features):
    return nn.Einsum((EXPERTS, features, WIDTH), "ebi,eoi->boe", bias_init=nn.initializers.normal(0.5), name="proj")


# How a layer of experts is made, its output brought to (experts, rows, out), and its kernel to (experts, in, out).
LAYOUTS = {
    "vmap": (_vmapped, lambda y: y, lambda w: w, "kernel"),
    "batch_dims": (_dense_general, lambda y: y, lambda w: w, "kernel"),
    "einsum": (_einsum, lambda y: y.transpose(2, 0, 1), lambda w: w.transpose(0, 2, 1), "kernel"),
    "own class": (lambda f: OwnExperts(f, name="proj"), lambda y: y, lambda w: w.transpose(1, 0, 2), "w"),
}
OWN_EXPERTS = LinearKind(
    lambda module: isinstance(module, OwnExperts),
    kernel_leaf="w",
    bias_leaf="b",
    contraction=lambda module, x, shape: Contraction(
        in_axes=(-3,), out_axes=(-1,), batch_axes=(-2,), x_batch_axes=(0,)
    ),
)
KINDS = (OWN_EXPERTS, *DEFAULT_KINDS)


class Experts(nn.Module):
    """(experts, rows, WIDTH) -> (experts, rows, INNER), each expert with rows and a map of its own."""

    layout: str
    features: int = INNER

    @nn.compact
    def __call__(self, x):
        make, arranged, _, _ = LAYOUTS[self.layout]
        return arranged(make(self.features)(x))


class Layer(nn.Module):
    layout: str

    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(Experts(self.layout, WIDTH, name="experts")(x)), None


class Layers(nn.Module):
    """A scan over layers of experts."""

    layout: str

    @nn.compact
    def __call__(self, x):
        return nn.scan(Layer, length=LAYERS, **AXES)(self.layout, name="layers")(x, None)[0]


class Loop(nn.Module):
    """Experts that are modules of their own, told by a number, in a layer that is called ``name``."""

    name_of: str = "block"

    @nn.compact
    def __call__(self, x):
        return sum(nn.Sequential([nn.Dense(WIDTH)], name=f"{self.name_of}_{i}")(x) for i in range(EXPERTS))


def example(key=0):
    return jax.random.normal(jax.random.key(key), (EXPERTS, ROWS, WIDTH))
