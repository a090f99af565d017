"""One decision a run about tokens: what opens a text, what closes it, what ends generation, and the date of templates.

Training, generation, evaluation and export ask the same `Tokenization`, and a run keeps what it decided:

    start      what the tokenizer itself puts before a text (a beginning-of-sequence token, or nothing)
    end        what closes a text or an answer: the tokenizer's end of sequence, else the model's
    stop       what generation ends at: the end, the token that closes a turn of the chat template, and those that
               `generation_config.json` or `config.json` name

**Where an answer begins.** A prompt is tokenised alone, as generation will see it. The answer is what the tokens of
prompt and answer together have beyond those of the prompt. Where a token would straddle the border, so that the
prompt's tokens do not begin the whole, the prompt keeps its own and the answer is tokenised as it is behind other text,
without the blank that some tokenizers put before a text.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_jax.data.sources import DataError
from mor_jax.data.tokenizer import load_tokenizer

_ANCHORS = ("a", "1", ".", "\n")  # texts behind which a tokenizer may start a new token without a blank of its own
_ENDS = ("generation_config.json", "config.json")  # where a model names its end tokens, the first that does decides
_PROBE = "~"  # an answer that no template contains


Piece = tuple[int, int, int]  # a token, its first character, the end of its last


@dataclass(frozen=True, eq=False)
class Tokenization:
    """A tokenizer with what a run decided about it.

    Attributes:
      tokenizer: A fast Hugging Face tokenizer.
      start: Tokens before a text that no template opens.
      end: Tokens after a text or an answer that no template closes; at most one but for tokenizers that add more.
      stop: Tokens that end generation, ascending.
      chat_date: The day that chat templates print, "2026-01-31"; empty is today.
      turn_end: The special token by which the chat template closes what the assistant says; None without one.
    """

    tokenizer: Any
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    chat_date: str = ""
    turn_end: int | None = None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text and nothing around them."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> list[int]:
        """A whole text: opened and closed, unless it says so itself."""
        return self._closed(self._opened(self.encode(text)))

    def encode_prompt(self, text: str) -> list[int]:
        """A prompt as generation sees it: opened, unless it says so itself, and not closed."""
        return self._opened(self.encode(text))

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """(prompt, the completion behind it, closed) in tokens, by the module's rule of the border."""
        own, whole = self.encode(prompt), self.encode(prompt + completion)
        kept = whole[: len(own)] == own  # no token straddles the border
        behind = whole[len(own) :] if kept else self.encode_behind(prompt, completion)
        return self._opened(own), self._closed(behind)

    def encode_behind(self, before: str, text: str) -> list[int]:
        """The tokens of `text` where it follows `before`, by the module's rule of the border."""
        return [token for token, _, _ in self.pieces_behind(before, text)]

    def pieces_behind(self, before: str, text: str) -> list[Piece]:
        """As `encode_behind`, with the place of each token in `text`."""
        for context in (before, *_ANCHORS):
            own, whole = self.encode(context), self.pieces(context + text)
            if [token for token, _, _ in whole[: len(own)]] == own:
                return [(token, *_shifted(span, len(context), len(text))) for token, *span in whole[len(own) :]]
        return self.pieces(text)

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text, each with its first character and the end of its last."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(token, *span) for token, span in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    def encode_choice(self, prompt: str, option: str) -> tuple[list[int], list[int]]:
        """(the prompt's tokens, the option's tokens that are scored), as evaluation harnesses make them.

        Blanks at the prompt's end count as the option's, whose tokens are those of both together beyond as many as the
        prompt alone has.
        """
        context = prompt.rstrip()
        option = prompt[len(context) :] + option
        if not context:
            return list(self.start or self.end[:1]), self.encode(option)
        before = self.encode_prompt(context)
        return before, self.encode_prompt(context + option)[len(before) :] or self.encode_behind(context, option)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as the tokenizer's chat template writes it, on the day `chat_date`.

        Raises:
          Exception: Whatever the template raises, of many kinds.
        """
        template = self.tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        if "strftime_now" in template:
            options["chat_template"] = _fixed_date(self.today()) + template
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def today(self) -> datetime.datetime:
        """Midnight of `chat_date`; today's where there is none."""
        return datetime.datetime.fromisoformat(self.chat_date or datetime.date.today().isoformat())

    @property
    def template(self) -> str:
        """The text of the chat template; empty without one."""
        found = getattr(self.tokenizer, "chat_template", None) or ""
        return found if isinstance(found, str) else found.get("default", "")

    def _opened(self, tokens: list[int]) -> list[int]:
        start = list(self.start)
        return tokens if tokens[: len(start)] == start else start + tokens

    def _closed(self, tokens: list[int]) -> list[int]:
        end = list(self.end)
        return tokens if end and tokens[-len(end) :] == end else tokens + end


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


def as_tokenization(tokenizer: Any) -> Tokenization:
    """A `Tokenization` itself, or what a tokenizer alone decides, without the files of its model."""
    return tokenizer if isinstance(tokenizer, Tokenization) else decide_tokens(tokenizer)


def read_tokenization(directory: str | os.PathLike, **recorded: Any) -> Tokenization:
    """The tokenizer of a model's directory with what its files, and the run, decide.

    Args:
      directory: A Hugging Face directory.
      **recorded: What a run recorded: `start`, `end`, `stop` (None leaves a decision to the files), `chat_date`.

    Raises:
      DataError: The directory has no readable tokenizer, or its template is none to rely on.
    """
    return decide_tokens(load_tokenizer(directory), _model_ends(Path(directory)), where=str(directory), **recorded)


def decide_tokens(
    tokenizer: Any,
    model_ends: Sequence[int] = (),
    *,
    start: Sequence[int] | None = None,
    end: Sequence[int] | None = None,
    stop: Sequence[int] | None = None,
    chat_date: str = "",
    where: str = "the tokenizer",
) -> Tokenization:
    """What a run's texts begin and end with, and where its generation stops.

    Args:
      tokenizer: A fast Hugging Face tokenizer.
      model_ends: End tokens that the model's files name.
      start: Instead of what the tokenizer puts before a text.
      end: Instead of its end of sequence.
      stop: Instead of all tokens that end a text.
      chat_date: Of `Tokenization`.
      where: Whose tokenizer it is, for messages.

    Raises:
      DataError: The chat template writes the same conversation in several ways.
    """
    before, after = _affixes(tokenizer)
    known = [token for token in model_ends if 0 <= token < len(tokenizer)]
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(known), None)
    if last is not None and last not in after and (tokenizer.eos_token_id is not None or not after):
        after = (*after, last)
    found = Tokenization(
        tokenizer, before if start is None else tuple(start), after if end is None else tuple(end), (), chat_date
    )
    _check_template(found, where)
    closing = _turn_end(found)
    decided = {*known, *found.end, *(() if closing is None else (closing,))}
    stops = tuple(sorted(decided if stop is None else set(stop)))
    return dataclasses.replace(found, stop=stops, turn_end=closing)


def _turn_end(tokenization: Tokenization) -> int | None:
    rest = _after_probe(tokenization)
    if not rest:
        return None
    special = tokenization.tokenizer.added_tokens_decoder
    return next((token for token in tokenization.encode(rest) if token in special), None)


def prints_date(tokenization: Tokenization) -> bool:
    """Whether the chat template writes another text on another day."""
    days = [dataclasses.replace(tokenization, chat_date=day) for day in ("2001-02-03", "2014-11-28")]
    return bool(tokenization.template) and len({_probe_text(day) for day in days}) > 1


def _shifted(span: Sequence[int], by: int, size: int) -> tuple[int, int]:
    """(first character, end) counted from a later place in the text, within 0 and `size`."""
    return min(max(span[0] - by, 0), size), min(max(span[1] - by, 0), size)


def _fixed_date(now: datetime.datetime) -> str:
    """A template's first line, which writes nothing and lets `strftime_now` tell another time than the clock's.

    The renderer hands plain data to a template, no functions; a macro of the same name goes before its own. The line's
    end vanishes with it, so that the template begins a line as it did.
    """
    signs = "aAbBcdDeFGhHIjmMprRSTuUVwWxXyYzZ"
    known = {form: now.strftime(form) for sign in signs for form in (f"%-{sign}", f"%{sign}")}
    changes = "".join(f" | replace({form!r}, {text!r})" for form, text in known.items())
    text = f"format | replace('%%', '\\0'){changes} | replace('\\0', '%')"
    return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n"


def _affixes(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer itself puts before and after a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for place in range(len(whole) - len(plain) + 1):
        if whole[place : place + len(plain)] == plain:
            return tuple(whole[:place]), tuple(whole[place + len(plain) :])
    return (), ()


def _model_ends(directory: Path) -> list[int]:
    from mor_jax.models.hf_config import read_json

    for name in _ENDS:
        named = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
        if named is not None:
            return [int(token) for token in (named if isinstance(named, list) else [named])]
    return []


def _probe_text(tokenization: Tokenization) -> str | None:
    """A short conversation as the template writes it; None where it refuses or there is none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    if not tokenization.template:
        return None
    try:
        return tokenization.render(turns)
    except Exception:  # templates raise errors of many kinds; a record that they refuse is told of with its place
        return None


def _after_probe(tokenization: Tokenization) -> str:
    text = _probe_text(tokenization)
    return text.rpartition(_PROBE)[2] if text and _PROBE in text else ""


def _check_template(tokenization: Tokenization, where: str) -> None:
    if len({_probe_text(tokenization) for _ in range(4)}) > 1:
        raise DataError(
            f"{where}: its chat template writes the same conversation otherwise each time; take what is random out of"
            " chat_template.jinja"
        )
