"""Running a command of `mor` in a test: its JSON, or its one line of error."""

import json

from mor_jax.cli.main import main


def run_json(capsys, *words, code=0):
    """What the command prints with `--json`; it must end with `code`."""
    found = main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out)


def run_bad(capsys, *words):
    """The one line that the command says of bad input; it prints nothing else."""
    assert main([*map(str, words), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err
