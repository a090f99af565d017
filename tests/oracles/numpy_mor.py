"""MoR, entry by entry in float64: arXiv 2410.13408, a softmax over N experts that scale the factors of one LoRA.

    delta = s sum_i g_i (((x a) * lam_a[i]) b) * lam_b[i]

Expert by expert, so the form that stacks the experts into one matmul is not shared with ``mor_jax``.
"""

import math

import numpy as np

VARIANTS = (
    {},
    {"router": "mean"},
    {"router": "balanced", "lam_std": 0.02},
    {"num_experts": 1},
    {"top_k": 2, "router": "balanced"},
    {"scope": "block"},
    {"scope": "block", "top_k": 2},
)


def gates(params, x, options):
    """(tokens, N): 1/N for the mean router, else a softmax of the logits, of the top_k largest alone if top_k > 0."""
    count = options["num_experts"]
    if options["router"] == "mean" or count == 1:
        return np.full((len(x), count), 1 / count)
    router, x = np.asarray(params["router"], np.float64), np.asarray(x, np.float64)
    result = np.zeros((len(x), count))
    for token, row in enumerate(x):
        logits = [sum(row[i] * router[i, n] for i in range(len(row))) for n in range(count)]
        kept = sorted(range(count), key=lambda n: -logits[n])[: options["top_k"] or count]
        total = sum(math.exp(logits[n] - logits[kept[0]]) for n in kept)
        for n in kept:
            result[token, n] = math.exp(logits[n] - logits[kept[0]]) / total
    return result


def forward(params, kernel, x, options):
    """y: (tokens, out) for kernel (in, out) and x (tokens, in).

    A gate reads options["block_input"] where it is a block's, and options["router_input"] where x was dropped out.
    """
    read = options["block_input"] if options["scope"] == "block" else options.get("router_input", x)
    weights = gates(params, read, options)
    a, b, lam_a, lam_b = (np.asarray(params[name], np.float64) for name in ("a", "b", "lam_a", "lam_b"))
    kernel, x = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    scale = options["alpha"] / options["rank"]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        hidden = [sum(row[i] * a[i, k] for i in range(len(row))) for k in range(a.shape[1])]
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for n in range(options["num_experts"]):
                expert = sum(hidden[k] * lam_a[n, k] * b[k, o] for k in range(a.shape[1]))
                y[token, o] += scale * weights[token, n] * expert * lam_b[n, o]
    return y


def balance(weights, mask, options):
    """The weighted Switch loss N sum_i f_i p_i of gates (tokens, N), over the tokens where mask is true."""
    count = options["num_experts"]
    share, mean, total = [0.0] * count, [0.0] * count, 0
    for row, real in zip(np.asarray(weights, np.float64), mask, strict=True):
        if real:
            total += 1
            share[int(np.argmax(row))] += 1
            for n in range(count):
                mean[n] += row[n]
    return options["balance_weight"] * count * sum(f * p for f, p in zip(share, mean, strict=True)) / total**2
