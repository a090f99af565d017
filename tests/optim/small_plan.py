"""A plan without a model: one stacked site of three layers and one of a single layer, of any method."""

import jax
import jax.numpy as jnp

from mor_jax.adapters import Kernel, Leaves, Site, make_adapter
from mor_jax.injection.plan import AdaptedSite, AdapterPlan

STACKED, SINGLE = "layers/mlp/up_proj", "proj"
KEY = jax.random.key(0)


def plan_of(name, layers=3, **options):
    adapter = make_adapter(name, **options)
    return AdapterPlan(
        (
            AdaptedSite(Site(STACKED, 6, 4, layers), adapter, (), (0,), (layers,)),
            AdaptedSite(Site(SINGLE, 5, 7), adapter, (), (), ()),
        )
    )


def leaves_of(plan, std=0.3):
    """Leaves of the whole plan, every trained one moved away from its start."""
    trees = Leaves({}, {}, {})
    for number, adapted in enumerate(plan.sites):
        site, method = adapted.site, adapted.adapter
        keys = jax.random.split(jax.random.fold_in(KEY, number), site.num_layers)
        kernel = Kernel(jnp.ones((site.in_features, site.out_features)))
        layers = [method.init(key, site, jnp.int32(layer), kernel) for layer, key in enumerate(keys)]
        own = jax.tree.map(lambda *each: jnp.stack(each), *layers) if adapted.stack_sizes else layers[0]
        moved = {
            leaf: value + std * jax.random.normal(jax.random.fold_in(keys[0], index), value.shape)
            for index, (leaf, value) in enumerate(sorted(own.params.items()))
        }
        for tree, part in zip(trees, (moved, own.state, own.constants), strict=True):
            if part:
                tree[site.path] = part
    return trees


def random_like(tree, seed=1, scale=1.0):
    flat, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return treedef.unflatten([scale * jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, flat, strict=True)])
