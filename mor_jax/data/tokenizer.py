"""The tokenizer of a model, from its own directory."""

from __future__ import annotations

import os
from typing import Any

from mor_jax.data.sources import DataError


def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The Hugging Face tokenizer in a model's directory; no code of the directory is run.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(directory), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises this very class for a tokenizer.json it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{directory}: no readable tokenizer ({reason}); copy the model's tokenizer files there"
        ) from error
