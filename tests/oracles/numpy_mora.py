"""MoRA, entry by entry in float64: arXiv 2405.12130, eqs. 6 to 9, h = W x + f_decompress(M f_compress(x)).

The groups and angles follow the paper's text and its released layer, one entry at a time.
"""

import math

import numpy as np

VARIANTS = (
    {},
    {"group_type": "contiguous"},
    {"group_type": "contiguous_tiled"},
    {"group_type": "sharing_repeated"},
    {"group_type": "rotation"},
    {"reset_every": 5, "group_type": "contiguous"},
)
TYPES = ("sharing", "contiguous", "contiguous_tiled", "sharing_repeated")


def group_of_neighbours(entry, length, k):
    """The group of one of ``length`` neighbours in k groups, counted out: the first length mod k have one more."""
    groups = []
    for group in range(k):
        groups += [group] * (length // k + (group < length % k))
    return groups[entry]


def change(matrix, row, out_features, group_type):
    """delta: (out,) of one token's x: (in,) through one matrix (k, k)."""
    k = len(matrix)
    blocks = math.ceil(len(row) / k)
    long = [row[j % len(row)] for j in range(blocks * k)]  # the beginning of x is repeated at its end
    if group_type == "rotation":
        flat = []
        for block in range(blocks):
            part = long[block * k : (block + 1) * k]
            turned = list(part)
            for j in range(k // 2):
                angle = block * 10000.0 ** (-2 * j / k)
                turned[j] = part[j] * math.cos(angle) - part[j + k // 2] * math.sin(angle)
                turned[j + k // 2] = part[j + k // 2] * math.cos(angle) + part[j] * math.sin(angle)
            flat += [sum(turned[j] * matrix[j, o] for j in range(k)) for o in range(k)]
        return [flat[o % len(flat)] for o in range(out_features)]
    small = [0.0] * k
    if group_type.startswith("contiguous"):  # of x itself: nothing is repeated
        for j, value in enumerate(row):
            small[group_of_neighbours(j, len(row), k)] += value
    else:
        for j, value in enumerate(long):
            small[j % k] += value
    mapped = [sum(small[j] * matrix[j, o] for j in range(k)) for o in range(k)]
    if group_type in ("contiguous", "sharing_repeated"):
        return [mapped[group_of_neighbours(o, out_features, k)] for o in range(out_features)]
    return [mapped[o % k] for o in range(out_features)]


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out) and x (tokens, in); with reset_every, the accumulators' changes too."""
    kernel, x = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    parts = [(np.asarray(params["m"], np.float64), options["group_type"])]
    if options["reset_every"]:
        parts = [(parts[0][0], TYPES[int(params["group_type"][0])])]
        parts += [(np.asarray(m, np.float64), name) for m, name in zip(params["accumulated"], TYPES, strict=True)]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
        for matrix, name in parts:
            y[token] += change(matrix, row, kernel.shape[1], name)
    return y
