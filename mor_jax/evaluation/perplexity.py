"""Held-out perplexity of a causal language model, exact over batches of unequal numbers of counted tokens.

The log-likelihood of every batch is summed in float32 on the device and added up in float64 on the host; the division
by the number of tokens happens once, so packing, padding and the batch size do not change the figure.
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.evaluation.tasks import Batch, Batches, by_task, check_rows, grouped
from mor_jax.finite import NotFiniteError
from mor_jax.processes import gathered

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


def perplexity(logits_fn: LogitsFn, batches: Batches) -> dict[str, float]:
    """Token-weighted loss and perplexity of a model on held-out batches.

    Args:
      logits_fn: Batch -> next-token logits (B, S, V).
      batches: Batches with `targets` and `loss_mask`, both (B, S); or {task: such batches}.

    Returns:
      `loss` (mean negative log-likelihood in nats), `perplexity` (its exponential; infinite when that overflows) and
      `tokens`; of several tasks also `loss/TASK` and so on.

    Raises:
      ValueError: When no token counts.
      DataError: A token is beyond the V of the logits; names batch and row.
      NotFiniteError: The loss of a row is not finite; names batch and row.
    """
    sums, first = {}, 0
    for task, own in grouped(batches).items():
        total, tokens, rows = _sums(logits_fn, own, f"task {task!r}, " if task else "", first)
        if tokens == 0:
            among = f" of the task {task!r}" if task else ""
            raise ValueError(f"perplexity needs a token with loss_mask 1; the evaluation batches{among} have none")
        sums[task], first = (total, tokens), first + rows
    totals, counts = (sum(column) for column in zip(*sums.values(), strict=True))
    return _figures(totals, counts) | by_task({task: _figures(*own) for task, own in sums.items()})


def _sums(logits_fn: LogitsFn, batches: Iterable[Batch], what: str, first: int) -> tuple[float, float, int]:
    """(log-likelihood, tokens, rows) of all batches; rows are counted on from `first` in errors."""
    total, tokens, rows = 0.0, 0.0, 0
    for number, batch in enumerate(batches, 1):
        logits, mask = logits_fn(batch), np.asarray(batch["loss_mask"])
        where = f"{what}batch {number}"
        targets = np.where(mask > 0, np.asarray(batch["targets"]), 0)
        for tokens_of in (batch.get("input_ids"), targets):
            if tokens_of is not None:
                check_rows(tokens_of, logits.shape[-1], where)
        found = target_log_likelihood(logits, jnp.asarray(targets), jnp.asarray(mask), per_row=True)
        likelihood, count = (np.asarray(gathered(each), np.float64) for each in found)
        wrong = np.flatnonzero(~np.isfinite(likelihood))
        if len(wrong):
            place = int(wrong[0])
            raise NotFiniteError(f"{where}, row {place + 1}", f"the loss is {-likelihood[place]}", first + rows + place)
        total, tokens, rows = total + likelihood.sum(), tokens + count.sum(), rows + len(likelihood)
    return float(total), float(tokens), rows


def _figures(total: float, tokens: float) -> dict[str, float]:
    loss = -total / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
