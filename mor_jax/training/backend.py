"""What differs by kind of device: the attention kernel, where activations may wait, and the compiler's options."""

from __future__ import annotations

import dataclasses

import jax

from mor_jax.models import DecoderConfig, ModelConfig
from mor_jax.models.fused_attention import fusion_obstacle
from mor_jax.training.config import ConfigError, TrainConfig

_PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


def for_backend(shape: ModelConfig, config: TrainConfig, mesh: jax.sharding.Mesh) -> ModelConfig:
    """`shape` with the attention that `config` asks for; "auto" takes the mesh's own kernel where it can run.

    Args:
      shape: of the base.
      config: of the run; its sequence length counts.
      mesh: its devices say what can run, whether they are there or only compiled for.

    Raises:
      ConfigError: the attention that was asked for can't run here, or `remat="offload"` has nowhere to go.
    """
    platform = mesh.devices.flat[0].platform
    if config.remat == "offload" and platform not in _PLATFORMS.values():
        raise ConfigError(f"remat='offload': {platform} devices have no second memory: choose full, dots or none")
    if not isinstance(shape, DecoderConfig):
        if config.attention_implementation in _PLATFORMS:
            raise ConfigError(f"attention_implementation={config.attention_implementation!r} is not for encoders")
        return shape
    asked, parts = config.attention_implementation, mesh.shape.get("sequence", 1)
    own = next((name for name, needed in _PLATFORMS.items() if needed == platform), "xla")
    chosen = dataclasses.replace(shape, attention_implementation=own if asked == "auto" else asked)
    if chosen.attention_implementation == "xla":
        return chosen
    if own != chosen.attention_implementation:
        raise ConfigError(f"attention_implementation={asked!r} does not run on {platform} devices: choose auto")
    obstacle = fusion_obstacle(chosen, config.sequence_length, parts)
    if obstacle and asked != "auto":
        raise ConfigError(f"attention_implementation={asked!r}: {obstacle}: choose auto")
    return dataclasses.replace(shape, attention_implementation="xla") if obstacle else chosen


def compiler_options(mesh: jax.sharding.Mesh | None) -> dict[str, str]:
    """Options of `jax.jit` for programs on `mesh`; {} where the compiler's own choice is good.

    A TPU's compiler multiplies with a kernel split over `fsdp` piece by piece as the pieces come in. The pieces split
    the axis that is summed over, so each adds to the whole result in memory: 16 reads and writes of all activations on
    16 chips. Gathering the kernel first, which overlaps with other work too, took the memory traffic of a step of
    Llama-3.2-1B with LoRA on v5e:4x4 from 525 to 230 GiB.
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
