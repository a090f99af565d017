"""Measures against explicit float64 loops and closed forms, on a bigram model whose probabilities are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.evaluation import (
    ChoiceQuestion,
    GenerationQuestion,
    choice,
    choice_batches,
    exact_match,
    left_padded,
    perplexity,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 11
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)) * 2
LOG_PROBS = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))


def bigram(batch):
    return jnp.asarray(TABLE, jnp.float32)[jnp.asarray(batch["input_ids"])]


def lm_batch(rng, rows, length):
    return {
        "input_ids": rng.integers(0, VOCAB, (rows, length)),
        "targets": rng.integers(0, VOCAB, (rows, length)),
        "loss_mask": rng.integers(0, 2, (rows, length)),
    }


def test_perplexity_is_the_token_mean_over_all_batches_not_the_mean_of_batch_means():
    rng = np.random.default_rng(1)
    batches = [lm_batch(rng, 2, 5), lm_batch(rng, 3, 9)]
    batches[0]["loss_mask"][:] = 0
    batches[0]["loss_mask"][0, 0] = 1
    terms = [
        LOG_PROBS[b["input_ids"][i, t], b["targets"][i, t]]
        for b in batches
        for i, t in zip(*np.nonzero(b["loss_mask"]), strict=True)
    ]
    got = perplexity(bigram, batches)
    assert got["tokens"] == len(terms)
    np.testing.assert_allclose(got["loss"], -np.mean(terms), rtol=1e-6)
    np.testing.assert_allclose(got["perplexity"], np.exp(-np.mean(terms)), rtol=1e-6)


def test_perplexity_of_uniform_logits_is_the_vocabulary_size():
    batch = lm_batch(np.random.default_rng(2), 2, 6)
    batch["loss_mask"][:] = 1
    got = perplexity(lambda b: jnp.zeros((2, 6, VOCAB), jnp.bfloat16), [batch])
    np.testing.assert_allclose(got["perplexity"], VOCAB, rtol=1e-6)


def test_perplexity_ignores_non_finite_logits_at_masked_positions_and_needs_a_token():
    batch = lm_batch(np.random.default_rng(2), 1, 4)
    batch["loss_mask"][:] = [[1, 1, 0, 0]]
    logits = jnp.zeros((1, 4, VOCAB)).at[:, 2:].set(jnp.nan)
    np.testing.assert_allclose(perplexity(lambda b: logits, [batch])["perplexity"], VOCAB, rtol=1e-6)
    with pytest.raises(ValueError, match="loss_mask"):
        perplexity(lambda b: logits, [])


def option_scores(question):
    scores = []
    for option in question.options:
        tokens = [question.prompt[-1], *option]
        scores.append(sum(LOG_PROBS[a, b] for a, b in zip(tokens[:-1], tokens[1:], strict=True)))
    return np.array(scores)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_choice_equals_an_explicit_loop_for_options_of_unequal_length(batch_size):
    rng = np.random.default_rng(3)
    questions = []
    for index in range(13):
        options = tuple(tuple(rng.integers(0, VOCAB, rng.integers(1, 5)).tolist()) for _ in range(rng.integers(2, 5)))
        prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 9)).tolist())
        questions.append(
            ChoiceQuestion(prompt=prompt, options=options, answer=int(rng.integers(len(options))), task=f"t{index % 2}")
        )
    by_sum = [int(option_scores(q).argmax()) == q.answer for q in questions]
    lengths = [np.array([len(option) for option in q.options]) for q in questions]
    by_mean = [int((option_scores(q) / size).argmax()) == q.answer for q, size in zip(questions, lengths, strict=True)]
    got = choice(bigram, questions, batch_size=batch_size)
    assert by_sum != by_mean
    np.testing.assert_allclose(got["accuracy"], np.mean(by_sum))
    np.testing.assert_allclose(got["accuracy_per_token"], np.mean(by_mean))
    np.testing.assert_allclose(got["accuracy/t1"], np.mean(by_sum[1::2]))


def test_choice_cuts_the_beginning_of_a_long_prompt_and_refuses_a_long_option():
    question = ChoiceQuestion(prompt=tuple(range(10)), options=((3, 4),), answer=0)
    (batch,) = choice_batches([question], batch_size=1, max_length=5)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 3, 4]]
    assert batch["targets"][0, 2:4].tolist() == [3, 4]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 0]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="max_length"):
        list(choice_batches([question], max_length=2))


def test_bad_questions_are_named():
    with pytest.raises(ValueError, match="answer"):
        ChoiceQuestion(prompt=(1,), options=((1,),), answer=1)
    with pytest.raises(ValueError, match="prompt"):
        GenerationQuestion(prompt=(), reference="x")


def test_exact_match_cuts_at_the_end_token_and_counts_by_task():
    def generate(prompts, mask):  # repeats the last token twice, then the end token and rubbish
        last = prompts[:, -1:]
        assert (mask[:, -1] == 1).all()
        return np.concatenate([last, last, np.full_like(last, 9), last], axis=1)

    questions = [
        GenerationQuestion(prompt=(1, 2), reference=" 2 2", task="a"),
        GenerationQuestion(prompt=(4, 5, 6), reference="6 6 9 6", task="b"),
        GenerationQuestion(prompt=(3,), reference="3 3", task="b"),
    ]
    got, texts = exact_match(generate, questions, lambda tokens: " ".join(map(str, tokens)), eos_ids=(9,), batch_size=2)
    assert texts == ["2 2", "6 6", "3 3"]
    assert got == {"accuracy": pytest.approx(2 / 3), "questions": 3, "accuracy/a": 1.0, "accuracy/b": 0.5}


def test_left_padding_puts_text_at_the_right_end_and_leaves_no_row_empty():
    tokens, mask = left_padded([(1, 2), (3,)], 3, 4, pad_id=7)
    assert tokens.tolist() == [[7, 7, 1, 2], [7, 7, 7, 3], [7, 7, 7, 7]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
