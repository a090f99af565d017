"""What a method says of its own settings: checks of their range, and what a run, a plan or a reader has to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor_jax.adapters.base import Site


class Settings:
    """Interface of frozen dataclasses whose fields are the hyper-parameters of a method."""

    def require_positive(self, *names: str) -> None:
        """Raises ValueError naming the first of the fields ``names`` that is not positive."""
        for name in names:
            if getattr(self, name) <= 0:
                raise ValueError(f"{type(self).__name__}.{name} must be positive, got {getattr(self, name)}")

    def require_not_negative(self, *names: str) -> None:
        """Raises ValueError naming the first of the fields ``names`` that is negative."""
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"{type(self).__name__}.{name} must not be negative, got {getattr(self, name)}")

    def require_choice(self, name: str, *allowed: str) -> None:
        """Raises ValueError unless the field ``name`` is one of ``allowed``."""
        if getattr(self, name) not in allowed:
            known = ", ".join(allowed)
            raise ValueError(f"{type(self).__name__}.{name} must be one of {known}, got {getattr(self, name)!r}")

    @classmethod
    def defaults_at(cls, learning_rate: float) -> Mapping[str, Any]:
        """Options whose default depends on a run's peak learning rate; what a user sets goes before them."""
        return {}

    def caution(self, sites: tuple[Site, ...]) -> str:
        """A sentence of warning for a plan with this method at ``sites``, with counts; "" where all is well."""
        return ""

    def read_differently(self, version: int, site: Site) -> str:
        """What has changed in the meaning of leaves that were saved under adapter format ``version``; "" for nothing.

        A clause that names the method, where the numbers of such a file would compute something else today.
        """
        return ""
