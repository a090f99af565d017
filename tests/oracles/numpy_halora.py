"""HaLoRA, entry by entry in float64: arXiv 2502.19747, y = x (W + nu) + s (x a) b and its regulariser.

The contract runs it on a clean base (nu = 0) and with merging allowed, which is off by default.
"""

import math

import numpy as np

VARIANTS = ({"mergeable": True}, {"mergeable": True, "norm": "frobenius", "alpha": 3.0, "noise_unit": "tile_max"})


def forward(params, kernel, x, options, noise=None):
    """y: (tokens, out) for kernel (in, out), x (tokens, in) and noise (in, out)."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    noise = np.zeros_like(kernel) if noise is None else np.asarray(noise, np.float64)
    scale = options["alpha"] / options["rank"]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            for i in range(kernel.shape[0]):
                y[token, o] += row[i] * (kernel[i, o] + noise[i, o])
                y[token, o] += sum(scale * row[i] * a[i, k] * b[k, o] for k in range(a.shape[1]))
    return y


def penalty(params, options):
    """mu (||a^T a|| + ||b b^T||): the largest singular value, or the root of the sum of squares."""
    total = 0.0
    for gram in (params["a"].T @ params["a"], params["b"] @ params["b"].T):
        gram = np.asarray(gram, np.float64)
        if options["norm"] == "spectral":
            total += np.linalg.svd(gram, compute_uv=False)[0]
        else:
            total += math.sqrt(sum(v * v for v in gram.reshape(-1)))
    return options["penalty_weight"] * total
