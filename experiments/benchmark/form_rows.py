"""Row forms: MoR's sum over experts, N maps of rank r from T tokens to ``out`` numbers, in three forms.

    one product   z (T, N r) times bcat (N r, out), both scaled first: `MoR.delta`
    loop          a scan over the experts, each a product with b, scaled before and after
    apart         one product of the (T N, r) scaled rows with b, then a weighted sum over the experts

Forward and backward in float32. All three multiply as often in their products; what differs is how large each product
is, and how much is read and written between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from programs import Program, time_ratio

from mor_jax.adapters import AdapterInputs, Kernel, Leaves, MoR

TOKENS = 1024
SIZES = ((8, 4, 704), (8, 32, 704), (2, 64, 704), (8, 8, 4096), (16, 16, 4096))  # N, r, out
Form = Callable[[MoR, Any, Array, Array], Array]


def one_product(adapter: MoR, params: Any, hidden: Array, gates: Array) -> Array:
    """`MoR.delta`: hidden (T, r), gates (T, N) -> (T, out)."""
    output = jnp.zeros((len(hidden), params["b"].shape[-1]), hidden.dtype)
    kernel = Kernel(jnp.zeros((0, 0)))  # nothing of it is read
    return adapter.delta(Leaves(params), hidden, output, kernel, gates, AdapterInputs())


def loop(adapter: MoR, params: Any, hidden: Array, gates: Array) -> Array:
    """Expert after expert, added up."""

    def add(total: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        gate, lam_a, lam_b = expert
        return total + gate[:, None] * ((hidden * lam_a) @ params["b"]) * lam_b, None

    start = jnp.zeros((len(hidden), params["b"].shape[-1]), hidden.dtype)
    return adapter.scale * jax.lax.scan(add, start, (gates.T, params["lam_a"], params["lam_b"]))[0]


def apart(adapter: MoR, params: Any, hidden: Array, gates: Array) -> Array:
    """Every expert's output, then their weighted sum."""
    outputs = jnp.einsum("tnr,ro->tno", hidden[:, None] * params["lam_a"], params["b"])
    return adapter.scale * jnp.einsum("tno,tn,no->to", outputs, gates, params["lam_b"])


def mixture_inputs(count: int, rank: int, out: int) -> tuple[MoR, tuple[Any, Array, Array]]:
    """The adapter, and (leaves, hidden (T, r), gates (T, N)), random."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    sizes = {"b": (rank, out), "lam_a": (count, rank), "lam_b": (count, out)}
    params = {name: jax.random.normal(next(keys), size) for name, size in sizes.items()}
    gates = jax.nn.softmax(jax.random.normal(next(keys), (TOKENS, count)))
    return MoR(rank=rank, num_experts=count), (params, jax.random.normal(next(keys), (TOKENS, rank)), gates)


def _program(form: Form, adapter: MoR, inputs: tuple[Any, Array, Array]) -> Program:
    def step(state: Any, *inputs: Any) -> Any:
        return state, jax.grad(lambda *own: jnp.square(form(adapter, *own)).sum(), argnums=(0, 1, 2))(*inputs)

    return Program(form.__name__, jax.jit(step), (), *inputs)


def mixture_forms(rounds: int) -> Iterator[dict[str, Any]]:
    """Time of the other forms ÷ that of one product, for each size."""
    for count, rank, out in SIZES:
        adapter, inputs = mixture_inputs(count, rank, out)
        chosen = _program(one_product, adapter, inputs)
        for form in (loop, apart):
            found = time_ratio(_program(form, adapter, inputs).run, chosen.run, rounds)
            what = f"MoR's sum over experts, {form.__name__} ÷ one product: N {count}, r {rank}, out {out}"
            yield {"id": "forms", "what": what, "must": "", **found, "note": f"{TOKENS} tokens, forward and backward"}
