"""Linear modules with arithmetic of their own, and models that hand them another kernel than they store."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mor_jax.injection import DEFAULT_KINDS, Contraction, LinearKind

WIDTH = 16


def scaled_product(*args, **kwargs):
    return 1.5 * lax.dot_general(*args, **kwargs)


def rounded_product(x, kernel, *args, **kwargs):
    """As four-bit hardware has it: both rounded to 7 steps of their largest entry."""
    steps = lambda v: jnp.round(v * (7 / jnp.abs(v).max())) / (7 / jnp.abs(v).max())  # noqa: E731
    return lax.dot_general(steps(x), steps(kernel), *args, **kwargs)


def half_precision(*values, dtype=None):
    return [None if v is None else v.astype(jnp.bfloat16) for v in values]


def whole_numbers(key, shape, dtype=jnp.int8):
    return jax.random.randint(key, shape, -127, 128, dtype)


class HalfDense(nn.Dense):
    """A subclass with a call of its own."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        return 0.5 * (inputs @ kernel)


class Twice(nn.Dense):
    """A subclass whose call is around its parent's, which is what is adapted."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class TwiceRead(nn.Dense):
    """One that also reads the kernel beside its parent."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs) + jnp.tanh(inputs @ self.variables["params"]["kernel"])


class Own(nn.Module):
    """Somebody's own linear class: (B, S, WIDTH) -> (B, S, WIDTH), and what it does beside the product."""

    kind: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (WIDTH, WIDTH))
        if self.kind == "masked":
            kernel = kernel * (jnp.arange(WIDTH)[:, None] % 4 > 0)
        if self.kind == "squashed":
            return jnp.tanh(x) @ kernel
        y = jnp.einsum("bsd,fd->bsf", x, kernel) if self.kind == "transposed" else x @ kernel
        changes = {
            "scaled": lambda y: 0.7 * y,
            "learned_scale": lambda y: y * self.param("scale", nn.initializers.constant(0.7), (WIDTH,)),
            "clipped": lambda y: jnp.clip(y, -1, 1),
            "activated": nn.relu,
        }
        y = changes.get(self.kind, lambda y: y)(y)
        return y + self.param("bias", nn.initializers.normal(), (WIDTH,)) if self.kind == "plain" else y


class Quantised(nn.Module):
    """Eight bits a weight, and a scale for each output."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", whole_numbers, (WIDTH, WIDTH))
        scale = self.param("scale", nn.initializers.constant(0.003), (WIDTH,))
        return (x @ kernel.astype(x.dtype)) * scale


NOT_PRODUCTS = {
    "dense_dot_general": lambda: nn.Dense(WIDTH, dot_general=scaled_product),
    "dense_dot_general_class": lambda: nn.Dense(WIDTH, dot_general_cls=lambda: scaled_product),
    "dense_rounded": lambda: nn.Dense(WIDTH, dot_general=rounded_product),
    "subclass": lambda: HalfDense(WIDTH),
    "subclass_beside": lambda: TwiceRead(WIDTH),
    "general_dot_general": lambda: nn.DenseGeneral((4, 4), dot_general=scaled_product),
    "integers": lambda: nn.Dense(WIDTH, param_dtype=jnp.int8, kernel_init=whole_numbers, use_bias=False),
    "quantised": Quantised,
    **{
        name: lambda name=name: Own(name)
        for name in ("scaled", "learned_scale", "clipped", "activated", "masked", "squashed")
    },
}
PRODUCTS = {
    "precise": lambda: nn.Dense(WIDTH, precision=lax.Precision.HIGHEST),
    "recomputed": lambda: nn.remat(nn.Dense)(WIDTH),
    "compiled": lambda: nn.jit(nn.Dense)(WIDTH),
    "own": lambda: Own("plain"),
    "transposed": lambda: Own("transposed"),
    "dense_half": lambda: nn.Dense(WIDTH, promote_dtype=half_precision),
    "einsum_half": lambda: nn.Einsum((WIDTH, 2, 8), "bsd,dhf->bshf", promote_dtype=half_precision),
    "einsum_type": lambda: nn.Einsum((WIDTH, 2, 8), "bsd,dhf->bshf", preferred_element_type=jnp.bfloat16),
    "subclass_around": lambda: Twice(WIDTH),
    "subclass_alone": lambda: type("Renamed", (nn.Dense,), {})(WIDTH),
}
KINDS = (
    LinearKind(
        lambda module: isinstance(module, Own) and module.kind == "transposed",
        contraction=lambda module, x, shape: Contraction(in_axes=(-1,), out_axes=(-2,)),
    ),
    LinearKind(lambda module: isinstance(module, (Own, Quantised))),
    *DEFAULT_KINDS,
)


class Side(nn.Module):
    """Each module of the table on the same x: {name: output}."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        made = {name: ({**NOT_PRODUCTS, **PRODUCTS}[name])() for name in self.names}
        return {name: module.copy(name=name)(x) for name, module in made.items()}


def double(variables):
    return {"params": {**variables["params"], "kernel": 2 * variables["params"]["kernel"]}}


def turned(variables):
    return {"params": {**variables["params"], "kernel": variables["params"]["kernel"].T}}


def rounded(variables):
    return jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)


def doubled_all(variables):
    return jax.tree.map(lambda v: 2 * v, variables)


def kernel_alone(variables):
    return {"params": {"kernel": variables["params"]["kernel"]}}


class Mapped(nn.Module):
    """One module that sees its variables through a function, perhaps in each of two scanned layers."""

    function: object
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.map_variables(nn.Dense, "params", trans_in_fn=self.function, init=True)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, h, _):
                return jnp.tanh(dense(WIDTH, use_bias=False, name="proj")(h)), None

        if not self.scanned:
            return Layer(name="layer")(x, None)[0]
        axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=2, **axes)(name="layer")(x, None)[0]


class Normed(nn.Module):
    """A module under weight or spectral normalisation, and one beside it."""

    wrapper: type

    @nn.compact
    def __call__(self, x):
        more = {"update_stats": False} if self.wrapper is nn.SpectralNorm else {}
        return nn.Dense(WIDTH, name="beside")(jnp.tanh(self.wrapper(nn.Dense(WIDTH, name="proj"))(x, **more)))


class Tied(nn.Module):
    """A map out of a space and back by the same kernel, read where it is used or handed on."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = (nn.remat(nn.Dense) if self.remat else nn.Dense)(WIDTH, use_bias=False, name="proj")
        y = jnp.tanh(dense(x))
        return nn.Dense(WIDTH, name="beside")(y @ dense.variables["params"]["kernel"].T)
