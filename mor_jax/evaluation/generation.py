"""Exact match of generated text: what the model writes after the prompt, up to the end token, and the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mor_jax.data import check_tokens
from mor_jax.evaluation.tasks import by_task
from mor_jax.finite import NotFiniteError
from mor_jax.processes import gathered

GenerateFn = Callable[[np.ndarray, np.ndarray], jax.Array | np.ndarray]


@dataclass(frozen=True, kw_only=True)
class GenerationQuestion:
    """A prompt in tokens and the text that should follow it."""

    prompt: tuple[int, ...]  # at least one token
    reference: str
    task: str = "default"

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("GenerationQuestion.prompt is empty; begin it with the tokenizer's start token")


def left_padded(
    prompts: Sequence[Sequence[int]], rows: int, length: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and their mask, (rows, length) int32, text at the right end; missing rows hold one real padding token.

    A row of padding alone would attend to nothing, hence that token. A prompt longer than `length` is a ValueError.
    """
    tokens = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), np.int32)
    mask[len(prompts) :, -1] = 1
    for row, prompt in enumerate(prompts):
        if len(prompt) > length:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, more than {length}")
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return tokens, mask


def _cut(tokens: np.ndarray, eos_ids: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    ends = np.flatnonzero(np.isin(tokens, list(eos_ids)))
    return [int(token) for token in (tokens[: ends[0]] if len(ends) else tokens)]


def exact_match(
    generate_fn: GenerateFn,
    questions: Sequence[GenerationQuestion],
    decode: Callable[[list[int]], str],
    *,
    eos_ids: Sequence[int] = (),
    batch_size: int = 8,
    pad_id: int = 0,
    normalize: Callable[[str], str] = str.strip,
    vocab_size: int | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Share of questions whose generated text equals the reference.

    Args:
      generate_fn: (prompts (B, S) left-padded, mask (B, S)) -> the new tokens (B, T), -1 where the logits were not
        finite.
      questions: What to ask.
      decode: Tokens -> text.
      eos_ids: Tokens that end the text; they and what follows are not part of it.
      batch_size: Prompts generated at once; every batch has the same shape.
      pad_id: Token in padding.
      normalize: Applied to both texts before comparing; strips white space by default.
      vocab_size: Tokens of the model; None checks none.

    Returns:
      ({`accuracy`, `questions`, `accuracy/TASK`...}, the generated texts in order).

    Raises:
      ValueError: When there are no questions.
      DataError: A token of a prompt is beyond the vocabulary; names the question.
      NotFiniteError: The model's logits were not finite; names the question.
    """
    if not questions:
        raise ValueError("exact_match needs at least one question")
    for number, question in enumerate(questions, 1):
        if vocab_size is not None:
            check_tokens(question.prompt, vocab_size, f"question {number}")
    length = -(-max(len(question.prompt) for question in questions) // 16) * 16
    texts: list[str] = []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        asked = [question.prompt for question in part]
        asked += asked[-1:] * (batch_size - len(asked))  # a row of its own would not end before the others
        prompts, mask = left_padded(asked, batch_size, length, pad_id)
        new = np.asarray(gathered(generate_fn(prompts, mask)))
        for row in range(len(part)):
            check_generated(new[row], f"question {start + row + 1}", start + row)
        texts += [decode(_cut(new[row], eos_ids)) for row in range(len(part))]
    right: dict[str, list[bool]] = {}
    for question, text in zip(questions, texts, strict=True):
        right.setdefault(question.task, []).append(normalize(text) == normalize(question.reference))
    metrics = {"accuracy": float(np.mean(sum(right.values(), []))), "questions": float(len(questions))}
    by_name = {task: {"accuracy": float(np.mean(own))} for task, own in right.items()}
    return metrics | by_task(by_name), texts


def check_generated(tokens: np.ndarray, where: str, row: int | None = None) -> None:
    """Returns when the new tokens (T,) of a row were drawn from finite logits; see `generate`.

    Raises:
      NotFiniteError: They were not; names `where`, and after how many tokens.
    """
    wrong = np.flatnonzero(np.asarray(tokens) < 0)
    if len(wrong):
        after = f"after {wrong[0]} token{'' if wrong[0] == 1 else 's'}"
        raise NotFiniteError(where, f"the logits are not finite {after}; look for weights that are not", row)
