"""What is known of a batch's tokens, at modules that read them in another shape."""

from __future__ import annotations

import dataclasses
import math

from mor_jax.adapters import AdapterInputs

_OF_TOKENS = ("segment_ids", "prompt_mask", "task_ids", "positions")


def inputs_for(kept: tuple[int, ...], inputs: AdapterInputs) -> AdapterInputs:
    """What is known of the rows that a module reads, ``kept`` being the shape of its x less what is contracted.

    (B, S) and flattened ones are the batch's tokens; (B,) one vector for each row of tokens, as poolers read. Of any
    other, such as the tokens that were sent to an expert, nothing is known.
    """
    segments = inputs.segment_ids
    if segments is None or kept[: segments.ndim] == segments.shape or kept == (math.prod(segments.shape),):
        return inputs
    given = {name: value for name in _OF_TOKENS if (value := getattr(inputs, name)) is not None}
    if kept == segments.shape[:1]:
        return dataclasses.replace(inputs, **{name: value.max(axis=1) for name, value in given.items()})
    return dataclasses.replace(inputs, **dict.fromkeys(_OF_TOKENS))
