"""The GPU script on a tiny shape: rows end to end, its table, and that a bad row costs its own figure only."""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable():
    """The scripts import one another as they do when run: by name, from their own folder."""
    sys.path.insert(0, str(EXPERIMENTS / "benchmark"))
    yield
    sys.path.remove(str(EXPERIMENTS / "benchmark"))


def make_jobs(answer):
    """In a worker: jobs that behave or not, each by its name."""

    def run(name, seconds):
        yield answer, os.getpid()
        if name == "raises":
            raise ValueError("no such\nthing")
        if name == "dies":
            os._exit(7)
        if name == "hangs":
            time.sleep(600)

    return run


def test_bad_job_costs_no_other(monkeypatch):
    """Raising, dying and hanging jobs keep what they sent; the next ones run, in a new process where they must."""
    import supervise
    from supervise import End, Job, run_jobs

    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.0)
    jobs = [
        Job("fine"),
        Job("raises"),
        Job("same"),
        Job("fresh", fresh=True),
        Job("dies"),
        Job("hangs", 0.03),
        Job("last"),
    ]
    ends, pids = {}, {}
    for name, found in run_jobs(jobs, make_jobs, "answer", 120):
        if isinstance(found, End):
            ends[name] = found
        else:
            answer, pids[name] = found
            assert answer == "answer"
    assert list(ends) == [job.name for job in jobs]
    assert {name: end.problem for name, end in ends.items() if name != "hangs"} == {
        "fine": "",
        "raises": "ValueError: no such",
        "same": "",
        "fresh": "",
        "dies": "its process ended with exit code 7",
        "last": "",
    }
    assert ends["hangs"].problem.startswith("stopped after")
    assert pids["fine"] == pids["raises"] == pids["same"]
    assert pids["fresh"] == pids["dies"]
    assert len({pids["same"], pids["fresh"], pids["last"]}) == 3


def test_job_without_time_is_not_begun():
    from supervise import End, Job, run_jobs

    found = list(run_jobs([Job("fine")], make_jobs, "answer", 0.0))
    assert found == [("fine", End("the time was spent before it", begun=False))]


def _keep_environment(monkeypatch):
    """What the script sets for its worker is undone with the test."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")


def test_rows_end_to_end(tmp_path, monkeypatch):
    """G4 needs an allocator that counts, which the CPU has not: its note says so, and G3 is measured."""
    import gpu

    _keep_environment(monkeypatch)
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    output = tmp_path / "table"
    limits = ["--rounds", "2", "--budget-seconds", "900", "--cache", cache]
    gpu.main(["--shape", "tiny", "--rows", "G5,G4,G3", *limits, "--output", str(output)])
    rows = {(row["id"], row["what"]): row for row in json.loads(output.with_suffix(".json").read_text())["rows"]}
    failed, measured = rows["G4", gpu.ROWS["G4"].lines[0].what], rows["G3", "LoRA r16 ÷ floor"]
    assert failed["figure"] is None
    assert "no memory statistics" in failed["note"]
    assert measured["low"] <= measured["figure"] <= measured["high"]
    assert measured["rounds"] == 2
    assert measured["machine"]["backend"] == "cpu"
    assert "shape tiny" in measured["note"]
    others = [row for row in rows.values() if row["id"] not in ("G3", "G4", "G5")]
    assert all(row["figure"] is None and row["note"].startswith("not yet run") for row in others)
    text = output.with_suffix(".md").read_text()
    assert f"| G3 | LoRA r16 ÷ floor | {measured['figure']:.3f} |" in text
    assert "not built: no quantised base" in text


def test_rate_is_tokens_of_all_micro_batches():
    """G1: seconds x tokens/s are the tokens of one step, and the figure is held against the printed rate."""
    from gpu import make_worker

    (found,) = make_worker(("tiny", 2))("G1", 0.0)
    assert found["figure"] == pytest.approx(found["tokens_per_second"] / 12_473)
    assert found["peak_bytes"] > 0
    assert "2 x 32 tokens x 2 micro-batches, remat dots, 2 steps" in found["note"]


def test_failing_line_leaves_the_others_of_its_row(monkeypatch):
    import gpu
    from gpu_rows import Line, Row

    def fail(rig):
        raise MemoryError("out of it | by far\nand more")

    lines = (Line("first", fail), Line("second", lambda rig: {"figure": 2.0, "note": ""}))
    monkeypatch.setitem(gpu.ROWS, "G99", Row(lines))
    first, second = gpu.make_worker(("tiny", 2))("G99", 1.0)
    assert (first["figure"], first["note"]) == (None, "shape tiny: MemoryError: out of it / by far")
    assert second["figure"] == 2.0


def test_weights_are_those_of_the_model():
    """Each leaf has the model's shape and dtype and the spread of its initialiser; norms start at one."""
    import jax
    from gpu_rig import SHAPE_SETS, random_params

    from mor_jax.models import abstract_params

    config = SHAPE_SETS["tiny"]().other.model
    params = random_params(config)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config)
    )
    gate = np.asarray(params["layers"]["mlp"]["gate_proj"]["kernel"], np.float32)
    assert np.std(gate) == pytest.approx(config.initializer_range, rel=0.05)
    assert not np.array_equal(gate[0], gate[1])
    assert np.all(np.asarray(params["norm"]["scale"], np.float32) == 1)


def test_packed_rows_have_segments_of_equal_length():
    import jax.numpy as jnp
    from gpu_rig import SHAPE_SETS
    from gpu_rows import packed_batch

    from mor_jax.models.attention import default_positions

    batch = packed_batch(SHAPE_SETS["tiny"]().main)
    assert np.unique(batch["segment_ids"]).tolist() == list(range(1, 17))
    np.testing.assert_array_equal(batch["positions"], default_positions(jnp.asarray(batch["segment_ids"])))


def test_table_has_every_row_and_keeps_what_was_measured(tmp_path, monkeypatch):
    """Listing adds what is missing; a run without time for a row keeps its figure, and says so where there is none."""
    import gpu
    from table import merge_rows, read_rows, write_table

    output = tmp_path / "table"
    gpu.main(["--list", "--output", str(output)])
    rows = read_rows(output)
    assert [row["id"] for row in rows] == sorted(
        (row["id"] for row in rows), key=lambda name: (int(name[1:].rstrip("bp")), name)
    )
    assert {row["id"] for row in rows} == {"G1b", "G1p", *(f"G{number}" for number in range(1, 12))}
    assert all(row["figure"] is None and "not yet run" in row["note"] for row in rows)
    text = output.with_suffix(".md").read_text()
    assert "| G3 | LoRA r16 ÷ floor |  |  | <= 1.15 |  | not yet run; stretch <= 1.08" in text
    measured = next(row for row in rows if row["id"] == "G3") | {"figure": 1.1, "machine": {"device": "some"}}
    write_table(merge_rows(rows, [measured]), output)
    gpu.main(["--list", "--output", str(output)])
    assert [row["figure"] for row in read_rows(output) if row["id"] == "G3"] == [1.1]
    assert "on device some" in output.with_suffix(".md").read_text()

    _keep_environment(monkeypatch)
    gpu.main(["--shape", "tiny", "--rows", "G3,G4", "--budget-seconds", "0", "--output", str(output)])
    found = {row["id"]: row for row in read_rows(output)}
    assert (found["G3"]["figure"], found["G3"]["machine"]) == (1.1, {"device": "some"})
    assert found["G4"]["note"].startswith("not measured: the time was spent before it")


def test_committed_table_lists_every_line():
    """A line whose name changed must be listed, or measured, anew; a figure is finite and names its GPU."""
    from gpu import not_yet_run
    from table import read_rows

    rows = {(row["id"], row["what"]): row for row in read_rows(EXPERIMENTS / "results" / "gpu")}
    assert set(rows) == {(row["id"], row["what"]) for row in not_yet_run("")}
    for row in rows.values():
        assert row["figure"] is None or (math.isfinite(row["figure"]) and row["machine"]["device"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "G99"], "no row 'G99'"),
        (["--rounds", "1"], "at least 2"),
        (["--shape", "tiny"], "give --output"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, message, capsys):
    from gpu import parse

    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
