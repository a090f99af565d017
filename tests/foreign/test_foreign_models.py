"""Adapt, train, merge, save and load models that we did not write; gradients against a merge written by hand."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.adapters import make_adapter
from mor_jax.injection import DEFAULT_KINDS, Adapted, InjectionError, init_leaves, resolve_sites
from mor_jax.merging import merge
from mor_jax.training.adapter_file import load_adapter, save_adapter
from mor_jax.training.checkpoint import fingerprint

sys.path.insert(0, str(Path(__file__).parent))

from foreign_models import GEMMA_MISSING, MODELS

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANK, ALPHA = 3, 6.0
METHODS = {
    "lora": make_adapter("lora", rank=RANK, alpha=ALPHA),
    "mor": make_adapter("mor", rank=RANK, alpha=ALPHA, num_experts=4, router="mean"),
}
CASES = [*((model, "lora") for model in MODELS), ("convolutional_net", "mor")]


def lora_by_hand(leaf):
    return leaf["a"] @ leaf["b"]


def mor_by_hand(leaf):
    """The mean of the experts, each LoRA with its own scaling of the rank's columns and of the outputs."""
    experts = [
        (leaf["a"] * own_a) @ (leaf["b"] * own_b) for own_a, own_b in zip(leaf["lam_a"], leaf["lam_b"], strict=True)
    ]
    return sum(experts) / len(experts)


BY_HAND = {"lora": lora_by_hand, "mor": mor_by_hand}


class Case:
    """One model with a method at its sites, nudged off zero, and a loss of some made-up targets."""

    def __init__(self, name, method):
        foreign = self.foreign = MODELS[name]()
        self.params = foreign.model.init(jax.random.key(0), *foreign.args, **foreign.kwargs)["params"]
        self.change = BY_HAND[method]
        self.plan = resolve_sites(
            foreign.model, METHODS[method], foreign.targets, *foreign.args, kinds=foreign.kinds, **foreign.kwargs
        )
        self.leaves = init_leaves(jax.random.key(1), self.plan, self.params)
        keys = iter(jax.random.split(jax.random.key(2), 1000))
        moved = jax.tree.map(lambda v: v + 0.2 * jax.random.normal(next(keys), v.shape), self.leaves.params)
        self.nudged = self.leaves._replace(params=moved)
        self.adapted = Adapted(base=foreign.model, plan=self.plan)

    def forward(self, adapters):
        own = {"params": self.params, "adapters": adapters, "adapter_state": {}, "adapter_constants": {}}
        return self.foreign.logits(self.adapted.apply(own, *self.foreign.args, **self.foreign.kwargs))

    def base_forward(self, params):
        return self.foreign.logits(
            self.foreign.model.apply({"params": params}, *self.foreign.args, **self.foreign.kwargs)
        )

    def loss(self, logits):
        targets = jnp.arange(logits[..., 0].size).reshape(logits.shape[:-1]) % logits.shape[-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def merged_by_hand(self, adapters):
        """Kernels plus (alpha / rank) times the change, laid out as the model's author would."""
        merged = jax.tree.map(lambda leaf: leaf, self.params)
        for path, leaf in adapters.items():
            *parents, last = path.split("/")
            module = merged
            for part in parents:
                module = module[part]
            layout = next(of for end, of in self.foreign.layout.items() if path.endswith(end))
            kernel = module[last][self.foreign.kernel]
            change = layout(ALPHA / RANK * self.change(leaf), kernel.shape)
            module[last] = {**module[last], self.foreign.kernel: kernel + change}
        return merged


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return Case(*request.param)


def test_every_target_is_a_site(case):
    assert case.plan.sites
    for target in case.foreign.targets:
        name = target.replace(".", "/")
        assert target == "all-linear" or any(path.endswith(name) for path in case.plan.paths), target


def test_gradients_equal_those_of_a_merge_by_hand(case):
    ours = jax.jit(jax.value_and_grad(lambda leaves: case.loss(case.forward(leaves))))(case.nudged.params)
    by_hand = jax.jit(jax.value_and_grad(lambda leaves: case.loss(case.base_forward(case.merged_by_hand(leaves)))))
    value, gradient = by_hand(case.nudged.params)
    assert abs(float(value) - float(case.loss(case.base_forward(case.params)))) > 1e-3  # the adapters do something
    np.testing.assert_allclose(ours[0], value, rtol=1e-5)
    for path, leaves in gradient.items():
        for name, wanted in leaves.items():
            assert np.abs(wanted).max() > 1e-7, f"{path}/{name} has no gradient to compare"
            scale = float(np.abs(wanted).max())
            np.testing.assert_allclose(ours[1][path][name], wanted, atol=1e-4 * scale, rtol=1e-3, err_msg=path)


def test_ten_steps_lower_the_loss_and_the_merge_computes_the_same(case):
    optimizer = optax.adam(1e-2)
    before = jax.tree.map(np.array, case.params)

    @jax.jit
    def step(adapters, state):
        value, gradient = jax.value_and_grad(lambda leaves: case.loss(case.forward(leaves)))(adapters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    adapters, losses = case.leaves.params, []
    state = optimizer.init(adapters)
    for _ in range(10):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    start = float(case.loss(case.base_forward(case.params)))
    np.testing.assert_allclose(losses[0], start, rtol=1e-5)  # adapters begin at zero
    assert losses[-1] < losses[0] - 0.01, losses
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(case.params)))
    merged = merge(case.params, case.leaves._replace(params=adapters), case.plan)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, dict(case.params))
    np.testing.assert_allclose(case.base_forward(merged), case.forward(adapters), atol=2e-5, rtol=1e-4)


def test_a_saved_adapter_is_the_same_when_it_is_loaded(case, tmp_path):
    foreign = case.foreign
    folder = save_adapter(tmp_path / "adapter", case.plan, case.nudged, {"base_fingerprint": fingerprint(case.params)})
    plan, leaves, _ = load_adapter(
        folder, foreign.model, case.params, *foreign.args, kinds=foreign.kinds, **foreign.kwargs
    )
    assert plan == case.plan
    jax.tree.map(np.testing.assert_array_equal, leaves, case.nudged)
    if foreign.kinds != DEFAULT_KINDS:
        with pytest.raises(InjectionError, match="LinearKind"):
            load_adapter(folder, foreign.model, case.params, *foreign.args, **foreign.kwargs)


def test_the_readme_finds_the_sites_of_gemma_2b():
    pytest.importorskip("gemma.transformer", reason=GEMMA_MISSING)
    (source,) = re.findall(r"```py\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S)
    assert len(source.split("\n")) <= 12  # ten lines, an empty one, and the end
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    sites = {adapted.site.path: adapted.site for adapted in names["plan"].sites}
    assert len(sites) == 2 * 26
    query = sites["layer_0/attn/q_einsum"]
    assert (query.in_features, query.out_features) == (2304, 8 * 256)
