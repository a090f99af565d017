"""ResLoRA, layer by layer and entry by entry in float64: arXiv 2402.18039, section 3.2.

``forward`` is a chain of one layer, as the contract runs it; ``chain`` runs one layer after another.
"""

import numpy as np

VARIANTS = ({}, {"form": "input", "alpha": 3.0}, {"form": "middle"}, {"form": "block", "previous": -1})


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out) and x (tokens, in)."""
    kernel, x = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
    return y + changes([params["a"]], [params["b"]], [x], options)[0]


def changes(factors_a, factors_b, inputs, options):
    """delta_n: (tokens, out) of each layer from its factors and its own x_n: (tokens, in), whatever made that x_n."""
    a, b, x = ([np.asarray(v, np.float64) for v in values] for values in (factors_a, factors_b, inputs))
    scale, reach = options["alpha"] / options["rank"], options["previous"]
    found = []
    for n in range(len(a)):
        first = 0 if reach < 0 else max(0, n - reach)
        delta = np.zeros((x[n].shape[0], b[n].shape[1]))
        for token in range(x[n].shape[0]):
            if options["form"] == "input":
                earlier = x[n - 1][token] if n else x[0][token]
                delta[token] = scale * (x[n][token] + earlier) @ a[n] @ b[n]
            for k in range(first, n + 1):
                if options["form"] == "block":
                    delta[token] += scale * x[n][token] @ a[k] @ b[k]
                elif options["form"] == "middle":
                    delta[token] += scale * x[k][token] @ a[k] @ b[n]
        found.append(delta)
    return found
