"""Fields that decoders and encoders share, and those that have no effect."""

from __future__ import annotations

import math
import re
from typing import Any

from mor_jax.models.config import ACTIVATIONS
from mor_jax.models.hf_families import Family
from mor_jax.models.hf_json import JsonReader

# transformers' other names of the same functions
_SAME_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}
# torch's names of floating types -> the type that is computed in
_DTYPES = {
    "bfloat16": "bfloat16",
    **dict.fromkeys(("float16", "half", "float32", "float", "float64", "double"), "float32"),
}
_MEANT = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
# Fields that decide nothing of what a model computes from its tokens: who wrote the file, dropout, how a model is run,
# how text is generated, names of labels
_SILENT = frozenset(
    """
    architectures model_type transformers_version name_or_path _name_or_path _commit_hash tokenizer_class prefix
    finetuning_task task_specific_params quantization_config compression_config per_layer_config is_causal
    kv_sharing_modes text_config dtype torch_dtype
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
    gradient_checkpointing use_cache output_attentions output_hidden_states return_dict chunk_size_feed_forward
    attn_implementation _attn_implementation _attn_implementation_autoset cache_implementation torchscript use_bfloat16
    is_encoder_decoder id2label label2id num_labels problem_type
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty remove_invalid_values epsilon_cutoff eta_cutoff encoder_repetition_penalty
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind
    """.split()
)


def read_dtype(reader: JsonReader) -> str:
    """The type to compute in: bfloat16 where the file says so, else float32, which holds all that it may say.

    Raises:
      ModelFileError: the file names no floating type of torch.
    """
    name = "torch_dtype" if reader.values.get("dtype") is None else "dtype"
    stored = reader.get(name, str, "float32", nullable=True) or "float32"
    if stored not in _DTYPES:
        plain = stored.removeprefix("torch.")
        near = _MEANT.get(plain, plain if plain in _DTYPES else "")
        raise reader.fail(
            name,
            f"is {stored!r}; supported: {', '.join(_DTYPES)}{f'; did you mean {near}?' if near else ''}",
        )
    other = reader.values.get("torch_dtype")
    if name == "dtype" and other is not None and other != stored:
        reader.ignore(["torch_dtype"], f"dtype is there too, and goes before it: {stored}")
    return _DTYPES[stored]


def read_activation(reader: JsonReader, name: str, default: str) -> str:
    """The name in `ACTIVATIONS` of the function that the field calls by any of its names.

    Raises:
      ModelFileError: it is another function.
    """
    written = reader.get(name, str, default)
    found = _SAME_ACTIVATIONS.get(written, written)
    if found not in ACTIVATIONS:
        choices = ", ".join((*ACTIVATIONS, *_SAME_ACTIVATIONS))
        raise reader.fail(name, f"is {written!r}: {name} must be one of {choices}")
    return found


def check_silent(reader: JsonReader, numbers: dict[str, bool], initializer_limit: float = math.inf) -> None:
    """Nothing where the fields that decide nothing are at least of the types that transformers insists on.

    Args:
      reader: of the file.
      numbers: the rates of dropout and the like that the family has, and whether they may be null.
      initializer_limit: the most that initializer_range may be.

    Raises:
      ModelFileError: one is of another type, so that transformers does not read the file.
    """
    reader.get("use_cache", bool, True)
    reader.count("num_labels", required=False)
    for name, nullable in numbers.items():
        reader.number(name, 0.0, nullable=nullable)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = reader.values.get(name)
        if not (name == "eos_token_id" and isinstance(value, list) and all(type(each) is int for each in value)):
            reader.get(name, int, nullable=True)
    labels = reader.get("id2label", dict, nullable=True) or {}
    if not all(re.fullmatch(r"\s*[+-]?\d+\s*", number) for number in labels):
        raise reader.fail("id2label", f"must have whole numbers as keys, got {sorted(labels)}")
    spread = reader.get("initializer_range", float, 0.0)
    if not 0 <= spread <= initializer_limit:
        limit = "" if initializer_limit == math.inf else f" and at most {initializer_limit}"
        raise reader.fail("initializer_range", f"must be at least 0{limit}, got {spread}")


def warn_of_others(reader: JsonReader, family: Family) -> None:
    """Logs which fields of a decoder's file have no effect."""
    values = reader.values
    for name in family.unread:
        if reader.get(name, float, nullable=True) is not None:
            reader.ignore([name], "transformers does not read it in this family either")
    quiet = family.names | set(family.unread)
    if values.get("pretraining_tp") == 1:  # the whole product at once, as always
        quiet |= {"pretraining_tp"}
    if values.get("hidden_act") == values.get(family.activation):  # written twice
        quiet |= {"hidden_act"}
    warn_of_unknown(reader, quiet, values["model_type"])


def warn_of_unknown(reader: JsonReader, known: frozenset[str] | set[str], model_type: Any) -> None:
    """Logs which fields are neither `known` nor known to decide nothing."""
    others = [
        name
        for name, value in reader.values.items()
        if value is not None and name not in known | _SILENT and not name.endswith(("_token_id", "_token_index"))
    ]
    reader.ignore(sorted(others), f"no part of a {model_type} in transformers, which passes over such fields too")
