"""Dropout as a whole model runs it: what of a method sees the dropped x, for every method and option."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import METHODS, AdapterInputs, LoRA, MoR, ResLoRA
from mor_jax.injection import Adapted, init_leaves, init_probes, resolve_sites

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY, RATE = jax.random.key(0), 0.4
IN, OUT = 8, 6
CASES = [(name, options) for name in METHODS for options in one_layer.oracle(name).VARIANTS]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values())) or 'default'}" for n, o in CASES]
)


class Block(nn.Module):
    """A block whose one linear map reads another x than the block itself."""

    @nn.compact
    def __call__(self, h):
        return nn.Dense(OUT, use_bias=False, name="proj")(jnp.tanh(h))


class Model(nn.Module):
    @nn.compact
    def __call__(self, h):
        return Block(name="layers")(h)


def _planned(method, h):
    params = Model().init(KEY, h)["params"]
    plan = resolve_sites(Model(), method, ("proj",), h)
    return params, plan, one_layer.scramble(init_leaves(KEY, plan, params), jax.random.key(1))


def _run(method, params, plan, leaves, h, probes=None):
    variables = {"params": params, "adapters": leaves.params, "adapter_state": leaves.state}
    variables |= {"adapter_constants": leaves.constants, "adapter_probes": probes or {}}
    inputs = AdapterInputs(key=jax.random.key(2), deterministic=False)
    return Adapted(Model(), plan).apply(variables, h, adapter_inputs=inputs)


def dropped_out(h):
    """tanh(h) as dropout leaves it: a LoRA of identities on a kernel of zeros hands it out, with everybody's mask."""
    lora = LoRA(rank=IN, alpha=float(IN), dropout=RATE)
    plan = resolve_sites(Model(), lora, ("proj",), h)
    kernel = {"layers": {"proj": {"kernel": jnp.zeros((IN, OUT))}}}
    halves = []
    for columns in (np.eye(IN)[:, :OUT], np.eye(IN)[:, -OUT:]):
        adapters = {"layers/proj": {"a": jnp.eye(IN), "b": jnp.asarray(columns, jnp.float32)}}
        variables = {"params": kernel, "adapters": adapters}
        inputs = AdapterInputs(key=jax.random.key(2), deterministic=False)
        halves.append(Adapted(Model(), plan).apply(variables, h, adapter_inputs=inputs))
    return jnp.concatenate([halves[0], halves[1][:, 2 * OUT - IN :]], axis=1)


@each_case
def test_the_change_reads_the_dropped_x_and_base_and_router_the_whole_one(name, options):
    """Float64: y of the oracle at the dropped x, its base at x; a gate is the oracle's for x, or for the block's h."""
    method = one_layer.small(name, options, dropout=RATE)
    h = jax.random.normal(jax.random.key(3), (6, IN))
    params, plan, leaves = _planned(method, h)
    kernel, x, dropped = params["layers"]["proj"]["kernel"], np.tanh(np.float64(h)), np.asarray(dropped_out(h))
    assert 0.2 < (dropped == 0).mean() < 0.6
    np.testing.assert_allclose(dropped[dropped != 0], x[dropped != 0] / (1 - RATE), rtol=1e-5)
    arrays = {k: np.asarray(v) for tree in leaves for own in tree.values() for k, v in own.items()}
    given = {**dataclasses.asdict(method), "block_input": h, "router_input": x}
    expected = one_layer.oracle(name).forward(arrays, np.asarray(kernel), dropped, given)
    expected = expected + (x - np.float64(dropped)) @ np.float64(kernel)
    y = jax.jit(lambda leaves: _run(method, params, plan, leaves, h))(leaves)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", [{}, {"router": "balanced"}, {"top_k": 2}, {"scope": "block"}], ids=str)
def test_one_token_repeated_has_one_gate(options):
    """Load and entropy of 500 copies of a token are those of a single one, though dropout differs in each."""
    method = MoR(rank=2, num_experts=4, dropout=0.5, **options)
    h = jnp.broadcast_to(jax.random.normal(KEY, (IN,)), (500, IN))
    params, plan, leaves = _planned(method, h)
    probes = init_probes(plan)
    (path,) = probes

    def sums(probes):
        return jnp.sum(_run(method, params, plan, leaves, h, probes))

    found = jax.jit(jax.grad(sums))(probes)[path]
    router = np.float64(leaves.params[path]["router"])
    read = np.float64(h[:1] if method.scope == "block" else np.tanh(h[:1]))
    gates = one_layer.oracle("mor").gates({"router": router}, read, dataclasses.asdict(method))[0]
    assert gates.max() - gates.min() > 0.05
    np.testing.assert_allclose(found["load"] / found["count"], gates, rtol=1e-4)
    entropy = -sum(g * np.log(g) for g in gates if g > 0)
    np.testing.assert_allclose(found["entropy"] / found["count"], entropy, rtol=1e-4)


def test_reslora_drops_the_sum_of_this_layer_s_and_the_earlier_x():
    """The released code drops entries of x_n + x_{n-1} with one mask and hands x_n on whole, and dropped(x_n) a."""
    rng = np.random.default_rng(0)
    x, kept = rng.standard_normal((3, 5, IN)), rng.random((3, 5, IN)) > RATE
    factors = rng.standard_normal((3, IN, 2)), rng.standard_normal((3, 2, OUT))
    for form in ("input", "middle"):
        method = ResLoRA(rank=2, form=form, dropout=RATE)
        kernel, found = one_layer.kernel_of(KEY, IN, OUT), []
        chain = method.init_chain(one_layer.site_of(kernel), (5,), jnp.float32)
        for n in range(3):
            leaves = one_layer.Leaves({"a": jnp.float32(factors[0][n]), "b": jnp.float32(factors[1][n])})
            own = AdapterInputs(chain=chain, clean_x=jnp.float32(x[n]), kept=jnp.asarray(kept[n]), deterministic=False)
            dropped = jnp.float32(np.where(kept[n], x[n] / (1 - RATE), 0))
            read = dropped if form == "input" else dropped @ leaves.params["a"]
            change, chain = method.delta(
                leaves, read, jnp.zeros((5, OUT)), one_layer.kernel_of(KEY, IN, OUT), None, own
            )
            found.append(change)
        given = {"alpha": method.alpha, "rank": 2, "form": form, "previous": 1}
        expected = one_layer.oracle("reslora").changes(*factors, x, given, kept / (1 - RATE))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
