"""LoRA, rsLoRA and DoRA against torch PEFT with the same factors: outputs, gradients and merged weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import AdapterInputs, DoRA, Kernel, Leaves, LoRA, RsLoRA, Site
from mor_jax.injection import Adapted, resolve_sites

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]
torch = pytest.importorskip("torch", reason="torch is not installed; it is in the extra 'oracle'")
peft = pytest.importorskip("peft", reason="peft is not installed; it is in the extra 'oracle'")

IN, OUT, RANK, ALPHA, TOKENS = 24, 20, 4, 6.0, 10
METHODS = {
    "lora": (LoRA(rank=RANK, alpha=ALPHA), {}),
    "rslora": (RsLoRA(rank=RANK, alpha=ALPHA), {"use_rslora": True}),
    "dora": (DoRA(rank=RANK, alpha=ALPHA), {"use_dora": True}),
}


def arrays(name):
    """Kernel, bias, x, the output's cotangent, and factors away from their start; float32."""
    draw = np.random.default_rng(0).standard_normal
    kernel = draw((IN, OUT)).astype(np.float32) / IN**0.5
    leaves = {"a": draw((IN, RANK)) / IN**0.5, "b": 0.3 * draw((RANK, OUT))}
    if name == "dora":
        leaves["m"] = np.linalg.norm(kernel, axis=0) * (1 + 0.2 * draw(OUT))
    leaves = {k: v.astype(np.float32) for k, v in leaves.items()}
    x, cotangent = draw((TOKENS, IN)).astype(np.float32), draw((TOKENS, OUT)).astype(np.float32)
    return kernel, draw(OUT).astype(np.float32), x, cotangent, leaves


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUT, name="proj")(x)


def dropped_out(method, x, params, leaves, rate=0.4):
    """The output of one map with this dropout, always the same entries."""
    method = dataclasses.replace(method, dropout=rate)
    plan = resolve_sites(Model(), method, ("proj",), x)
    inputs = AdapterInputs(key=jax.random.key(5), deterministic=False)
    variables = {"params": {"proj": params}, "adapters": {"proj": leaves}}
    return Adapted(Model(), plan).apply(variables, x, adapter_inputs=inputs)


def dropout_factors(rate=0.4):
    """(TOKENS, IN): what that dropout multiplies x with, as LoRAs hand it out, OUT columns of x at a time."""
    found = np.zeros((TOKENS, IN), np.float32)
    params = {"kernel": jnp.zeros((IN, OUT)), "bias": jnp.zeros(OUT)}
    for start in range(0, IN, OUT):
        here = np.eye(IN, dtype=np.float32)[:, start : start + OUT]
        leaves = {"a": jnp.eye(IN), "b": jnp.pad(here, ((0, 0), (0, OUT - here.shape[1])))}
        y = dropped_out(LoRA(rank=IN, alpha=float(IN)), jnp.ones((TOKENS, IN)), params, leaves, rate)
        found[:, start : start + OUT] = y[:, : here.shape[1]]
    return found


class FixedDropout(torch.nn.Module):
    """In place of torch's dropout: the same entries as ours."""

    def __init__(self, factors):
        super().__init__()
        self.factors = torch.from_numpy(factors)

    def forward(self, x):
        return x * self.factors


def torch_parameters(layer):
    """PEFT's parameters under our names, each with whether it is our transpose."""
    found = {"a": (layer.lora_A["default"].weight, True), "b": (layer.lora_B["default"].weight, True)}
    if layer.lora_magnitude_vector:
        found["m"] = (layer.lora_magnitude_vector["default"].weight, False)
    return found


def peft_layer(name, kernel, bias, leaves):
    base = torch.nn.Linear(IN, OUT)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=0.0, **METHODS[name][1])
    with torch.no_grad():
        base.weight.copy_(torch.from_numpy(kernel.T.copy()))
        base.bias.copy_(torch.from_numpy(bias))
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for leaf, (weight, transposed) in torch_parameters(layer).items():
            weight.copy_(torch.from_numpy(leaves[leaf].T.copy() if transposed else leaves[leaf]))
    return model, layer


@pytest.mark.parametrize("name", METHODS)
def test_start_is_that_of_peft(name):
    """DoRA's m is the same vector; a is uniform with the same bound; b is zero."""
    kernel, bias, _, _, _ = arrays(name)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **METHODS[name][1])
    base = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        base.weight.copy_(torch.from_numpy(kernel.T.copy()))
    layer = peft.get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]
    ours = (
        METHODS[name][0].init(jax.random.key(0), Site("0", IN, OUT), jnp.int32(0), Kernel(jnp.asarray(kernel))).params
    )
    theirs = {
        leaf: (w.T if transposed else w).detach().numpy() for leaf, (w, transposed) in torch_parameters(layer).items()
    }
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for factor in (ours["a"], theirs["a"]):
        assert 0.9 * IN**-0.5 < np.abs(factor).max() <= IN**-0.5
    np.testing.assert_array_equal(ours["b"], theirs["b"])
    if name == "dora":
        np.testing.assert_allclose(ours["m"], theirs["m"], rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_output_gradients_and_merge(name):
    kernel, bias, x, cotangent, leaves = arrays(name)
    model, layer = peft_layer(name, kernel, bias, leaves)
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = model(x_torch)
    y_torch.backward(torch.from_numpy(cotangent))

    method, view = METHODS[name][0], Kernel(jnp.asarray(kernel))

    @jax.jit
    def forward(params, x):
        own = Leaves(params)
        base_output = x @ view.value
        change = method.delta(own, x @ method.input_factor(own), base_output, view, None, AdapterInputs())
        return base_output + bias + change

    y, pullback = jax.vjp(forward, leaves, jnp.asarray(x))
    by_leaf, by_x = pullback(jnp.asarray(cotangent))
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(y, y_torch.detach().numpy(), **tolerance)
    np.testing.assert_allclose(by_x, x_torch.grad.numpy(), **tolerance)
    for leaf, (weight, transposed) in torch_parameters(layer).items():
        expected = weight.grad.numpy()
        np.testing.assert_allclose(by_leaf[leaf], expected.T if transposed else expected, err_msg=leaf, **tolerance)

    merged = model.merge_and_unload()[0].weight.detach().numpy().T
    np.testing.assert_allclose(method.merge(Leaves(leaves), view), merged, **tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_output_and_gradients_with_the_same_entries_dropped(name):
    """DoRA's (m / norm - 1) x W is of the dropped x too, in PEFT as in the authors' code."""
    kernel, bias, x, cotangent, leaves = arrays(name)
    model, layer = peft_layer(name, kernel, bias, leaves)
    factors = dropout_factors()
    assert 0.2 < (factors == 0).mean() < 0.6
    layer.lora_dropout["default"] = FixedDropout(factors)
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = model.train()(x_torch)
    y_torch.backward(torch.from_numpy(cotangent))

    @jax.jit
    def forward(leaves, x):
        return dropped_out(METHODS[name][0], x, {"kernel": kernel, "bias": bias}, leaves)

    y, pullback = jax.vjp(forward, leaves, jnp.asarray(x))
    by_leaf, by_x = pullback(jnp.asarray(cotangent))
    tolerance = {"rtol": 1e-5, "atol": 2e-5}
    np.testing.assert_allclose(y, y_torch.detach().numpy(), **tolerance)
    np.testing.assert_allclose(by_x, x_torch.grad.numpy(), **tolerance)
    for leaf, (weight, transposed) in torch_parameters(layer).items():
        expected = weight.grad.numpy()
        np.testing.assert_allclose(by_leaf[leaf], expected.T if transposed else expected, err_msg=leaf, **tolerance)
