import io
import json
import time
from types import SimpleNamespace

import jax
import numpy as np

from mor_jax.training.metrics import (
    MetricsWriter,
    Progress,
    TargetRow,
    Throughput,
    peak_memory,
    print_targets,
    router_metrics,
)


def _read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_plain_numbers_and_no_nan(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": np.float32(2.5), "parts": {"a": np.ones(2), "b": None}, "bad": float("nan"), "n": 3})
    writer.close()
    assert _read(tmp_path) == [{"step": 1, "loss": 2.5, "parts": {"a": [1.0, 1.0], "b": None}, "bad": None, "n": 3}]


def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')  # a kill
    again = MetricsWriter(tmp_path, step=2)
    again.write(3, {"loss": 0.5})
    again.close()
    assert [(line["step"], line["loss"]) for line in _read(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_tensorboard_gets_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = MetricsWriter(tmp_path)
    writer.write(7, {"loss": 2.5, "eval_loss_by_task": {"add": 1.5}, "list": [1, 2], "name": "text"})
    writer.close()
    (path,) = tmp_path.glob("events.*")
    data, found = path.read_bytes(), {}
    while data:  # TFRecord: length (8), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert found == {"loss": (7, 2.5), "eval_loss_by_task/add": (7, 1.5)}


def test_throughput_counts_from_the_third_step_and_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    throughput = Throughput()
    rates = []
    for seconds in (100, 10, 2, 2):
        now[0] += seconds
        rates.append(throughput.add(50))
    now[0] += 8
    throughput.leave_out(7)
    rates.append(throughput.add(50))
    assert rates == [0.0, 0.0, 25.0, 25.0, 30.0]


def test_router_metrics_are_means_over_tokens():
    rng = np.random.default_rng(0)
    gates = rng.dirichlet(np.ones(3), size=(2, 10))  # two layers, ten tokens, three experts
    task = np.array([0] * 4 + [1] * 6)
    sums = {
        "load": gates.sum(1),
        "entropy": -(gates * np.log(gates)).sum((1, 2))[:, None],
        "count": np.full((2, 1), 10.0),
        "task_load": np.stack([gates[:, task == t].sum(1) for t in (0, 1, 2)], 1),
        "task_count": np.tile([4.0, 6.0, 0.0], (2, 1)),
    }
    found = router_metrics({"up": sums, "other": {"norm": np.ones(3)}}, ("x", "y", "unseen"))
    assert set(found["router"]) == {"up"}
    np.testing.assert_allclose(found["router"]["up"]["load"], gates.mean((0, 1)))
    np.testing.assert_allclose(found["router_entropy"], -(gates * np.log(gates)).sum(-1).mean())
    np.testing.assert_allclose(found["router_max_load"], gates.mean(1).max(-1).mean())
    assert set(found["router"]["up"]["task_gates"]) == {"x", "y"}
    np.testing.assert_allclose(found["router"]["up"]["task_gates"]["y"], gates[:, task == 1].mean((0, 1)))
    assert router_metrics({}) == {}


def test_the_table_has_every_site_its_sums_and_says_what_merges():
    rows = [
        TargetRow("up_proj", "2 x (4, 8)", "2 mor", 1200, 64, 9600, "approximate"),
        TargetRow("rest", "", "", 0, 1, 0),
    ]
    stream = io.StringIO()
    print_targets(rows, "title", stream)
    text = " ".join(stream.getvalue().split())
    for word in ("up_proj", "2 x (4, 8)", "1,200", "9,600", "65", "approximate"):
        assert word in text
    assert "merge into the base: approximate (distill, " in text
    stream = io.StringIO()
    print_targets([TargetRow("q", "", "", 1, 1, 1, "exact")], "title", stream)
    assert "merge into the base: exact" in stream.getvalue()


def test_the_bar_shows_loss_speed_and_memory():
    stream = io.StringIO()
    bar = Progress(4, start=1, every=2, stream=stream)
    for step in (2, 3, 4):
        bar.update(step, 0.25, 1234.0)
    bar.close()
    last = stream.getvalue().split("\r")[-1]
    for word in ("4/4", "loss=0.2500", "tokens=1234/s", "GiB"):
        assert word in last


def test_memory_is_that_of_the_process_and_of_the_fullest_device_that_tells(monkeypatch):
    found = peak_memory()
    assert 2**26 < found["peak_rss_bytes"] < 2**40
    assert found["peak_device_bytes"] is None  # CPUs do not tell
    stats = [None, {"peak_bytes_in_use": 5}, {}, {"peak_bytes_in_use": 7}]
    devices = [SimpleNamespace(memory_stats=lambda value=value: value) for value in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory()["peak_device_bytes"] == 7
