"""Every spelling of a config.json means to us what it means to transformers, or both refuse it."""

import random
import re

import pytest
from spellings import ABSENT, BASES, DTYPES, FUNCTIONS, ROPES, SCALINGS, SHAPES, SILENT, WINDOWS
from transformers_reading import check, read_or_error, write

from mor_jax.models import ModelFileError, read_config

pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

_PLACES = [{name: scaling} for name in ("rope_scaling", "rope_parameters") for scaling in SCALINGS]
_OTHERS = ("mistral", "qwen2", "qwen3", "gemma2")  # families that read their rope as llama does


def spelled(family, *changes):
    values = {"model_type": family, **BASES[family]}
    for change in changes:
        values |= change
    return {name: value for name, value in values.items() if value is not ABSENT}


def differs(values):
    """What we refuse although transformers does something with it: not always the same, or by an accident."""
    windows = [values.get(name) for name in ("sliding_window", "attention_chunk_size", "layer_types")]
    return (values["model_type"], values.get("head_dim")) == ("mistral", 0) or (
        values["model_type"] == "llama" and any(window is not None for window in windows)
    )


def check_all(folder, spellings):
    return {check(folder, values) for values in spellings if not differs(values)}


@pytest.mark.parametrize("family", BASES)
def test_one_rope_setting(family, tmp_path):
    places = random.Random(family).sample(_PLACES, 20) if family in _OTHERS else _PLACES
    assert check_all(tmp_path, [spelled(family, place) for place in places]) == {"same", "refused"}


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize(
    "changes", [ROPES, WINDOWS, SHAPES, FUNCTIONS, SILENT], ids=["ropes", "windows", "shapes", "functions", "silent"]
)
def test_one_field_or_a_few(family, changes, tmp_path):
    assert check_all(tmp_path, [spelled(family, change) for change in changes]) >= {"same"}


def test_types_of_weights(tmp_path):
    assert check_all(tmp_path, [spelled("llama", change) for change in DTYPES]) == {"same", "refused"}


@pytest.mark.parametrize("family", BASES)
def test_several_fields_at_once(family, tmp_path):
    """Drawn among the changes that alone are read, so that most of the files are."""

    def is_read(change):
        return not isinstance(read_or_error(write(tmp_path, spelled(family, change))), ModelFileError)

    drawn = random.Random(family)
    kinds = [[change for change in kind if is_read(change)] for kind in (_PLACES + ROPES, WINDOWS, SHAPES, FUNCTIONS)]
    files = [spelled(family, *map(drawn.choice, kinds)) for _ in range(40)]
    found = [check(tmp_path, values) for values in files if not differs(values)]
    assert found.count("same") > 20


_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"sliding_window": 5}, "field 'sliding_window' is 5, which transformers keeps to when"),
        ("llama", {"attention_chunk_size": 8}, "field 'attention_chunk_size' is 8, which"),
        ("mistral", {"sliding_window": None, "attention_chunk_size": 8}, "field 'attention_chunk_size' is 8, which"),
        (
            "llama",
            {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
            "field 'layer_types' names sliding_attention",
        ),
        ("llama", {"is_causal": False}, "field 'is_causal' is False: tokens would see later ones"),
        ("qwen2", {"is_causal": None}, "field 'is_causal' is None"),
        ("gemma2", {"use_bidirectional_attention": True}, "field 'use_bidirectional_attention' is True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "field 'use_bidirectional_attention' is True"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ("qwen3", {"rope_parameters": _LONGROPE}, "rope type 'longrope' is not supported"),
        ("gemma3_text", {"rope_scaling": _LONGROPE}, "rope type 'longrope' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional' is not supported"),
        ("llama", {"rope_theta": 0}, "field 'rope_theta' must be positive, got 0"),
        ("llama", {"hidden_act": "quick_gelu"}, "field 'hidden_act' is 'quick_gelu': hidden_act must be one of silu,"),
        ("gemma2", {"hidden_activation": "mish"}, "field 'hidden_activation' is 'mish': hidden_activation must be"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq) are not supported"),
        ("llama", {"quantization_config": {}}, "field 'quantization_config' is set"),
    ],
)
def test_what_only_we_refuse_is_named(family, change, message, tmp_path):
    write(tmp_path, spelled(family, change))
    with pytest.raises(ModelFileError, match=re.escape(message)):
        read_config(tmp_path)
