"""What `mor plan --search` compiles, and what it takes."""

import dataclasses

import jax
import pytest
import tiny_runs

from mor_jax.training import plan_search
from mor_jax.training.build import base_config
from mor_jax.training.mesh import MeshError
from mor_jax.training.plan import Forecast
from mor_jax.training.plan_search import LONG, REMATS, search
from mor_jax.training.topology import CHIPS, Topology


@pytest.fixture(scope="module")
def config(files, tmp_path_factory):
    return tiny_runs.config_of(files, tmp_path_factory.mktemp("searched"), batch_size=16)


def _pretended(monkeypatch, fits, seconds=lambda config: 1.0, refuse=lambda config: False):
    """From here on a forecast is what these functions of a configuration say."""

    def pretend(config, shape, topology):
        if refuse(config):
            raise MeshError("heads do not divide")
        names = {"mesh": config.mesh, "remat": config.remat, "accumulate": config.accumulate}
        sizes = {"peak_bytes_per_device": 10, "capacity_bytes": 10, "flops": 1.0, "topology": topology.name}
        return Forecast(**names, **sizes, fits=fits(config), estimated_seconds=seconds(config))

    monkeypatch.setattr(plan_search, "forecast", pretend)


def test_the_search_takes_the_fastest_that_fits_with_the_fewest_micro_batches(config, monkeypatch):
    _pretended(
        monkeypatch,
        fits=lambda config: config.accumulate >= {"none": 4, "dots": 2, "full": 1}[config.remat],
        seconds=lambda config: {"none": 3.0, "dots": 2.0, "full": 2.5}[config.remat] + ("data=2" in config.mesh),
        refuse=lambda config: "tensor=4" in config.mesh,
    )
    told = []
    found, tried = search(config, base_config(config), Topology("t", tuple(range(8)), None), told.append)
    assert (found.mesh, found.remat, found.accumulate) == ("data=1,fsdp=8,sequence=1,tensor=1", "dots", 2)
    assert told == tried
    assert max(plan.accumulate for plan in tried) == 4
    assert not [plan for plan in tried if "tensor=4" in plan.mesh]


@pytest.mark.parametrize(
    ("batch_size", "length", "sizes"),
    [(8, 512, {1}), (8, LONG, {1, 2, 4}), (8, LONG - 3, {1}), (2, 512, {1, 4}), (1, LONG, {1, 2, 4, 8}), (2, 510, {1})],
)
def test_the_search_splits_rows_that_are_long_or_too_few(config, monkeypatch, batch_size, length, sizes):
    _pretended(monkeypatch, fits=lambda _: True)
    config = dataclasses.replace(config, batch_size=batch_size, sequence_length=length, accumulate=1)
    _, tried = search(config, base_config(config), Topology("t", tuple(range(8)), None))
    meshes = {plan.mesh for plan in tried}
    assert {int(mesh.split("sequence=")[1].split(",")[0]) for mesh in meshes} == sizes
    assert len(meshes) == 5 + len(sizes) - 1


def test_the_search_offloads_only_where_nothing_else_fits_and_there_is_a_host(config, monkeypatch):
    slice_, shape = Topology("v5e:2x4", tuple(range(8)), None), base_config(config)
    _pretended(monkeypatch, fits=lambda config: config.remat == "offload" and config.accumulate > 1)
    found, tried = search(config, shape, slice_)
    assert (found.remat, found.accumulate) == ("offload", 2)
    assert {plan.remat for plan in tried} == {*REMATS, "offload"}
    _, tried = search(config, shape, dataclasses.replace(slice_, name="cpu:8"))
    assert {plan.remat for plan in tried} == set(REMATS)
    _pretended(monkeypatch, fits=lambda config: config.remat == "full")
    _, tried = search(config, shape, slice_)
    assert {plan.remat for plan in tried} == set(REMATS)


def test_fewer_rows_than_devices_are_planned_in_parts(config, monkeypatch):
    monkeypatch.setattr(plan_search, "_SPLITS", (1,))
    monkeypatch.setattr(plan_search, "REMATS", ("none",))
    config = dataclasses.replace(config, batch_size=4, accumulate=1)
    found, tried = search(config, base_config(config), Topology("cpu:8", tuple(jax.devices()), CHIPS["v5e"]))
    assert tried == [found]
    assert found.fits
    assert found.mesh == "data=1,fsdp=4,sequence=2,tensor=1"
    none = dataclasses.replace(config, batch_size=3, sequence_length=config.sequence_length - 1)
    with pytest.raises(MeshError, match="batch_size=3: 8 devices .* need a multiple of 8"):
        search(none, base_config(none), Topology("cpu:8", tuple(jax.devices()), None))
