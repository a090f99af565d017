"""DoRA, entry by entry in float64: arXiv 2402.09353, eq. 5, W' = m V / ||V||_c with V = W0 + s B A.

The sum V and its norm are formed explicitly, one output at a time (``mor_jax`` forms neither).
"""

import math

import numpy as np

VARIANTS = ({}, {"alpha": 3.0})


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out), x (tokens, in) and options with rank and alpha."""
    a, b, m, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], params["m"], kernel, x))
    scale = options["alpha"] / options["rank"]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for o in range(kernel.shape[1]):
        direction = [
            kernel[i, o] + sum(scale * a[i, k] * b[k, o] for k in range(a.shape[1])) for i in range(kernel.shape[0])
        ]
        norm = math.sqrt(sum(v * v for v in direction))
        for token, row in enumerate(x):
            for i, v in enumerate(direction):
                y[token, o] += row[i] * m[o] * v / norm
    return y
