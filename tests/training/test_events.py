"""What the score of an event is, and what batch it is taken on."""

import types
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
import optax
import pytest
from tiny_training import adapted_decoder, decoder_loss, nudge, params_of, random_batch

from mor_jax.adapters import AdapterInputs
from mor_jax.adapters.rules import Event, EventResult
from mor_jax.models import logical_axes
from mor_jax.models.logical_axes import split_ways
from mor_jax.optim import EventRule
from mor_jax.optim.rules import Rules
from mor_jax.training.events import make_events
from mor_jax.training.loop import _score_batch
from mor_jax.training.mesh import make_mesh, put_batch
from mor_jax.training.sharding import param_specs, shardings_of
from mor_jax.training.step import init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclass(frozen=True)
class Ask(Event):
    """Reports the score of the leaves as they are, and without any."""

    name: ClassVar[str] = "ask"
    scores: ClassVar[bool] = True

    def due(self, step):
        return True

    def apply(self, call):
        without = jax.tree.map(lambda leaf: 0 * leaf, call.leaves)
        report = {"all": call.score(call.leaves), "none": call.score(without)}
        return EventResult(call.leaves, call.state, report=report)


def _cross_entropy(adapted, params, adapters, batch):
    """The mean over counted tokens in float64."""
    inputs = AdapterInputs(segment_ids=batch["segment_ids"])
    arguments = batch["input_ids"], batch["positions"], batch["segment_ids"]
    logits = adapted.apply({"params": params, "adapters": adapters}, *arguments, adapter_inputs=inputs)
    logits = np.asarray(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return np.mean((normaliser - chosen)[batch["loss_mask"] > 0])


@pytest.mark.parametrize(("layout", "ways"), [(None, 1), ("data=2,fsdp=2,sequence=2", 8)])
def test_the_score_is_minus_the_cross_entropy_of_the_development_batch(layout, ways):
    """On a mesh too, where the scoring passes are traced under the rules of sharding: tokens are split 8 ways."""
    adapted, params = adapted_decoder("lora", rank=2), params_of()
    rule = EventRule(Ask(), tuple((site.site.path, site.stack_sizes) for site in adapted.plan.sites))
    rules, optimizer = Rules(events=(rule,)), optax.sgd(0.1)
    development, of_the_step = random_batch(seed=1), random_batch(seed=2)
    mesh = specs = None
    on_devices, whole = development, params
    if layout is not None:
        mesh = make_mesh(layout)
        specs = param_specs(params, mesh, smallest=1, axes=logical_axes(params))
        whole, on_devices = jax.device_put(params, shardings_of(specs, mesh)), put_batch(development, mesh)
        of_the_step = put_batch(of_the_step, mesh)
    state, constants, shardings = init_state(jax.random.key(0), adapted, whole, optimizer, mesh, specs, rules)
    state = nudge(state)
    adapters = jax.tree.map(np.array, state.adapters)  # the state is donated
    plain, seen = decoder_loss(adapted), set()

    def loss(*arguments):
        seen.add(split_ways("batch", "length"))
        return plain(*arguments)

    events = make_events(rules, optimizer, loss=loss, constants=constants, shardings=shardings, batch=on_devices)
    found = events(1, state, whole, of_the_step)[1]["ask"]
    silent = jax.tree.map(np.zeros_like, adapters)
    for name, own in (("all", adapters), ("none", silent)):
        np.testing.assert_allclose(found[name], -_cross_entropy(adapted, params, own, development), rtol=1e-5)
    assert found["all"] != found["none"]
    assert seen == {ways}


@dataclass(frozen=True)
class AskInSecret(Ask):
    """Would be scored on held-out data that a resumed run may change."""

    scores: ClassVar[bool] = False


def test_an_event_that_scores_must_say_so():
    adapted, params = adapted_decoder("lora", rank=2), params_of()
    rules = Rules(events=(EventRule(AskInSecret(), ((adapted.plan.sites[0].site.path, (2,)),)),))
    state, constants, _ = init_state(jax.random.key(0), adapted, params, optax.sgd(0.1), rules=rules)
    events = make_events(rules, optax.sgd(0.1), loss=decoder_loss(adapted), constants=constants)
    with pytest.raises(TypeError, match="AskInSecret asks for a score: set its scores = True"):
        events(1, state, params, random_batch())
    run = types.SimpleNamespace(eval_batches=lambda: iter([random_batch()]), mesh=make_mesh("data=1"))
    assert _score_batch(run, rules) is None


def test_the_development_batch_is_the_first_held_out_one():
    batches = [random_batch(4, seed=seed) for seed in (1, 2)]
    run = types.SimpleNamespace(eval_batches=lambda: iter(batches), mesh=make_mesh("data=2"))
    rules = Rules(events=(EventRule(Ask(), ()),))
    jax.tree.map(np.testing.assert_array_equal, _score_batch(run, rules), batches[0])
    assert _score_batch(run, Rules()) is None
    assert _score_batch(types.SimpleNamespace(eval_batches=None, mesh=run.mesh), rules) is None
