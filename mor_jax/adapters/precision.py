"""Products that are of float32 on every device: by default a GPU rounds their factors to TF32 and a TPU to bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` with all matrix products in it, and in what it calls, of the highest precision.

    For what is written down once and kept, such as merged kernels, norms and what a merge is fitted to; training and
    generation keep jax's default. Put it below ``jax.jit``, on what is traced: a context around a compiled function
    takes no part in its trace, only in the key by which it is cached.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run
