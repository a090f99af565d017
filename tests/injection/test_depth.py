"""Where a site lies in the depth of the model: in scans, in loops of scans, under numbers, and beside others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_models import AXES
from linen_models import WIDTH, example

from mor_jax.adapters import LoRA, PRILoRA, ResLoRA, Site
from mor_jax.injection import Adapted, InjectionError, init_leaves, resolve_sites
from mor_jax.merging import merge

pytestmark = pytest.mark.usefixtures("quick_compilation")
GROWING = PRILoRA(rank=5, first_rank=2, last_rank=8)


class Up(nn.Module):
    features: int = WIDTH

    @nn.compact
    def __call__(self, h, _=None):
        return jnp.tanh(nn.Dense(self.features, use_bias=False, name="up")(h)), None


class Stages(nn.Module):
    """A loop over scans of 2, 3 and 2 layers."""

    @nn.compact
    def __call__(self, h):
        for number, length in enumerate((2, 3, 2)):
            h, _ = nn.scan(Up, length=length, **AXES)(name=f"stage_{number}")(h, None)
        return h


class Numbers(nn.Module):
    """Layers whose name is their number, in a module of their own, as checkpoints of PyTorch name them."""

    @nn.compact
    def __call__(self, h):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, h):
                for number in range(4):
                    h, _ = Up(name=str(number))(h)
                return h

        return Layer(name="layer")(h)


class Widths(nn.Module):
    """Layers of one name and other sizes: 6 to 8, 8 to 8, 8 to 8."""

    @nn.compact
    def __call__(self, h):
        for number in range(3):
            h, _ = Up(8, name=f"layers_{number}")(h)
        return h


class Pipeline(nn.Module):
    """Stages of a pipeline that run side by side under vmap and follow one another in depth."""

    name_of_axis: str

    @nn.compact
    def __call__(self, h):
        axes = {**AXES, "metadata_params": {nn.PARTITION_NAME: self.name_of_axis}}
        return nn.vmap(Up, in_axes=(0, None), **axes)(name="stages")(jnp.stack([h, h, h]), None)[0]


class Ambiguous(nn.Module):
    """A scan and a vmap of one module, of which the vmap alone stacks parameters."""

    name_of_axis: str = ""

    @nn.compact
    def __call__(self, h):
        named = {"metadata_params": {nn.PARTITION_NAME: self.name_of_axis}} if self.name_of_axis else {}
        many = nn.vmap(Up, in_axes=(0, None), **AXES, **named)
        shared = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        return nn.scan(many, length=2, **shared)(name="layers")(jnp.stack([h, h, h]), None)[0]


def ranks(plan, params):
    state = init_leaves(jax.random.key(0), plan, params).state
    return {path: np.asarray(own["mask"].sum(-1), int).tolist() for path, own in state.items()}


def test_depth_goes_on_from_scan_to_scan():
    model, x = Stages(), example()
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, GROWING, "up", x)
    assert ranks(plan, params) == {"stage_0/up": [2, 3], "stage_1/up": [4, 5, 6], "stage_2/up": [7, 8]}
    assert plan.num_params() == sum(range(2, 9)) * 2 * WIDTH
    chained = resolve_sites(model, ResLoRA(rank=2, alpha=3.0), "up", x)
    leaves = init_leaves(jax.random.key(1), chained, params)
    leaves = leaves._replace(params=jax.tree.map(lambda v: v + 0.1, leaves.params))
    paths = [f"stage_{n}/up" for n in range(3)]
    a, b = (np.concatenate([np.float64(leaves.params[p][name]) for p in paths]) for name in "ab")
    kernels = np.concatenate([np.float64(params[p.split("/")[0]]["up"]["kernel"]) for p in paths])
    expected = kernels + 1.5 * a @ b
    expected[1:] += 1.5 * a[:-1] @ b[:-1]
    merged = merge(params, leaves, chained)
    actual = np.concatenate([merged[p.split("/")[0]]["up"]["kernel"] for p in paths])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    forward = Adapted(model, chained).apply({"params": params, "adapters": leaves.params}, x)
    np.testing.assert_allclose(forward, model.apply({"params": merged}, x), rtol=1e-5, atol=1e-5)


def test_a_number_alone_names_a_layer():
    model, x = Numbers(), example()
    plan = resolve_sites(model, GROWING, "up", x)
    params = model.init(jax.random.key(0), x)["params"]
    assert list(ranks(plan, params).values()) == [2, 4, 6, 8]
    assert len(resolve_sites(model, ResLoRA(rank=2), "up", x).chains) == 1


def test_layers_of_other_sizes_are_no_chain():
    model, x = Widths(), example()
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, ResLoRA(rank=2), "up", x)
    assert sorted(len(sites) for sites in plan.chains.values()) == [1, 2]
    leaves = init_leaves(jax.random.key(1), plan, params)
    leaves = leaves._replace(params=jax.tree.map(lambda v: v + 0.1, leaves.params))
    forward = Adapted(model, plan).apply({"params": params, "adapters": leaves.params}, x)
    merged = merge(params, leaves, plan)
    np.testing.assert_allclose(forward, model.apply({"params": merged}, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("stages", 3), ("layers", 3), ("experts", 1), ("batch", 1)])
def test_the_name_of_an_axis_decides_before_the_transformation(name, layers):
    site = resolve_sites(Pipeline(name), LoRA(), "up", example())["stages/up"].site
    assert (site.num_layers, site.layers) == (3, layers)


def test_an_axis_that_could_be_either_asks_for_its_name():
    with pytest.raises(InjectionError, match=r"layers/up runs under nn.scan and nn.vmap, only one .*nn.PARTITION_NAME"):
        resolve_sites(Ambiguous(), LoRA(), "up", example())
    assert resolve_sites(Ambiguous("experts"), LoRA(), "up", example())["layers/up"].site.layers == 1


def test_layers_of_a_stack_by_hand():
    """Axes (2 layers, 3 experts, 4 layers, 5 experts): the layer is that of the axes that are layers."""
    shape, layers = (2, 3, 4, 5), (0, 2)
    strides = [int(np.prod(shape[i + 1 :])) for i in range(4)]
    site = Site("x", 1, 1, int(np.prod(shape)), layer_axes=tuple((strides[i], shape[i]) for i in layers))
    for index in range(site.num_layers):
        place = np.unravel_index(index, shape)
        assert site.layer_of(index) == place[0] * 4 + place[2]
    assert site.layers == 8
