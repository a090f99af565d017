"""What a frozen base spares: products for its own gradient, and the way back below the first adapted layer."""

import dataclasses
import re

import jax
import optax
import pytest
import tiny_training as tiny

from mor_jax.adapters import METHODS, AdapterInputs, method_options
from mor_jax.models import DecoderConfig, abstract_params
from mor_jax.optim import plan_rules
from mor_jax.training.hlo import count_flops
from mor_jax.training.mesh import make_mesh
from mor_jax.training.sharding import param_specs
from mor_jax.training.step import abstract_state, make_step

# No two of these sizes are equal, so that the shape of a product's result tells what it is.
CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=14
)
KERNELS = {(24, 28), (14, 24), (24, 40), (24, 37)}  # q and o, k and v, the three of the MLP, the head
LENGTH = 5  # of a row: the 20 tokens of a batch of 4 are no width either
BATCH = tiny.random_batch(4, LENGTH)


RESULT = re.compile(r"stablehlo\.dot_general .*-> tensor<(?:\d+x)*?(\d+)x(\d+)x[a-z]\w*>")
OF_FACTORS = re.compile(r"tensor<\d+x2xf32>, tensor<2x\d+xf32>")  # a times b, of rank 2: no sum over tokens


def _product_shapes(lowered):
    """The last two sizes, sorted, of the results of products in what is handed to the compiler."""
    products = [found for line in lowered.as_text().splitlines() if (found := RESULT.search(line))]
    return {tuple(sorted(map(int, one.groups()))) for one in products if not OF_FACTORS.search(one.string)}


def _lowered_step(config, method, targets="all-linear", layout="data=1", accumulate=1):
    small = {"num_experts": 4, "rank": 2}
    options = {name: value for name, value in small.items() if name in method_options(method)}
    adapted = tiny.adapted_decoder(method, config, targets=targets, **options)
    mesh, params = make_mesh(layout), abstract_params(config)
    rules = plan_rules(adapted.plan, total_steps=100)
    optimizer = rules.wrap(optax.adam(1e-3))
    state, constants, shardings = abstract_state(adapted, params, optimizer, mesh, param_specs(params, mesh), rules)
    options = {"shardings": shardings, "rules": rules, "accumulate": accumulate, "constants": constants}
    step = make_step(adapted, optimizer, loss=tiny.decoder_loss(adapted, config), **options)
    return step, (state, params, constants, tiny.random_batch(4 * accumulate * mesh.size, LENGTH))


@pytest.mark.parametrize("method", METHODS)
def test_no_product_makes_the_gradient_of_a_frozen_matrix(method):
    step, arguments = _lowered_step(CONFIG, method)
    found = _product_shapes(step.function.lower(*arguments))
    assert found
    assert not found & KERNELS


@pytest.mark.parametrize("method", ["lora", "dora", "mor"])
def test_no_product_makes_it_where_each_device_has_sums_of_its_own(method):
    step, arguments = _lowered_step(CONFIG, method, layout="data=8", accumulate=2)
    found = _product_shapes(step.function.lower(*arguments))
    assert {(2, 28), (2, 40)} & found or {(8, 28), (8, 40)} & found  # of the factors
    assert not found & KERNELS


def test_the_shapes_looked_for_are_those_of_full_fine_tuning():
    adapted = tiny.adapted_decoder("lora", CONFIG, targets="all-linear", rank=2)
    variables = jax.eval_shape(adapted.init, jax.random.key(0), BATCH["input_ids"])
    loss = tiny.decoder_loss(adapted, CONFIG)

    def total(params, adapters):
        return loss({"params": params, "adapters": adapters}, BATCH, AdapterInputs())[0]

    found = _product_shapes(jax.jit(jax.grad(total)).lower(variables["params"], variables["adapters"]))
    assert found & KERNELS == KERNELS - {(24, 37)}  # the chunked loss has no gradient of the head


def test_nothing_runs_back_below_the_first_adapted_layer():
    """Of layers apart; a scan runs one program for all its layers, and one path adapts them all."""

    def flops(layers, adapted_layers):
        config = dataclasses.replace(CONFIG, num_layers=layers, scan_layers=False)
        step, arguments = _lowered_step(config, "lora", (rf"layers_[{adapted_layers}]/mlp/up_proj",))
        return count_flops(step.function.trace(*arguments).jaxpr)

    tokens, width = BATCH["input_ids"].size, CONFIG.num_heads * CONFIG.head_dim
    kernels = 2 * 24 * 28 + 2 * 24 * 14 + 3 * 24 * 40
    forward = 2 * tokens * (kernels + 2 * LENGTH * width)  # scores and their sum of values
    assert flops(3, "2") - flops(2, "1") == forward
    assert flops(3, "012") - flops(2, "01") > 1.8 * forward
