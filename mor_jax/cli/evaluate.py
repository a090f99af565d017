"""`mor eval`: perplexity, multiple choice, classification and exact match on files of held-out records, by task."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mor_jax.cli.flags import UsageError
from mor_jax.cli.opening import LiveModel, at_rank, open_model
from mor_jax.cli.options import EvalOptions, path_texts
from mor_jax.data import (
    DataError,
    DataSource,
    Examples,
    Tokenization,
    as_tokenization,
    build_row,
    check_tokens,
    check_unicode,
    encode_record,
    load_examples,
    load_labelled,
    parse_sources,
    read_records,
    stack_rows,
)
from mor_jax.evaluation import (
    ChoiceQuestion,
    GenerationQuestion,
    choice,
    classification,
    exact_match,
    perplexity,
    task_means,
)
from mor_jax.finite import NotFiniteError, require_finite
from mor_jax.models import EncoderConfig
from mor_jax.training.distributed import check_same_content

TOLD = "the records in tokens"  # what processes compare: files and tokenizers may differ from host to host
Sources = tuple[DataSource, ...]
Members = dict[str, list[int]]  # task -> examples
Question = TypeVar("Question", ChoiceQuestion, GenerationQuestion)


def evaluate_command(options: EvalOptions) -> dict[str, Any]:
    """`metrics` (name -> figure), with the `task` and the `data` they belong to: one text, or a list of several.

    Of several tasks each figure is there for all records (`accuracy`), by task (`accuracy/TASK`) and, but for counts,
    as the unweighted mean over the tasks (`mean_accuracy`).

    Raises:
      UsageError: an option is out of range, or the task is not built yet.
      DataError: a record is not usable for the task or has a token that the model has not; names file and line.
      NotFiniteError: a figure is not finite; names it, and the record where it is of one.
    """
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.limit < 0:
        raise UsageError(f"--limit must be at least 0, got {options.limit}; 0 measures all")
    if options.sequence_length < 2:
        raise UsageError(f"--sequence-length must be at least 2, got {options.sequence_length}")
    texts = path_texts(options.data)
    sources = parse_sources(texts)
    for source in sources:
        if source.weight != 1:
            raise UsageError(
                f"--data {source.path}:{source.weight:g}: each record is measured once; leave the weight out"
            )
    model = at_rank(open_model(options.model, options.dtype, options.mesh, options.base), options.rank)
    options = dataclasses.replace(options, batch_size=model.padded_rows(options.batch_size))
    tokenization = model.tokenization(options.chat_date)
    if options.task != "classification":
        model.require_decoder(f"--task {options.task}")
    measures = {"perplexity": _perplexity, "choice": _choice, "generation": _generation}
    measure = measures.get(options.task, _classification)
    with model.on_devices():
        metrics, tasks = measure(model, tokenization, sources, options)
    metrics |= task_means(metrics, tasks)
    require_finite(metrics, ", ".join(texts))
    return {"metrics": metrics, "task": options.task, "data": texts[0] if len(texts) == 1 else list(texts)}


@contextlib.contextmanager
def _named(place: Callable[[int], str]) -> Iterator[None]:
    """An error about a row or question names, instead of its number, where that record stands."""
    try:
        yield
    except NotFiniteError as error:
        if error.row is None:
            raise
        raise NotFiniteError(place(error.row), error.problem, error.row) from error


def _perplexity(
    model: LiveModel, tokenization: Tokenization, sources: Sources, options: EvalOptions
) -> tuple[dict[str, float], Sequence[str]]:
    examples = load_examples(sources, tokenization, options.sequence_length, vocab_size=model.config.vocab_size)
    members = _measured(examples, options.limit)
    rows = options.batch_size
    with _named(functools.partial(_place_of_row, examples, members, rows)):
        metrics = perplexity(model.logits_fn(), _task_batches(model, examples, members, options))
    counts = {f"examples/{task}": float(len(own)) for task, own in members.items()} if len(members) > 1 else {}
    total = {"examples": float(sum(map(len, members.values()))), "truncated": float(examples.truncated)}
    return metrics | counts | total, tuple(members)


def _classification(
    model: LiveModel, tokenization: Tokenization, sources: Sources, options: EvalOptions
) -> tuple[dict[str, float], Sequence[str]]:
    config = model.config
    if not isinstance(config, EncoderConfig) or config.head == "none":
        raise UsageError(f"{options.model} has no classification head; give a classifier, or a run that trained one")
    length = min(options.sequence_length, config.max_length)
    vocabulary = config.vocab_size
    examples, _ = load_labelled(sources, tokenization, length, labels=config.labels, vocab_size=vocabulary)
    members = _measured(examples, options.limit)
    with _named(functools.partial(_place_of_row, examples, members, options.batch_size)):
        batches = _task_batches(model, examples, members, options)
        metrics = classification(model.logits_fn(), batches, config.labels, vocabulary)
    return metrics | {"truncated": float(examples.truncated)}, tuple(members)


def _measured(examples: Examples, limit: int) -> Members:
    """The examples of each task, `limit` of each source at most; processes are told to have the same."""
    members: Members = {}
    parts = []
    for number, source in enumerate(examples.sources):
        own = np.flatnonzero(examples.source_ids == number)[: limit or None]
        members.setdefault(source.task, []).extend(own.tolist())
        parts.append(examples.tokens[examples.offsets[own[0]] : examples.offsets[own[-1] + 1]])
    check_same_content(TOLD, parts)
    return members


def _task_batches(
    model: LiveModel, examples: Examples, members: Members, options: EvalOptions
) -> dict[str, Iterator[dict[str, np.ndarray]]]:
    """{task: batches}, all of one shape; the model is told the task where it was trained on one of that name."""
    longest = int(examples.lengths[sum(members.values(), [])].max())
    length = min(options.sequence_length, -(-longest // 16) * 16)
    number = {task: model.tasks.index(task) if task in model.tasks else 0 for task in members}
    batches = functools.partial(_example_batches, examples, length=length, rows=options.batch_size)
    return {task: batches(own, task=number[task]) for task, own in members.items()}


def _example_batches(
    examples: Examples, members: Sequence[int], *, length: int, rows: int, task: int
) -> Iterator[dict[str, np.ndarray]]:
    """One example a row, in order; the last batch is filled with empty rows."""
    for start in range(0, len(members), rows):
        own = [[member] for member in members[start : start + rows]]
        padded: list[list[int]] = own + [[]] * (rows - len(own))
        batch = stack_rows([build_row(examples, np.array(each, np.int64), length) for each in padded])
        yield {**batch, "task_ids": np.full_like(batch["task_ids"], task)}


def _place_of_row(examples: Examples, members: Members, rows: int, number: int) -> str:
    """Where the example of a row stands; rows are those of all batches in order, empty ones included."""
    padded = [own + [own[-1]] * (-len(own) % rows) for own in members.values()]
    index = sum(padded, [])[number]
    source = int(examples.source_ids[index])
    first = int(np.flatnonzero(examples.source_ids == source)[0])
    return f"{examples.sources[source].path}, example {index - first + 1}"


def _questions(
    make: Callable[[dict[str, Any], Any, str], Question],
    tokenization: Tokenization,
    sources: Sources,
    limit: int,
    check: Callable[[Question, str], None],
) -> tuple[list[Question], list[str]]:
    """(the question of each record, `limit` of each source at most, their places); a record's own task comes first."""
    questions, places = [], []
    for source in sources:
        for where, record in itertools.islice(read_records(source), limit or None):
            question = make(record, tokenization, where)
            check(question, where)
            own = record.get("task")
            task = source.task if own is None or own == "" else str(own)
            questions.append(dataclasses.replace(question, task=task))
            places.append(where)
    check_same_content(TOLD, [repr(questions).encode()])
    return questions, places


def _tasks(questions: Sequence[ChoiceQuestion | GenerationQuestion]) -> tuple[str, ...]:
    return tuple(sorted({question.task for question in questions}))


def _field(record: dict[str, Any], where: str, names: tuple[str, ...], kind: type | tuple[type, ...]) -> Any:
    for name in names:
        if isinstance(record.get(name), kind):
            return record[name]
    raise DataError(f"{where}: needs the field {' or '.join(names)}; has {', '.join(record) or 'none'}")


def _choice(
    model: LiveModel, tokenization: Tokenization, sources: Sources, options: EvalOptions
) -> tuple[dict[str, float], Sequence[str]]:
    def check(question: ChoiceQuestion, where: str) -> None:
        asked = [*question.prompt, *itertools.chain(*question.options)]
        check_tokens(asked, model.config.vocab_size, where, tokenization.tokenizer)

    questions, places = _questions(choice_question, tokenization, sources, options.limit, check)
    shape = {"batch_size": options.batch_size, "max_length": options.sequence_length}
    with _named(places.__getitem__):
        return choice(model.logits_fn(), questions, **shape), _tasks(questions)


def choice_question(record: dict[str, Any], tokenizer: Any, where: str) -> ChoiceQuestion:
    """The question in {"prompt": text, "options": [text, ...], "answer": index or text, "task": name (may be absent)}.

    `question` and `choices` are taken for `prompt` and `options`. Prompt and option are tokenised together
    and cut as evaluation harnesses do (`Tokenization.encode_choice`).

    Raises:
      DataError: a field is missing or not Unicode text, or the answer is not among the options.
    """
    prompt = _field(record, where, ("prompt", "question"), str)
    options = _field(record, where, ("options", "choices"), list)
    if any(option is None or isinstance(option, dict | list) for option in options):
        raise DataError(f"{where}: an option is no text; give each in quotes")
    texts = [str(option) for option in options]
    check_unicode(prompt, "the prompt", where)
    for number, text in enumerate(texts, 1):
        check_unicode(text, f"option {number}", where)
    answer = _answer(_field(record, where, ("answer",), (int, float, str)), texts, where)
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


def _answer(value: Any, texts: Sequence[str], where: str) -> int:
    """The index of the right option: of its text, else the number that it is; a table of text writes both alike."""
    spelled = str(value)
    alike = [text.lower() for text in texts]
    if isinstance(value, str) and value in texts:
        return texts.index(value)
    if spelled.lower() in ("true", "false"):  # an option, and no index
        if spelled.lower() in alike:
            return alike.index(spelled.lower())
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    elif isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}(\.0+)?\s*", value):
        return int(float(value))
    raise DataError(f"{where}: the answer {value!r} is not among the options; give its index or its text")


def _generation(
    model: LiveModel, tokenization: Tokenization, sources: Sources, options: EvalOptions
) -> tuple[dict[str, float], Sequence[str]]:
    def check(question: GenerationQuestion, where: str) -> None:
        check_tokens(question.prompt, model.config.vocab_size, where, tokenization.tokenizer)

    questions, places = _questions(generation_question, tokenization, sources, options.limit, check)
    ends = tokenization.stop
    pad = ends[0] if ends else 0
    run = model.generate_fn(ends, pad, max_new_tokens=options.max_new_tokens)
    decode = functools.partial(tokenization.tokenizer.decode, skip_special_tokens=True)
    shape: Mapping[str, Any] = {"eos_ids": ends, "batch_size": options.batch_size, "pad_id": pad}
    with _named(places.__getitem__):
        metrics, _ = exact_match(run, questions, decode, **shape)
    return metrics, _tasks(questions)


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
