"""MoRA and ReMoRA (arXiv 2405.12130; the authors' code): one square matrix instead of two thin ones.

    y = x W + decompress(compress(x) M)        M: (k, k), 0 at the start; k = round(sqrt((in + out) r)); no alpha

With the parameters of a rank-r LoRA the change can have rank k. compress and decompress have no parameters:

    sharing (1)          input j joins group j mod k, groups are summed; the output is tiled and cut
    contiguous (2)       neighbours form a group; each output entry is repeated for its neighbours
    contiguous_tiled (3) groups as in 2, output as in 1
    sharing_repeated (4) groups as in 1, output as in 2
    rotation (6)         x is cut into blocks of k (even), block i is rotated by the angles i 10000^(-2 j / k) of rotary
                         position embeddings, each goes through the same M; the blocks in a row are the output, cut, or
                         tiled where they are too short

The numbers are those of the code, and so is what happens where k does not divide f entries. Strides and blocks lengthen
x to a multiple of k by repeating its beginning. Neighbours lengthen nothing: of k groups the first f mod k have one
member more than the others, on both sides. Types 1 to 4 are for large ranks, rotation for small ones, but it reads only
as many blocks as the output has room for: where in > out most of x is ignored, which is warned of. Hence our default:
sharing.

Ours: k is at most ``out`` (and at most ``in`` where neighbours are grouped). The released code lets it be larger on
narrow maps, where the rest of M's columns, or rows, meet no entry and are never trained.

ReMoRA (``reset_every`` > 0; the paper's 2,000) folds M into the model every so many steps, zeroes it, and goes on with
the next of the types 1 to 4. The base stays frozen: a fixed type is linear in M, so folded matrices add up in one
accumulator a type. The event that folds reads and writes these leaves:

    params  {"m": (k, k)}
    state   {"accumulated": (4, k, k) float32, one a type; "group_type": (1,) int32, the current type less 1}
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import Adapter, AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.precision import full_precision
from mor_jax.adapters.remora import FoldMatrix

GROUP_TYPES = ("sharing", "contiguous", "contiguous_tiled", "sharing_repeated")
# [compress][decompress] -> type: compress by stride or by neighbours, decompress by tiling or by repeating.
_TYPE_OF = ((0, 3), (2, 1))
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MoRA(Adapter):
    """High-rank updating with a square matrix."""

    name: ClassVar[str] = "mora"
    title: ClassVar[str] = "MoRA"
    paper: ClassVar[str] = "2405.12130"
    optional_rule: ClassVar[str] = "fold (reset_every)"

    rank: int = 8  # of the LoRA with as many parameters
    group_type: Literal["sharing", "contiguous", "contiguous_tiled", "sharing_repeated", "rotation"] = "sharing"
    reset_every: int = 0  # steps between two folds of ReMoRA; 0 is MoRA

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("rank")
        self.require_not_negative("reset_every")
        self.require_choice("group_type", *GROUP_TYPES, "rotation")
        if self.reset_every and self.group_type == "rotation":
            raise ValueError(f"MoRA.reset_every cycles through {', '.join(GROUP_TYPES)}; start with one of them")

    @property
    def rule(self) -> str:
        """ReMoRA folds M."""
        return "fold" if self.reset_every else ""

    def rules(self, total_steps: int) -> tuple[FoldMatrix, ...]:
        """The fold of ReMoRA."""
        return (FoldMatrix(interval=self.reset_every, total_steps=total_steps),) if self.reset_every else ()

    def size(self, site: Site) -> int:
        """k: rows and columns of M, each of which is read; for rotation even, or 1 for a single output."""
        return self._square(site, self._room(site))

    def _room(self, site: Site) -> int:
        """The largest k of which no row and no column is left without an entry."""
        strided = not self.reset_every and self.group_type in ("sharing", "sharing_repeated", "rotation")
        return site.out_features if strided else min(site.in_features, site.out_features)

    def _square(self, site: Site, room: int) -> int:
        size = min(int(math.sqrt((site.in_features + site.out_features) * self.rank) + 0.5), room)
        return max(size // 2 * 2, min(room, 2)) if self.group_type == "rotation" else size

    def read_differently(self, version: int, site: Site) -> str:
        """Up to version 1 neighbours lengthened x, and k could exceed what is read."""
        if version > 1:
            return ""
        k, (into, out_of) = self.size(site), (site.in_features, site.out_features)
        if self._square(site, 2**31) != k:
            return f"MoRA's M had more rows or columns than the map reads, and is {k} x {k} now"
        neighbours, repeated = self._ways()
        if any(neighbours) and into % k or any(repeated) and out_of % k:
            return f"MoRA grouped the neighbours among {into} inputs and {out_of} outputs otherwise for k = {k}"
        return ""

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"m": (k, k)}, 0, and for ReMoRA its accumulators."""
        k = self.size(site)
        used = math.ceil(site.out_features / k) * k
        if self.group_type == "rotation" and used < site.in_features:
            message = "%s: MoRA's rotation reads %d of %d inputs; choose group_type='sharing'"
            _LOGGER.warning(message, site.path, used, site.in_features)
        state = {}
        if self.reset_every:
            state["accumulated"] = jnp.zeros((4, k, k), jnp.float32)
            state["group_type"] = jnp.array([GROUP_TYPES.index(self.group_type)], jnp.int32)
        return Leaves({"m": jnp.zeros((k, k), jnp.float32)}, state)

    def _matrices(self, leaves: Leaves) -> Array:
        """(compress, decompress, k, k): one matrix for each way through; those that are never taken are cut off."""
        m = leaves.params["m"]
        if self.reset_every:
            current = jnp.arange(4)[:, None, None] == leaves.state["group_type"]
            return (leaves.state["accumulated"] + current * m)[jnp.array(_TYPE_OF)]
        return m[None, None]

    def _ways(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Whether to compress by neighbours, and to decompress by repeating, for each axis entry of ``_matrices``."""
        if self.reset_every:
            return (False, True), (False, True)
        return (self.group_type.startswith("contiguous"),), (self.group_type in ("contiguous", "sharing_repeated"),)

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """decompress(compress(x) M) for x: (..., in), as (..., out)."""
        k, out_features = leaves.params["m"].shape[0], kernel.shape[1]
        if self.group_type == "rotation":
            return self._rotated(leaves, _wrap(x, -(-x.shape[-1] // k) * k).astype(base_output.dtype), out_features)
        grouped = [_compress(x, k, neighbours) for neighbours in self._ways()[0]]
        return self._grouped(leaves, jnp.stack(grouped, axis=-2).astype(base_output.dtype), out_features)

    def _rotated(self, leaves: Leaves, x: Array, out_features: int) -> Array:
        m = leaves.params["m"].astype(x.dtype)
        blocks = x.reshape(*x.shape[:-1], -1, len(m))[..., : -(-out_features // len(m)), :]
        return _wrap((_rotate(blocks) @ m).reshape(*x.shape[:-1], -1), out_features)

    def _grouped(self, leaves: Leaves, grouped: Array, out_features: int) -> Array:
        """Sums of groups, (..., compress, k), to (..., out)."""
        y = jnp.einsum("...ck,cdkl->...dl", grouped, self._matrices(leaves).astype(grouped.dtype))
        parts = [_decompress(y[..., i, :], out_features, repeat) for i, repeat in enumerate(self._ways()[1])]
        return sum(parts[1:], parts[0])

    def num_params(self, site: Site) -> int:
        """k^2 a layer."""
        return site.num_layers * self.size(site) ** 2

    @full_precision
    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """W + decompress(compress(I) M), exactly; for ReMoRA the accumulators' changes with it."""
        (in_features, out_features), k = kernel.shape, leaves.params["m"].shape[0]
        if self.group_type == "rotation":
            entries = jnp.arange(-(-in_features // k) * k) % in_features  # of the lengthened x
            change = self._rotated(leaves, jnp.eye(in_features)[:, entries], out_features)
        else:
            members = [_members(in_features, k, neighbours) for neighbours in self._ways()[0]]
            change = self._grouped(leaves, jnp.stack(members, axis=-2), out_features)
        return kernel.replace(kernel.dense() + change)

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """M mixes groups of inputs and outputs: no axis follows the kernel's."""
        return {"m": (None, None)}


def _wrap(x: Array, length: int) -> Array:
    """X: (..., n) repeated from its beginning, or cut, to (..., length)."""
    return x[..., :length] if length <= x.shape[-1] else x[..., jnp.arange(length) % x.shape[-1]]


def _groups(length: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((groups, members of each), the same of the groups after them): ``length`` neighbours in k groups."""
    members, larger = divmod(length, k)
    return (larger, members + 1), (k - larger, members)


def _compress(x: Array, k: int, neighbours: bool) -> Array:
    """Sums of groups of x: (..., n), as (..., k): of neighbours, or of every k-th entry; summed in float32."""
    if not neighbours:
        x = _wrap(x, -(-x.shape[-1] // k) * k)
        return jnp.sum(x.reshape(*x.shape[:-1], -1, k), axis=-2, dtype=jnp.float32)
    parts, start = [], 0
    for count, members in _groups(x.shape[-1], k):
        part = x[..., start : start + count * members].reshape(*x.shape[:-1], count, members)
        parts.append(jnp.sum(part, axis=-1, dtype=jnp.float32))
        start += count * members
    return jnp.concatenate(parts, axis=-1)


def _members(length: int, k: int, neighbours: bool) -> Array:
    """(length, k): how often each entry of x is in each group; ``_compress`` of the identity, never written out."""
    if neighbours:
        entries = jnp.arange(length)
        groups = _decompress(jnp.arange(k), length, repeat=True)
    else:
        entries = jnp.arange(-(-length // k) * k)
        groups = entries % k
    return jnp.zeros((length, k)).at[entries % length, groups].add(1.0)


def _decompress(y: Array, length: int, repeat: bool) -> Array:
    """Y: (..., k) to (..., length): each entry repeated for its neighbours, or the whole tiled and cut."""
    if not repeat:
        return _wrap(y, length)
    (larger, members), (_, fewer) = _groups(length, y.shape[-1])
    parts = jnp.repeat(y[..., :larger], members, axis=-1), jnp.repeat(y[..., larger:], fewer, axis=-1)
    return jnp.concatenate(parts, axis=-1)


def _rotate(blocks: Array) -> Array:
    """Block i of (..., blocks, k) turned by the angles i 10000^(-2 j / k), entry j paired with entry j + k / 2."""
    count, k = blocks.shape[-2:]
    if k == 1:
        return blocks  # no pair to turn
    angles = jnp.arange(count)[:, None] * 10000.0 ** (-2 * jnp.arange(k // 2) / k)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = blocks[..., : k // 2].astype(jnp.float32), blocks[..., k // 2 :].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(blocks.dtype)
