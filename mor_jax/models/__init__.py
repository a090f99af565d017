"""Base models: one configured decoder, its Hugging Face files, and generation."""

from mor_jax.models.config import DecoderConfig, RopeScaling
from mor_jax.models.decoder import Decoder, abstract_params, head_kernel, init_cache
from mor_jax.models.generation import CachedForward, continue_prompts, generate
from mor_jax.models.hf import load_params, save_params
from mor_jax.models.hf_config import ModelFileError, config_to_hf, known_config, read_config
from mor_jax.models.logical_axes import logical_axes

__all__ = [
    "CachedForward",
    "Decoder",
    "DecoderConfig",
    "ModelFileError",
    "RopeScaling",
    "abstract_params",
    "config_to_hf",
    "continue_prompts",
    "generate",
    "head_kernel",
    "init_cache",
    "known_config",
    "load_params",
    "logical_axes",
    "read_config",
    "save_params",
]
