"""A path of the wrong kind is one line that names it and exit code 2, whichever command and argument it is of."""

import os
from pathlib import Path

import pytest
import tiny_llama as tiny

from mor_jax.cli.main import main
from mor_jax.cli.paths import blamed

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_dir):
    return tiny.make_run(tmp_path_factory.mktemp("lora") / "run", model_dir, method="lora", targets=("up_proj",))


@pytest.fixture
def places(tmp_path, model_dir, run):
    """What the words of a command may stand for."""
    made = {"DATA": Path(tiny.write_records(tmp_path / "data.jsonl")), "MODEL": Path(model_dir), "RUN": Path(run)}
    for name in ("FILE", "LINK", "FOLDER", "ABSENT", "LOOP", "BELOW", "OUT"):
        made[name] = tmp_path / name.lower()
    made["FILE"].write_text("not what was asked for\n")
    made["LINK"].symlink_to(tmp_path / "gone")
    made["LOOP"].symlink_to(made["LOOP"])
    made["FOLDER"].mkdir()
    made["BELOW"] = made["FILE"] / "below"
    made["LONG"] = tmp_path / ("a" * 300)
    return {name: str(path) for name, path in made.items()}


COMMANDS = {
    "model of train": ["train", "--model", "?", "--data", "DATA", "--output-dir", "OUT"],
    "data of train": ["train", "--model", "MODEL", "--data", "?", "--output-dir", "OUT"],
    "held-out data of train": [
        "train",
        "--model",
        "MODEL",
        "--data",
        "DATA",
        "--eval-data",
        "?",
        "--output-dir",
        "OUT",
    ],
    "configuration of train": ["train", "?", "--output-dir", "OUT"],
    "model of eval": ["eval", "?", "--data", "DATA"],
    "data of eval": ["eval", "MODEL", "--data", "?"],
    "second data of eval": ["eval", "MODEL", "--data", "DATA", "--data", "?"],
    "choices of eval": ["eval", "MODEL", "--data", "?", "--task", "choice"],
    "model of generate": ["generate", "?", "--prompt", "x"],
    "run of merge": ["merge", "?", "--output-dir", "OUT"],
    "calibration of merge": ["merge", "RUN", "--calibration", "?", "--output-dir", "OUT"],
    "run of export": ["export", "?", "--output-dir", "OUT"],
    "calibration of export": ["export", "RUN", "--calibration", "?", "--output-dir", "OUT"],
    "model of inspect": ["inspect", "?", "--method", "lora"],
    "model of plan": ["plan", "?", "--topology", "cpu:1"],
    "path of verify": ["verify", "?"],
}
OUTPUTS = {
    "train": ["train", "--model", "MODEL", "--data", "DATA", "--rank", "2", "--steps", "1", "--output-dir", "?"],
    "merge": ["merge", "RUN", "--output-dir", "?"],
    "export": ["export", "RUN", "--format", "safetensors", "--output-dir", "?"],
    "peft": ["export", "RUN", "--format", "peft", "--output-dir", "?"],
    "demo": ["demo", "--output-dir", "?"],
}


def refused(capsys, words, place):
    assert main(words) == 2, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.out == ""
    told = [line for line in captured.err.splitlines() if line.startswith("mor: ")]
    assert len(told) == 1
    assert "Traceback" not in captured.err
    assert place in told[0]


@pytest.mark.parametrize("kind", ["FILE", "LINK", "FOLDER", "ABSENT", "LOOP", "BELOW", "LONG"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_read(capsys, places, command, kind):
    if command == "path of verify" and kind == "FOLDER":
        kind = "DATA"  # for a folder is of the right kind
    words = [places[kind] if word == "?" else places.get(word, word) for word in COMMANDS[command]]
    refused(capsys, words, places[kind])
    assert not Path(places["OUT"]).exists()


@pytest.mark.parametrize("kind", ["FILE", "BELOW", "LOOP", "LONG"])
@pytest.mark.parametrize("command", OUTPUTS)
def test_what_is_written(capsys, places, command, kind):
    words = [places[kind] if word == "?" else places.get(word, word) for word in OUTPUTS[command]]
    refused(capsys, words, places[kind])


@pytest.mark.parametrize("command", OUTPUTS)
def test_what_may_not_be_written(capsys, places, command, monkeypatch):
    """Root may write everywhere, so the system's refusal is played."""
    access, mkdir = os.access, Path.mkdir

    def refuse(path, *arguments, **options):
        if str(path).startswith(places["OUT"]):
            raise PermissionError(13, "Permission denied", str(path))
        return mkdir(path, *arguments, **options)

    above = os.path.dirname(places["OUT"])
    monkeypatch.setattr(os, "access", lambda path, mode: False if str(path) == above else access(path, mode))
    monkeypatch.setattr(Path, "mkdir", refuse)
    words = [places["OUT"] if word == "?" else places.get(word, word) for word in OUTPUTS[command]]
    refused(capsys, words, places["OUT"])
    assert not Path(places["OUT"]).exists()


@pytest.mark.parametrize(
    ("error", "is_bad_input"),
    [
        (PermissionError(13, "Permission denied", "/x/run/adapter/adapter.json"), True),
        (NotADirectoryError(20, "Not a directory", "/x/out"), True),
        (FileExistsError(17, "File exists", "/x"), True),  # where the folder should be made
        (OSError(40, "Too many levels", "/x/.out.tmp/out", None, "/x/out"), True),
        (FileNotFoundError(2, "No such file", "/x/run/config.json"), True),
        (FileNotFoundError(2, "No such file", "/x/out/checkpoints/3"), False),  # was there and is gone
        (OSError(28, "No space left on device", "/x/out/adapter"), False),
        (OSError(5, "Input/output error", "/x/run/adapter"), False),
        (PermissionError(13, "Permission denied", "/y/library.so"), False),
        (PermissionError(13, "Permission denied", "/x/run2/adapter"), False),
        (ConnectionRefusedError(111, "Connection refused"), False),
    ],
)
def test_only_a_refusal_of_a_named_path_is_bad_input(error, is_bad_input):
    found = blamed(error, {"run": "/x/run", "output_dir": "/x/out", "data": ["/y"], "rank": 4})
    assert (found is not None) == is_bad_input


@pytest.mark.parametrize("command", ["model of train", "data of train", "configuration of train", "data of eval"])
def test_a_file_that_may_not_be_read(capsys, places, command, monkeypatch):
    """Root may read everything, so the system's refusal is played."""
    place = Path(places["FILE"])
    if command.startswith("model"):
        place = Path(places["FOLDER"]) / "config.json"
        place.write_text("{}")
    if command.startswith("data"):
        place = place.rename(place.with_suffix(".jsonl"))

    def refusing(read):
        def refuse(path, *arguments, **options):
            if path == place:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path, *arguments, **options)

        return refuse

    for name in ("open", "read_text"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    given = places["FOLDER"] if command.startswith("model") else str(place)
    refused(capsys, [given if word == "?" else places.get(word, word) for word in COMMANDS[command]], str(place))
