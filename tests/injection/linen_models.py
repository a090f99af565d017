"""Small linen models of many shapes, each with the kernels' changes by LoRA written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.injection import DEFAULT_KINDS, Contraction, LinearKind

WIDTH, INNER, LAYERS = 6, 4, 3


class Block(nn.Module):
    """query and key read one x; out is a bias-free map back."""

    partitioned: bool = False
    remat_dense: bool = False

    @nn.compact
    def __call__(self, h, _=None):
        init = nn.initializers.lecun_normal()
        if self.partitioned:
            init = nn.with_partitioning(init, ("embed", "inner"))
        dense = nn.remat(nn.Dense) if self.remat_dense else nn.Dense
        query = dense(INNER, kernel_init=init, name="query")(h)
        key = dense(INNER, kernel_init=init, use_bias=False, name="key")(h)
        return h + dense(WIDTH, name="out")(jnp.tanh(query) * key), None


class Stack(nn.Module):
    """(B, S, WIDTH) -> (B, S, WIDTH) through LAYERS blocks: scanned over an axis, or a loop."""

    scan_axis: int | None = 0
    remat: bool = False
    partitioned: bool = False
    remat_dense: bool = False

    @nn.compact
    def __call__(self, h):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        fields = {"partitioned": self.partitioned, "remat_dense": self.remat_dense}
        if self.scan_axis is None:
            for i in range(LAYERS):
                h, _ = block(**fields, name=f"layers_{i}")(h)
            return h
        scanned = nn.scan(
            block,
            variable_axes={"params": self.scan_axis},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(**fields, name="layers")(h, None)[0]


class VmapInScan(nn.Module):
    """Each scanned layer adds the mean of two blocks that run under vmap."""

    scan_axis: int = 0

    @nn.compact
    def __call__(self, h):
        class Pair(nn.Module):
            @nn.compact
            def __call__(self, h, _):
                axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
                pair = nn.vmap(Block, in_axes=None, out_axes=0, axis_size=2, **axes)(name="pair")
                return pair(h)[0].mean(0), None

        axes = {"variable_axes": {"params": self.scan_axis}, "split_rngs": {"params": True}}
        return nn.scan(Pair, length=LAYERS, **axes)(name="layers")(h, None)[0]


class Siamese(nn.Module):
    """setup modules, one of them called twice, one by keyword, and a second way in."""

    def setup(self):
        self.tower = nn.Dense(WIDTH)
        self.join = nn.Dense(INNER, use_bias=False)

    def encode(self, h):
        return jnp.tanh(self.tower(h))

    def __call__(self, h):
        return self.join(inputs=self.encode(h) - self.encode(self.encode(h[..., ::-1])))


class Heads(nn.Module):
    """DenseGeneral with two axes out and two in, Einsum with its head axis first and with four kernel axes."""

    @nn.compact
    def __call__(self, h):
        query = nn.DenseGeneral((2, 3), name="query")(h)
        value = nn.Einsum((2, WIDTH, 3), "bsd,ndh->bnsh", use_bias=True, name="value")(h)
        mixed = query * value.transpose(0, 2, 1, 3)
        wide = nn.Einsum((2, 3, 4, 1), "bsnh,nhkm->bkms", use_bias=True, name="wide")(mixed)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed) + wide.mean((1, 2))[..., None]


class Scaled(nn.Module):
    """A linear class of somebody's own: another kernel name, outputs first."""

    features: int

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(0.5), (self.features, x.shape[-1]))
        return x @ weight.T + self.param("offset", nn.initializers.normal(0.5), (self.features,))


class Own(nn.Module):
    @nn.compact
    def __call__(self, h):
        return Scaled(INNER, name="proj")(jnp.tanh(h))


class CrossAttention(nn.Module):
    """Two siblings in a scanned layer read one array that the scan does not split."""

    @nn.compact
    def __call__(self, h):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, h, context):
                key = nn.Dense(WIDTH, name="key")(context)
                value = nn.Dense(WIDTH, use_bias=False, name="value")(context)
                return h + jnp.tanh(h * key) * value, None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, in_axes=nn.broadcast, length=LAYERS, **axes)(name="layers")(h, h[:, ::-1])[0]


class Ensemble(nn.Module):
    """Siblings that are themselves under vmap, beside one that is not, all reading one x."""

    @nn.compact
    def __call__(self, h):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        many = nn.vmap(nn.Dense, in_axes=None, axis_size=2, **axes)
        one, two = many(INNER, name="one")(h), many(INNER, name="two")(h)
        return (one * jnp.tanh(two)).sum(0) + nn.Dense(INNER, name="plain")(h) * nn.Dense(INNER, name="other")(h)


class SharedLayer(nn.Module):
    """One block's parameters in every step of a scan."""

    @nn.compact
    def __call__(self, h):
        axes = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        return nn.scan(Block, length=LAYERS, **axes)(name="layers")(h, None)[0]


@dataclass(frozen=True)
class Case:
    """A model, and for each target how LoRA's factors (layer axes leading) change its kernel as it is stored."""

    model: nn.Module
    changes: dict[str, Callable[[Any, Any], Any]] = field(hash=False)
    kinds: tuple[LinearKind, ...] = DEFAULT_KINDS
    kernel: str = "kernel"
    targets: tuple[str, ...] = ("all-linear",)


def _block(prefix, equation):
    return {f"{prefix}/{name}": lambda a, b: jnp.einsum(equation, a, b) for name in ("query", "key", "out")}


def _plain(a, b):
    return a @ b


OWN = LinearKind(
    lambda module: isinstance(module, Scaled),
    kernel_leaf="weight",
    contraction=lambda module, x, shape: Contraction(in_axes=(-1,), out_axes=(-2,)),
    bias_leaf="offset",
)
_LOOP = {k: v for i in range(LAYERS) for k, v in _block(f"layers_{i}", "ir,ro->io").items()}
_HEADS = {
    "query": lambda a, b: (a @ b).reshape(WIDTH, 2, 3),
    "value": lambda a, b: (a @ b).reshape(WIDTH, 2, 3).transpose(1, 0, 2),
    "wide": lambda a, b: (a @ b).reshape(2, 3, 4, 1),
    "out": lambda a, b: (a @ b).reshape(2, 3, WIDTH),
}
CASES = {
    "scan axis 0": Case(Stack(0), _block("layers", "lir,lro->lio")),
    "scan axis 1, remat": Case(Stack(1, remat=True), _block("layers", "lir,lro->ilo")),
    "loop, remat": Case(Stack(None, remat=True), _LOOP),
    "boxes": Case(Stack(0, partitioned=True), _block("layers", "lir,lro->lio")),
    "boxes, scan axis 1": Case(Stack(1, partitioned=True), _block("layers", "lir,lro->ilo")),
    "remat of each Dense": Case(Stack(0, remat_dense=True), _block("layers", "lir,lro->lio")),
    "vmap in scan": Case(VmapInScan(0), _block("layers/pair", "lpir,lpro->lpio")),
    "vmap in scan axis 1": Case(VmapInScan(1), _block("layers/pair", "plir,plro->plio")),
    "setup, called twice": Case(Siamese(), {"tower": _plain, "join": _plain}),
    "heads": Case(Heads(), _HEADS),
    "own class": Case(Own(), {"proj": lambda a, b: (a @ b).T}, (*DEFAULT_KINDS, OWN), "weight"),
    "broadcast x": Case(
        CrossAttention(), {f"layers/{k}": lambda a, b: jnp.einsum("lir,lro->lio", a, b) for k in ("key", "value")}
    ),
    "vmap of Dense": Case(
        Ensemble(),
        {k: lambda a, b: jnp.einsum("...ir,...ro->...io", a, b) for k in ("one", "two", "plain", "other")},
    ),
    "shared layer": Case(SharedLayer(), _block("layers", "ir,ro->io")),
}


def example(key=0, batch=2, length=5):
    return jax.random.normal(jax.random.key(key), (batch, length, WIDTH))
