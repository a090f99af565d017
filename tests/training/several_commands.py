"""Several `mor` commands in one process: python several_commands.py COMMANDS.json LAUNCH_FLAGS; stops at a failure."""

import json
import sys
from pathlib import Path

from mor_jax.cli.main import main

if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text()):
        code = main([*command, *sys.argv[2:]])
        if code:
            raise SystemExit(code)
