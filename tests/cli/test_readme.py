"""The README is true: its example runs, its commands parse, and CI finds the two that it runs."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from mor_jax.cli.main import COMMANDS, NOT_BUILT, _parse

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_example_runs_learns_and_merges_exactly():
    (source,) = blocks("python")
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    loss, adapted, plain = map(jax.jit, (names["loss"], names["adapted"].apply, names["model"].apply))
    assert loss(names["trained"]) < loss(names["leaves"].params) - 0.05
    routed = adapted({"params": names["params"], "adapters": names["trained"]}, names["tokens"])
    merged = plain({"params": names["merged"]}, names["tokens"])
    base = plain({"params": names["params"]}, names["tokens"])
    np.testing.assert_allclose(merged, routed, atol=1e-4)
    assert np.abs(np.asarray(merged - base)).max() > 1e-2
    assert len([line for line in source.splitlines() if line.strip()]) <= 22


def test_every_command_of_the_readme_parses():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("mor ")]
    named = set()
    for line in lines:
        name, *words = shlex.split(line, comments=True)[1:]
        named.add(name)
        _parse(name, words)
    assert named == set(COMMANDS) - {"demo"}


def test_what_is_not_built_is_named():
    limits = README.split("## Limits")[1].split("\n## ")[0]
    assert all(f"`{name}`" in limits or f"`mor {name}`" in limits for name in NOT_BUILT)


@pytest.mark.parametrize(
    ("mark", "ending"), [("demo", "mor demo --output-dir mor_demo"), ("tests", "pytest -q -n 2 --dist worksteal")]
)
def test_the_two_commands_are_where_ci_looks(mark, ending):
    (command,) = re.findall(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", README, re.S)
    assert "\n" not in command
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert command.endswith(ending)


def test_hooks_and_ci_run_the_same_pinned_tools():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    pins = re.findall(r'"(ruff|pyright|import-linter)==', (ROOT / "pyproject.toml").read_text())
    assert sorted(pins) == ["import-linter", "pyright", "ruff"]
    for command in ("ruff check", "ruff format --check", "pyright", "lint-imports", ".ci/check_files.py"):
        assert command in hooks
        assert command in script
