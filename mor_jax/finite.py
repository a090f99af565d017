"""Figures that are not finite: no command that found one is done."""

from __future__ import annotations

import math
from collections.abc import Mapping


class NotFiniteError(FloatingPointError):
    """A figure is NaN or infinite; `row` is the number, from 0, of the row or question it was found at, or None."""

    exit_code = 3

    def __init__(self, message: str, row: int | None = None):
        self.row = row
        super().__init__(message)


def require_finite(figures: Mapping[str, float], where: str) -> None:
    """Returns when all figures are finite.

    Args:
      figures: name -> figure.
      where: what they were measured on, for the message.

    Raises:
      NotFiniteError: names the first that is not.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{where}: {name} is {value}; look for weights or logits that are not finite")
