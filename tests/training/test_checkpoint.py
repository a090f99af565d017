import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.training.checkpoint import CheckpointError, Checkpoints, fingerprint
from mor_jax.training.integrity import IntegrityError
from mor_jax.training.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _items(seed, sharding=None):
    rng = np.random.default_rng(seed)
    value = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    if sharding is not None:
        value = jax.device_put(value, sharding)
    return {"adapters": {"layers/q_proj": {"a": value}}, "adapter_state": {}, "rng": {"step": jnp.int32(seed)}}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _save(directory, *steps, keep=10):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, _items(step), {"iterator": {"row": step}})
    checkpoints.close()


def test_restores_what_was_saved_with_its_sharding(tmp_path):
    sharding = NamedSharding(make_mesh("data=2,fsdp=4"), PartitionSpec("fsdp"))
    checkpoints = Checkpoints(tmp_path / "c")
    items = _items(3, sharding)
    checkpoints.save(3, items, {"iterator": {"row": 7}})
    checkpoints.close()
    blank = jax.tree.map(jnp.zeros_like, items)
    step, restored, metadata = Checkpoints(tmp_path / "c").restore(blank)
    assert (step, metadata) == (3, {"iterator": {"row": 7}})
    assert restored["adapter_state"] == {}
    value = restored["adapters"]["layers/q_proj"]["a"]
    assert value.sharding == sharding
    assert np.array_equal(value, items["adapters"]["layers/q_proj"]["a"])


def test_nothing_saved_restores_nothing(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(_items(0)) is None


def test_only_the_newest_stay(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, keep=2)
    assert Checkpoints(tmp_path).steps() == [3, 4]


def test_an_existing_step_is_an_error(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists"):
        _save(tmp_path, 1)


def test_a_flip_in_any_file_falls_back_to_the_step_before(tmp_path):
    _save(tmp_path / "model", 1, 2)
    names = sorted(
        p.relative_to(tmp_path / "model" / "2") for p in (tmp_path / "model" / "2").rglob("*") if p.is_file()
    )
    kinds = {name.parts[0] for name in names}
    assert {"adapters", "rng", "metadata", "manifest.json"} <= kinds
    import shutil

    for number, name in enumerate(names):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "model", place)
        if (place / "2" / name).stat().st_size == 0:
            continue
        _flip(place / "2" / name)
        step, items, _ = Checkpoints(place).restore(_items(0))
        assert step == 1, name
        assert np.array_equal(items["adapters"]["layers/q_proj"]["a"], _items(1)["adapters"]["layers/q_proj"]["a"])
        assert (place / "bad" / "2").is_dir()
        assert not (place / "2").exists()


def test_after_the_fallback_the_bad_step_can_be_saved_again(tmp_path):
    _save(tmp_path, 1, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(_items(0))[0] == 1
    checkpoints.save(2, _items(5), {})
    checkpoints.close()
    assert int(Checkpoints(tmp_path).restore(_items(0))[1]["rng"]["step"]) == 5


def test_leftovers_of_a_killed_save_are_set_aside(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp-0").mkdir()
    assert Checkpoints(tmp_path).restore(_items(0))[0] == 1
    assert (tmp_path / "bad" / "2.orbax-checkpoint-tmp-0").is_dir()


def test_when_none_is_good_the_error_names_the_file(tmp_path):
    _save(tmp_path, 1)
    _flip(tmp_path / "1" / "metadata" / "metadata")
    with pytest.raises(IntegrityError, match="metadata/metadata"):
        Checkpoints(tmp_path).restore(_items(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_fingerprint_sees_every_bit_and_no_mesh(dtype):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.integers(1, 100, (8, 5)), dtype), "v": jnp.ones((3,), dtype)}
    own = fingerprint(params)
    sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    assert fingerprint(params | {"w": jax.device_put(params["w"], sharding)}) == own
    swapped = params["w"].at[0, 0].set(params["w"][0, 1]).at[0, 1].set(params["w"][0, 0])
    assert fingerprint(params | {"w": swapped}) != own
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[params["w"].dtype.itemsize]
    for bit in range(8 * params["w"].dtype.itemsize):
        flipped = (
            jax.lax.bitcast_convert_type(params["w"], bits)
            .at[3, 2]
            .set(jax.lax.bitcast_convert_type(params["w"], bits)[3, 2] ^ bits(1 << bit))
        )
        assert fingerprint(params | {"w": jax.lax.bitcast_convert_type(flipped, params["w"].dtype)}) != own
