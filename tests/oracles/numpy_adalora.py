"""AdaLoRA, entry by entry in float64: arXiv 2303.10512, eq. 3, h = W0 x + s P Lambda Q x, and one site's importance."""

import numpy as np

VARIANTS = ({"alpha": 3.0},)


def forward(params, kernel, x, options):
    """y: (tokens, out); s = alpha over the number of triplets."""
    a, b, e, kernel, x = (np.asarray(v, np.float64) for v in (*(params[n] for n in "abe"), kernel, x))
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for k in range(len(e)):
                hidden = sum(row[i] * a[i, k] for i in range(len(row)))
                y[token, o] += options["alpha"] / len(e) * hidden * e[k] * b[k, o]
    return y
