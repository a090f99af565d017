"""What the names of tensors tell of a checkpoint that is not what its `config.json` describes.

Each function gives the end of an error's sentence, beginning with "; ", or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from mor_jax.models.hf_encoder import ENCODER_FAMILIES
from mor_jax.models.hf_families import FAMILIES

HEAD = "lm_head.weight"
_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|hada_w\d_[ab]|vera_lambda_\w)\b"
)
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_packed|weight_zero_point|SCB|absmax|quant_map|"
    r"quant_state\..*|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))$"
)
_WRAPPERS = {  # the module that it puts before the names -> what did, and what to save instead
    "_orig_mod": ("torch.compile", "save the model that was compiled (its _orig_mod)"),
    "module": ("DataParallel or DistributedDataParallel", "save the model within (its module)"),
    "_fsdp_wrapped_module": ("FullyShardedDataParallel", "save the state of the model within"),
    "_checkpoint_wrapped_module": ("torch's checkpoint_wrapper", "save the state of the model within"),
    "_forward_module": ("Lightning", "save the model within"),
    "base_model.model": ("PEFT", "save what merge_and_unload() gives"),
    "pretrained_model": ("TRL's value head", "save its pretrained_model"),
    "auto_model": ("sentence-transformers", "save the model within (its auto_model)"),
}
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:\d+\.(?=auto_model))?({'|'.join(re.escape(name) for name in _WRAPPERS)})\.")
_MARKS = (  # what only models of another kind have
    (r"\b(vision_tower|vision_model|visual|multi_modal_projector|mm_projector)\.", "a multimodal model"),
    (r"\b(experts|block_sparse_moe)\.|\bmlp\.gate\.weight$", "a mixture of experts"),
    (r"\b(qkv_proj|gate_up_proj)\.", "a model with joined projections, such as Phi-3"),
    (r"\b(c_attn|c_fc|query_key_value|Wqkv|in_proj_weight)\b", "another family, such as GPT-2 or GPT-NeoX"),
    (r"\b(SelfAttention|EncDecAttention)\.", "a T5"),
)


def name_hint(names: Collection[str], expected: Collection[str], config: ModelConfig) -> str:
    """Why the tensors of a checkpoint are not the expected ones.

    Args:
      names: of the tensors, as the files have them.
      expected: names of the model's tensors, whatever class a file was saved from.
      config: of the model.
    """
    if any(_ADAPTER.search(name) for name in names):
        return "; they are of an adapter that is not merged into its model: save what PEFT's merge_and_unload() gives"
    if any(_QUANTISED.search(name) for name in names):
        return "; the weights are quantised, which is not supported: use a float checkpoint"
    wrappers = sorted({found for name in names for found in _WRAPPER.findall(name)})
    plain = {_WRAPPER.sub("", name) for name in names}
    if wrappers and len(_matched(plain, expected)) > len(_matched(names, expected)):
        who, instead = _WRAPPERS[wrappers[0]]
        return f"; the names hold '{wrappers[0]}.', which {who} puts there: {instead}, or rename the tensors"
    return (
        _other_kind(plain, config)
        or _other_prefix(plain, expected, config)
        or _other_layers(plain, config)
        or _other_parts(names, expected, config)
    )


def _bare(name: str) -> str:
    """Without the prefix under which a model with a head has the model itself."""
    return re.sub(rf"^({'|'.join(('model', *ENCODER_FAMILIES))})\.", "", name)


def _matched(names: Collection[str], expected: Collection[str]) -> set[str]:
    return {_bare(name) for name in names} & {_bare(name) for name in expected}


def _other_kind(names: Collection[str], config: ModelConfig) -> str:
    for pattern, kind in _MARKS:
        if any(re.search(pattern, name) for name in names):
            return f"; they are of {kind}, which is not supported"
    encoder = any(".attention.self.query." in f".{name}" for name in names)
    decoder = any(".self_attn.q_proj." in f".{name}" for name in names)
    if encoder and isinstance(config, DecoderConfig):
        return "; they are of an encoder such as BERT: its config.json has another model_type"
    if decoder and isinstance(config, EncoderConfig):
        return "; they are of a decoder such as Llama: its config.json has another model_type"
    if not decoder or not isinstance(config, DecoderConfig):
        return ""
    found = _traits([re.sub(r"\b(self_attn)\.", ".self_attn.", name) for name in names])
    own = (config.post_norms, config.qk_norm)
    if found[:2] == own:
        return ""
    families = {(True, True): "gemma3_text", (True, False): "gemma2", (False, True): "qwen3"}
    other = families.get(found[:2], "qwen2" if found[2] else "llama or mistral")
    return f"; they look like those of a {other}, and config.json says model_type = {config.model_type!r}"


def _traits(names: list[str]) -> tuple[bool, bool, bool]:
    """Norms behind attention and MLP, norms of queries and keys, and biases that the output projection lacks."""

    def has(part: str) -> bool:
        return any(part in name for name in names)

    return (
        has("pre_feedforward_layernorm"),
        has("self_attn.q_norm"),
        has("self_attn.q_proj.bias") and not has("self_attn.o_proj.bias"),
    )


def _other_prefix(names: Collection[str], expected: Collection[str], config: ModelConfig) -> str:
    probe = next((_bare(name) for name in sorted(expected) if re.search(r"\blayers?\.0\..*weight$", name)), HEAD)
    prefixes = {name.removesuffix(probe) for name in names if f".{name}".endswith(f".{probe}")}
    usual = {"model."} if isinstance(config, DecoderConfig) else {"", f"{config.model_type}."}
    if not prefixes or prefixes & usual:
        return ""
    prefix = min(prefixes)
    if "language_model." in prefix:
        return (
            f"; the names begin with {prefix!r}: this is a multimodal model, of which only its language_model is read"
        )
    if prefix.removesuffix(".") in ENCODER_FAMILIES:
        return f"; they are of a {prefix.removesuffix('.')}, and config.json says model_type = {config.model_type!r}"
    if prefix or isinstance(config, EncoderConfig):
        wanted = " or ".join(repr(each) for each in sorted(usual) if each)
        return f"; the names begin with {prefix!r} instead of {wanted}: rename the tensors"
    family = FAMILIES[config.model_type].architecture
    return (
        f"; the names lack the prefix 'model.': the file was saved from a {family.removesuffix('ForCausalLM')}Model, "
        f"without its head; save it from {family}, or rename the tensors"
    )


def _other_layers(names: Collection[str], config: ModelConfig) -> str:
    found = [int(match[1]) for name in names if (match := re.search(r"(?:^|\.)layers?\.(\d+)\.", name))]
    if not found or max(found) + 1 == config.num_layers:
        return ""
    return f"; the checkpoint has {max(found) + 1} layers, and config.json says num_hidden_layers = {config.num_layers}"


def _other_parts(names: Collection[str], expected: Collection[str], config: ModelConfig) -> str:
    have, want = {_bare(name) for name in names}, {_bare(name) for name in expected}
    missing, extra = want - have, have - want
    if missing == {HEAD} and {name.partition(".")[0] for name in extra} & {"score", "qa_outputs", "classifier"}:
        return f"; {min(extra)} is the head of a classifier, and a language model is needed"
    if missing == {HEAD}:
        return "; if the head is the embedding, config.json must say tie_word_embeddings = true"
    odd = missing or extra
    if odd and all(name.endswith("_proj.bias") for name in odd):
        mlp = all(".mlp." in name for name in odd)
        said = "false" if missing else "true"
        flag, ours = ("mlp_bias", "mlp_bias") if mlp else ("attention_bias", "qkv_bias")
        if isinstance(config, DecoderConfig) and FAMILIES[config.model_type].bias_fields.get(ours) == flag:
            return f"; config.json would have to say {flag} = {said}"
        return f"; a {config.model_type} always has them" if missing else f"; a {config.model_type} never has them"
    if extra and all("distance_embedding" in name for name in extra):
        return "; they are of relative positions (position_embedding_type), which are not supported"
    if missing and all(name.startswith("pooler.") for name in missing):
        return "; the checkpoint was saved without a pooler"
    heads = {"score": "classifier", "qa_outputs": "model that answers questions", "v_head": "model with a value head"}
    return next((f"; {name} is of a {heads[part]}" for name in extra for part in heads if name.startswith(part)), "")


_AXES = (  # (rows, columns) of a tensor, by the end of its name
    (r"(embed_tokens|lm_head|word_embeddings)\.weight", ("vocab_size", "hidden_size")),
    (r"position_embeddings\.weight", ("max_position_embeddings", "hidden_size")),
    (r"token_type_embeddings\.weight", ("type_vocab_size", "hidden_size")),
    (r"q_proj\.(weight|bias)", ("num_attention_heads * head_dim", "hidden_size")),
    (r"[kv]_proj\.(weight|bias)", ("num_key_value_heads * head_dim", "hidden_size")),
    (r"o_proj\.(weight|bias)", ("hidden_size", "num_attention_heads * head_dim")),
    (r"((gate|up)_proj|intermediate\.dense)\.(weight|bias)", ("intermediate_size", "hidden_size")),
    (r"(down_proj|layer\.\d+\.output\.dense)\.(weight|bias)", ("hidden_size", "intermediate_size")),
    (r"[qk]_norm\.weight", ("head_dim",)),
    (r"(norm|LayerNorm|layernorm)\.(weight|bias)", ("hidden_size",)),
    (r"classifier(\.out_proj)?\.(weight|bias)", ("number of classes (id2label)", "hidden_size")),
)


def shape_hint(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Which fields of `config.json` give the tensor another shape than it has."""
    if len(found) != len(wanted) or (found == wanted[::-1] and len(found) > 1):
        return ""
    axes = next((axes for pattern, axes in _AXES if re.search(rf"(?:^|[._]){pattern}$", name)), ())
    wrong = [field for field, one, other in zip(axes, found, wanted, strict=False) if one != other]
    return f"; the field {' and '.join(wrong)} does not fit these weights" if wrong else ""


def folder_hint(directory: Path) -> str:
    """What a folder without weights of ours holds instead."""
    pickles = sorted(file.name for kind in ("bin", "pt", "pth", "ckpt") for file in directory.glob(f"*.{kind}"))
    if (directory / "adapter_config.json").is_file():
        return "; it holds an adapter of PEFT: name its base model, or save what merge_and_unload() gives"
    if pickles:
        return f"; {pickles[0]} is a pickle and is never opened: convert it to safetensors"
    others = sorted(
        file.name for kind in ("safetensors", "gguf", "h5", "msgpack") for file in directory.glob(f"*.{kind}")
    )
    if not others:
        return ""
    if others[0].startswith("model") and others[0].endswith(".safetensors"):
        return f"; {others[0]} is there: if it is the whole model, name it model.safetensors"
    return f"; {others[0]} is of another format: convert the model to that of Hugging Face"
