"""VeRA, entry by entry in float64: arXiv 2310.11454, eq. 2, h = W0 x + Lambda_b B Lambda_d A x.

a and b are the shared factors; a site reads their upper left parts.
"""

import numpy as np

VARIANTS = ({}, {"d_initial": 0.5, "seed": 3})


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out) and x (tokens, in)."""
    a, b, d, lam_b = (np.asarray(params[name], np.float64) for name in ("a", "b", "d", "lam_b"))
    kernel, x = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            for i in range(kernel.shape[0]):
                y[token, o] += row[i] * kernel[i, o]
                for k in range(options["rank"]):
                    y[token, o] += row[i] * a[i, k] * d[k] * b[k, o] * lam_b[o]
    return y
