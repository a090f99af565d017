"""Multiple choice by log-likelihood: the option that the model finds likeliest after the prompt is its answer.

Three readings are reported: by the sum of the option's token log-probabilities (`accuracy`), and by that sum over the
option's length, which does not punish long options, in tokens (`accuracy_per_token`) and in bytes of its UTF-8 text
(`accuracy_per_byte`, which evaluation harnesses report too and which does not depend on the tokenizer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mor_jax.data import BATCH_FIELDS, check_tokens
from mor_jax.evaluation.perplexity import LogitsFn, target_log_likelihood
from mor_jax.evaluation.tasks import by_task
from mor_jax.finite import NotFiniteError
from mor_jax.processes import gathered


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """One question: prompt tokens, the tokens of every option, and which option is right."""

    prompt: tuple[int, ...]  # at least one token
    options: tuple[tuple[int, ...], ...]  # at least one token each
    answer: int  # index into options
    task: str = "default"  # figures are reported by task too
    option_bytes: tuple[int, ...] = ()  # UTF-8 bytes of each option's text; empty where they are not known

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("ChoiceQuestion.prompt is empty; begin it with the tokenizer's start token")
        if not self.options or not all(self.options):
            raise ValueError(f"ChoiceQuestion.options needs options of at least one token each, got {self.options}")
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"ChoiceQuestion.answer is {self.answer}, but there are {len(self.options)} options")
        if self.option_bytes and (len(self.option_bytes) != len(self.options) or min(self.option_bytes) < 1):
            raise ValueError(f"ChoiceQuestion.option_bytes needs one number for each option, got {self.option_bytes}")


def _choice_rows(questions: Sequence[ChoiceQuestion], max_length: int) -> list[tuple[list[int], int]]:
    """(tokens, tokens of the option) for each option of each question; a long prompt loses its beginning."""
    rows = []
    for index, question in enumerate(questions):
        for option in question.options:
            if len(option) >= max_length:
                raise ValueError(f"question {index}: an option has {len(option)} tokens, max_length is {max_length}")
            tokens = (*question.prompt, *option)[-max_length:]
            rows.append((list(tokens), len(option)))
    return rows


def choice_batches(
    questions: Sequence[ChoiceQuestion], batch_size: int = 8, max_length: int = 512, pad_id: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Right-padded batches, one row per option in order, all of one shape; the last batch is filled with empty rows.

    Args:
      questions: The questions.
      batch_size: Rows of a batch.
      max_length: Longest row; a longer one loses the beginning of its prompt.
      pad_id: Token in padding.

    Yields:
      int32 arrays (batch_size, S): input_ids, targets, loss_mask (1 on the option's tokens), segment_ids, positions,
      task_ids, prompt_mask.

    Raises:
      ValueError: When an option alone is longer than `max_length` - 1 tokens.
    """
    rows = _choice_rows(questions, max_length)
    length = min(max_length, -(-max((len(tokens) for tokens, _ in rows), default=1) // 16) * 16)
    for start in range(0, len(rows), batch_size):
        batch = {name: np.zeros((batch_size, length), np.int32) for name in BATCH_FIELDS}
        batch["input_ids"][:] = pad_id
        batch["targets"][:] = pad_id
        for row, (tokens, option_length) in enumerate(rows[start : start + batch_size]):
            size = len(tokens)
            batch["input_ids"][row, :size] = tokens
            batch["targets"][row, : size - 1] = tokens[1:]
            batch["loss_mask"][row, size - 1 - option_length : size - 1] = 1
            batch["segment_ids"][row, :size] = 1
            batch["positions"][row, :size] = np.arange(size)
            batch["prompt_mask"][row, : size - option_length] = 1
        yield batch


def choice(
    logits_fn: LogitsFn,
    questions: Sequence[ChoiceQuestion],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    pad_id: int = 0,
) -> dict[str, float]:
    """Accuracy of the likeliest option; ties go to the earlier option, and an impossible one (-inf) is never likeliest.

    Args:
      logits_fn: Batch -> next-token logits (B, S, V).
      questions: What to ask.
      batch_size: Options scored at once.
      max_length: Longest prompt + option in tokens.
      pad_id: Token in padding.

    Returns:
      `accuracy` (by sum), `accuracy_per_token`, `accuracy_per_byte` (where all questions know their bytes),
      `questions`, and of several tasks also `accuracy/TASK` and so on.

    Raises:
      ValueError: When there are no questions, or an option does not fit.
      DataError: A token is beyond the V of the logits; names the question.
      NotFiniteError: The likelihood of an option is not finite, or no option of a question is possible.
    """
    if not questions:
        raise ValueError("choice needs at least one question")
    sums, counts = _likelihoods(logits_fn, questions, choice_batches(questions, batch_size, max_length, pad_id))
    right: dict[str, list[dict[str, bool]]] = {}
    row = 0
    for number, question in enumerate(questions):
        span = slice(row, row + len(question.options))
        row = span.stop
        _check_likelihoods(sums[span], number)
        scores = {"accuracy": sums[span], "accuracy_per_token": sums[span] / counts[span]}
        if question.option_bytes:
            scores["accuracy_per_byte"] = sums[span] / np.array(question.option_bytes)
        answers = {name: bool(np.argmax(own) == question.answer) for name, own in scores.items()}
        right.setdefault(question.task, []).append(answers)
    return _figures(sum(right.values(), [])) | by_task({task: _figures(own) for task, own in right.items()})


def _likelihoods(
    logits_fn: LogitsFn, questions: Sequence[ChoiceQuestion], batches: Iterator[dict[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """(summed log-probability, tokens) of each option of each question in order, float64."""
    sums, counts = [], []
    for batch in batches:
        logits = logits_fn(batch)
        if not sums:  # now the size of the vocabulary is known
            for number, question in enumerate(questions, 1):
                asked = [*question.prompt, *sum(question.options, ())]
                check_tokens(asked, logits.shape[-1], f"question {number}")
        likelihood, count = target_log_likelihood(
            logits, jnp.asarray(batch["targets"]), jnp.asarray(batch["loss_mask"]), per_row=True
        )
        sums.append(np.asarray(gathered(likelihood), np.float64))
        counts.append(np.asarray(gathered(count), np.float64))
    return np.concatenate(sums), np.concatenate(counts)


def _check_likelihoods(options: np.ndarray, number: int) -> None:
    """Raises NotFiniteError unless the options of a question can be compared and one of them is possible."""
    wrong = np.flatnonzero(np.isnan(options) | np.isposinf(options))
    if len(wrong):
        problem = f"the log-likelihood of option {wrong[0] + 1} is {options[wrong[0]]}"
        raise NotFiniteError(f"question {number + 1}", problem, number)
    if np.isneginf(options).all():
        raise NotFiniteError(f"question {number + 1}", "no option has a probability above 0", number)


def _figures(right: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of right answers by each reading that all questions have, and how many questions there are."""
    names = [name for name in max(right, key=len) if all(name in own for own in right)]
    return {name: float(np.mean([own[name] for own in right])) for name in names} | {"questions": float(len(right))}
