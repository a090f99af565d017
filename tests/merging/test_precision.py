"""Every product of a merge is one of float32: by default a GPU rounds its factors to TF32 and a TPU to bfloat16."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "adapters"))
import one_layer

from mor_jax.adapters import METHODS, DoRA, Kernel, LoRA, MoR, ResLoRA
from mor_jax.injection import Adapted, init_leaves, resolve_sites
from mor_jax.merging import as_lora, earlier_shares, least_squares, merge, merge_changes, merge_routed
from mor_jax.models import Decoder, DecoderConfig
from mor_jax.training.distillation import distill
from tests.merging.models import INNER, LAYERS, WIDTH, Stack, batches, call, make

KEY, BLOCK = jax.random.key(0), 6
CASES = [(name, options) for name in METHODS for options in one_layer.oracle(name).VARIANTS]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values())) or 'default'}" for n, o in CASES]
)
each_platform = pytest.mark.parametrize("platform", ["tpu", "cuda"])


def products(text):
    """The dot_generals of a program's text, and those of them that are not of the highest precision."""
    found = re.findall(r"stablehlo\.dot_general.*", text)
    return found, [line for line in found if "precision = [HIGHEST, HIGHEST]" not in line]


def rounded(function, platform, *args):
    """(how many products the function has for a platform, those of lower precision)."""
    found, low = products(jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text())
    return len(found), low


def _layer(name, options, **more):
    adapter = one_layer.small(name, options, **more)
    kernel = one_layer.kernel_of(KEY, *one_layer.fitting(name, 8, 6))
    return adapter, kernel, one_layer.start(adapter, KEY, kernel, block_features=BLOCK)


@each_platform
@each_case
def test_no_method_rounds_what_it_merges_or_computes_once_a_step(name, options, platform):
    more = {"mergeable": True} if name == "halora" else {}
    adapter, kernel, leaves = _layer(name, options, **more)
    gates = None if adapter.merges_exactly else jnp.ones(adapter.num_gates or 1)
    view = lambda value: Kernel(value)  # noqa: E731
    run = lambda function, *rest: rounded(function, platform, leaves, kernel.value, *rest)  # noqa: E731
    count, low = run(lambda leaves, value: adapter.merge(leaves, view(value), gates))
    assert count > 0
    assert not low
    assert not run(lambda leaves, value: adapter.factors(leaves, view(value)))[1]
    assert not run(lambda leaves, value: adapter.prepare(leaves, view(value)))[1]
    if adapter.chained:
        square = jnp.eye(kernel.shape[0])
        assert not run(lambda leaves, _, moment: adapter.input_norm(leaves, moment), square)[1]
    if adapter.chained and adapter.form == "input":
        assert not run(lambda leaves, value: adapter.weight_norm(leaves, view(value)))[1]


@each_platform
def test_the_norm_of_dora_is_of_full_precision_and_its_forward_products_are_left_alone(platform):
    adapter, kernel, leaves = _layer("dora", {})
    count, low = rounded(lambda leaves: adapter.prepare(leaves, kernel), platform, leaves)
    assert count >= 3
    assert not low
    x = jnp.ones((4, kernel.shape[0]))
    ready = adapter.prepare(leaves, kernel)
    count, low = rounded(lambda x: one_layer.delta(adapter, ready, x, kernel), platform, x)
    assert count == len(low) == 3


@each_platform
def test_training_products_stay_as_they_are(platform):
    for method in (LoRA(rank=2), MoR(rank=2, num_experts=3), DoRA(rank=2)):
        model, params, leaves, plan = make(method)
        ids = jnp.zeros((2, 4), jnp.int32)

        def loss(adapters, model=model, params=params, plan=plan, ids=ids):
            return jnp.sum(Adapted(model, plan).apply({"params": params, "adapters": adapters}, ids))

        count, low = rounded(jax.grad(loss), platform, leaves.params)
        once = 6 if method.name == "dora" else 0  # the norm's three at both sites
        assert count - len(low) == once


class Plus(LoRA):
    """A user's method, which says nothing of precision."""

    def merge(self, leaves, kernel, gates=None):
        return kernel.replace(kernel.dense() + self.scale * leaves.params["a"] @ leaves.params["b"])

    def factors(self, leaves, kernel):
        return leaves.params["a"] @ jnp.eye(self.rank), self.scale * leaves.params["b"]


@each_platform
def test_merges_of_whole_models_are_of_full_precision_whatever_the_method_says(platform):
    for method in (Plus(rank=2), MoR(rank=2, num_experts=3), ResLoRA(rank=2, previous=2), LoRA(rank=2)):
        _, params, leaves, plan = make(method)
        gates = {s.site.path: jnp.ones((LAYERS, 3)) for s in plan.sites} if method.routed else None
        count, low = rounded(lambda p, own, plan=plan, g=gates: merge(p, own, plan, g), platform, params, leaves)
        assert count >= 2
        assert not low
    _, params, leaves, plan = make(Plus(rank=2))
    assert not rounded(lambda p, own: merge_changes(p, own, plan, {}), platform, params, leaves)[1]
    wide = {"layers/up": jnp.ones((LAYERS, WIDTH, INNER))}
    assert not rounded(lambda p, own: merge_changes(p, own, plan, wide), platform, params, leaves)[1]


@each_platform
def test_factors_of_whole_models_are_of_full_precision(platform):
    class Other(Plus):
        pass

    for name in ("melora", "adalora"):
        method = one_layer.small(name, {})
        _, params, leaves, plan = make(method)
        assert not rounded(lambda own, p, plan=plan: as_lora(plan, own, p)[1], platform, leaves, params)[1]


def _dumped(folder, run):
    """The products of every program that ``run`` lowers, and those of lower precision."""
    jax.clear_caches()
    before = jax.config.read("jax_dump_ir_to")
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        run()
    finally:
        jax.config.update("jax_dump_ir_to", before)
    count, low = 0, []
    for file in pathlib.Path(folder).glob("*.mlir"):
        found, own = products(file.read_text())
        count += len(found)
        low += [f"{file.name}: {line.strip()[:150]}" for line in own]
    return count, low


def test_all_candidates_of_a_merge_are_found_and_judged_in_full_precision(tmp_path):
    """Gates, moments, least squares, the low-rank merge that is trained, site errors and logits; forward passes too."""
    model, params, leaves, plan = make(MoR(rank=2, num_experts=3))
    data, held_out = batches(2), batches(2, seed=9)

    def distilled():
        new_plan, new = distill(model, params, leaves, plan, data, rank=2, call=call, steps=1)
        return merge(params, new, new_plan)

    def run():
        options = {"calibration": data, "heldout": held_out, "call": call, "tasks": ("one", "other")}
        _, report = merge_routed(model, params, leaves, plan, others={"distill": distilled}, **options)
        assert set(report.candidates) == {"mean", "least_squares", "sequential", "distill"}
        merge_routed(model, params, leaves, plan, gates="task:one", **options)

    count, low = _dumped(tmp_path, run)
    assert count > 50
    assert not low


def test_shares_of_earlier_layers_are_found_in_full_precision(tmp_path):
    config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2)
    ids = np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32)
    model = Decoder(config)
    params = model.init(KEY, ids)["params"]

    def run():
        for form, by in (("input", "input"), ("input", "weight"), ("middle", "input")):
            plan = resolve_sites(model, ResLoRA(rank=2, form=form), ("q_proj",), ids)
            leaves = init_leaves(KEY, plan, params)
            shares = earlier_shares(model, params, leaves, plan, [{"input_ids": ids}], by=by)
            merge(params, leaves, plan, shares)

    count, low = _dumped(tmp_path, run)
    assert count > 10
    assert not low


def test_a_context_of_the_caller_s_changes_nothing(tmp_path):
    """Precision is part of what a program is cached by: one that was made in another context is not taken for ours."""
    model, params, leaves, plan = make(MoR(rank=2, num_experts=3))

    def run():
        with jax.default_matmul_precision("bfloat16"):
            least_squares(model, params, leaves, plan, batches(1), call=call)
            merge(params, leaves, plan, {s.site.path: jnp.ones((LAYERS, 3)) for s in plan.sites})

    count, low = _dumped(tmp_path, run)
    assert count > 10
    assert not low
    assert isinstance(model, Stack)
