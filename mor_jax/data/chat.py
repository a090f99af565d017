"""Conversations through a tokenizer's chat template: which tokens they become, and which of them are learned.

A conversation is tokenised whole, as the template renders it. What the assistant says is found in the text by rendering
the conversation up to each of its turns, so that it begins where generation will begin. It closes with the
end-of-sequence token (what the template writes after that, such as a line break, is not learned), or, under a template
that ends turns otherwise, with all that is written for the turn.

Beside role and content, a message may say whether it is learned, in the words of several trainers: `weight` (0 or 1),
`train`, `training` or `loss` (true or false), `masked` (true: not learned). `tools`, `documents` and
`chat_template_kwargs` beside the messages reach the template in every rendering. What the template does not show is an
error, but for reasoning that it cuts away, which is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mor_jax.data.sources import DataError
from mor_jax.data.tokenization import Piece, Tokenization, as_tokenization, check_unicode

OPTIONS = ("tools", "documents")  # lists beside the messages that a template may show
LEARNED_FIELDS = {"weight": 1, "train": True, "training": True, "loss": True, "masked": False}  # and what says: learn
_REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message that some templates show
_THOUGHT_END = "</think>"


class Encoded(NamedTuple):
    """One example.

    Attributes:
      tokens: (n,) int32.
      learned: (n,) bool, true where the token is to be predicted.
      prompt_length: Tokens before the first answer.
      said: Characters of the answers as they were written.
      hidden: How many of them the chat template does not show, so that they are not learned.
    """

    tokens: np.ndarray
    learned: np.ndarray
    prompt_length: int
    said: int = 0
    hidden: int = 0


@dataclass(frozen=True)
class Conversation:
    """Messages as the template takes them, what else it gets, and which messages are learned."""

    messages: list[dict[str, Any]]
    learned: tuple[bool, ...]
    options: dict[str, Any] = field(default_factory=dict)


class Span(NamedTuple):
    """Characters `start` to `end` of a rendering that are the assistant's turn number `index`."""

    index: int
    start: int
    end: int


def read_conversation(record: Mapping[str, Any], tokenization: Tokenization, where: str) -> Conversation:
    """The conversation of a record with `messages`.

    Raises:
      DataError: A message or option is not as it should be, or the template does not show it.
    """
    value = record["messages"]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages must be a list of {{role, content}}, got {type(value).__name__}")
    pairs = [_message(message, number, where) for number, message in enumerate(value, 1)]
    options: dict[str, Any] = {}
    for name in OPTIONS:
        if record.get(name) not in (None, [], ""):
            options[name] = _list_option(record[name], name, where)
    extra = record.get("chat_template_kwargs") or {}
    if not isinstance(extra, Mapping):
        raise DataError(f"{where}: chat_template_kwargs must be a mapping, found {type(extra).__name__}")
    for name in extra:
        if not re.search(rf"\b{re.escape(str(name))}\b", tokenization.template):
            raise DataError(f"{where}: the chat template does not know {name!r} of chat_template_kwargs; leave it out")
    conversation = Conversation([m for m, _ in pairs], tuple(learn for _, learn in pairs), options | dict(extra))
    if tokenization.template:
        _check_shown(conversation, tokenization, where)
    return conversation


def encode_messages(messages: list[dict[str, Any]], tokenizer: Any, where: str = "messages", **beside: Any) -> Encoded:
    """A conversation through the chat template, learned on the assistant's turns only.

    Args:
      messages: {role, content} and what else the template shows.
      tokenizer: A `Tokenization`, or a fast Hugging Face tokenizer.
      where: The place of the record, for messages.
      **beside: `tools`, `documents`, `chat_template_kwargs`.

    Raises:
      DataError: If the tokenizer has no template, no message is the assistant's, something is not shown, or the
        template rewrites earlier turns so that they cannot be found.
    """
    tokenization = as_tokenization(tokenizer)
    if not tokenization.template:
        raise DataError(f"{where}: the tokenizer has no chat template for messages; use prompt and completion fields")
    conversation = read_conversation({"messages": messages, **beside}, tokenization, where)
    text = render(conversation, tokenization, where)
    spans = assistant_spans(conversation, text, tokenization, where)
    tokens, learned, prompt_length = _encode_spans(text, spans, conversation.learned, tokenization)
    counted = [_shown(conversation.messages[s.index], text[s.start : s.end]) for s in spans]
    said, hidden = (sum(values) for values in zip(*counted, strict=True))
    return Encoded(np.array(tokens, np.int32), np.array(learned, bool), prompt_length, said, hidden)


def render(
    conversation: Conversation, tokenization: Tokenization, where: str, count: int | None = None, **options: Any
) -> str:
    """The first `count` messages (None: all) as the template writes them.

    Raises:
      DataError: The template refuses them.
    """
    try:
        return tokenization.render(conversation.messages[:count], **conversation.options, **options)
    except Exception as error:  # templates raise jinja errors of many kinds, often on purpose (role order)
        raise DataError(f"{where}: the chat template refuses the messages ({error}); check roles and order") from None


def assistant_spans(conversation: Conversation, text: str, tokenization: Tokenization, where: str) -> list[Span]:
    """Each assistant turn in `text`, the rendering of all messages.

    Raises:
      DataError: If there is none, or a turn cannot be found.
    """
    spans, floor = [], 0
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        start = _turn_start(conversation, index, text, tokenization, where)
        end = _turn_end(conversation, index, text, start, tokenization, where)
        spans.append(Span(index, max(start, floor), end))
        floor = end
    if not spans:
        raise DataError(
            f"{where}: no message has the role 'assistant', so nothing can be learned; add one or drop the line"
        )
    return spans


def _turn_start(conversation: Conversation, index: int, text: str, tokenization: Tokenization, where: str) -> int:
    if not index:
        asked = Conversation([{"role": "user", "content": "a"}], (False,), conversation.options)
        opened = render(asked, tokenization, where, add_generation_prompt=True)
        header = opened[len(render(asked, tokenization, where)) :]
        return text.find(header) + len(header) if header in text else 0
    before = render(conversation, tokenization, where, index)
    if not text.startswith(before):
        raise DataError(
            f"{where}: the chat template rewrites the turns before message {index + 1}; split the record, or write"
            " its system message into the user's"
        )
    opened = render(conversation, tokenization, where, index, add_generation_prompt=True)
    return max(len(before), _common_prefix(opened, text))


def _turn_end(
    conversation: Conversation, index: int, text: str, start: int, tokenization: Tokenization, where: str
) -> int:
    """Where the turn that begins at `start` ends in `text`.

    Templates that show a turn otherwise while it is the last one (reasoning blocks are removed later) are not prefixes
    of the whole: there the end of the turn, or the turn's own words, are looked for.
    """
    rendered = render(conversation, tokenization, where, index + 1)
    last = tokenization.tokenizer.eos_token or ""
    if text.startswith(rendered):
        end = len(rendered)
        closed = text.rfind(last, start, end) + len(last) if last and last in text[start:end] else end
        return end if text[closed:end].strip() else closed
    content = conversation.messages[index]["content"]
    content = content.rpartition(_THOUGHT_END)[2].strip() or content.strip()
    found = text.find(content, start)
    if found < 0:
        raise DataError(f"{where}: the chat template does not show message {index + 1} as written; split the record")
    token, end = tokenization.turn_end, found + len(content)
    closing = last if token is None else tokenization.tokenizer.convert_ids_to_tokens(token)
    if token is not None and closing in text[end:]:
        return text.index(closing, end) + len(closing)
    return end + len(closing) if closing and text.startswith(closing, end) else end


def _encode_spans(
    text: str, spans: list[Span], chosen: tuple[bool, ...], tokenization: Tokenization
) -> tuple[list[int], list[bool], int]:
    """(tokens, which are learned, tokens before the first span): each span begins where generation begins.

    Where a token straddles a span's beginning, the text up to it is tokenised as generation sees it, and what follows,
    up to the next special token, as it is behind other text.
    """
    pieces, previous, prompt_length = tokenization.pieces(text), (0, 0), None
    special = set(tokenization.tokenizer.added_tokens_decoder)
    for span in spans:
        first, pieces = _cut_at(span.start, previous, text, pieces, special, tokenization)
        prompt_length = first if prompt_length is None and chosen[span.index] else prompt_length
        previous = span.start, span.end
    learned = [False] * len(pieces)
    for span in spans:
        for place, (_, start, _) in enumerate(pieces):
            learned[place] |= chosen[span.index] and span.start <= start < span.end
    return [token for token, _, _ in pieces], learned, len(pieces) if prompt_length is None else prompt_length


def _cut_at(
    border: int,
    previous: tuple[int, int],
    text: str,
    pieces: list[Piece],
    special: set[int],
    tokenization: Tokenization,
) -> tuple[int, list[Piece]]:
    """(how many tokens come before the border, the tokens with a cut there).

    What is compared goes back to the last special token, on both sides of which a tokenizer works apart, or else to the
    answer before, which begins and ends at the characters `previous`.
    """
    first = next((i for i, (_, start, _) in enumerate(pieces) if start >= border), len(pieces))
    left = next((i for i in range(first - 1, -1, -1) if pieces[i][0] in special), None)
    if left is None or pieces[left][1] < previous[1]:
        left = next((i for i, (_, start, _) in enumerate(pieces) if start >= previous[1]), first)
    cut = pieces[left][1] if left else 0
    own = tokenization.pieces_behind(text[previous[0] : cut] if left else "", text[cut:border])
    if [token for token, _, _ in pieces[left : left + len(own)]] == [token for token, _, _ in own]:
        after = [(token, max(start, border), end) for token, start, end in pieces[left + len(own) :]]
        return left + len(own), pieces[: left + len(own)] + after
    right = next((i for i in range(first, len(pieces)) if pieces[i][0] in special), len(pieces))
    stop = pieces[right][1] if right < len(pieces) else len(text)
    before = [(token, cut + start, cut + end) for token, start, end in own]
    behind = tokenization.pieces_behind(text[cut:border], text[border:stop])
    after = [(token, border + start, border + end) for token, start, end in behind]
    return left + len(own), pieces[:left] + before + after + pieces[right:]


def _common_prefix(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _message(value: Any, number: int, where: str) -> tuple[dict[str, Any], bool]:
    """(the message as the template takes it, whether it is learned)."""
    message = without_nulls(dict(value)) if isinstance(value, Mapping) else {}
    calls = message.get("tool_calls") or message.get("function_call")
    if calls and message.get("role") == "assistant":
        message.setdefault("content", "")  # the usual format writes null beside calls, or leaves it out
    if not all(isinstance(message.get(name), str) for name in ("role", "content")):
        raise DataError(f"{where}: message {number} must have the text fields role and content")
    for name in ("content", *_REASONING):
        if isinstance(message.get(name), str):
            check_unicode(message[name], f"message {number}", where)
    said = {name: message.pop(name) for name in LEARNED_FIELDS if name in message}
    for name, choice in said.items():
        if choice not in (0, 1):  # also true and false
            raise DataError(f"{where}: message {number}: {name} must be 0 or 1, true or false, found {choice!r}")
    chosen = {choice == LEARNED_FIELDS[name] for name, choice in said.items()}
    if len(chosen) > 1:
        raise DataError(f"{where}: message {number}: {' and '.join(said)} contradict each other; keep one")
    learn = chosen.pop() if chosen else message["role"] == "assistant"
    if learn and message["role"] != "assistant" and "masked" not in said:
        raise DataError(
            f"{where}: message {number}: {' and '.join(said)} asks to learn what the role {message['role']!r} says;"
            " only the assistant's messages are learned: leave it out there"
        )
    return message, learn and message["role"] == "assistant"


def without_nulls(value: Any) -> Any:
    """A value without the null fields that tables of one schema put into each row, at any depth."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _list_option(value: Any, name: str, where: str) -> list[Any]:
    """A list of objects, which tables often hold as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: {name} is text, but not JSON ({error}); write a list of objects") from None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"{where}: {name} must be a list of objects, found {type(value).__name__}")
    return without_nulls(value)


def _check_shown(conversation: Conversation, tokenization: Tokenization, where: str) -> None:
    """Raises DataError where the template drops tools, documents or calls."""
    calls = ("tool_calls", "function_call")
    called = any(name in message for message in conversation.messages for name in calls)
    if not conversation.options and not called:
        return
    text = render(conversation, tokenization, where)
    for name in OPTIONS:
        fewer = {key: value for key, value in conversation.options.items() if key != name}
        other = Conversation(conversation.messages, conversation.learned, fewer)
        if name in conversation.options and render(other, tokenization, where) == text:
            raise DataError(f"{where}: the chat template does not show {name!r}; take a model whose template does")
    for number, message in enumerate(conversation.messages):
        bare = {name: value for name, value in message.items() if name not in calls}
        if len(bare) < len(message):
            changed = [*conversation.messages[:number], bare, *conversation.messages[number + 1 :]]
            other = Conversation(changed, conversation.learned, conversation.options)
            if render(other, tokenization, where) == text:
                raise DataError(
                    f"{where}: the chat template does not show the calls of message {number + 1}; write them into its"
                    " content, or take a model whose template does"
                )


def _shown(message: Mapping[str, Any], text: str) -> tuple[int, int]:
    """(characters of what the message says, how many of them `text` lacks); blanks do not count."""
    parts = [message[name] for name in (*_REASONING, "content") if isinstance(message.get(name), str)]
    rendered = "".join(text.split())
    pieces = ["".join(part.split()) for part in parts]
    lacking = 0
    for piece in pieces:
        if piece in rendered:
            continue
        thought, mark, answer = piece.rpartition(_THOUGHT_END)
        thought = thought.removeprefix("<think>")
        lacking += sum(len(own) for own in (thought, answer) if own and own not in rendered) if mark else len(piece)
    return sum(len(piece) for piece in pieces), lacking
