"""LoRA, entry by entry in float64: arXiv 2106.09685, eq. 3, h = W0 x + (alpha / r) B A x.

An oracle file gives ``VARIANTS``, the option sets that the contract runs, and ``forward``.
"""

import numpy as np

VARIANTS = ({}, {"zero": "a", "alpha": 3.0})


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out), x (tokens, in) and options with rank and alpha."""
    return low_rank(params, kernel, x, options["alpha"] / options["rank"])


def low_rank(params, kernel, x, scale):
    """y = x W + scale (x a) b, token by token."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            for i in range(kernel.shape[0]):
                y[token, o] += row[i] * kernel[i, o]
                for k in range(a.shape[1]):
                    y[token, o] += scale * row[i] * a[i, k] * b[k, o]
    return y
