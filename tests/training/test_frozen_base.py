"""What a frozen base spares: products for its own gradient, and the way back below the first adapted layer."""

import dataclasses
import re

import jax
import optax
import pytest
import tiny_training as tiny

from mor_jax.adapters import AdapterInputs
from mor_jax.models import DecoderConfig, abstract_params
from mor_jax.training.hlo import count_flops
from mor_jax.training.mesh import make_mesh
from mor_jax.training.sharding import param_specs
from mor_jax.training.step import abstract_state, make_step

# No two of these sizes are equal, so that the shape of a product's result tells what it is.
CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=14
)
KERNELS = {(24, 28), (14, 24), (24, 40), (24, 37)}  # q and o, k and v, the three of the MLP, the head
BATCH = tiny.random_batch(4, 6)


def _product_shapes(lowered):
    """Sizes of the results of all products that are matrices, sorted, in what is handed to the compiler."""
    results = re.findall(r"stablehlo\.dot_general .*-> tensor<(\d+)x(\d+)x\w+>", lowered.as_text())
    return {tuple(sorted(map(int, sizes))) for sizes in results}


def _lowered_step(config, method, targets="all-linear"):
    options = {"num_experts": 4} if method == "mor" else {}
    adapted = tiny.adapted_decoder(method, config, targets=targets, rank=2, **options)
    optimizer, mesh, params = optax.adam(1e-3), make_mesh("data=1"), abstract_params(config)
    state, constants, shardings = abstract_state(adapted, params, optimizer, mesh, param_specs(params, mesh))
    step = make_step(adapted, optimizer, loss=tiny.decoder_loss(adapted, config), shardings=shardings)
    return step, (state, params, constants, BATCH)


@pytest.mark.parametrize("method", ["lora", "dora", "mor"])
def test_no_product_makes_the_gradient_of_a_frozen_matrix(method):
    step, arguments = _lowered_step(CONFIG, method)
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
    forward = 2 * tokens * (kernels + 2 * 6 * width)  # scores and their sum of values, of rows of 6
    assert flops(3, "2") - flops(2, "1") == forward
    assert flops(3, "012") - flops(2, "01") > 1.8 * forward
