"""PRILoRA, entry by entry in float64: arXiv 2401.11316, a LoRA whose rank depends on its layer, and its pruning."""

import numpy as np

VARIANTS = ({"alpha": 3.0},)


def layer_rank(first, last, layer, layers):
    """r_l = r_s + (r_f - r_s) l / (L - 1), rounded to the nearest."""
    exact = first + (last - first) * layer / (layers - 1)
    return int(np.floor(exact + 0.5))


def forward(params, kernel, x, options):
    """y: (tokens, out) of a model's only layer, which has options["rank"] of the columns that a is padded to."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    rank = options["rank"]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for k in range(rank):
                y[token, o] += options["alpha"] / rank * sum(row[i] * a[i, k] for i in range(len(row))) * b[k, o]
    return y


def prune(a, norms, fraction):
    """A copy of a: (in, r) with the least important entries of each column zero, for norms: (in,)."""
    pruned = np.array(a, np.float64)
    for k in range(pruned.shape[1]):
        importance = [(abs(pruned[i, k]) * norms[i], i) for i in range(len(norms))]
        for _, i in sorted(importance)[: int(fraction * len(norms))]:
            pruned[i, k] = 0.0
    return pruned
