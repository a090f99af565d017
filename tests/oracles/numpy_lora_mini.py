"""LoRA-Mini, entry by entry in float64: arXiv 2411.15804, y = W x + s B_frozen b a A_frozen x, s = alpha / r."""

import numpy as np

VARIANTS = ({"inner_in": 6, "inner_out": 4}, {"inner_in": 2, "inner_out": 9, "alpha": 3.0, "seed": 5})


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out) and x (tokens, in)."""
    outer_a, a, b, outer_b = (np.asarray(params[name], np.float64) for name in ("outer_a", "a", "b", "outer_b"))
    kernel, x = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        inner = [sum(row[i] * outer_a[i, m] for i in range(len(row))) for m in range(options["inner_in"])]
        low = [sum(inner[m] * a[m, k] for m in range(options["inner_in"])) for k in range(options["rank"])]
        high = [sum(low[k] * b[k, n] for k in range(options["rank"])) for n in range(options["inner_out"])]
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for n in range(options["inner_out"]):
                y[token, o] += options["alpha"] / options["rank"] * high[n] * outer_b[n, o]
    return y
