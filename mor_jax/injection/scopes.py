"""Which of the module calls in one run of a model are the model's own, and traces that no cache may answer.

A model may run modules that are none of its own: ``nn.Dense(...).apply({"params": {"kernel": table.T}}, x)`` has
parameters of its own making and a path that starts anew, perhaps that of another module. They are left alone.

``nn.jit`` answers a second call of an equal module from the trace of the first, under which no interceptor is called
again: neither in another layer nor in another run. Its key holds the flags of the scope, so a flag whose hash is always
another keeps it from that while a run is intercepted.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

_TRACES = itertools.count()


class _NeverTheSame:
    """Hashes to another number each time."""

    def __hash__(self) -> int:
        return hash(("mor_jax", next(_TRACES)))


@dataclass
class OwnModules:
    """One run of a model: ``model.apply(..., method=own.entering(model, method))``."""

    root: Any = None
    foreign: int = field(default=0)  # how many calls that are not the model's own are open

    def entering(self, model: nn.Module, method: Any = None) -> Callable[..., Any]:
        """``method`` of ``model`` (a name, a function of the module; None: its call) as such a function."""
        run = type(model).__call__ if method is None else method
        if isinstance(run, str):
            run = getattr(type(model), run)
        function = getattr(run, "__func__", run)

        def enter(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.root = scope = module.scope
            assert scope is not None
            scope.flags = FrozenDict({**scope.flags, "intercepted": _NeverTheSame()})
            return function(module, *args, **kwargs)

        return enter

    @contextlib.contextmanager
    def call(self, module: nn.Module) -> Iterator[str | None]:
        """The path of ``module``, whose method is being called, joined by "/"; None where it is not the model's own."""
        scope: Any = module.scope
        if scope is None:  # a method that reads no variable, of a module that is not bound
            yield None
            return
        starts_anew = scope.root is not self.root and not scope.root.debug_path  # inside nn.scan and others it has one
        self.foreign += starts_anew
        try:
            yield None if self.foreign else "/".join(module.path)
        finally:
            self.foreign -= starts_anew
