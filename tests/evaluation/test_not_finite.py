"""What is not finite is an error that names its row, and a token beyond the vocabulary one that names the token."""

import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.data import DataError
from mor_jax.evaluation import (
    ChoiceQuestion,
    GenerationQuestion,
    NotFiniteError,
    choice,
    classification,
    exact_match,
    perplexity,
)

VOCAB = 7
pytestmark = pytest.mark.usefixtures("quick_compilation")


def batch(rows=2, length=4):
    fields = {name: np.ones((rows, length), np.int32) for name in ("input_ids", "targets", "loss_mask", "segment_ids")}
    return fields | {"loss_mask": np.array([[1, 1, 0, 0]] * rows)}


def spoilt(number, at, value):
    """Logits of zeros, `value` at one place of the batch of that number."""
    seen = []

    def logits_fn(given):
        seen.append(given)
        logits = jnp.zeros((*given["input_ids"].shape, VOCAB))
        return logits.at[at].set(value) if len(seen) == number else logits

    return logits_fn


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_named_by_its_row(value):
    with pytest.raises(NotFiniteError, match="batch 2, row 1: .*(nan|inf)") as caught:
        perplexity(spoilt(2, (0, 1, 1), value), [batch(), batch()])
    assert caught.value.row == 2
    assert caught.value.exit_code == 3
    figures = perplexity(spoilt(2, (0, 2, 1), value), [batch(), batch()])  # nothing counts there
    assert figures["loss"] == pytest.approx(np.log(VOCAB))


QUESTIONS = [ChoiceQuestion(prompt=(1, 2), options=((1,), (2, 3)), answer=number) for number in (0, 1, 0)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_choice_between_options_that_are_not_finite(value):
    with pytest.raises(NotFiniteError, match="question 2: .*option 2 is nan") as caught:
        choice(spoilt(2, (1, 1), value), QUESTIONS, batch_size=2)
    assert caught.value.row == 1


def test_an_impossible_option_loses_but_one_must_be_possible():
    def certain(given):  # token 2 is sure to follow
        return jnp.full((*given["input_ids"].shape, VOCAB), -jnp.inf).at[..., 2].set(0.0)

    possible = ChoiceQuestion(prompt=(1,), options=((1,), (2, 2)), answer=1)
    assert choice(certain, [possible])["accuracy"] == 1.0
    with pytest.raises(NotFiniteError, match="question 2: no option"):
        choice(certain, [possible, ChoiceQuestion(prompt=(1,), options=((1,), (3,)), answer=0)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_class_by_logits_that_are_not_finite(value):
    labelled = batch() | {"targets": np.zeros((2, 4), np.int32), "loss_mask": np.array([[1, 0, 0, 0]] * 2)}

    def logits_fn(given):
        return jnp.zeros((2, 3)).at[1, 0].set(value)

    with pytest.raises(NotFiniteError, match="batch 1, row 2: .*(nan|inf)") as caught:
        classification(logits_fn, [labelled])
    assert caught.value.row == 1
    other = jnp.zeros((2, 3)).at[1, 2].set(-jnp.inf)  # a class that cannot be is no fault
    assert classification(lambda given: other, [labelled])["loss"] == pytest.approx((np.log(3) + np.log(2)) / 2)


def test_generation_that_met_logits_that_are_not_finite():
    questions = [GenerationQuestion(prompt=(1,), reference="x")] * 3
    new = [np.array([[3, 4], [3, 4]]), np.array([[5, -1], [5, 6]])]
    with pytest.raises(NotFiniteError, match="question 3: .*after 1 token") as caught:
        exact_match(lambda *_: new.pop(0), questions, str, batch_size=2)
    assert caught.value.row == 2


def test_tokens_beyond_the_vocabulary_are_named():
    wrong = batch()
    wrong["input_ids"][1, 2] = VOCAB
    with pytest.raises(DataError, match=f"batch 1, row 2: token {VOCAB} .*vocabulary has {VOCAB}"):
        perplexity(spoilt(0, (0,), 0), [wrong])
    wrong = batch()
    wrong["targets"][0, 1] = VOCAB + 1
    with pytest.raises(DataError, match=f"batch 1, row 1: token {VOCAB + 1} "):
        perplexity(spoilt(0, (0,), 0), [wrong])
    for question in ({"prompt": (1, 9), "options": ((1,), (2,))}, {"prompt": (1,), "options": ((1,), (9,))}):
        with pytest.raises(DataError, match="question 1: token 9 "):
            choice(spoilt(0, (0,), 0), [ChoiceQuestion(**question, answer=0)])
    asked = [GenerationQuestion(prompt=prompt, reference="") for prompt in ((1,), (9,))]
    with pytest.raises(DataError, match="question 2: token 9 "):
        exact_match(lambda *_: np.zeros((2, 1)), asked, str, vocab_size=VOCAB)
    with pytest.raises(DataError, match="batch 1, row 1: token 9 "):
        classification(spoilt(0, (0,), 0), [{name: values * 9 for name, values in batch().items()}], vocab_size=VOCAB)


def test_figures_by_task():
    """Against sums over the rows in NumPy's float64."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, VOCAB))
    scores = table - np.log(np.exp(table).sum(-1, keepdims=True))

    def rows(count):
        fields = {name: rng.integers(0, VOCAB, (count, 5)) for name in ("input_ids", "targets")}
        return fields | {"loss_mask": rng.integers(0, 2, (count, 5))}

    tasks = {"a": [rows(2), rows(2)], "b": [rows(3)]}
    losses = {
        task: np.concatenate([-scores[b["input_ids"], b["targets"]][b["loss_mask"] > 0] for b in batches])
        for task, batches in tasks.items()
    }
    found = perplexity(lambda b: jnp.asarray(table, jnp.float32)[b["input_ids"]], tasks)
    everything = np.concatenate(list(losses.values()))
    assert found["loss"] == pytest.approx(everything.mean(), rel=1e-6)
    assert found["tokens"] == len(everything)
    for task, own in losses.items():
        assert found[f"loss/{task}"] == pytest.approx(own.mean(), rel=1e-6)
        assert found[f"perplexity/{task}"] == pytest.approx(np.exp(own.mean()), rel=1e-6)
        assert found[f"tokens/{task}"] == len(own)
    alone = perplexity(lambda b: jnp.asarray(table, jnp.float32)[b["input_ids"]], {"a": tasks["a"]})
    assert set(alone) == {"loss", "perplexity", "tokens"}
    with pytest.raises(ValueError, match="task 'b' .*none"):
        perplexity(lambda b: jnp.zeros((1, 5, VOCAB)), tasks | {"b": []})


def test_classes_by_task():
    def labelled(truth):
        return batch(len(truth)) | {
            "targets": np.array([[number] * 4 for number in truth]),
            "loss_mask": np.array([[0, 1, 0, 0]] * len(truth)),
        }

    logits = [jnp.eye(3)[jnp.array(answers)] * 5 for answers in ([0, 1], [1, 1], [2, 0])]
    tasks = {"x": [labelled([0, 1]), labelled([1, 0])], "y": [labelled([2, 1])]}
    found = classification(lambda _: logits.pop(0), tasks, ("p", "q", "r"))
    right, wrong = np.log(1 + 2 * np.exp(-5)), np.log(np.exp(5) + 2)
    assert (found["accuracy"], found["accuracy/x"], found["accuracy/y"]) == (pytest.approx(4 / 6), 0.75, 0.5)
    assert (found["examples/x"], found["examples/y"]) == (4, 2)
    assert found["loss/y"] == pytest.approx((right + wrong) / 2)
    assert found["macro_f1/x"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert (found["accuracy/p"], found["accuracy/q"], found["accuracy/r"]) == (0.5, pytest.approx(2 / 3), 1.0)
    with pytest.raises(ValueError, match="'p' is a task and a class"):
        classification(lambda _: jnp.eye(3)[:2], {"p": [labelled([0, 1])], "y": [labelled([0, 1])]}, ("p", "q", "r"))
