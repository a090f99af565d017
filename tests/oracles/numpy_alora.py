"""ALoRA, entry by entry in float64: arXiv 2403.16187, a LoRA with a switch for each rank, and one round's moves."""

import numpy as np

VARIANTS = ({},)


def forward(params, kernel, x, options):
    """y: (tokens, out); the first options["rank"] ranks are on unless options["gamma"] says otherwise."""
    a, b, kernel, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], kernel, x))
    gamma = options.get("gamma") or [float(k < options["rank"]) for k in range(a.shape[1])]
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for token, row in enumerate(x):
        for o in range(kernel.shape[1]):
            y[token, o] = sum(row[i] * kernel[i, o] for i in range(len(row)))
            for k, switch in enumerate(gamma):
                y[token, o] += switch * sum(row[i] * a[i, k] for i in range(len(row))) * b[k, o]
    return y


def scores(gamma, score):
    """{(site, rank): S(all) - S(all but it) + S(only it)} for the ranks that are on; score takes a list of lists."""
    found = {}
    for site, row in enumerate(gamma):
        for rank, switch in enumerate(row):
            if switch:
                without = [[v * ((s, k) != (site, rank)) for k, v in enumerate(r)] for s, r in enumerate(gamma)]
                only = [[float((s, k) == (site, rank)) for k in range(len(r))] for s, r in enumerate(gamma)]
                found[site, rank] = score(gamma) - score(without) + score(only)
    return found


def round_of(gamma, importance, count):
    """(pruned, ranks given to each site): the ``count`` lowest go, and sites that lost none get as many, in turns.

    One rank is left at least; a site without any comes last in turn.
    """
    pruned = sorted(importance, key=importance.get)[: min(count, len(importance) - 1)]
    lost = {site for site, _ in pruned}
    held = [[v for (site, _), v in importance.items() if site == s] for s in range(len(gamma))]
    mean = [np.mean(values) if values else -np.inf for values in held]
    given = [0] * len(gamma)
    takers = sorted((s for s in range(len(gamma)) if s not in lost), key=lambda s: -mean[s])
    left = len(pruned)
    while left and takers:
        takers = [s for s in takers if sum(gamma[s]) + given[s] < len(gamma[s])]
        for site in takers[:left]:
            given[site] += 1
        left -= min(left, len(takers))
    return pruned, given
