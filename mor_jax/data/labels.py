"""What a label says: the name of a class or its number, the same in every format.

JSON and Parquet tell 1 from "1", a table of text does not, and a saved dataset may know the names of its numbers. So
text that is a number, and `true` or `false`, counts as that; a label is the class that bears its name, and the class
of its number only where none does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from mor_jax.data.formats import DataError, NamedClass
from mor_jax.data.tokenization import check_unicode

_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?")  # as it is printed: 007 and 1e3 are names
_TRUTH = ("false", "true")
_UNLABELLED = -1


class Label(NamedTuple):
    """A label as it is written, the number that it stands for, and the names of all classes where its column has them.

    A number that is not whole is a float; None is no number.
    """

    text: str
    number: int | float | None = None
    names: tuple[str, ...] = ()

    @property
    def is_truth(self) -> bool:
        """Whether it is true or false."""
        return self.text.lower() in _TRUTH


def read_label(record: Mapping[str, Any], where: str) -> Label:
    """The label of a record, in its field `label`.

    Raises:
      DataError: It is missing or empty, or neither a number nor text.
    """
    field = "Quality" if "#1 String" in record and "label" not in record else "label"  # as in GLUE's file of MRPC
    value = record.get(field)
    if value is None or value == "":
        raise DataError(
            f"{where}: the field {field!r} is missing or empty; has {', '.join(map(str, record)) or 'none'}"
        )
    if isinstance(value, NamedClass):
        return Label(value.name, int(value), value.names)
    if isinstance(value, bool):
        return Label(_TRUTH[value], int(value))
    if isinstance(value, str):
        check_unicode(value, f"the field {field!r}", where)
        return _read_text(value)
    if isinstance(value, int):
        return Label(str(value), value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return Label(str(value), _whole(float(value)))
    raise DataError(f"{where}: the field {field!r} must be a whole number or a name, found {value!r}")


def _read_text(text: str) -> Label:
    plain = text.strip()
    if plain.lower() in _TRUTH:
        return Label(plain, _TRUTH.index(plain.lower()))
    if not _NUMBER.fullmatch(plain):
        return Label(text)
    return Label(plain, _whole(float(plain)) if "." in plain else int(plain))


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def class_names(labels: Iterable[tuple[Label, str]]) -> tuple[str, ...]:
    """Names of the classes that labels of an unnamed set stand for: numbers first, then words, each in order.

    Where a column names its classes, they are those. True and false are words unless they stand beside numbers alone.

    Args:
      labels: Each with the place where it was first met.

    Raises:
      DataError: A label marks its record as unlabelled, or is no whole number.
    """
    found = list(labels)
    for label, where in found:
        if label.number == _UNLABELLED:
            raise _unlabelled(label, where)
        if isinstance(label.number, float):
            raise DataError(
                f"{where}: the label {label.text} is a score, and a class is a whole number or a name; labels= names"
                " classes like it"
            )
    known = next((label.names for label, _ in found if label.names), ())
    if known:
        return known
    as_words = all(label.is_truth for label, _ in found) or any(label.number is None for label, _ in found)
    whole, words = set(), set()
    for label, _ in found:
        if label.number is None or (label.is_truth and as_words):
            words.add(label.text if label.number is None else label.text.lower())
        else:
            whole.add(int(label.number))
    return tuple([str(number) for number in sorted(whole)] + sorted(words))


def class_id(label: Label, names: Sequence[str], where: str) -> int:
    """Which of the classes the label is: that of its name, else that of its number.

    Raises:
      DataError: It is none of them; names the place where it stands.
    """
    if label.text in names:
        return names.index(label.text)
    alike = [name.lower() for name in names]
    if label.is_truth and label.text.lower() in alike:
        return alike.index(label.text.lower())
    if any(name in names for name in label.names):  # they name classes alike, and this one is none of them
        raise _unknown(label, names, where)
    if str(label.number) in names:
        return names.index(str(label.number))
    if isinstance(label.number, int) and 0 <= label.number < len(names):
        return label.number
    if label.number == _UNLABELLED:
        raise _unlabelled(label, where)
    raise _unknown(label, names, where)


def _unknown(label: Label, names: Sequence[str], where: str) -> DataError:
    return DataError(f"{where}: the label {label.text!r} is not one of {', '.join(names)}; labels= names others")


def _unlabelled(label: Label, where: str) -> DataError:
    return DataError(
        f"{where}: the label {label.text} marks a record without one, as in GLUE's test sets; leave such records out,"
        " or name the class with labels="
    )
