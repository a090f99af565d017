"""From one record to tokens: which of them the loss counts, and which are the prompt.

Four kinds of record are known, looked for in this order:

    {"messages": [{"role": ..., "content": ...}, ...]}     the tokenizer's chat template, see `chat`
    {"prompt": ..., "completion": ...}                     as written, nothing between
    {"instruction": ..., "input": ..., "output": ...}      chat if there is a template, else headings; with a template
                                                           also `system` and `history`, a list of [question, answer]
    {"text": ...}                                          every token counts

Where an answer begins, and what opens and closes a text, `tokenization` says. A field that other trainers read,
and that would change what is learned, is an error where its kind of record has no use for it; all others are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mor_jax.data.chat import OPTIONS, Encoded, encode_messages
from mor_jax.data.sources import DataError
from mor_jax.data.tokenization import Tokenization, as_tokenization, check_unicode

KINDS = ("messages", "prompt + completion", "instruction + output", "text")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_MEANING = (*OPTIONS, "chat_template_kwargs", "system", "history", *_MEDIA)  # fields that would change what is learned
_USED = {"messages": (*OPTIONS, "chat_template_kwargs"), "instruction": ("system", "history")}


def encode_record(record: Mapping[str, Any], tokenizer: Any, where: str) -> Encoded:
    """The record's tokens with the mask of those that are learned.

    Args:
      record: Fields of one record.
      tokenizer: A `Tokenization`, or a fast Hugging Face tokenizer.
      where: The record's place, for messages.

    Raises:
      DataError: If the record is of no known kind, a field is not text or cannot be honoured, or the chat template
        cannot render it.
    """
    tokenization = as_tokenization(tokenizer)
    if record.get("messages") is not None:
        _require_no_more(record, "messages", where)
        beside = {name: record[name] for name in _USED["messages"] if name in record}
        return encode_messages(record["messages"], tokenization, where, **beside)
    if "prompt" in record and "completion" in record:
        _require_no_more(record, "prompt", where)
        pair = _text(record, "prompt", where), _text(record, "completion", where)
        return _encode_pair(*pair, tokenization)
    if "instruction" in record and "output" in record:
        _require_no_more(record, "instruction", where)
        return _encode_instruction(record, tokenization, where)
    if "text" in record:
        _require_no_more(record, "text", where)
        tokens = tokenization.encode_text(_text(record, "text", where))
        return Encoded(np.array(tokens, np.int32), np.ones(len(tokens), bool), 0)
    known = ", ".join(KINDS)
    raise DataError(f"{where}: has the fields {', '.join(map(str, record)) or '(none)'}; needs one of: {known}")


def _require_no_more(record: Mapping[str, Any], kind: str, where: str) -> None:
    """Raises DataError for a field that would change what is learned and that this kind of record has no use for."""
    for name in _MEANING:
        if name not in _USED.get(kind, ()) and record.get(name) not in (None, "", [], {}):
            raise DataError(
                f"{where}: the field {name!r} has no meaning beside {kind!r}; write it into the text or the messages,"
                " or delete it"
            )


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} must be text, found {type(value).__name__}; write it in quotes")
    check_unicode(value, f"the field {field!r}", where)
    return value


def _encode_instruction(record: Mapping[str, Any], tokenization: Tokenization, where: str) -> Encoded:
    instruction, answer = _text(record, "instruction", where), _text(record, "output", where)
    context = _text(record, "input", where) if record.get("input") is not None else ""
    if tokenization.template:
        turns = [{"role": "system", "content": _text(record, "system", where)}] if record.get("system") else []
        turns += _history(record.get("history") or [], where)
        question = f"{instruction}\n\n{context}" if context else instruction
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return encode_messages(turns, tokenization, where)
    for name in _USED["instruction"]:
        if record.get(name):
            raise DataError(f"{where}: {name!r} needs a tokenizer with a chat template; write it into the instruction")
    middle = f"### Input:\n{context}\n\n" if context else ""
    return _encode_pair(f"### Instruction:\n{instruction}\n\n{middle}### Response:\n", answer, tokenization)


def _history(turns: Any, where: str) -> list[dict[str, Any]]:
    """Earlier turns, learned as the last one is."""
    good = isinstance(turns, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns)
    if not good or not all(isinstance(text, str) for turn in turns for text in turn):
        raise DataError(f"{where}: history must be a list of [question, answer], both text")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _encode_pair(prompt: str, completion: str, tokenization: Tokenization) -> Encoded:
    before, after = tokenization.encode_pair(prompt, completion)
    learned = np.arange(len(before) + len(after)) >= len(before)
    return Encoded(np.array(before + after, np.int32), learned, len(before))
