"""The facts of HaLoRA (arXiv 2502.19747)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, HaLoRA, Kernel, LoRA, NotMergeable, Site
from mor_jax.adapters.halora import tile_max

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def _filled(adapter, size=(40, 30)):
    kernel = one_layer.kernel_of(KEY, *size)
    return kernel, one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY)


def _delta(adapter, leaves, x, kernel, step):
    inputs = AdapterInputs(noise_step=None if step is None else jnp.int32(step))
    return adapter.delta(leaves, x, x @ kernel.dense(), kernel, None, inputs)


def test_without_noise_it_is_lora():
    adapter = HaLoRA()
    assert (adapter.rank, adapter.sigma, adapter.noise_steps) == (4, 0.01, 400)
    assert (adapter.penalty_weight, adapter.norm, adapter.noise_unit) == (0.1, "spectral", "absolute")
    kernel, leaves = _filled(adapter)
    x = jax.random.normal(KEY, (5, 40))
    lora = one_layer.delta(LoRA(rank=4, alpha=8.0), leaves, x, kernel)
    np.testing.assert_allclose(_delta(adapter, leaves, x, kernel, None), lora, rtol=1e-5, atol=1e-6)


def test_one_draw_is_held_for_400_steps_and_differs_by_site_and_layer():
    adapter, kernel = HaLoRA(), one_layer.kernel_of(KEY, 40, 30)
    run = jax.jit(lambda leaves, step: adapter.noise(leaves, kernel, step))
    starts = [
        adapter.init(KEY, Site(path, 40, 30, first_layer=first), jnp.int32(layer), kernel)
        for path, layer, first in (("q", 0, 0), ("q", 1, 0), ("k", 0, 0), ("q", 0, 1))
    ]
    first = run(starts[0], 0)
    np.testing.assert_array_equal(first, run(starts[0], 399))
    np.testing.assert_array_equal(run(starts[1], 7), run(starts[3], 7))  # a layer of its own, at the same depth
    for other in (run(starts[0], 400), run(starts[1], 0), run(starts[2], 0)):
        assert bool((first != other).all())
    assert run._cache_size() == 1


@pytest.mark.parametrize("sigma", [0.005, 0.01, 0.02])
def test_noise_of_the_training_forward(sigma):
    """An adapter trained at one sigma is evaluated at others by replacing the field."""
    adapter = dataclasses.replace(HaLoRA(), sigma=sigma)
    kernel, leaves = _filled(adapter, (200, 150))
    noise = adapter.noise(leaves, kernel, jnp.int32(3))
    assert abs(float(noise.std()) / sigma - 1) < 0.02  # 30,000 draws
    assert abs(float(noise.mean())) < 0.03 * sigma
    x = jax.random.normal(KEY, (3, 200))
    y = x @ kernel.dense() + _delta(adapter, leaves, x, kernel, 3)
    options = {**dataclasses.asdict(adapter)}
    expected = one_layer.oracle("halora").forward(leaves.params, kernel.dense(), x[:1], options, noise)
    np.testing.assert_allclose(y[:1], expected, rtol=1e-4, atol=1e-4)


def test_output_in_one_is_the_noisy_base_and_the_change():
    adapter = HaLoRA()
    kernel, leaves = _filled(adapter)
    x = jax.random.normal(KEY, (2, 3, 40))
    y = adapter.output(leaves, x, kernel, AdapterInputs(noise_step=jnp.int32(3)))
    expected = x @ kernel.dense() + _delta(adapter, leaves, x, kernel, 3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert adapter.output(leaves, x, kernel, AdapterInputs()) is None
    assert HaLoRA(sigma=0.0).output(leaves, x, kernel, AdapterInputs(noise_step=jnp.int32(3))) is None


def test_unit_of_the_largest_weight_of_a_tile():
    values = np.asarray(jax.random.normal(KEY, (70, 130)))
    found = np.asarray(tile_max(jnp.asarray(values)))
    for rows in (slice(0, 64), slice(64, 70)):
        for columns in (slice(0, 64), slice(64, 128), slice(128, 130)):
            np.testing.assert_array_equal(found[rows, columns], np.abs(values[rows, columns]).max())
    kernel = Kernel(jnp.asarray(values))
    absolute, relative = HaLoRA(), HaLoRA(noise_unit="tile_max")
    leaves = one_layer.start(absolute, KEY, kernel)
    ratio = relative.noise(leaves, kernel, jnp.int32(0)) / absolute.noise(leaves, kernel, jnp.int32(0))
    np.testing.assert_allclose(ratio, found, rtol=1e-5)


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_penalty_and_its_gradient(norm):
    adapter = HaLoRA(norm=norm)
    kernel, leaves = _filled(adapter)
    params = jax.tree.map(np.asarray, leaves.params)
    expected = one_layer.oracle("halora").penalty(params, dataclasses.asdict(adapter))
    np.testing.assert_allclose(adapter.penalty(leaves), expected, rtol=1e-5)
    run = lambda params: adapter.penalty(leaves._replace(params=params))  # noqa: E731
    gradient = jax.grad(run)(leaves.params)
    with jax.enable_x64(True):
        step = 1e-6
        for name in ("a", "b"):
            wide = {k: jnp.asarray(v, jnp.float64) for k, v in params.items()}
            moved = [dict(wide, **{name: wide[name].at[0, 1].add(sign * step)}) for sign in (1, -1)]
            slope = (run(moved[0]) - run(moved[1])) / (2 * step)
            np.testing.assert_allclose(gradient[name][0, 1], slope, rtol=1e-3, atol=1e-5)
    start = jax.grad(run)(one_layer.start(adapter, KEY, kernel).params)
    assert bool(jnp.isfinite(start["a"]).all())
    np.testing.assert_array_equal(start["b"], 0)  # b = 0, where the naive gradient is NaN
    assert HaLoRA(penalty_weight=0.0).penalty(leaves) is None


def test_merging_must_be_asked_for():
    kernel, leaves = _filled(HaLoRA())
    with pytest.raises(NotMergeable, match="mergeable=True"):
        HaLoRA().merge(leaves, kernel)
    merged = HaLoRA(mergeable=True).merge(leaves, kernel)
    np.testing.assert_allclose(merged - kernel.dense(), 2 * leaves.params["a"] @ leaves.params["b"], atol=1e-5)


def test_impossible_options_name_the_field():
    for options, message in (
        ({"sigma": -1.0}, "sigma must not be negative"),
        ({"norm": "nuclear"}, "norm must be one of spectral, frobenius"),
        ({"noise_unit": "relative"}, "noise_unit must be one of"),
        ({"noise_steps": 0}, "noise_steps must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            HaLoRA(**options)
