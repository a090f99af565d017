"""Check the given files: no merge markers, nothing over 4 MiB; TOML, YAML and JSON parse. Exits 1 with a line each."""

import json
import pathlib
import sys
import tomllib

import yaml

LARGEST = 4 * 2**20  # bytes; the embedded base of the demo is the largest file that belongs here
MARKERS = (b"<<<<<<< ", b">>>>>>> ")
PARSERS = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}


def problem(path: pathlib.Path) -> str | None:
    """What is wrong with this file, or None."""
    data = path.read_bytes()
    if len(data) > LARGEST:
        return f"{len(data)} bytes, more than {LARGEST}"
    for number, line in enumerate(data.splitlines(), 1):
        if line.startswith(MARKERS):
            return f"merge marker in line {number}"
    if path.suffix in PARSERS:
        try:
            PARSERS[path.suffix](data.decode())
        except (ValueError, yaml.YAMLError) as error:
            return f"does not parse: {error}"
    return None


def main() -> int:
    """Print a line for each bad file and return the exit code."""
    found = [(path, problem(pathlib.Path(path))) for path in sys.argv[1:]]
    bad = [f"{path}: {text}" for path, text in found if text]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
