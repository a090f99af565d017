"""Rules in real training runs, where `test_every_method.py` does not go through all of them alike."""

from pathlib import Path

import jax
import method_runs
import numpy as np
import optax
import pytest
from method_runs import STEPS, config_of, lines_of
from tiny_training import FIELDS, adapted_decoder, decoder_loss, params_of

from mor_jax.adapters import Leaves, make_adapter
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.optim import mean_penalty, plan_rules
from mor_jax.training.config import ConfigError, config_to_mapping
from mor_jax.training.run_folder import check_same_run
from mor_jax.training.step import init_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return method_runs.make_files(tmp_path_factory.mktemp("files"))


def test_dylora_draws_every_rank_equally_often(files, tmp_path):
    """A chi-square test with 3 degrees of freedom over the ranks in the log."""
    config = config_of(files, tmp_path / "run", "dylora", steps=80, save_every=0)
    ranks = [line["rank"] for line in lines_of(method_runs.train(config).folder)]
    counts = np.bincount(ranks, minlength=5)
    assert counts.sum() == 80
    assert counts[0] == 0
    assert ((counts[1:] - 20) ** 2 / 20).sum() < 11.34  # 1 % of true uniform draws exceed it


def test_halora_holds_its_noise_for_an_epoch(files, tmp_path):
    """Nothing learns and all batches are equal, so the loss is constant within an epoch of noise and nowhere else."""
    record = Path(files["train"]).read_text().splitlines()[0]
    (tmp_path / "same.jsonl").write_text("\n".join([record] * 8) + "\n")
    fields = {"data": (str(tmp_path / "same.jsonl"),), "packing": False, "learning_rate": 0.0, "steps": 7}
    method_runs.train(config_of(files, tmp_path / "run", "halora", eval_data=(), save_every=0, **fields))
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert len(set(losses[:3])) == len(set(losses[3:6])) == 1
    assert len({losses[0], losses[3], losses[6]}) == 3


def test_lora_plus_moves_b_at_its_own_rate(files, tmp_path):
    """Under SGD an update is the rate times the gradient, and the log holds the norm of the gradient of all leaves."""
    rate, ratio = 0.5, 16.0
    fields = {"optimizer": "sgd", "clip_norm": 0.0, "weight_decay": 0.0, "learning_rate": rate, "steps": 2}
    plain, plus = (
        method_runs.train(config_of(files, tmp_path / name, "lora", options=options, save_every=0, **fields))
        for name, options in (("plain", {}), ("plus", {"learning_rate_ratio": ratio}))
    )
    first, second = (plus.states[step][0]["adapters"] for step in (1, 2))
    norms = [line["gradient_norm"] for line in lines_of(plus.folder)]
    squares = [0.0, 0.0]
    for path, own in plain.states[1][0]["adapters"].items():
        assert own["b"].any()
        np.testing.assert_array_equal(first[path]["b"], ratio * own["b"])  # from 0, and 16 is a power of two
        np.testing.assert_array_equal(first[path]["a"], own["a"])  # no gradient reaches a while b is 0
        moved = {leaf: np.float64(second[path][leaf]) - first[path][leaf] for leaf in ("a", "b")}
        assert all(change.any() for change in moved.values())
        squares[0] += np.sum((np.float64(first[path]["b"]) / (ratio * rate)) ** 2)
        squares[1] += np.sum((moved["a"] / rate) ** 2) + np.sum((moved["b"] / (ratio * rate)) ** 2)
    np.testing.assert_allclose(np.sqrt(squares), norms, rtol=1e-4)


def test_accumulation_does_not_change_a_rule(files, tmp_path):
    """Two micro-batches see the same feature norms together as one whole batch, so the same entries are pruned."""
    runs = [
        method_runs.train(config_of(files, tmp_path / str(count), "prilora", accumulate=count, save_every=0))
        for count in (1, 2)
    ]
    for step in (3, 6):
        whole, split = (run.states[step][1] for run in runs)
        for path, norms in whole["rule_state"]["0-prune"].items():
            np.testing.assert_allclose(
                split["rule_state"]["0-prune"][path]["feature_norm"], norms["feature_norm"], rtol=2e-3
            )
            zero, other = (state["adapters"][path]["a"] == 0 for state in (whole, split))
            assert (zero == other).mean() > 0.99  # two entries may be equal to rounding


def test_the_penalty_is_in_the_gradient_and_in_the_log():
    """On a batch without a counted token nothing else moves the leaves."""
    base, ids = adapted_decoder("lora").base, jax.ShapeDtypeStruct((1, 8), np.int32)
    adapted = Adapted(base=base, plan=resolve_sites(base, make_adapter("adalora", rank=2), ("o_proj",), ids))
    rules = plan_rules(adapted.plan, 10)
    optimizer, params = rules.wrap(optax.sgd(1.0)), params_of()
    state, constants, _ = init_state(jax.random.key(0), adapted, params, optimizer, rules=rules)
    step = make_step(adapted, optimizer, loss=decoder_loss(adapted), constants=constants, rules=rules)
    batch = {name: np.zeros((2, 8), np.int32) for name in FIELDS}
    before = jax.tree.map(np.array, state.adapters)
    leaves = Leaves(before, jax.tree.map(np.array, state.adapter_state))
    penalty = jax.jit(jax.value_and_grad(lambda own: mean_penalty(adapted.plan, leaves._replace(params=own))))
    value, gradient = penalty(before)
    after, metrics = step(state, params, batch)
    np.testing.assert_allclose(metrics["penalty"], value, rtol=1e-6)
    jax.tree.map(lambda b, g, a: np.testing.assert_allclose(b - g, a, atol=1e-6), before, gradient, after.adapters)


def test_rules_cannot_be_forgotten():
    adapted = adapted_decoder("dylora", rank=2)
    with pytest.raises(ValueError, match="DyLoRA changes leaves while training: make rules = plan_rules"):
        make_step(adapted, optax.sgd(1.0), loss=decoder_loss(adapted))
    with pytest.raises(ValueError, match="rules=rules"):
        init_state(jax.random.key(0), adapted, {}, optax.sgd(1.0))


def test_steps_are_part_of_a_run_where_a_rule_depends_on_them(files, tmp_path):
    """A constant schedule allows more steps on resume, unless the rule was planned for fewer."""
    for method, steps_matter in (("prilora", False), ("alora", True)):
        config, longer = (config_of(files, tmp_path, method, steps=steps) for steps in (STEPS, STEPS + 4))
        saved = {"config": config_to_mapping(config), "custom_optimizer": False}
        if not steps_matter:
            check_same_run(longer, saved, False)
        else:
            with pytest.raises(ConfigError, match="steps=12"):
                check_same_run(longer, saved, False)


def test_a_run_warns_of_the_sites_that_alora_has_emptied(files, tmp_path, caplog):
    """Four sites of one rank, three of which go in the only round: three sites are left without any."""
    options = {"moved": 3, "rounds": 1, "first_fraction": 0.5}
    done = method_runs.train(
        config_of(files, tmp_path / "run", "alora", rank=1, options=options, steps=2, save_every=0)
    )
    events = lines_of(done.folder)[0]["events"]["reallocate"]
    assert (events["pruned"], events["emptied"], events["ranks"]) == (3, 3, 2)  # the fourth site is given one
    (warning,) = [record.getMessage() for record in caplog.records if "ALoRA" in record.getMessage()]
    assert warning.startswith("step 1: ALoRA has pruned the last rank of 3 sites")
