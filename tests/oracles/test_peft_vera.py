"""VeRA against torch PEFT: forward, gradients and merged weights from the same factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import VeRA
from mor_jax.injection import Adapted, init_leaves, resolve_sites
from mor_jax.merging import merge

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

SIZES = {"up": (6, 14), "down": (14, 10), "out": (10, 5)}  # no site has both the largest in and the largest out
TOLERANCE = 1e-5  # float32


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, (_, out_features) in SIZES.items():
            x = jnp.tanh(nn.Dense(out_features, name=name)(x))
        return x


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (in_features, out_features) in SIZES.items():
            setattr(self, name, torch.nn.Linear(in_features, out_features))

    def forward(self, x):
        for name in SIZES:
            x = torch.tanh(getattr(self, name)(x))
        return x


def _tensor(value):
    return torch.tensor(np.array(value))


def test_forward_gradients_and_merged_weights():
    x = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    model = Net()
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, VeRA(rank=4), tuple(SIZES), x)
    leaves = init_leaves(jax.random.key(1), plan, params)
    adapters = jax.tree.map(lambda v: v + 0.5 * jax.random.normal(jax.random.key(2), v.shape), leaves.params)
    leaves = leaves._replace(params=adapters)
    shared = leaves.constants["shared/vera"]

    theirs = TorchNet()
    config = peft.VeraConfig(r=4, target_modules=list(SIZES), projection_prng_key=0, save_projection=True)
    wrapped = peft.get_peft_model(theirs, config)
    layers = {name: getattr(wrapped.base_model.model, name) for name in SIZES}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.base_layer.weight.copy_(_tensor(params[name]["kernel"]).T)
            layer.base_layer.bias.copy_(_tensor(params[name]["bias"]))
            assert layer.vera_A["default"].shape == shared["a"].T.shape  # PEFT slices the same largest shape
            assert layer.vera_B["default"].shape == shared["b"].T.shape
            layer.vera_A["default"].copy_(_tensor(shared["a"]).T)
            layer.vera_B["default"].copy_(_tensor(shared["b"]).T)
            layer.vera_lambda_d["default"].copy_(_tensor(adapters[name]["d"]))
            layer.vera_lambda_b["default"].copy_(_tensor(adapters[name]["lam_b"]))

    def loss(adapters):
        variables = {"params": params, "adapters": adapters, "adapter_constants": leaves.constants}
        y = Adapted(base=model, plan=plan).apply(variables, x)
        return jnp.sum(y * jnp.cos(y)), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    their_y = wrapped(_tensor(x))
    (their_y * torch.cos(their_y)).sum().backward()
    np.testing.assert_allclose(y, their_y.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)
    for name, layer in layers.items():
        for own, parameter in (("d", layer.vera_lambda_d), ("lam_b", layer.vera_lambda_b)):
            expected = parameter["default"].grad.numpy()
            atol = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(gradient[name][own], expected, rtol=TOLERANCE, atol=atol)
    merged = merge(params, leaves, plan)
    for name, layer in layers.items():
        layer.merge()
        theirs = layer.base_layer.weight.detach().numpy().T
        np.testing.assert_allclose(merged[name]["kernel"], theirs, rtol=TOLERANCE, atol=TOLERANCE)
