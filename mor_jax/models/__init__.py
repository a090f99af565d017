"""Base models: one configured decoder and one encoder, their Hugging Face files, and generation."""

from mor_jax.models.carried_files import carried_files
from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig, RopeScaling
from mor_jax.models.decoder import Decoder, HeadKernel, head_kernel, init_cache
from mor_jax.models.dtypes import DtypeRangeError, round_params
from mor_jax.models.encoder import Encoder, mean_embedding
from mor_jax.models.family import abstract_params, add_head, make_model, with_head
from mor_jax.models.generation import CachedForward, generate
from mor_jax.models.hf import load_params, save_params, stored_dtypes, written_dtypes
from mor_jax.models.hf_config import config_to_hf, known_config, read_config
from mor_jax.models.hf_json import ModelFileError
from mor_jax.models.logical_axes import logical_axes

__all__ = [
    "CachedForward",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "DtypeRangeError",
    "EncoderConfig",
    "ModelConfig",
    "ModelFileError",
    "RopeScaling",
    "abstract_params",
    "add_head",
    "carried_files",
    "config_to_hf",
    "generate",
    "HeadKernel",
    "head_kernel",
    "init_cache",
    "known_config",
    "load_params",
    "logical_axes",
    "make_model",
    "mean_embedding",
    "read_config",
    "round_params",
    "save_params",
    "stored_dtypes",
    "with_head",
    "written_dtypes",
]
