"""BeamLoRA, entry by entry in float64: arXiv 2502.13604, ranks weighed by r softmax(gamma / tau), and the pruning."""

import math

import numpy as np

VARIANTS = ({"alpha": 3.0},)
SMALLEST_RANK = 2  # the softmax of one weight is 1, whatever it is


def weights(gamma, temperature):
    """p: r softmax(gamma / tau)."""
    powers = [math.exp((g - max(gamma)) / temperature) for g in gamma]
    return [len(gamma) * power / sum(powers) for power in powers]


def forward(params, kernel, x, options):
    """y: (tokens, out)."""
    a, b, gamma, kernel, x = (np.asarray(v, np.float64) for v in (*(params[n] for n in ("a", "b", "gamma")), kernel, x))
    p = weights(gamma.tolist(), options["temperature"])
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for k, weight in enumerate(p):
                hidden = sum(row[i] * a[i, k] for i in range(len(row)))
                y[token, o] += options["alpha"] / len(p) * hidden * weight * b[k, o]
    return y


def pruned(gammas, temperature, share):
    """For each site the ranks that go, weakest first: from where the sum of p exceeds the share, at most r // 2.

    The released code masks from the first index on at which the cumulative sum is larger than share * sites * rank.
    """
    ranked = sorted(
        ((p, site, k) for site, row in enumerate(gammas) for k, p in enumerate(weights(row, temperature))), reverse=True
    )
    total, up_to_here, gone = sum(p for p, _, _ in ranked), 0.0, {site: [] for site in range(len(gammas))}
    for p, site, k in ranked:
        up_to_here += p
        if up_to_here > share * total:
            gone[site].insert(0, k)
    return [gone[site][: len(row) // 2] for site, row in enumerate(gammas)]
