import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mor_jax.training.mesh import MeshError, check_batch, check_length, held_rows, make_mesh, put_batch
from mor_jax.training.sharding import param_specs


@pytest.mark.parametrize(
    ("description", "sizes"),
    [
        ("", (8, 1)),
        ("data=2,fsdp=4", (2, 4)),
        ("fsdp=-1", (1, 8)),
        ("data=2, fsdp=-1", (2, 4)),
        ("data=3", (3, 1)),
        ("tensor=4,data=2", (2, 1)),
    ],
)
def test_descriptions_become_meshes(description, sizes):
    mesh = make_mesh(description)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "description", ["data=9", "data=0", "data=-2", "data=-1,fsdp=-1", "pipeline=2", "data=2,data=2", "data", "data=two"]
)
def test_impossible_descriptions_are_named(description):
    with pytest.raises(MeshError, match="mesh=") as caught:
        make_mesh(description)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("description", "known", "fits"),
    [("data=3,fsdp=-1", 3, 2), ("data=-1,fsdp=2,tensor=3", 6, 4), ("data=16,fsdp=-1", 16, 8)],
)
def test_all_that_is_left_leaves_no_device_out(description, known, fits):
    with pytest.raises(MeshError, match=rf"mesh='{description}': .* {known}, .* 8 devices: make them {fits}$"):
        make_mesh(description)


def test_given_devices_are_all_used_in_their_order():
    chosen = jax.devices()[4:2:-1]
    assert list(make_mesh("data=2", chosen).devices.ravel()) == chosen
    with pytest.raises(MeshError, match="asks for 1"):
        make_mesh("data=1", chosen)


def test_the_largest_axis_that_divides_is_sharded_and_never_the_layers():
    mesh = make_mesh("data=2,fsdp=4")
    shapes = {"scanned": (8, 6, 12), "embed": (40, 8), "odd": (5, 8), "vector": (16,), "small": (2, 2)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert param_specs(params, mesh, smallest=10) == {
        "scanned": PartitionSpec(None, None, "fsdp"),
        "embed": PartitionSpec("fsdp"),
        "odd": PartitionSpec(None, "fsdp"),
        "vector": PartitionSpec("fsdp"),
        "small": PartitionSpec(),
    }
    assert set(param_specs(params, make_mesh("data=8"), smallest=1).values()) == {PartitionSpec()}


def test_a_large_parameter_that_does_not_divide_is_named():
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((4, 5, 7), jnp.float32)}}
    with pytest.raises(MeshError, match=r"layers/kernel of shape \(4, 5, 7\) .* fsdp=4"):
        param_specs(params, make_mesh("fsdp=4"), smallest=1)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(12, 1), (8, 2)])
def test_a_batch_that_does_not_divide_says_what_would(batch_size, accumulate):
    with pytest.raises(MeshError, match=f"batch_size={batch_size}: .* multiple of {8 * accumulate}"):
        check_batch(make_mesh(), batch_size, accumulate)
    check_batch(make_mesh(), 16, 2)


@pytest.mark.parametrize(("layout", "shard"), [("data=2,fsdp=4", (2, 2)), ("data=4,sequence=2", (4, 1))])
def test_rows_and_their_tokens_are_dealt_over_all_devices(layout, shard):
    rows = np.arange(32, dtype=np.int32).reshape(16, 2)
    placed = put_batch({"x": rows}, make_mesh(layout))["x"]
    assert [piece.data.shape for piece in placed.addressable_shards] == [shard] * 8
    np.testing.assert_array_equal(placed, rows)


@pytest.mark.parametrize("description", ["data=8", "data=2,fsdp=4", "fsdp=4,tensor=2", "tensor=8"])
@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_hosts_hold_the_rows_of_their_devices_and_all_rows_together(description, hosts):
    mesh = make_mesh(description)
    devices = np.split(mesh.devices.ravel(), hosts)
    placed = put_batch({"x": np.arange(16, dtype=np.int32)[:, None]}, mesh)["x"]
    held = [held_rows(mesh, 16, list(own)) for own in devices]
    for own, rows in zip(devices, held, strict=True):
        found = [shard.data[:, 0] for shard in placed.addressable_shards if shard.device in own]
        assert rows.tolist() == sorted(set(np.concatenate(found).tolist()))
    assert sorted(set(np.concatenate(held).tolist())) == list(range(16))
    np.testing.assert_array_equal(held_rows(mesh, 16), np.arange(16))


def test_a_row_that_does_not_divide_says_what_would():
    with pytest.raises(MeshError, match=r"sequence_length=18: sequence=4 needs a multiple of 4"):
        check_length(make_mesh("data=2,sequence=4"), 18)
    check_length(make_mesh("data=2,sequence=4"), 20)
