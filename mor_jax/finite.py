"""Figures that are not finite: no command that found one is done."""

from __future__ import annotations

import math
from collections.abc import Mapping


class NotFiniteError(FloatingPointError):
    """A figure is NaN or infinite.

    Attributes:
      problem: which figure, and what it is.
      row: number, from 0, of the row or question where it was found, or None.
    """

    exit_code = 3

    def __init__(self, where: str, problem: str, row: int | None = None):
        self.problem, self.row = problem, row
        super().__init__(f"{where}: {problem}")


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
            raise NotFiniteError(where, f"{name} is {value}; look for weights and logits that are not finite")
