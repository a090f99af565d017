"""rsLoRA, entry by entry in float64: arXiv 2312.03732, gamma_r = alpha / sqrt(r)."""

import math

import numpy as np

VARIANTS = ({},)


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out), x (tokens, in) and options with rank and alpha."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    scale = options["alpha"] / math.sqrt(options["rank"])
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            for i in range(kernel.shape[0]):
                y[token, o] += row[i] * kernel[i, o]
                for k in range(a.shape[1]):
                    y[token, o] += scale * row[i] * a[i, k] * b[k, o]
    return y
