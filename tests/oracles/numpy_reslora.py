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


def changes(factors_a, factors_b, inputs, options, kept=None):
    """delta_n: (tokens, out) of each layer from its factors and its own x_n: (tokens, in), whatever made that x_n.

    ``kept``: (tokens, in) of each layer, what dropout multiplies its sums of x with: 0 or 1 / (1 - rate).
    """
    a, b, x = ([np.asarray(v, np.float64) for v in values] for values in (factors_a, factors_b, inputs))
    kept = np.ones((len(x), *x[0].shape)) if kept is None else kept
    scale, reach = options["alpha"] / options["rank"], options["previous"]
    found = []
    for n in range(len(a)):
        first = 0 if reach < 0 else max(0, n - reach)
        delta = np.zeros((x[n].shape[0], b[n].shape[1]))
        for token in range(x[n].shape[0]):
            if options["form"] == "input":
                earlier = x[n - 1][token] if n else x[0][token]
                delta[token] = scale * (kept[n][token] * (x[n][token] + earlier)) @ a[n] @ b[n]
            for k in range(first, n + 1):
                if options["form"] == "block":
                    delta[token] += scale * (kept[n][token] * x[n][token]) @ a[k] @ b[k]
                elif options["form"] == "middle":
                    delta[token] += scale * (kept[k][token] * x[k][token]) @ a[k] @ b[n]
        found.append(delta)
    return found


def shares_by_weight(kernels, factors_a, factors_b, options):
    """alpha of each layer: 1 for the first two, then ||W'_{n-2}||_F / ||W'_{n-1}||_F of the merged W' = W + s a b."""
    scale, norms = options["alpha"] / options["rank"], []
    for kernel, a, b in zip(kernels, factors_a, factors_b, strict=True):
        merged = np.asarray(kernel, np.float64) + scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        norms.append(np.sqrt(sum(entry * entry for entry in merged.ravel())))
    return np.array([1.0 if n < 2 else norms[n - 2] / norms[n - 1] for n in range(len(norms))])
