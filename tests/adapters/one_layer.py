"""One adapted linear map outside of any model, as the tests of the methods run it."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp

from mor_jax.adapters import AdapterInputs, Kernel, Leaves, Site, make_adapter

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"


def oracle(name):
    """The module tests/oracles/numpy_<name>.py; FileNotFoundError where a method has none."""
    path = ORACLES / f"numpy_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(name, options, **more):
    """A method at test size: num_experts 4 and rank 3 where it has them, or the smallest rank of its oracle file."""
    names = {f.name for f in dataclasses.fields(type(make_adapter(name)))}
    sizes = {key: value for key, value in {"num_experts": 4, "rank": 3}.items() if key in names}
    chosen = {**sizes, **options, **more}
    if "rank" in chosen:
        chosen["rank"] = max(chosen["rank"], getattr(oracle(name), "SMALLEST_RANK", 1))
    return make_adapter(name, **chosen)


def fitting(name, *sizes):
    """The sizes, rounded up to the multiple that the method's oracle file asks for (1 if it has no MULTIPLE)."""
    multiple = getattr(oracle(name), "MULTIPLE", 1)
    return tuple(-(-size // multiple) * multiple for size in sizes)


def kernel_of(key, in_features=7, out_features=5, dtype=jnp.float32):
    return Kernel(jax.random.normal(key, (in_features, out_features), dtype) / in_features**0.5)


def site_of(kernel, num_layers=1):
    return Site("layers/proj", *kernel.shape, num_layers=num_layers)


def start(adapter, key, kernel, layer=0, block_features=0):
    """Leaves as training starts with them, a gate at a block and what sites share among them, as methods see them."""
    site = site_of(kernel)
    both = zip(adapter.init(key, site, jnp.int32(layer), kernel), adapter.shared(key, (site,)), strict=True)
    leaves = Leaves(*({**own, **shared} for own, shared in both))
    gate = adapter.init_gate(jax.random.fold_in(key, 1), block_features) if adapter.gate_block else {}
    return leaves._replace(params={**leaves.params, **gate})


def scramble(leaves, key, std=0.3):
    """Every trained leaf moved away from its start, so that no zero and no one hides a mistake."""
    flat, tree = jax.tree.flatten(leaves.params)
    keys = jax.random.split(key, len(flat))
    moved = [leaf + std * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(flat, keys, strict=True)]
    return leaves._replace(params=jax.tree.unflatten(tree, moved))


def gates_of(adapter, leaves, x, block_input=None):
    """The gates as injection asks for them, and what ``delta`` receives as x."""
    own = leaves
    if adapter.gate_block:
        own = leaves._replace(params={k: v for k, v in leaves.params.items() if k != "router"})
        gates = adapter.gate(Leaves({"router": leaves.params["router"]}), block_input, AdapterInputs())
    factor = adapter.input_factor(own)
    if factor is not None:
        x = jnp.matmul(x, factor.astype(x.dtype), preferred_element_type=jnp.float32)
    if not adapter.gate_block:
        gates = adapter.gate(own, x, AdapterInputs())
    return gates, x


def delta(adapter, leaves, x, kernel, block_input=None, gates=None):
    """The change of the output x @ kernel, in the dtype of x; ``gates: (N,)`` replace the method's own."""
    own_gates, h = gates_of(adapter, leaves, x, block_input)
    if gates is not None:
        own_gates = jnp.broadcast_to(gates, own_gates.shape)
    base_output = x @ kernel.dense(x.dtype)
    return adapter.delta(leaves, h, base_output, kernel, own_gates, AdapterInputs())


def forward(adapter, leaves, x, kernel, block_input=None, gates=None):
    """x @ kernel + delta."""
    return x @ kernel.dense(x.dtype) + delta(adapter, leaves, x, kernel, block_input, gates)
