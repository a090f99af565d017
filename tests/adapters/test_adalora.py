"""The card of AdaLoRA, against torch PEFT: forward, gradients, merged weights, penalty, budget and masks."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import optax
import pytest

from mor_jax.adapters import Kernel, Leaves, Site, make_adapter
from mor_jax.adapters.adalora import CutBudget, Sensitivity
from mor_jax.adapters.rules import EventCall
from mor_jax.optim import EventRule, UpdateRule

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

STEPS, START, FINAL, INTERVAL = 24, 3, 6, 2
ADAPTER = make_adapter("adalora", rank=2, initial_rank=4, alpha=6.0, interval=INTERVAL)
SIZES = {"first": (7, 6), "second": (6, 5)}


class _TwoLayers(torch.nn.Module):
    def __init__(self, kernels):
        super().__init__()
        for name, kernel in kernels.items():
            layer = torch.nn.Linear(*kernel.shape, bias=False)
            layer.weight.data = torch.tensor(np.array(kernel.value).T.copy())
            setattr(self, name, layer)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class _OnlyALoss(_TwoLayers):
    def forward(self, x):
        return types.SimpleNamespace(loss=super().forward(x).sum() * 0)


def _kernels():
    return {name: one_layer.kernel_of(jax.random.key(i), *size) for i, (name, size) in enumerate(SIZES.items())}


def _leaves(kernels):
    params, state = {}, {}
    for name, kernel in kernels.items():
        own = one_layer.scramble(one_layer.start(ADAPTER, jax.random.key(3), kernel), jax.random.key(4))
        params[name], state[name] = own.params, own.state
    return Leaves(params, state, {})


def _forward(kernels, params, state, x):
    for name, kernel in kernels.items():
        y = one_layer.forward(ADAPTER, Leaves(params[name], state[name]), x, kernel)
        x = jnp.tanh(y)
    return y


def _peft_model(kernels, leaves, model=_TwoLayers):
    config = peft.AdaLoraConfig(
        target_modules=list(SIZES), init_r=ADAPTER.width, target_r=ADAPTER.rank, lora_alpha=6, total_step=STEPS,
        tinit=START, tfinal=FINAL, deltaT=INTERVAL, orth_reg_weight=0.1,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model(kernels), config)
    for name, own in leaves.params.items():
        layer = getattr(wrapped.base_model.model, name)
        for leaf, place in (("a", layer.lora_A), ("b", layer.lora_B)):
            place["default"].data = torch.tensor(np.array(own[leaf]).T.copy())
        layer.lora_E["default"].data = torch.tensor(np.array(own["e"]))[:, None]
    return wrapped


def _torch_leaves(wrapped, read):
    found = {}
    for name in SIZES:
        layer = getattr(wrapped.base_model.model, name)
        parts = {"a": layer.lora_A, "b": layer.lora_B, "e": layer.lora_E}
        found[name] = {leaf: np.array(read(part["default"]).T) for leaf, part in parts.items()}
        found[name]["e"] = found[name]["e"][0]
    return found


def _close(one, other):
    """To 1e-5 of each array's largest entry: PEFT divides by the rank + 1e-5, which is 2.5e-6 off here."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), one, other)


def test_start_and_defaults():
    adapter = make_adapter("adalora")
    assert (adapter.rank, adapter.width, adapter.decay, adapter.orthogonality_weight) == (8, 12, 0.85, 0.1)
    params = adapter.init(jax.random.key(0), Site("proj", 500, 400), jnp.int32(0), Kernel(jnp.ones((500, 400)))).params
    assert not params["e"].any()
    for leaf in ("a", "b"):
        np.testing.assert_allclose(params[leaf].std(), 0.02, rtol=0.03)


def test_forward_gradients_and_merged_weights_equal_peft():
    kernels = _kernels()
    leaves = _leaves(kernels)
    wrapped = _peft_model(kernels, leaves)
    x = jax.random.normal(jax.random.key(5), (3, 7))
    expected = wrapped(torch.tensor(np.array(x)))
    _close(_forward(kernels, *leaves[:2], x), expected.detach().numpy())
    expected.square().sum().backward()
    gradient = jax.grad(lambda params: jnp.sum(_forward(kernels, params, leaves.state, x) ** 2))(leaves.params)
    _close(gradient, _torch_leaves(wrapped, lambda part: part.grad.numpy()))
    merged = wrapped.merge_and_unload()
    for name, kernel in kernels.items():
        own = Leaves(leaves.params[name], leaves.state[name])
        _close(ADAPTER.merge(own, kernel), getattr(merged, name).weight.detach().numpy().T)


def test_penalty_is_twice_that_of_peft():
    """PEFT divides by the number of factors, the mean over sites divides by half of it."""
    kernels = _kernels()
    leaves = _leaves(kernels)
    expected = _peft_model(kernels, leaves, _OnlyALoss).base_model(torch.ones(1, 7)).loss.item()
    ours = [ADAPTER.penalty(Leaves(leaves.params[name], leaves.state[name])) for name in kernels]
    np.testing.assert_allclose(sum(ours) / len(ours), 2 * expected, rtol=1e-5)


def _event():
    return CutBudget(ADAPTER.width, ADAPTER.rank, START, STEPS - FINAL, INTERVAL)


def test_budget_schedule_equals_peft():
    allocator = _peft_model(_kernels(), _leaves(_kernels())).base_model.rankallocator
    event = _event()
    for step in range(1, STEPS + 1):
        budget, cuts = allocator.budget_schedule(step)
        assert event.budget(step, len(SIZES)) == budget, step
        if step < STEPS - FINAL:
            assert event.due(step) == cuts, step
    assert [step for step in range(1, STEPS + 1) if event.due(step)] == [4, 6, 8, 10, 12, 14, 16, 18]
    first, cut = make_adapter("adalora", rank=2, initial_rank=4).rules(100)
    assert (first, cut) == (Sensitivity(0.85), CutBudget(4, 2, 10, 70, 10))


def _train_torch(wrapped, xs):
    """PEFT's allocator on SGD, importance taken at the parameters of the gradient as in the paper's algorithm 1."""
    allocator, model = wrapped.base_model.rankallocator, wrapped.base_model.model
    factors = [p for n, p in wrapped.named_parameters() if "lora_" in n and "ranknum" not in n]
    optimizer, pattern = torch.optim.SGD(factors, lr=0.05), None
    for step, x in enumerate(xs, 1):
        optimizer.zero_grad()
        wrapped(torch.tensor(np.array(x))).square().sum().backward()
        allocator.update_ipt(model)
        optimizer.step()
        budget, cuts = allocator.budget_schedule(step)
        if step < STEPS - FINAL and cuts or step == STEPS - FINAL:
            pattern = allocator.mask_to_budget(model, budget)
        elif step > STEPS - FINAL:
            allocator.mask_using_rank_pattern(model, pattern)
        yield _torch_leaves(wrapped, lambda part: part.detach().numpy())


def test_masks_equal_peft_at_every_step():
    kernels = _kernels()
    leaves = _leaves(kernels)
    optimizer = UpdateRule(Sensitivity(0.85)).wrap(optax.sgd(0.05))
    rule = EventRule(_event(), tuple((name, ()) for name in SIZES), ("sensitivity", "uncertainty"))

    @jax.jit
    def step(leaves, state, x):
        gradient = jax.grad(lambda params: jnp.sum(_forward(kernels, params, leaves.state, x) ** 2))(leaves.params)
        updates, state = optimizer.update(gradient, state, leaves.params)
        return leaves._replace(params=optax.apply_updates(leaves.params, updates)), state

    @jax.jit
    def cut(leaves, state, number):
        zero = lambda _: jnp.float32(0)  # noqa: E731 - this rule asks for no score
        found = rule.apply(leaves, state, {}, jax.random.key(0), zero, step=number, optimizer=optimizer)
        return found[0], found[1], found[3]["budget"]

    xs = [0.5 * jax.random.normal(jax.random.key(10 + i), (3, 7)) for i in range(STEPS)]
    state, kept = optimizer.init(leaves.params), []
    for number, (x, expected) in enumerate(zip(xs, _train_torch(_peft_model(kernels, leaves), xs), strict=True), 1):
        leaves, state = step(leaves, state, x)
        if rule.due(number):
            leaves, state, budget = cut(leaves, state, jnp.int32(number))
            assert budget == _event().budget(number, len(SIZES))
        effective = {name: own["e"] * leaves.state[name]["mask"] for name, own in leaves.params.items()}
        for name in SIZES:
            assert ((effective[name] == 0) == (expected[name]["e"] == 0)).all(), (number, name)
            np.testing.assert_allclose(effective[name], expected[name]["e"], rtol=1e-3, atol=1e-5)
            for leaf in ("a", "b"):
                np.testing.assert_allclose(leaves.params[name][leaf], expected[name][leaf], rtol=1e-3, atol=1e-5)
        kept.append(sum(int((e != 0).sum()) for e in effective.values()))
    assert kept[START - 1] == 8
    assert kept[-1] == kept[STEPS - FINAL - 1] == 4
    assert cut._cache_size() == step._cache_size() == 1


def test_cut_ranks_the_whole_model_and_may_empty_a_site():
    """Scores of eq. 8 by hand: only one site's triplets matter, so the other loses all of its own."""

    def ones(scale):
        return {"a": scale * jnp.ones((1, 3, 2)), "b": scale * jnp.ones((1, 2, 4)), "e": scale * jnp.ones((1, 2))}

    leaves = {name: Leaves(ones(1.0), {"mask": jnp.ones((1, 2))}) for name in ("strong", "weak")}
    kept = {"strong": ones(2.0), "weak": ones(1.0)}
    call = EventCall(leaves, {}, {"sensitivity": kept, "uncertainty": kept}, None, jnp.int32(9), None)
    result = CutBudget(2, 1, 0, 9, 3).apply(call)
    assert result.leaves["strong"].params["e"].tolist() == result.leaves["strong"].state["mask"].tolist() == [[1, 1]]
    assert result.leaves["weak"].params["e"].tolist() == result.leaves["weak"].state["mask"].tolist() == [[0, 0]]
    assert result.report["budget"] == 2


def test_impossible_options_are_named():
    for options in ({"initial_rank": 3}, {"decay": 1.0}, {"start_fraction": 0.8}, {"interval": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_adapter("adalora", **options)
