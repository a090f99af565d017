"""Where tokens meet a model: each must have a row in its embedding.

jax looks up a token beyond the table without a word, so that its figures are NaN and what is likeliest is token 0. All
that tokenises for a model calls `check_tokens`: training, evaluation, generation, calibration.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mor_jax.data.formats import DataError


def check_tokens(tokens: Any, vocab_size: int, where: str, tokenizer: Any = None) -> None:
    """Returns when a model with `vocab_size` tokens has all of these.

    Args:
      tokens: Ids of any shape.
      vocab_size: Rows of the model's embedding.
      where: The record, prompt or batch that they are of, for the message.
      tokenizer: That made them; tells how the token is written.

    Raises:
      DataError: Names the place, the token and the size of the vocabulary.
    """
    ids = np.asarray(tokens).reshape(-1)
    beyond = ids[(ids >= vocab_size) | (ids < 0)] if ids.size else ids
    if beyond.size:
        token = int(beyond[0])
        written = "" if tokenizer is None or token < 0 else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
        raise DataError(
            f"{where}: token {token}{written} is none of the model's, whose vocabulary has {vocab_size} (0 to"
            f" {vocab_size - 1}); give the model its own tokenizer"
        )
