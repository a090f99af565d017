"""One tiny random model of every family as the folder that its publishers would put on the hub.

`config.json` is in the spelling of the published checkpoints, the weights and their names are those that transformers
saves, and each parameter is drawn at random, norms and biases too, so that none can be lost unseen.
"""

import json

import tiny_bert
import tiny_llama

_SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QWEN = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 5,
    "max_window_layers": 1,
    "use_sliding_window": False,
    "num_key_value_heads": 2,
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "sliding_window": 5, "head_dim": 12}

# family -> (model_type, class, what differs from _SIZES); windows are shorter than texts, caps are small for effect
DECODERS = {
    "llama2": ("llama", "LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 4, "rope_scaling": None}),
    "llama3": (
        "llama",
        "LlamaForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE, "head_dim": 24},
    ),
    "smollm2": (
        "llama",
        "LlamaForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "rope_theta": 1e5, "tie_word_embeddings": True},
    ),
    "mistral": (
        "mistral",
        "MistralForCausalLM",
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "sliding_window": 5},
    ),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {**_QWEN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**_QWEN, "head_dim": 16, "attention_bias": False}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (  # seven layers, and every sixth is without a window
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
        },
    ),
}
_BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2}
ENCODERS = {
    "bert": ("bert", "BertForPreTraining", _BERT),
    "roberta": (
        "roberta",
        "RobertaForMaskedLM",
        {**_BERT, "layer_norm_eps": 1e-5, "pad_token_id": 1, "type_vocab_size": 1},
    ),
    "minilm": ("bert", "BertModel", {**_BERT, "num_hidden_layers": 3}),  # no head, and no prefix before the names
}


def make_family(name, directory):
    """Writes the model and its tokenizer to `directory` and returns it as a string."""
    import torch
    import transformers

    model_type, architecture, changes = (DECODERS | ENCODERS)[name]
    fields = {"model_type": model_type, "architectures": [architecture], "torch_dtype": "float32", **_SIZES, **changes}
    tokenizer = tiny_llama.make_tokenizer() if name in DECODERS else _word_tokenizer(name)
    if name in ENCODERS:
        fields = {key: of for key, of in fields.items() if key not in ("bos_token_id", "eos_token_id")}
        fields["vocab_size"] = len(tokenizer)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(sum(map(ord, name)))
    settings = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, architecture)(settings)
    norm = 0.0 if name.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_scale = "norm" in parameter_name.lower() and parameter_name.endswith("weight")
            parameter.normal_(norm if is_scale else 0.0, 0.2)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(fields))  # transformers wrote its own spelling
    tokenizer.save_pretrained(str(directory))
    return str(directory)


def _word_tokenizer(name):
    if name != "roberta":
        return tiny_bert.make_tokenizer()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(marks + tiny_bert.WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), marks, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=["input_ids", "attention_mask"], **names)
