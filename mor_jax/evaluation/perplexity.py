"""Held-out perplexity of a causal language model, exact over batches of unequal numbers of counted tokens.

The log-likelihood of every batch is summed in float32 on the device and added up in float64 on the host; the division
by the number of tokens happens once, so packing, padding and the batch size do not change the figure.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, Any]
LogitsFn = Callable[[Batch], jax.Array]


@functools.partial(jax.jit, static_argnames="per_row")
def target_log_likelihood(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, per_row: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probability of the targets, and how many there are.

    Args:
      logits: (B, S, V), any float dtype; position t predicts `targets[:, t]`.
      targets: (B, S) int32.
      mask: (B, S), 1 where the target counts.
      per_row: Whether to keep the batch axis.

    Returns:
      (log-likelihood, count), float32; shape (B,) each with `per_row`, else ().
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    mask = mask.astype(jnp.float32)
    axis = -1 if per_row else None
    return jnp.where(mask > 0, picked * mask, 0.0).sum(axis), mask.sum(axis)


def perplexity(logits_fn: LogitsFn, batches: Iterable[Batch]) -> dict[str, float]:
    """Token-weighted loss and perplexity of a model on held-out batches.

    Args:
      logits_fn: Batch -> next-token logits (B, S, V).
      batches: Batches with `targets` and `loss_mask`, both (B, S).

    Returns:
      `loss` (mean negative log-likelihood in nats), `perplexity` (its exponential; infinite when that overflows) and
      `tokens`.

    Raises:
      ValueError: When no token counts.
    """
    total, tokens = 0.0, 0.0
    for batch in batches:
        likelihood, count = target_log_likelihood(
            logits_fn(batch), jnp.asarray(batch["targets"]), jnp.asarray(batch["loss_mask"])
        )
        total += float(np.float64(likelihood))
        tokens += float(np.float64(count))
    if tokens == 0:
        raise ValueError("perplexity needs at least one token with loss_mask 1; the evaluation batches have none")
    loss = -total / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
