"""Pictures hold what they were given, and bad input is named."""

import json

import numpy as np
import pytest

from mor_jax.report import plot_curves, plot_routing, read_metrics


def _metrics(path, values):
    path.write_text("".join(json.dumps({"step": i + 1, "loss": v}) + "\n" for i, v in enumerate(values)))
    return path


def test_curves_of_two_runs_make_a_picture_and_leave_nothing_beside_it(tmp_path):
    runs = {"lora": _metrics(tmp_path / "a.jsonl", [3, 2, 1]), "mor": _metrics(tmp_path / "b.jsonl", [3.0, 1.5])}
    picture = plot_curves(runs, tmp_path / "out" / "loss.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in picture.parent.iterdir()] == ["loss.png"]


def test_lines_without_the_metric_are_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval_loss": 3.0}\n\n{"step": 2, "loss": 1.0}\n')
    assert read_metrics(path, "loss") == ([1, 2], [2.0, 1.0])


def test_a_metric_that_no_line_has_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no metric 'accuracy'"):
        plot_curves({"a": _metrics(tmp_path / "m.jsonl", [1.0])}, tmp_path / "x.png", name="accuracy")


def test_routing_draws_a_panel_for_each_row_and_site(tmp_path):
    gates = np.random.default_rng(0).dirichlet(np.ones(4), size=3)
    panels = {"learned": {"up": gates, "down": gates}, "shuffled": {"up": gates, "down": gates}}
    picture = plot_routing(panels, ["a", "b", "c"], tmp_path / "routing.png", "who uses what")
    assert picture.stat().st_size > 5_000
