"""Every einsum equation that is a linear map of x by a kernel, against NumPy's einsum in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import Leaves, LoRA
from mor_jax.injection import Adapted, Contraction, einsum_contraction, resolve_sites
from mor_jax.merging import merge

pytestmark = pytest.mark.usefixtures("quick_compilation")
LORA = LoRA(rank=2, alpha=3.0)
SIZES = {"b": 2, "s": 3, "d": 4, "f": 5, "h": 2, "n": 3, "e": 2, "q": 3, "k": 4}
# The equation, the same with an ellipsis spelled out, and the kernel's letters of one map: contracted and produced.
EQUATIONS = {
    "...d,df->...f": ("bsd,df->bsf", "", "d", "f"),
    "...d,fd->f...": ("bsd,fd->fbs", "", "d", "f"),
    "b...d,dnh->bn...h": ("bsd,dnh->bnsh", "", "d", "nh"),
    "...nh,nhd->...d": ("bsnh,nhd->bsd", "", "nh", "d"),
    "bqd,bkd->bqk": ("bqd,bkd->bqk", "b", "d", "k"),
    "ebd,edf->ebf": ("ebd,edf->ebf", "e", "d", "f"),
    "bed,dfe->fbe": ("bed,dfe->fbe", "e", "d", "f"),
    "ens...d,nefd->fn...es": ("ensbd,nefd->fnbes", "ne", "d", "f"),
    "bsd,d->bs": ("bsd,d->bs", "", "d", ""),
    " b s d , d f -> b s f ": ("bsd,df->bsf", "", "d", "f"),
}


class Map(nn.Module):
    """One Einsum, which gets its equation as a field or with its call."""

    equation: str
    shape: tuple
    at_call: bool

    @nn.compact
    def __call__(self, x):
        options = {"bias_init": nn.initializers.normal(), "name": "proj"}
        options["kernel_init"] = nn.initializers.normal()
        if self.at_call:
            return nn.Einsum(self.shape, **options)(x, self.equation)
        return nn.Einsum(self.shape, self.equation, **options)(x)


@pytest.mark.parametrize("at_call", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_equation(equation, at_call):
    spelled, batch, contracted, produced = EQUATIONS[equation]
    inputs, output = spelled.split("->")
    x_letters, kernel_letters = inputs.split(",")
    draw = np.random.default_rng(0).standard_normal
    x = draw([SIZES[c] for c in x_letters])
    model = Map(equation, tuple(SIZES[c] for c in kernel_letters), at_call)
    params = model.init(jax.random.key(0), jnp.float32(x))["params"]
    plan = resolve_sites(model, LORA, "proj", jnp.float32(x))
    a = draw([*(SIZES[c] for c in batch), int(np.prod([SIZES[c] for c in contracted])), 2])
    b = draw([*(SIZES[c] for c in batch), 2, int(np.prod([SIZES[c] for c in produced]))])
    shape = [SIZES[c] for c in batch + contracted + produced]
    change = np.einsum(f"{batch}{contracted}{produced}->{kernel_letters}", 1.5 * (a @ b).reshape(shape))
    kernel = np.float64(params["proj"]["kernel"]) + change
    without = np.float64(model.apply({"params": params}, jnp.float32(x)))
    expected = without + np.einsum(spelled, x, change)
    leaves = Leaves({"proj": {"a": jnp.float32(a), "b": jnp.float32(b)}})
    actual = Adapted(model, plan).apply({"params": params, "adapters": leaves.params}, jnp.float32(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    merged = merge(params, leaves, plan)
    np.testing.assert_allclose(merged["proj"]["kernel"], kernel, rtol=1e-5, atol=1e-5)
    assert plan.num_params() == a.size + b.size


@pytest.mark.parametrize(
    ("equation", "ndims", "message"),
    [
        ("bd,d->bd", (2, 1), "contracts no axis"),
        ("bd,df->f", (2, 2), "sums over 'b' alone"),
        ("bd,dfk->bf", (2, 3), "sums over 'k' alone"),
        ("bdd,df->bf", (3, 2), "repeats a letter"),
        ("bd,df", (2, 2), "is not of the form"),
        ("bd,df,fg->bg", (2, 2), "is not of the form"),
        ("bd,df->bf", (3, 2), "does not fit an x of 3 and a kernel of 2 axes"),
        ("...d...,df->...f", (3, 2), "is not of the form"),
        ("...bsd,df->...f", (2, 2), "does not fit"),
    ],
)
def test_what_is_no_linear_map(equation, ndims, message):
    with pytest.raises(ValueError, match=message):
        einsum_contraction(equation, ndims[0], (2,) * ndims[1])


def test_an_ellipsis_in_the_kernel_is_a_batch_axis():
    found = einsum_contraction("...d,...df->...f", 3, (2, 3, 4, 5))
    assert found == Contraction((-1,), (-2,), (-1,), None, (-4, -3), (-3, -2))
