"""Methods by name, and what an error says."""

import dataclasses

import pytest

from mor_jax.adapters import METHODS, MoR, RsLoRA, get_method, make_adapter, method_options


def test_methods_by_name():
    assert get_method("mor") is MoR
    assert make_adapter("rslora", rank=4) == RsLoRA(rank=4)
    assert len(set(METHODS.values())) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_the_fields_and_survive_a_round_trip(name):
    adapter = make_adapter(name)
    assert method_options(name) == tuple(f.name for f in dataclasses.fields(adapter))
    assert make_adapter(name, **dataclasses.asdict(adapter)) == adapter
    assert hash(make_adapter(name)) == hash(adapter)
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.dropout = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_unknown_method_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'lorra'; known: lora, .*did you mean 'lora'"):
        get_method("lorra")


def test_unknown_option_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError, match="'mor' has no option 'num_expert'; it has .*did you mean 'num_experts'"):
        make_adapter("mor", num_expert=4)
