"""From one record to tokens: which of them the loss counts, and which are the prompt.

Four kinds of record are known, looked for in this order:

    {"messages": [{"role": ..., "content": ...}, ...]}     the tokenizer's chat template
    {"prompt": ..., "completion": ...}                     as written, nothing between
    {"instruction": ..., "input": ..., "output": ...}      chat if there is a template, else headings
    {"text": ...}                                          every token counts

Prompts and completions are tokenised apart, so that the prompt's tokens are those that generation will see. A
conversation is tokenised whole, as the template renders it; the assistant's turns are found in the text by rendering
the conversation up to each turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mor_jax.data.sources import DataError

KINDS = ("messages", "prompt + completion", "instruction + output", "text")


class Encoded(NamedTuple):
    """One example: `tokens` (n,) int32; `learned` (n,) bool, true where it is to be predicted; the prompt's length."""

    tokens: np.ndarray
    learned: np.ndarray
    prompt_length: int


def encode_record(record: Mapping[str, Any], tokenizer: Any, where: str) -> Encoded:
    """The record's tokens with the mask of those that are learned.

    Args:
      record: Fields of one record; others than those of its kind are ignored.
      tokenizer: A fast Hugging Face tokenizer.
      where: The record's place, for messages.

    Raises:
      DataError: If the record is of no known kind, a field is not text, or the chat template cannot render it.
    """
    if record.get("messages") is not None:
        return encode_messages(_messages(record["messages"], where), tokenizer, where)
    if "prompt" in record and "completion" in record:
        return _encode_pair(_text(record, "prompt", where), _text(record, "completion", where), tokenizer)
    if "instruction" in record and "output" in record:
        return _encode_instruction(record, tokenizer, where)
    if "text" in record:
        tokens = [*_leading_tokens(tokenizer), *_tokenise(tokenizer, _text(record, "text", where)), *_end(tokenizer)]
        return Encoded(np.array(tokens, np.int32), np.ones(len(tokens), bool), 0)
    known = ", ".join(KINDS)
    raise DataError(f"{where}: has the fields {', '.join(map(str, record)) or '(none)'}; needs one of: {known}")


def encode_messages(messages: list[dict[str, str]], tokenizer: Any, where: str = "messages") -> Encoded:
    """A conversation through the tokenizer's chat template, learned on the assistant's turns only.

    A turn begins where the rendering of all before it, with the generation prompt, ends, and closes with the
    end-of-sequence token (what the template writes after that, such as a line break, is not learned). The prompt is all
    before the first such turn.

    Raises:
      DataError: If the tokenizer has no template, no message is the assistant's, or the template rewrites earlier turns
        so that they cannot be found.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: the tokenizer has no chat template for messages; use prompt and completion fields")
    text = _render(tokenizer, messages, where)
    spans = assistant_spans(messages, text, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    learned = np.zeros(starts.shape, bool)
    for start, end in spans:
        learned |= (starts >= start) & (starts < end)
    prompt_length = int(np.argmax(learned)) if learned.any() else len(starts)
    return Encoded(np.array(encoded["input_ids"], np.int32), learned, prompt_length)


def assistant_spans(messages: list[dict[str, str]], text: str, tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """(start, end) characters of each assistant turn in `text`, the rendering of all messages.

    Raises:
      DataError: If there is none, or a turn cannot be found.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], where) if index else ""
        if not text.startswith(before):
            raise DataError(
                f"{where}: the chat template rewrites the turns before message {index + 1}; split the record, or write"
                " its system message into the user's"
            )
        opened = _render(tokenizer, messages[:index], where, add_generation_prompt=True) if index else before
        start = max(len(before), _common_prefix(opened, text))
        spans.append((start, _turn_end(messages, index, text, start, tokenizer, where)))
    if not spans:
        raise DataError(
            f"{where}: no message has the role 'assistant', so nothing can be learned; add one or drop the line"
        )
    return spans


def _turn_end(messages, index: int, text: str, start: int, tokenizer: Any, where: str) -> int:
    """Where the turn that begins at `start` ends in `text`.

    Templates that show a turn otherwise while it is the last one (reasoning blocks are removed later) are not prefixes
    of the whole: there the turn's own words are looked for.
    """
    rendered = _render(tokenizer, messages[: index + 1], where)
    end_token = tokenizer.eos_token or ""
    if text.startswith(rendered):
        end = len(rendered)
        closing = (
            text.rfind(end_token, start, end) + len(end_token) if end_token and end_token in text[start:end] else end
        )
        return end if text[closing:end].strip() else closing
    content = messages[index]["content"].strip()
    found = text.find(content, start)
    if found < 0:
        raise DataError(f"{where}: the chat template does not show message {index + 1} as written; split the record")
    end = found + len(content)
    return end + len(end_token) if end_token and text.startswith(end_token, end) else end


def _render(tokenizer: Any, messages, where: str, **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates raise jinja errors of many kinds, often on purpose (role order)
        raise DataError(f"{where}: the chat template refuses the messages ({error}); check roles and order") from None


def _common_prefix(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages must be a list of {{role, content}}, got {type(value).__name__}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}: message {number} must have the text fields role and content")
        check_unicode(message["content"], f"message {number}", where)
    return [dict(message) for message in value]


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} must be text, found {type(value).__name__}; write it in quotes")
    check_unicode(value, f"the field {field!r}", where)
    return value


def check_unicode(text: str, what: str, where: str) -> None:
    """JSON may hold one half of a surrogate pair (a broken emoji), which no tokenizer takes.

    Args:
      text: To be tokenised.
      what: Which part of the record it is, for the message.
      where: The record's place, for the message.

    Raises:
      DataError: If the text holds such a half.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what}: character {error.start + 1} is half of a broken pair ({error.reason}); mend or drop it"
        ) from None


def _encode_instruction(record: Mapping[str, Any], tokenizer: Any, where: str) -> Encoded:
    instruction, answer = _text(record, "instruction", where), _text(record, "output", where)
    context = _text(record, "input", where) if record.get("input") is not None else ""
    if getattr(tokenizer, "chat_template", None):
        question = f"{instruction}\n\n{context}" if context else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return encode_messages(turns, tokenizer, where)
    middle = f"### Input:\n{context}\n\n" if context else ""
    return _encode_pair(f"### Instruction:\n{instruction}\n\n{middle}### Response:\n", answer, tokenizer)


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> Encoded:
    before = [*_leading_tokens(tokenizer), *_tokenise(tokenizer, prompt)]
    after = [*_tokenise(tokenizer, completion), *_end(tokenizer)]
    learned = np.arange(len(before) + len(after)) >= len(before)
    return Encoded(np.array(before + after, np.int32), learned, len(before))


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a begin-of-sequence token, or nothing)."""
    bos = tokenizer.bos_token_id
    whole = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and whole and whole[0] == bos else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
