"""Known models by name: shapes of the published sizes, without weights or a compile."""

import json
import math

import jax
import pytest

from mor_jax.models import ModelFileError, abstract_params, known_config
from mor_jax.models.presets import PRESETS


def _image_encoder(hidden):
    """Parameters of Gemma 3's encoder (27 layers of 1,152, MLP 4,304, 4,096 patches of 14 x 14) and projector."""
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 1152 + 4304 + 2 * 2 * 1152
    return 3 * 14 * 14 * 1152 + 1152 + 4096 * 1152 + 27 * layer + 2 * 1152 + 1152 * hidden + 1152


# Parameters of the checkpoints on the Hugging Face hub, a tied table counted once.
PUBLISHED = {
    "Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "Mistral-7B": 7_248_023_552,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - _image_encoder(2560),
    "gemma-3-12b": 12_187_325_040 - _image_encoder(3840),
    "gemma-3-27b": 27_432_406_640 - _image_encoder(5376),
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_known_names_have_the_published_sizes(name, parameters):
    leaves = jax.tree.leaves(abstract_params(known_config(name)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


def test_every_known_name_is_held_to_its_published_size():
    assert sorted(name.lower().rsplit("/", 1)[-1] for name in PUBLISHED) == sorted(PRESETS)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(tmp_path):
    with pytest.raises(ModelFileError, match=r"known are llama-3.2-1b, .*did you mean llama-3.1-8b\?"):
        known_config("Llama-3.1-8")
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["qwen3-0.6b"]))
    assert known_config(tmp_path / "config.json") == known_config(tmp_path)
