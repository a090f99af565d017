"""`mor eval`: perplexity, multiple choice, classification and exact match on a file of held-out records."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mor_jax.cli.flags import UsageError
from mor_jax.cli.opening import LiveModel, at_rank, open_model
from mor_jax.cli.options import EvalOptions
from mor_jax.data import (
    DataError,
    DataSource,
    Examples,
    Tokenization,
    as_tokenization,
    build_row,
    check_unicode,
    encode_record,
    load_examples,
    load_labelled,
    parse_source,
    read_records,
    stack_rows,
)
from mor_jax.evaluation import ChoiceQuestion, GenerationQuestion, choice, classification, exact_match, perplexity
from mor_jax.models import EncoderConfig
from mor_jax.training.distributed import check_same_content

TOLD = "the records in tokens"  # what processes compare: files and tokenizers may differ from host to host


def evaluate_command(options: EvalOptions) -> dict[str, Any]:
    """`metrics` (name -> figure), with the `task` and the `data` they belong to.

    Raises:
      UsageError: an option is out of range, or the task is not built yet.
      DataError: a record is not usable for the task; names file and line.
    """
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.limit < 0:
        raise UsageError(f"--limit must be at least 0, got {options.limit}; 0 measures all")
    if options.sequence_length < 2:
        raise UsageError(f"--sequence-length must be at least 2, got {options.sequence_length}")
    source = parse_source(options.data)
    model = at_rank(open_model(options.model, options.dtype, options.mesh, options.base), options.rank)
    options = dataclasses.replace(options, batch_size=model.padded_rows(options.batch_size))
    tokenization = model.tokenization(options.chat_date)
    if options.task != "classification":
        model.require_decoder(f"--task {options.task}")
    measures = {"perplexity": _perplexity, "choice": _choice, "generation": _generation}
    measure = measures.get(options.task, _classification)
    with model.on_devices():
        metrics = measure(model, tokenization, source, options)
    return {"metrics": metrics, "task": options.task, "data": options.data}


def _perplexity(
    model: LiveModel, tokenization: Tokenization, source: DataSource, options: EvalOptions
) -> dict[str, float]:
    examples = load_examples([source], tokenization, options.sequence_length)
    task = model.tasks.index(source.task) if source.task in model.tasks else 0
    count = min(len(examples), options.limit or len(examples))
    check_same_content(TOLD, [examples.tokens[: examples.offsets[count]]])
    metrics = perplexity(model.logits_fn(), _example_batches(examples, count, task, options))
    return metrics | {"examples": float(count), "truncated": float(examples.truncated)}


def _example_batches(
    examples: Examples, count: int, task: int, options: EvalOptions
) -> Iterator[dict[str, np.ndarray]]:
    """One example a row, in file order; the last batch is filled with empty rows."""
    length = min(options.sequence_length, -(-int(examples.lengths[:count].max()) // 16) * 16)
    for start in range(0, count, options.batch_size):
        members = [[n] if n < count else [] for n in range(start, start + options.batch_size)]
        batch = stack_rows([build_row(examples, np.array(each, np.int64), length) for each in members])
        yield {**batch, "task_ids": np.full_like(batch["task_ids"], task)}


def _classification(
    model: LiveModel, tokenization: Tokenization, source: DataSource, options: EvalOptions
) -> dict[str, float]:
    config = model.config
    if not isinstance(config, EncoderConfig) or config.head == "none":
        raise UsageError(f"{options.model} has no classification head; give a classifier, or a run that trained one")
    length = min(options.sequence_length, config.max_length)
    examples, _ = load_labelled([source], tokenization.tokenizer, length, labels=config.labels)
    task = model.tasks.index(source.task) if source.task in model.tasks else 0
    count = min(len(examples), options.limit or len(examples))
    check_same_content(TOLD, [examples.tokens[: examples.offsets[count]]])
    metrics = classification(model.logits_fn(), _example_batches(examples, count, task, options), config.labels)
    return metrics | {"truncated": float(examples.truncated)}


def _records(source: DataSource, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return itertools.islice(read_records(source), limit or None)


def _field(record: dict[str, Any], where: str, names: tuple[str, ...], kind: type | tuple[type, ...]) -> Any:
    for name in names:
        if isinstance(record.get(name), kind):
            return record[name]
    raise DataError(f"{where}: needs the field {' or '.join(names)}; has {', '.join(record) or 'none'}")


def _choice(model: LiveModel, tokenization: Tokenization, source: DataSource, options: EvalOptions) -> dict[str, float]:
    questions = [choice_question(record, tokenization, where) for where, record in _records(source, options.limit)]
    check_same_content(TOLD, [repr(questions).encode()])
    return choice(model.logits_fn(), questions, batch_size=options.batch_size, max_length=options.sequence_length)


def choice_question(record: dict[str, Any], tokenizer: Any, where: str) -> ChoiceQuestion:
    """The question in {"prompt": text, "options": [text, ...], "answer": index or text, "task": name (may be absent)}.

    `question` and `choices` are taken for `prompt` and `options`. Prompt and option are tokenised together
    and cut as evaluation harnesses do (`Tokenization.encode_choice`).

    Raises:
      DataError: a field is missing or not Unicode text, or the answer is not among the options.
    """
    prompt = _field(record, where, ("prompt", "question"), str)
    texts = [str(text) for text in _field(record, where, ("options", "choices"), list)]
    check_unicode(prompt, "the prompt", where)
    for number, text in enumerate(texts, 1):
        check_unicode(text, f"option {number}", where)
    answer = _field(record, where, ("answer",), (int, str))
    if isinstance(answer, str):
        if answer not in texts:
            raise DataError(f"{where}: the answer {answer!r} is not among the options; give its index or its text")
        answer = texts.index(answer)
    tokenization = as_tokenization(tokenizer)
    pairs = [tokenization.encode_choice(prompt, text) for text in texts]
    try:
        return ChoiceQuestion(
            prompt=tuple(pairs[0][0]) if pairs else (),
            options=tuple(tuple(own) for _, own in pairs),
            option_bytes=tuple(len(text.encode()) for text in texts),
            answer=answer,
            task=str(record.get("task", "default")),
        )
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _generation(
    model: LiveModel, tokenization: Tokenization, source: DataSource, options: EvalOptions
) -> dict[str, float]:
    questions = [generation_question(record, tokenization, where) for where, record in _records(source, options.limit)]
    check_same_content(TOLD, [repr(questions).encode()])
    ends = tokenization.stop
    pad = ends[0] if ends else 0
    run = model.generate_fn(ends, pad, max_new_tokens=options.max_new_tokens)
    decode = functools.partial(tokenization.tokenizer.decode, skip_special_tokens=True)
    metrics, _ = exact_match(run, questions, decode, eos_ids=ends, batch_size=options.batch_size, pad_id=pad)
    return metrics


def generation_question(record: dict[str, Any], tokenizer: Any, where: str) -> GenerationQuestion:
    """The prompt of a record as training tokenises it, and the text of its first answer.

    Raises:
      DataError: the record has no prompt and answer.
    """
    tokenization = as_tokenization(tokenizer)
    encoded = encode_record(record, tokenization, where)
    if encoded.prompt_length < 1 or not encoded.learned.any():
        raise DataError(f"{where}: generation needs a prompt and an answer; use prompt + completion or messages")
    answer = encoded.tokens[encoded.prompt_length :]
    later = np.flatnonzero(~encoded.learned[encoded.prompt_length :])  # a conversation may go on
    answer = answer[: later[0]] if len(later) else answer
    return GenerationQuestion(
        prompt=tuple(encoded.tokens[: encoded.prompt_length].tolist()),
        reference=tokenization.tokenizer.decode(answer.tolist(), skip_special_tokens=True),
        task=str(record.get("task", "default")),
    )
