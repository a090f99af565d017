"""DyLoRA, entry by entry in float64: arXiv 2210.07558, eq. 6, h = W0 x + (alpha / k) B[:, :k] A[:k] x."""

import numpy as np

VARIANTS = ({"alpha": 3.0},)


def forward(params, kernel, x, options):
    """y: (tokens, out) at rank options["drawn"], or at the whole rank where nothing was drawn."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    k = options.get("drawn") or options["rank"]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for j in range(k):
                hidden = sum(row[i] * a[i, j] for i in range(len(row)))
                y[token, o] += options["alpha"] / k * hidden * b[j, o]
    return y
