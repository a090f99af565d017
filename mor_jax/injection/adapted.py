"""A Flax module around any Flax module: the same call, plus an adapter at every site of the plan.

The base runs under ``nn.intercept_methods``. Interception is not part of jit's cache key, so the context is opened
inside ``apply``, hence inside whatever is traced. Statistics leave the model as the gradients of zero probe leaves, and
balance losses enter it as gradients, because collections of our own would be dropped by scans that do not list them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mor_jax.adapters import GATED_PRODUCT, Adapter, AdapterInputs, Kernel, Leaves, site_id
from mor_jax.injection.arguments import check_collections, check_model
from mor_jax.injection.carriers import add_gradient, emit
from mor_jax.injection.chain import carried_chain, initial_chain, replace_chain
from mor_jax.injection.leaves import RESERVED, init_leaves, join, prepare_leaves, site_leaves, with_shared
from mor_jax.injection.linear import Contraction, LinearKind, find_kind, first_argument
from mor_jax.injection.plan import AdaptedSite, AdapterPlan
from mor_jax.injection.products import is_product
from mor_jax.injection.resolve import resolve_sites
from mor_jax.injection.rows import inputs_for
from mor_jax.injection.scopes import OwnModules
from mor_jax.injection.targets import InjectionError
from mor_jax.injection.wiring import watch_derivatives


@dataclass
class _Call:
    """What one traced run of the base keeps: open block gates, chains, and the last shared matmul of each group."""

    plan: AdapterPlan
    inputs: AdapterInputs
    common: dict[str, Leaves] = field(default_factory=dict)
    chains: list[dict[str, Any]] = field(default_factory=list)
    visited: set[str] = field(default_factory=set)
    gates: list[tuple[str, Array]] = field(default_factory=list)
    shared: dict[tuple[str, ...], tuple[Array, Any, dict[str, Array]]] = field(default_factory=dict)
    capture: Callable[[str, Array, Array], None] | None = None
    own: OwnModules = field(default_factory=OwnModules)
    calls: Counter = field(default_factory=Counter)  # of each site so far

    def intercept(self, next_fun, args, kwargs, context):
        with self.own.call(context.module) as path:
            if path is None or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            return self._call(path, context.module, next_fun, args, kwargs)

    def _call(self, path: str, module: nn.Module, next_fun, args, kwargs):
        chain = carried_chain(args[0]) if args else None
        if chain is None:
            return self._run(path, module, next_fun, args, kwargs)
        self.chains.append(dict(chain.sites))
        try:
            output = self._run(path, module, next_fun, args, kwargs)
        finally:
            sites = self.chains.pop()
        changed = any(value is not chain.sites[name] for name, value in sites.items())
        return replace_chain(output, sites) if changed else output  # a remat wrapper leaves it to the block inside

    def _run(self, path: str, module: nn.Module, next_fun, args, kwargs):
        if path in self.plan.gates and module.has_variable("params", RESERVED):
            return self._run_block(path, module, next_fun, args, kwargs)
        before = self.calls[path]
        output = next_fun(*args, **kwargs)
        kind = find_kind(module, self.plan.kinds) if path in self.plan.paths else None
        if kind is None or self.calls[path] > before:  # a class that calls its parent's __call__ is called twice
            return output
        self.calls[path] += 1
        self.visited.add(path)
        return self._adapt(self.plan[path], kind, module, args, kwargs, output)

    def _run_block(self, path: str, module: nn.Module, next_fun, args, kwargs):
        bundle = module.get_variable("params", RESERVED)
        leaves = Leaves(bundle["params"])
        adapted, h = self.plan.gates[path], first_argument(args, kwargs)
        inputs = inputs_for(h.shape[:-1], self.inputs)
        gates = adapted.adapter.gate(leaves, h, inputs)
        self.gates.append((path, self._watch(adapted.adapter, leaves, h, gates, bundle["probes"], inputs)))
        try:
            return next_fun(*args, **kwargs)
        finally:
            self.gates.pop()

    def _watch(
        self,
        method: Adapter,
        leaves: Leaves,
        h: Array,
        gates: Any,
        probes: Mapping[str, Array],
        inputs: AdapterInputs,
    ) -> Array:
        """Gates that carry the balance loss's gradient and the router's statistics."""
        mask = None if inputs.segment_ids is None else inputs.segment_ids > 0
        statistics = method.statistics(leaves, h, gates, inputs) if probes else {}
        balance = method.balance(gates, mask)
        if balance is not None:
            if inputs.auxiliary_scale is not None:
                gradient = jax.grad(lambda g: method.balance(g, mask))(jax.lax.stop_gradient(gates))
                gates = add_gradient(gates, gradient * (inputs.auxiliary_scale / self.plan.num_gate_sites))
            statistics["balance"] = jax.lax.stop_gradient(balance)[None]
        return emit(gates, dict(probes), {name: statistics[name] for name in probes}) if probes else gates

    def _factored(self, adapted: AdaptedSite, module: nn.Module, leaves: Leaves, x: Array) -> Array:
        """X times the site's input factor in float32, shared with the siblings that read the identical x."""
        factor = adapted.adapter.input_factor(leaves)
        if factor is None:
            return x
        siblings = _siblings(adapted, module)
        if not siblings:
            product = jnp.matmul(x, factor.astype(x.dtype), preferred_element_type=jnp.float32)
            return checkpoint_name(product, GATED_PRODUCT) if _worth_keeping(adapted) else product
        kept = self.shared.get(adapted.group)
        # A transformation that traces its body twice may hand in the same x, but never the same parent.
        if kept is not None and kept[0] is x and kept[1] is module.parent and adapted.site.path in kept[2]:
            return kept[2][adapted.site.path]
        factors = {}
        for path, bundle in siblings.items():
            part = self.plan[path].adapter.input_factor(self._leaves(self.plan[path], bundle))
            if part is not None:
                factors[path] = part.astype(x.dtype)
        product = jnp.matmul(x, jnp.concatenate(list(factors.values()), 1), preferred_element_type=jnp.float32)
        parts, start = {}, 0
        for path, part in factors.items():
            parts[path] = product[..., start : start + part.shape[1]]
            start += part.shape[1]
        self.shared[adapted.group] = (x, module.parent, parts)
        return parts[adapted.site.path]

    def _adapt(self, adapted: AdaptedSite, kind: LinearKind, module: nn.Module, args, kwargs, output: Array) -> Array:
        argument, method = first_argument(args, kwargs), adapted.adapter
        bundle = module.get_variable("params", RESERVED)
        value = meta.unbox(module.get_variable("params", kind.kernel_leaf))
        contraction = _contraction(adapted, kind, module, args, kwargs, value.shape)
        bias = _bias(module, kind, contraction, output)
        if adapted.own_axes:
            delta = self._change_of_each(adapted, module, bundle, value, contraction, argument, output - bias)
            return output + contraction.restore_output(delta, output)
        dropped = method.dropout and not self.inputs.deterministic
        watched = self.capture is not None or bundle["probes"]
        if not dropped and not watched and is_product(module, kind, value):
            x = contraction.flatten_input(argument).astype(output.dtype)
            inputs, kernel = self._inputs_at(adapted, bundle, x.shape[:-1]), adapted.kernel_of(value)
            whole = method.output(self._leaves(adapted, bundle), x, kernel, inputs)
            if whole is not None:
                return contraction.restore_output(whole, output) + bias
        delta = self._change(adapted, module, bundle, value, contraction, argument, output - bias)
        if self.capture is not None:
            self.capture(adapted.site.path, contraction.flatten_input(argument), delta)
        return output + contraction.restore_output(delta, output)

    def _change_of_each(self, adapted, module, bundle, value, contraction: Contraction, argument, base) -> Array:
        """The change by each of the maps that a module's kernel is, (batch axes..., kept..., out)."""
        values = jnp.moveaxis(value, contraction.batch_axes, range(adapted.own_axes))
        x = contraction.flatten_input(argument).astype(base.dtype)
        base = contraction.flatten_output(base, x.shape[:-1])
        one = partial(self._change, adapted, module)
        one = lambda bundle, value, x, base, one=one: one(bundle, value, Contraction(), x, base)  # noqa: E731
        for _ in range(adapted.own_axes):
            one = jax.vmap(one)
        delta = one(dict(bundle), values, x, base)
        if self.capture is not None:
            self.capture(adapted.site.path, x, delta)
        return delta

    def _change(self, adapted, module, bundle, value, contraction: Contraction, argument: Array, base: Array) -> Array:
        """The change by one map, (kept..., out), from what its module read and put out less the bias."""
        leaves, method = self._leaves(adapted, bundle), adapted.adapter
        kept = contraction.kept_shape(argument.shape)
        inputs, kernel = self._inputs_at(adapted, bundle, kept), adapted.kernel_of(value)
        x = argument  # the identical array, so that siblings can recognise it
        if method.dropout and not inputs.deterministic:
            left = _kept(x, method.dropout, inputs.key, adapted.site.path)
            x = method.drop(x, dataclasses.replace(inputs, kept=left))
            clean = contraction.flatten_input(argument).astype(base.dtype)
            inputs = dataclasses.replace(inputs, clean_x=clean, kept=contraction.flatten_input(left))
        factored = self._project(adapted, module, leaves, x, contraction, base.dtype)
        if adapted.gate_path is not None:
            gates = self._open_gate(adapted)
        else:
            h = factored  # a router reads x before dropout
            if method.num_gates and inputs.kept is not None:
                h = self._project(adapted, module, leaves, argument, contraction, base.dtype)
            gates = method.gate(leaves, h, inputs)
            if gates is not None:
                gates = self._watch(method, leaves, h, gates, bundle["probes"], inputs)
        base = contraction.flatten_output(base, factored.shape[:-1])
        delta = self._delta(adapted, leaves, factored, base, kernel, gates, inputs)
        if gates is None and bundle["probes"]:
            statistics = method.statistics(leaves, contraction.flatten_input(argument), None, inputs)
            delta = emit(delta, dict(bundle["probes"]), {name: statistics[name] for name in bundle["probes"]})
        return delta

    def _inputs_at(self, adapted: AdaptedSite, bundle: Mapping[str, Any], kept: tuple[int, ...]) -> AdapterInputs:
        """What is known where a site reads, with a key of its own for this layer (or expert)."""
        inputs = inputs_for(kept, self.inputs)
        if inputs.key is None:
            return inputs
        key = jax.random.fold_in(inputs.key, site_id(adapted.site.path))
        return dataclasses.replace(inputs, key=jax.random.fold_in(key, bundle["layer"][0]))

    def _leaves(self, adapted: AdaptedSite, bundle: Mapping[str, Any]) -> Leaves:
        own = Leaves(bundle["params"], bundle["state"], bundle["constants"])
        return with_shared(own, self.common[adapted.shared]) if adapted.shared else own

    def _delta(self, adapted: AdaptedSite, leaves: Leaves, x, base, kernel: Kernel, gates, inputs) -> Array:
        """The method's change; a chained site takes its entry of the block's chain and leaves another."""
        if adapted.chain not in self.plan.chained:
            return adapted.adapter.delta(leaves, x, base, kernel, gates, inputs)  # pyright: ignore[reportReturnType]
        if not self.chains:
            raise InjectionError(f"{adapted.site.path} is outside of the layers that thread carry_extra; exclude it")
        inputs = dataclasses.replace(inputs, chain=self.chains[-1][adapted.chain])
        delta, self.chains[-1][adapted.chain] = adapted.adapter.delta(leaves, x, base, kernel, gates, inputs)
        return delta

    def _open_gate(self, adapted: AdaptedSite) -> Array:
        for path, gates in reversed(self.gates):
            if path == adapted.gate_path:
                return gates
        raise InjectionError(f"{adapted.site.path}: {adapted.gate_path}, which decides its gate, is not being called")

    def _project(self, adapted, module, leaves: Leaves, x: Array, contraction: Contraction, dtype) -> Array:
        flat = contraction.flatten_input(x)
        if flat is not x or x.dtype != dtype:
            return self._factored(dataclasses.replace(adapted, group=()), module, leaves, flat.astype(dtype))
        return self._factored(adapted, module, leaves, x)


def _contraction(
    adapted: AdaptedSite, kind: LinearKind, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], shape: tuple
) -> Contraction:
    """How this call contracts, which must be as the plan has it as far as the kernel is concerned."""
    found, planned = kind.contract(module, args, kwargs, shape), adapted.contraction
    for name in ("in_axes", "out_axes", "batch_axes"):
        if getattr(found, name) != getattr(planned, name):
            raise InjectionError(
                f"{adapted.site.path} is called with {name} {getattr(found, name)} and was planned with "
                f"{getattr(planned, name)}: give resolve_sites example inputs as this call has them"
            )
    return found


def _siblings(adapted: AdaptedSite, module: nn.Module) -> dict[str, Any]:
    """What the sites of a group hold, read from their parent; {} where a transformation lies in between."""
    if not adapted.group or not isinstance(module.parent, nn.Module):
        return {}
    params = module.parent.variables["params"]
    bundles = {path: params[path.rsplit("/", 1)[-1]][RESERVED] for path in adapted.group}
    layer = module.get_variable("params", RESERVED)["layer"]
    if bundles[adapted.site.path]["layer"] is not layer:
        return {}
    return {path: bundle for path, bundle in bundles.items() if bundle["layer"].shape == layer.shape}


def _bias(module: nn.Module, kind: LinearKind, contraction: Contraction, output: Array) -> Array:
    """The module's bias as it broadcasts to its output, 0 where it has none."""
    if not module.has_variable("params", kind.bias_leaf):
        return jnp.zeros((), output.dtype)
    bias = meta.unbox(module.get_variable("params", kind.bias_leaf)).astype(output.dtype)
    return contraction.place_bias(bias, output.ndim)


def _worth_keeping(adapted: AdaptedSite) -> bool:
    """Whether the backward pass should keep the site's thin product, which decides a gate, rather than a wide x.

    The cotangent of such an x depends on the gate. Computed again, the gate waits for x, and a device of a sharded run
    holds the kernels that make x (an MLP's gate and up) while it gathers this site's (down).
    """
    wide = adapted.site.in_features > adapted.site.out_features
    return wide and adapted.adapter.routed and adapted.gate_path is None


def _kept(x: Array, rate: float, key: Array | None, path: str) -> Array:
    """Which entries of x dropout leaves, bool in the shape of x."""
    if key is None:
        raise ValueError(f"{path}: dropout needs AdapterInputs.key while deterministic is False")
    return jax.random.bernoulli(key, 1 - rate, x.shape)


class Adapted(nn.Module):
    """Any linen module with adapters, its own code and parameter names unchanged.

    ``apply`` takes ``{"params": base, "adapters": leaves.params, "adapter_state": ..., "adapter_constants": ...,
    "adapter_probes": ...}`` and any other collection of the base (a cache), and has the base's call signature plus
    ``adapter_inputs``. Give either a ``plan`` or ``adapter`` and ``targets``, from which each call finds the plan.

    Attributes:
        base: The module to adapt.
        plan: From ``resolve_sites``.
        adapter: The method, where no plan is given.
        targets: Its targets.
    """

    base: nn.Module
    plan: AdapterPlan | None = None
    adapter: Adapter | None = None
    targets: tuple[str, ...] = ()

    def resolve(self, *args: Any, **kwargs: Any) -> AdapterPlan:
        """The plan given, or the one found by tracing the base on these arguments."""
        if self.plan is not None:
            return self.plan
        if self.adapter is None:
            raise InjectionError("Adapted needs a plan, or an adapter and targets")
        return resolve_sites(self.base, self.adapter, self.targets, *args, **kwargs)

    def init(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rngs: Array, *args: Any, adapter_inputs: AdapterInputs | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Fresh base variables and adapters: {"params", "adapters", "adapter_state", "adapter_constants", ...}."""
        variables = self.base.init(rngs, *args, **kwargs)
        leaves = init_leaves(rngs, self.resolve(*args, **kwargs), variables["params"])
        own = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
        return {**variables, **own}

    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        variables: Mapping[str, Any],
        *args: Any,
        adapter_inputs: AdapterInputs | None = None,
        capture: Callable[[str, Array, Array], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``base.apply`` with every site's delta added.

        Args:
            variables: The base's collections and the adapters' (class docstring).
            *args: The base's arguments.
            adapter_inputs: What the methods may know of the batch.
            capture: Called with (path, x, delta) at each visit, for calibration of models without scans.
            **kwargs: The base's keyword arguments, and ``mutable``, ``rngs``, ``method``.

        Raises:
            InjectionError: if the adapters are missing, or a site of the plan was not visited.
        """
        check_model(self.base)
        plan = self.plan or self.resolve(*args, **{k: v for k, v in kwargs.items() if k not in _FLAX_ARGUMENTS})
        check_collections(variables, plan)
        variables, inputs = dict(variables), adapter_inputs or AdapterInputs()
        leaves = Leaves(*(variables.pop(name, {}) for name in ("adapters", "adapter_state", "adapter_constants")))
        leaves = watch_derivatives(plan, leaves, inputs)
        probes = variables.pop("adapter_probes", {})
        params = variables.pop("params")
        joined = join(plan, params, prepare_leaves(plan, leaves, params), probes)
        common = {name: site_leaves(leaves, name) for name in plan.shared}
        call = _Call(plan, inputs, common, capture=capture)
        if plan.chained:
            run = lambda *args, **kwargs: self.base.apply({"params": params, **variables}, *args, **kwargs)  # noqa: E731
            kwargs["carry_extra"] = initial_chain(self.base, plan, run, args, kwargs)
        method = kwargs.pop("method", None)
        with nn.intercept_methods(call.intercept):
            entry = call.own.entering(self.base, method)
            result = self.base.apply({"params": joined, **variables}, *args, method=entry, **kwargs)
        missed = [s.site.path for s in plan.sites if s.site.path not in call.visited]
        if missed and method is None:
            raise InjectionError(
                f"{missed[0]} has an adapter but did not run in this call; exclude it from the targets"
            )
        return result


_FLAX_ARGUMENTS = ("mutable", "rngs", "method", "capture_intermediates")
