"""Linen models with anything beside the linear modules that are adapted, and the paths of those."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from linen_models import LAYERS, WIDTH, Block

OUT = 5


class TiedHead(nn.Module):
    """The table of the input as the kernel of a head that is applied by hand; its path is that of nobody."""

    @nn.compact
    def __call__(self, h):
        table = self.param("table", nn.initializers.normal(0.5), (OUT, WIDTH))
        h = h + nn.Dense(WIDTH, name="proj")(h)
        return nn.Dense(OUT, use_bias=False).apply({"params": {"kernel": table.T}}, h)


class Small(nn.Module):
    @nn.compact
    def __call__(self, h):
        return jnp.tanh(nn.Dense(WIDTH, use_bias=False, name="proj")(h))


class TiedNames(nn.Module):
    """A whole model applied by hand, whose module is called as the model's own is."""

    @nn.compact
    def __call__(self, h):
        h = jnp.tanh(nn.Dense(WIDTH, name="proj")(h))
        return Small(parent=None).apply({"params": {"proj": {"kernel": jnp.eye(WIDTH)}}}, h)


class BoundHead(nn.Module):
    """The same through ``bind``, and the parameters of a module of its own used again by hand."""

    def setup(self):
        self.proj = nn.Dense(WIDTH)

    def __call__(self, h):
        h = jnp.tanh(self.proj(h))
        again = nn.Dense(WIDTH, parent=None).bind({"params": {"kernel": 2 * jnp.eye(WIDTH), "bias": jnp.ones(WIDTH)}})
        return again(h)


class Unscoped(nn.Module):
    """Methods of a module that is bound to nothing."""

    width: int

    def twice(self):
        return 2 * self.width

    @nn.nowrap
    def thrice(self):
        return 3 * self.width

    @nn.compact
    def __call__(self, h):
        other = Unscoped(self.width, parent=None)
        return nn.Dense(WIDTH, name="proj")(h) * other.twice() + other.thrice()


class NoMap(nn.Module):
    """Equations that are no linear map of x: an axis of the kernel that nothing reads, one of x that is summed."""

    @nn.compact
    def __call__(self, h):
        h = h + nn.Dense(WIDTH, name="proj")(h)
        scaled = nn.Einsum((WIDTH,), "bsd,d->bsd", use_bias=False, kernel_init=nn.initializers.ones, name="scaled")(h)
        summed = nn.Einsum((WIDTH, OUT, 2), "bsd,dok->bso", use_bias=False, name="summed")(h)
        return scaled.sum(-1, keepdims=True) + summed + nn.Einsum((WIDTH, OUT), "bsd,df->bf", name="pooled")(h)[:, None]


class OtherCollection(nn.Module):
    """A linear class whose kernel is no parameter, and one of flax's own in a closure without a name."""

    @nn.compact
    def __call__(self, h):
        class Frozen(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x @ self.variable("frozen", "kernel", lambda: jnp.full((WIDTH, WIDTH), 0.1)).value

        return Frozen(name="frozen")(nn.Dense(WIDTH, name="proj")(h))


class Shapes(nn.Module):
    """One module that is called with two, three and four axes, by place and by name."""

    def setup(self):
        self.proj = nn.Dense(WIDTH)

    def __call__(self, h):
        pooled = self.proj(inputs=h.mean(1))
        return self.proj(h) + self.proj(h[:, None])[:, 0] + pooled[:, None]


class Twice(nn.Dense):
    """A class of flax's with a call of its own around its parent's."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Inherited(nn.Module):
    @nn.compact
    def __call__(self, h):
        return Twice(WIDTH, name="proj")(h)


class SharedScope(nn.Module):
    """A wrapper that lives in its child's scope, with parameters of its own beside the kernel."""

    @nn.compact
    def __call__(self, h):
        class Wrapped(nn.Module):
            def setup(self):
                self.base = nn.Dense(WIDTH)
                nn.share_scope(self, self.base)

            def __call__(self, x):
                return jnp.tanh(self.base(x)) * 3

        return Wrapped(name="proj")(h)


class Jitted(nn.Module):
    """Equal layers under nn.jit, whose trace flax keeps and gives to the next."""

    @nn.compact
    def __call__(self, h):
        for number in range(LAYERS):
            h, _ = nn.jit(Block)(name=f"layers_{number}")(h)
        return h


JITTED = nn.jit(nn.Dense)


class JittedOutside(nn.Module):
    @nn.compact
    def __call__(self, h):
        return JITTED(WIDTH, name="other")(JITTED(WIDTH, name="proj")(h))


class Everything(nn.Module):
    """nn.Sequential in setup, nn.remat of a method, nn.cond between two branches, nn.jit inside a scan."""

    def setup(self):
        self.steps = nn.Sequential([nn.Dense(WIDTH), jnp.tanh, nn.Dense(WIDTH)])
        self.proj = nn.Dense(WIDTH)

    @nn.remat
    def part(self, h):
        return jnp.tanh(self.proj(h))

    def __call__(self, h):
        h = self.part(self.steps(h))
        if self.is_initializing():
            return self.proj(h)
        return nn.cond(h.sum() > 0, lambda m, x: m.proj(x), lambda m, x: 2 * m.proj(x), self, h)


class Layers(nn.Module):
    """What flax itself does with parameters: a recurrent scan, scans in scans, axes that are names only."""

    @nn.compact
    def __call__(self, h):
        h = nn.RNN(nn.SimpleCell(WIDTH), name="recurrent")(h) + nn.Dense(WIDTH, name="proj")(h)
        h = nn.add_metadata_axis(nn.Dense, variable_axes={"params": 0})(WIDTH, name="named")(h)
        return nn.remat_scan(nn.Dense, lengths=(2, 2))(WIDTH, name="deep")(jnp.tanh(h))


CASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "tied head": (TiedHead(), ("proj",)),
    "tied names": (TiedNames(), ("proj",)),
    "bound": (BoundHead(), ("proj",)),
    "unscoped": (Unscoped(3), ("proj",)),
    "no map": (NoMap(), ("proj",)),
    "other collection": (OtherCollection(), ("proj",)),
    "shapes": (Shapes(), ("proj",)),
    "inherited": (Inherited(), ("proj",)),
    "shared scope": (SharedScope(), ("proj",)),
    "jitted layers": (Jitted(), tuple(f"layers_{i}/{n}" for i in range(LAYERS) for n in ("query", "key", "out"))),
    "jitted": (JittedOutside(), ("proj", "other")),
    "flax": (Layers(), ("SimpleCell_0/i", "SimpleCell_0/h", "proj", "named", "deep")),
    "everything": (Everything(), ("steps/layers_0", "steps/layers_2", "proj")),
}
