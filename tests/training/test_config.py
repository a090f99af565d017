import dataclasses

import pytest

from mor_jax.adapters import METHODS
from mor_jax.training.config import (
    ConfigError,
    TrainConfig,
    config_from_mapping,
    config_to_mapping,
    load_config,
    save_config,
)

FULL = {
    "model": "base",
    "data": ("add=a.jsonl:0.5", "b.jsonl"),
    "method": "mor",
    "steps": 30,
    "learning_rate": 3e-4,
    "optimizer_options": {"b2": 0.95, "nesterov": True},
    "alpha": 4.0,
    "options": {"router": "balanced", "balance_weight": 0.1},
    "targets": (r"layers_[0-9]{1,2}/.*", "q_proj"),
    "overrides": {".*down_proj": {"rank": 4, "method": "lora"}},
    "param_dtype": "bfloat16",
    "mesh": "data=2,fsdp=4",
    "scan_layers": False,
}


@pytest.mark.parametrize("fields", [{}, FULL])
def test_yaml_and_back_is_the_identity(tmp_path, fields):
    config = TrainConfig(**fields)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_a_short_yaml_keeps_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("model: base\ndata: [a.jsonl]\nsteps: 7\n")
    assert load_config(tmp_path / "c.yaml") == TrainConfig(model="base", data=("a.jsonl",), steps=7)
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == TrainConfig()


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown field 'learning_rat': did you mean learning_rate"):
        config_from_mapping({"learning_rat": 1.0}, "c.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": "many"}, "steps='many'"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": None}, "steps=None"),
        ({"data": 3}, "data=3"),
        ({"packing": [1]}, r"packing=\[1\]"),
        ({"options": ["router"]}, "options="),
        ({"schedule": "cosin"}, "schedule='cosin'"),
    ],
)
def test_a_wrong_type_names_file_field_and_value(fields, message):
    with pytest.raises(ConfigError, match="c.yaml: " + message):
        config_from_mapping(fields, "c.yaml")


@pytest.mark.parametrize("mapping", [[1], "text", 3])
def test_what_is_no_mapping_is_an_error(mapping):
    with pytest.raises(ConfigError, match="expected a mapping"):
        config_from_mapping(mapping)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- 1", "expected a mapping")])
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml: {message}"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 8, "accumulate": 3}, "accumulate=3: it must divide batch_size=8"),
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps=5: give less than steps"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"targets": ()}, r"targets=\(\): name at least one"),
        ({"targets": "q_proj"}, "targets='q_proj': give a tuple"),
        ({"data": ("",)}, "data="),
        ({"param_dtype": "float16"}, "param_dtype='float16'"),
        ({"method": "lorra"}, "method='lorra': .*lora"),
        ({"method": "lora", "num_experts": 4}, "method='lora': .*num_experts"),
        ({"rank": 4, "options": {"router": "best"}}, "router"),
        ({"overrides": {"q_proj": {"rnk": 4}}}, r"overrides\['q_proj'\]"),
        ({"labels": ("no", "yes")}, "labels=.* objective=classification only"),
        ({"objective": "classification", "labels": ("yes", "yes")}, "labels=.*two different"),
        ({"adapters": ("run/adapter",)}, "adapters=.* not built yet"),
    ],
)
def test_impossible_values_and_pairs_name_the_field(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig(**fields)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_overrides_keep_what_they_do_not_name():
    config = TrainConfig(rank=8, alpha=4.0, overrides={"q": {"rank": 2}, "k": {"method": "lora", "alpha": 1.0}})
    (_, first), (_, second) = config.override_adapters()
    assert first == dataclasses.replace(config.adapter(), rank=2)
    assert (second.name, second.rank, second.alpha) == ("lora", 8, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_without_a_rank_each_method_has_its_own(name):
    own = METHODS[name]()
    config = TrainConfig(method=name, overrides={"q": {"dropout": 0.5}, "k": {"method": "vera"}})
    assert config.rank is None
    assert config.adapter() == own
    (_, first), (_, second) = config.override_adapters()
    assert (first.rank, second.rank) == (own.rank, 256)
    assert config_from_mapping(config_to_mapping(config)) == config
    assert TrainConfig(method=name, rank=5).adapter() == dataclasses.replace(own, rank=5)


def test_all_linear_is_a_word_and_not_a_pattern():
    assert TrainConfig().target_modules == "all-linear"
    assert TrainConfig(targets=("q_proj",)).target_modules == ("q_proj",)


@pytest.mark.parametrize("text", ["rank: 8\nsteps: 3\nrank: 16\n", "options: {router: mean, router: softmax}\n"])
def test_a_field_that_is_there_twice_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{path}: not YAML: .*'(rank|router)' is there twice.*line"):
        load_config(path)
