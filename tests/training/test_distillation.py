"""The trained merge: its loss against NumPy, what it recovers exactly, what it improves, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import AdapterInputs, LoRA, MoR
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.merging import measure_fidelity, merge
from mor_jax.training.distillation import distill, distillation_loss
from mor_jax.training.step import NonFiniteError
from tests.merging.models import Stack, batches, call, make, random_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHOD = MoR(rank=3, num_experts=4, alpha=3)
RANK = 3
TRAIN, UNSEEN = batches(6), batches(3, seed=9)


@pytest.fixture(scope="module")
def routed():
    """(model, params, leaves, plan): `up` is routed, `down` has an ordinary LoRA."""
    model, ids = Stack(), jnp.zeros((2, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    plan = resolve_sites(model, METHOD, ("up", "down"), ids, overrides=(("down", LoRA(rank=2)),))
    return model, params, random_leaves(jax.random.key(1), plan, params, 0.4), plan


def frozen_copy(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def distilled(routed):
    """What was there before, (plan, leaves) of the trained merge."""
    before = frozen_copy((routed[1], routed[2]))
    return before, distill(*routed, TRAIN, rank=RANK, call=call, steps=60, learning_rate=1e-2)


def kl(routed, plan, leaves):
    merged = merge(routed[1], leaves, plan)
    return measure_fidelity(*routed, merged, UNSEEN, call=call, sites=False).kl


def test_the_loss_is_the_kl_of_the_next_token_distributions():
    model, params, leaves, plan = make(LoRA(rank=2), targets=("down",))
    adapted = Adapted(base=model, plan=plan)
    (batch,) = batches(1)
    random = np.random.default_rng(0)
    target = random.normal(size=(4, 16, 7)).astype(np.float32)
    mask = (random.random((4, 16)) < 0.6).astype(np.int32)
    variables = {"params": params, "adapters": leaves.params}
    given = batch | {"target_logits": jnp.asarray(target), "loss_mask": jnp.asarray(mask)}
    total, tokens = jax.jit(distillation_loss(adapted, call))(variables, given, AdapterInputs())
    inputs = call(batch)[2]
    logits = np.asarray(jax.jit(adapted.apply)(variables, batch["input_ids"], adapter_inputs=inputs), np.float64)
    wanted = 0.0
    for row, place in np.argwhere(mask > 0):
        p, q = (np.exp(z - z.max()) for z in (np.float64(target[row, place]), logits[row, place]))
        p, q = p / p.sum(), q / q.sum()
        wanted += sum(p[i] * (np.log(p[i]) - np.log(q[i])) for i in range(7))
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert (total.dtype, tokens.dtype, float(tokens)) == (jnp.float32, jnp.float32, mask.sum())


def test_training_lowers_the_kl_on_unseen_rows(routed, distilled):
    start = kl(routed, *distill(*routed, TRAIN, rank=RANK, call=call, steps=0))
    assert start > 0.01  # there is something to gain
    assert kl(routed, *distilled[1]) < 0.8 * start


def test_only_the_factors_of_routed_sites_move(routed, distilled):
    _, params, leaves, _ = routed
    before, (plan, found) = distilled
    assert_same((params, leaves), before)  # the base and the teacher, bit by bit and not donated
    assert_same(found.params["layers/down"], leaves.params["layers/down"])
    assert plan["layers/down"].adapter == LoRA(rank=2)
    assert plan["layers/up"].adapter == LoRA(rank=RANK, alpha=float(RANK))
    assert {name: leaf.shape for name, leaf in found.params["layers/up"].items()} == {
        "a": (3, 12, RANK),
        "b": (3, RANK, 20),
    }


def test_the_seed_decides_everything(routed):
    short = lambda seed: distill(*routed, TRAIN, rank=RANK, call=call, steps=8, seed=seed)[1].params  # noqa: E731
    first = short(0)
    assert_same(first, short(0))
    assert not np.array_equal(first["layers/up"]["a"], short(1)["layers/up"]["a"])


def test_a_gate_that_is_constant_is_recovered(routed):
    model, params, leaves, plan = routed
    own = dict(leaves.params)
    own["layers/up"] = own["layers/up"] | {"router": jnp.zeros_like(own["layers/up"]["router"])}
    constant = leaves._replace(params=own)
    exact = merge(params, constant, plan, {"layers/up": jnp.full((3, 4), 0.25)})
    found = distill(model, params, constant, plan, TRAIN, rank=RANK, call=call, steps=20, ridge=1e-9)
    merged = merge(params, *reversed(found))
    assert measure_fidelity(model, params, constant, plan, merged, UNSEEN, call=call, sites=False).kl < 1e-6
    for name in ("up", "down"):
        wanted = exact["layers"][name]["kernel"]
        miss = np.linalg.norm(merged["layers"][name]["kernel"] - wanted) / np.linalg.norm(wanted)
        assert miss < 1e-3  # of the ridge and of float32 sums


def test_what_cannot_be_trained_is_said(routed):
    with pytest.raises(ValueError, match="at least one calibration batch"):
        distill(*routed, [], rank=RANK, call=call)
    with pytest.raises(ValueError, match="rank must be between 1 and 12"):
        distill(*routed, TRAIN, rank=13, call=call)
    with pytest.raises(NonFiniteError, match="step 1: update of layers/up"):
        distill(*routed, TRAIN, rank=RANK, call=call, steps=2, learning_rate=float("inf"))
