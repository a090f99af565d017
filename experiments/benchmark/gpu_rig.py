"""What the GPU rows share: shapes, random weights made on the device, compiled programs, and wall-clock timing."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from programs import SHAPES, Program, Shape, adapter_step, floor_program, full_program, make_batch, time_ratio

from mor_jax.adapters import Adapter, LoRA
from mor_jax.models import DecoderConfig, abstract_params, known_config

GIB = 2**30
REMATS = ("dots", "full")  # of shape G: the first whose step fits the memory is taken
# dense bfloat16 FLOP/s of the data sheets, by what the device calls itself; the first that is contained counts
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12}


class NotMeasuredError(Exception):
    """A line cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Shapes:
    """Models and batches of the rows.

    Attributes:
      main: shape G, one micro-batch.
      other: the same batch on another family's widths.
      small: a model whose full fine-tuning fits too.
      short: the main model on rows half as long.
      accumulate: micro-batches of a whole step of shape G.
      needs_gpu: whether nothing else can carry them.
    """

    main: Shape
    other: Shape
    small: Shape
    short: Shape
    accumulate: int
    needs_gpu: bool


def _in_bfloat16(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")


def _shape_g() -> Shapes:
    llama = _in_bfloat16(known_config("llama-3.1-8b"))
    qwen = DecoderConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        max_position_embeddings=32768,
        rope_theta=1e6,
        qkv_bias=True,
        model_type="qwen2",
    )
    return Shapes(
        main=Shape(llama, 2, 4096),
        other=Shape(_in_bfloat16(qwen), 2, 4096),
        small=Shape(_in_bfloat16(known_config("llama-3.2-1b")), 2, 4096),
        short=Shape(llama, 2, 2048),
        accumulate=16,
        needs_gpu=True,
    )


def _tiny_shape() -> Shapes:
    tiny = dataclasses.replace(SHAPES["tiny"], model=_in_bfloat16(SHAPES["tiny"].model))
    other = tiny.with_model(qkv_bias=True, model_type="qwen2")
    return Shapes(main=tiny, other=other, small=tiny, short=tiny, accumulate=2, needs_gpu=False)


SHAPE_SETS: dict[str, Callable[[], Shapes]] = {"G": _shape_g, "tiny": _tiny_shape}


def random_params(config: DecoderConfig) -> Any:
    """Random weights, made on the device a leaf at a time and a layer at a time.

    What is drawn at once comes largest first, so that the scratch of drawing is never beside all weights: it would be
    the peak that row G4 reads.
    """

    def one(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(config.initializer_range, dtype)

    def stacked(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.lax.map(lambda own: one(own, shape[1:], dtype), jax.random.split(key, shape[0]))

    draws = {is_stacked: jax.jit(draw, static_argnums=(1, 2)) for is_stacked, draw in ((True, stacked), (False, one))}
    shapes = abstract_params(config)
    leaves = jax.tree.leaves_with_path(shapes)

    def in_layers(number: int) -> bool:
        return config.scan_layers and leaves[number][0][0].key == "layers"

    def drawn_at_once(number: int) -> int:
        leaf = leaves[number][1]
        return leaf.size // (leaf.shape[0] if in_layers(number) else 1)

    made: dict[int, jax.Array] = {}
    for number in sorted(range(len(leaves)), key=drawn_at_once, reverse=True):
        path, leaf = leaves[number]
        key = jax.random.key(number)
        is_norm = path[-1].key == "scale"
        made[number] = (
            jnp.ones(leaf.shape, leaf.dtype) if is_norm else draws[in_layers(number)](key, leaf.shape, leaf.dtype)
        )
        made[number].block_until_ready()
    return jax.tree.unflatten(jax.tree.structure(shapes), [made[number] for number in range(len(leaves))])


def peak_flops() -> float | None:
    """Dense bfloat16 FLOP/s of the device, None where it is not known."""
    kind = jax.local_devices()[0].device_kind
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)


def memory_statistics() -> dict[str, int]:
    """The allocator's counts since the process began.

    Raises:
      NotMeasuredError: the backend has none.
    """
    found = jax.local_devices()[0].memory_stats()
    if not found:
        raise NotMeasuredError(f"the {jax.default_backend()} backend has no memory statistics")
    return found


def about(shape: Shape) -> str:
    """What of a shape's model changes its speed and not its result."""
    return f"remat {shape.model.remat}, attention {shape.model.attention_implementation}"


def memory_limit() -> float:
    """Bytes that the allocator may use; infinite where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


class Rig:
    """Weights and programs that the rows of one process share: each is made when a row first asks for it."""

    def __init__(self, shapes: Shapes, rounds: int):
        """Nothing is made yet, and no backend started.

        ``until``, of ``time.monotonic``, is when a line should be done; ``scratch`` is for what lines hand on;
        ``problems`` say why the backend's own attention is not used any more.
        """
        self.shapes, self.rounds, self.until = shapes, rounds, math.inf
        self.scratch: dict[str, Any] = {}
        self._weights: tuple[Any, Any] | None = None
        self._programs: dict[Any, Program] = {}
        self._remats: dict[Shape, str] = {}
        self.problems: list[str] = []

    def forget(self) -> None:
        """Drops weights and programs: after a failure a program's state may be gone."""
        self._weights = None
        self._programs.clear()
        gc.collect()

    def require_device(self) -> None:
        """Starts the backend.

        Raises:
          NotMeasuredError: it is not one for these shapes.
        """
        if self.shapes.needs_gpu and jax.default_backend() != "gpu":
            raise NotMeasuredError("jax has no GPU backend here: install the extra `cuda`")

    def attention(self) -> str:
        """The attention of all rows: the one that ``mor train`` takes here by itself, as long as it works."""
        fused = jax.default_backend() == "gpu" and not self.problems
        return "cudnn" if fused else "xla"

    def shape(self, name: str) -> Shape:
        """One of ``Shapes``, with ``attention``."""
        self.require_device()
        return getattr(self.shapes, name).with_model(attention_implementation=self.attention())

    def params(self, config: DecoderConfig) -> Any:
        """Weights of a model; those of another one are dropped first, with the programs that hold them."""
        self.require_device()
        sizes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
        if self._weights is None or self._weights[0] != sizes:
            self.forget()
            self._weights = sizes, random_params(config)
        return self._weights[1]

    def fitted(self, name: str, accumulate: int = 1) -> Shape:
        """``shape`` with the first of ``REMATS`` whose LoRA step fits the memory.

        Raises:
          NotMeasuredError: none does.
        """
        shape, needed = self.shape(name), math.nan
        for remat in REMATS if shape not in self._remats else ():
            needed = self.lora(shape.with_model(remat=remat), accumulate).peak_bytes
            if needed <= memory_limit():
                self._remats[shape] = remat
                break
            self.forget()
        if shape not in self._remats:
            raise NotMeasuredError(f"a LoRA step needs {needed / GIB:.1f} GiB of {memory_limit() / GIB:.1f}")
        return shape.with_model(remat=self._remats[shape])

    def adapter(
        self, name: str, adapter: Adapter, shape: Shape, accumulate: int = 1, options: dict[str, Any] | None = None
    ) -> Program:
        """The step of ``mor train`` on ``accumulate`` micro-batches of ``shape``."""
        whole = dataclasses.replace(shape, rows=shape.rows * accumulate)

        def make() -> Program:
            params, batch = self.params(shape.model), make_batch(whole)
            return adapter_step(adapter, shape.model, params, batch, accumulate=accumulate).compile(name, options)

        return self._made((name, whole, accumulate), shape, make)

    def lora(self, shape: Shape, accumulate: int = 1) -> Program:
        """LoRA of rank 16."""
        return self.adapter("LoRA r16", LoRA(rank=16), shape, accumulate)

    def floor(self, shape: Shape) -> Program:
        """What any adapter must pay."""
        return self._made(
            ("floor", shape), shape, lambda: floor_program(shape.model, self.params(shape.model), make_batch(shape))
        )

    def full(self, shape: Shape) -> Program:
        """Full fine-tuning, moments in the weights' dtype."""
        return self._made(
            ("full", shape), shape, lambda: full_program(shape.model, self.params(shape.model), make_batch(shape))
        )

    def _made(self, key: Any, shape: Shape, make: Callable[[], Program]) -> Program:
        self.params(shape.model)  # drops the programs of another model, if that one's are here
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def ratio(self, first: Callable[[], Any], second: Callable[[], Any]) -> dict[str, Any]:
        """Per-round ratio of wall time, in turn."""
        found = time_ratio(first, second, self.rounds, time.perf_counter, self.until)
        note = f"{found['first_ms']:,.0f} and {found['second_ms']:,.0f} ms, {found['rounds']} rounds"
        return {**found, "note": note}

    def seconds(self, run: Callable[[], Any]) -> tuple[float, float, float, int]:
        """(median, quartiles, number of rounds) of the wall time of a step, after one to warm up."""
        run()
        times: list[float] = []
        while len(times) < 2 or (len(times) < self.rounds and time.monotonic() < self.until):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        low, median, high = statistics.quantiles(times, n=4)
        return median, low, high, len(times)
