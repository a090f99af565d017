"""Files that say several things at once, longer texts than each was trained for: logits equal to transformers'."""

import numpy as np
import pytest
from spellings import BASES
from transformers_reading import torch_model, write

from mor_jax.models import Decoder, load_params, read_config

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

ROWS, LENGTH = 2, 48  # six times the original context
_YARN = {"factor": 6.0, "original_max_position_embeddings": 8}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_KINDS = ["sliding_attention", "full_attention"]
# id -> (family, what the file says beside its sizes)
FILES = {
    "llama_yarn_ignored_entries": (
        "llama",
        {"rope_scaling": {"type": "yarn", **_YARN, "attn_factor": 9.0, "finetuned": True}, "head_dim": 12},
    ),
    "llama_yarn_mscale": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", **_YARN, "mscale": 0.7, "mscale_all_dim": 0.2, "factor": None}},
    ),
    "llama_yarn_attention_factor": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", **_YARN, "attention_factor": 0.6, "truncate": None, "beta_fast": 4}},
    ),
    "llama3_both_spellings": (
        "llama",
        {"rope_scaling": _LLAMA3, "rope_parameters": {"rope_theta": 5.0}, "original_max_position_embeddings": 8},
    ),
    "llama_partial_ignored": ("llama", {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "mlp_bias": True}),
    "mistral_kinds": ("mistral", {"layer_types": _KINDS, "sliding_window": 5, "head_dim": 4}),
    "qwen2_upper": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
    "qwen3_kinds_before_upper": (
        "qwen3",
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5, "layer_types": _KINDS},
    ),
    "gemma2_own_pattern": ("gemma2", {"sliding_window_pattern": 1, "sliding_window": 5, "query_pre_attn_scalar": 3}),
    "gemma3_scaling_over_kinds": (
        "gemma3_text",
        {
            "rope_scaling": {"rope_type": "yarn", **_YARN, "truncate": False},
            "rope_parameters": {"full_attention": {"rope_theta": 70.0}, "sliding_attention": {"rope_theta": 30.0}},
            "sliding_window": 5,
            "attn_logit_softcapping": 0.1,
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_logits(name, tmp_path):
    family, said = FILES[name]
    write(tmp_path, {"model_type": family, **BASES[family], **said})
    model = torch_model(tmp_path)
    assert isinstance(model, torch.nn.Module), model
    torch.manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name and "gemma" not in family else 0.0, 0.3)
    spelled = (tmp_path / "config.json").read_text()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(spelled)
    ids = np.random.default_rng(0).integers(0, 40, (ROWS, LENGTH))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    assert theirs.std() > 0.3
    config = read_config(tmp_path)
    ours = Decoder(config).apply({"params": load_params(tmp_path, config)}, ids)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
