"""The facts of LoRA-Mini (arXiv 2411.15804)."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, Kernel, LoRA, LoRAMini, Site
from mor_jax.injection import resolve_sites
from mor_jax.models import Decoder, DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
CONFIG = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=40, num_layers=2, num_heads=2)


def _leaves(adapter, seed=0, layer=0, path="p", size=(40, 30)):
    kernel = Kernel(jnp.zeros(size))
    return adapter.init(jax.random.key(seed), Site(path, *size), jnp.int32(layer), kernel)


def test_frozen_factors_come_from_seed_site_and_layer_alone():
    adapter = LoRAMini(rank=2, inner_in=16, inner_out=8)
    one = _leaves(adapter).constants
    jax.tree.map(np.testing.assert_array_equal, one, _leaves(adapter, seed=7).constants)
    jitted = jax.jit(lambda layer: _leaves(adapter, layer=layer).constants)(0)
    jax.tree.map(np.testing.assert_array_equal, one, jitted)  # bit by bit, so that a checksum can be compared
    others = (
        _leaves(adapter, layer=1),
        _leaves(adapter, path="q"),
        _leaves(LoRAMini(rank=2, inner_in=16, inner_out=8, seed=1)),
    )
    for other in others:
        assert bool((one["outer_a"] != other.constants["outer_a"]).any())
    assert not bool((one["outer_a"][:8, :16] == one["outer_b"].T[:8, :16].repeat(2, 1)[:, :16]).all())


def test_frozen_factors_are_gaussian_with_variance_one_over_fan_in():
    constants = _leaves(LoRAMini(inner_in=200, inner_out=100), size=(400, 300)).constants
    for values, fan_in in ((constants["outer_a"], 400), (constants["outer_b"], 100)):
        scaled = np.asarray(values, np.float64) * fan_in**0.5
        assert abs(scaled.mean()) < 0.02  # 3e4 or more draws: standard error below 0.006
        assert abs(scaled.std() - 1) < 0.02
        for sigmas, share in ((1, 0.6827), (2, 0.9545)):
            assert abs((np.abs(scaled) < sigmas).mean() - share) < 0.01


def test_inner_factors_start_like_lora_s():
    params = _leaves(LoRAMini(inner_in=100, inner_out=64)).params
    assert 0.9 * 0.1 < float(jnp.abs(params["a"]).max()) <= 0.1  # 1 / sqrt(100)
    np.testing.assert_array_equal(params["b"], 0)


def test_identity_outer_factors_make_it_lora():
    adapter = LoRAMini(rank=3, inner_in=7, inner_out=5)
    kernel = one_layer.kernel_of(KEY)
    leaves = one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY)
    leaves = leaves._replace(constants={"outer_a": jnp.eye(7), "outer_b": jnp.eye(5)})
    x = jax.random.normal(KEY, (4, 7))
    lora = one_layer.delta(LoRA(rank=3), leaves._replace(constants={}), x, kernel)
    np.testing.assert_allclose(one_layer.delta(adapter, leaves, x, kernel), lora, rtol=1e-5, atol=1e-6)


def test_prepared_leaves_need_no_frozen_factors():
    adapter = LoRAMini(rank=3, inner_in=6, inner_out=4)
    kernel = one_layer.kernel_of(KEY)
    leaves = one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY)
    prepared = adapter.prepare(leaves, kernel)._replace(constants={})
    x = jax.random.normal(KEY, (4, 7))
    h = x @ adapter.input_factor(prepared)
    change = adapter.delta(prepared, h, x @ kernel.dense(), kernel, None, AdapterInputs())
    np.testing.assert_allclose(change, one_layer.delta(adapter, leaves, x, kernel), rtol=1e-5, atol=1e-6)


def test_impossible_options_name_the_field():
    with pytest.raises(ValueError, match="inner_in must be positive"):
        LoRAMini(inner_in=0)


def test_a_plan_warns_once_where_it_trains_more_than_lora(caplog):
    """r (m + n) = 3 (20 + 20) = 120 a layer where LoRA has 3 (16 + 16) = 96, on two maps of two layers."""
    model, ids = Decoder(CONFIG), jnp.zeros((1, 4), jnp.int32)
    method = LoRAMini(rank=3, inner_in=20, inner_out=20)
    with caplog.at_level(logging.WARNING):
        plan = resolve_sites(model, method, ("q_proj", "o_proj", "up_proj"), ids)
    (record,) = caplog.records
    assert plan.num_params() == 2 * 3 * 120
    assert "trains 480 parameters where LoRA of rank 3 would train 384, on 2 of 3 sites" in record.getMessage()
    assert "layers/self_attn/q_proj has 16 + 16 inputs and outputs" in record.getMessage()
    caplog.clear()
    resolve_sites(model, method, ("up_proj",), ids)
    resolve_sites(model, LoRAMini(rank=3, inner_in=16, inner_out=16), ("q_proj",), ids)
    assert not caplog.records
