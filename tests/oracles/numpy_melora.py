"""MELoRA, mini by mini in float64: arXiv 2402.17263, eq. 3, h = W x + concat_i s B_i A_i x_i.

``MULTIPLE`` is what the contract multiplies the sizes of its kernels by: n must divide both.
"""

import numpy as np

VARIANTS = ({}, {"num_minis": 1, "alpha": 3.0})
MULTIPLE = 2


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out) and x (tokens, in)."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    count, scale = options["num_minis"], options["alpha"] / options["rank"]
    rows, columns = kernel.shape[0] // count, kernel.shape[1] // count
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(kernel.shape[0]))
            mini = o // columns
            for i in range(mini * rows, (mini + 1) * rows):
                for k in range(options["rank"]):
                    y[token, o] += scale * row[i] * a[mini, i - mini * rows, k] * b[mini, k, o - mini * columns]
    return y
