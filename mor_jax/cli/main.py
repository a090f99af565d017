"""The command `mor`: finds the command, runs its function, prints a table or one JSON value, returns the exit code.

Exit codes: 0 done, 2 bad input (one line on stderr), 3 a fault that is not the user's input, 143 saved and stopped by
SIGTERM, 130 stopped by Ctrl-C. Nothing heavy is imported before a command needs it, so that `mor --help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mor_jax.cli import options
from mor_jax.cli.flags import PATH_LISTS, Parser, UsageError, add_flags, flag_of, given_flags
from mor_jax.cli.launch import is_peer, leave, on_all
from mor_jax.cli.paths import blamed, check_makeable

INTERRUPTED = 130
PACKAGE = Path(__file__).parents[1]


class FailedCheck(Exception):
    """A command finished and what it found is a fault: `result` is printed all the same, the exit code is 3."""

    def __init__(self, result: Any, message: str):
        self.result = result
        super().__init__(message)


def demo(args: argparse.Namespace) -> dict:
    """`mor demo`: MoR and LoRA side by side on the embedded base."""
    from mor_jax.cli.demo import run_demo

    chosen = options.DemoOptions(**given_flags(args, options.DemoOptions))
    check_makeable(chosen.output_dir, "--output-dir")
    result = run_demo(chosen.output_dir, chosen.seed)
    if not result["export_verified"]:
        raise FailedCheck(result, f"{result['output_dir']}/export differs from the live model in a logit")
    return result


def train(args: argparse.Namespace) -> dict | None:
    """`mor train`: the configuration file with the flags laid over it, trained."""
    from mor_jax.cli.train import train_command
    from mor_jax.training.config import TrainConfig

    launch: dict[str, Any] = {"distributed": "auto"} | given_flags(args, options.LaunchOptions)
    given = given_flags(args, TrainConfig)
    result = train_command(getattr(args, "config", None), given, options.LaunchOptions(**launch))
    held_out = (result or {}).get("eval_loss", 0.0)
    if not math.isfinite(held_out):
        raise FailedCheck(result, f"eval_loss is {held_out}: the run is saved, and useless on its eval_data")
    return result


def evaluate(args: argparse.Namespace) -> dict:
    """`mor eval`: held-out figures of a model directory or a run."""
    from mor_jax.cli.evaluate import evaluate_command

    return evaluate_command(options.EvalOptions(**given_flags(args, options.EvalOptions)))


def generate(args: argparse.Namespace) -> dict:
    """`mor generate`: text that goes on from a prompt."""
    from mor_jax.cli.generate import generate_command

    return generate_command(options.GenerateOptions(**given_flags(args, options.GenerateOptions)))


def merge(args: argparse.Namespace) -> dict:
    """`mor merge`: the base with the adapter folded in, as a Hugging Face directory."""
    from mor_jax.cli.merge import merge_command

    return merge_command(options.MergeOptions(**given_flags(args, options.MergeOptions)))


def export(args: argparse.Namespace) -> dict:
    """`mor export`: what was trained, for the rest of the world."""
    from mor_jax.cli.export import export_command

    result = export_command(options.ExportOptions(**given_flags(args, options.ExportOptions)))
    if result["verified"] is False:
        raise FailedCheck(
            result, f"{result['output_dir']} differs from the live model by {result['max_logit_difference']} in a logit"
        )
    return result


def inspect(args: argparse.Namespace) -> dict:
    """`mor inspect`: sites, shapes and parameters, from config.json alone."""
    from mor_jax.cli.listing import inspect_command

    return inspect_command(options.InspectOptions(**given_flags(args, options.InspectOptions)))


def plan(args: argparse.Namespace) -> dict:
    """`mor plan`: a training step compiled for a slice that is not there."""
    from mor_jax.cli.plan import plan_command

    return plan_command(options.PlanOptions(**given_flags(args, options.PlanOptions)))


def methods(args: argparse.Namespace) -> list:
    """`mor methods`: the registry."""
    from mor_jax.cli.listing import methods_command

    return methods_command()


def verify(args: argparse.Namespace) -> dict:
    """`mor verify`: a folder against its manifest."""
    from mor_jax.cli.listing import verify_command

    result = verify_command(options.VerifyOptions(**given_flags(args, options.VerifyOptions)))
    if not result["ok"]:
        raise FailedCheck(result, f"{args.path}: bad: {', '.join(result['bad'])}; restore it from another copy")
    return result


@dataclass(frozen=True)
class Command:
    """One command: its function, where its options stand, which of them are positional, and one line about it."""

    run: Callable[[argparse.Namespace], Any]
    options: str  # module:class
    positional: tuple[str, ...]
    required: tuple[str, ...]
    about: str
    launch: bool = False  # whether several processes may run it together

    @property
    def options_class(self) -> type:
        """The dataclass of its options; imported only for the command that runs."""
        module, _, name = self.options.partition(":")
        return getattr(importlib.import_module(module), name)


_OPTIONS = "mor_jax.cli.options:"
COMMANDS = {
    "demo": Command(demo, _OPTIONS + "DemoOptions", (), (), "fine-tune, merge, export and verify the embedded example"),
    "train": Command(train, "mor_jax.training.config:TrainConfig", (), (), "train an adapter", launch=True),
    "eval": Command(
        evaluate, _OPTIONS + "EvalOptions", ("model",), ("data",), "measure on held-out records", launch=True
    ),
    "generate": Command(
        generate, _OPTIONS + "GenerateOptions", ("model",), ("prompt",), "go on from a prompt", launch=True
    ),
    "merge": Command(
        merge, _OPTIONS + "MergeOptions", ("run",), ("output_dir",), "fold an adapter into its base", launch=True
    ),
    "export": Command(
        export, _OPTIONS + "ExportOptions", ("run",), ("output_dir",), "write a run for other software", launch=True
    ),
    "inspect": Command(inspect, _OPTIONS + "InspectOptions", ("model",), (), "list what a method would adapt"),
    "plan": Command(plan, _OPTIONS + "PlanOptions", ("model",), (), "compile a training step for a slice, from shapes"),
    "methods": Command(methods, _OPTIONS + "MethodsOptions", (), (), "list the methods"),
    "verify": Command(verify, _OPTIONS + "VerifyOptions", ("path",), (), "check a folder against its manifest"),
}
NOT_BUILT = ("report", "convert", "library", "sweep", "replay")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: the words after `mor`; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    failure: BaseException | None = None
    try:
        code = _run(arguments)
    except KeyboardInterrupt as error:
        _say("stopped by Ctrl-C")
        code, failure = INTERRUPTED, error
    except SystemExit as stop:
        code, failure = stop.code if isinstance(stop.code, int) else int(stop.code is not None), stop
    except Exception as error:
        code, failure = _report(error), error
    leave(code, failure)
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("mor_jax"))
        return 0
    name = arguments[0]
    if name in NOT_BUILT:
        raise UsageError(f"'mor {name}' is not built yet; built are {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    args = _parse(name, arguments[1:])
    failed = None
    with contextlib.redirect_stdout(sys.stderr):  # progress, and what libraries print, is no result
        try:
            result = _run_command(name, args)
        except FailedCheck as error:
            result, failed = None if is_peer() else error.result, error
    if result is not None:
        _show(name, result, args.json)
    if failed is not None:
        if not is_peer():
            _say(str(failed))
        return 3
    return 0


def _run_command(name: str, args: argparse.Namespace) -> Any:
    """The command's result; None where another process shows it."""
    command = COMMANDS[name]

    def run() -> Any:
        try:
            return command.run(args)
        except OSError as error:
            raise blamed(error, vars(args)) or error from error

    if name == "train" or not command.launch:  # training finds the others by itself, when its configuration is right
        return run()
    launch = options.LaunchOptions(**given_flags(args, options.LaunchOptions))
    given = given_flags(args, command.options_class)
    told = {flag_of(field): given[field.name] for field in fields(command.options_class) if field.name in given}
    return on_all(launch, run, told)


def _parse(name: str, arguments: list[str]) -> argparse.Namespace:
    command = COMMANDS[name]
    parser = Parser(prog=f"mor {name}", description=command.about, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout instead of a table")
    if name == "train":
        parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", default=None, help="fields as in the flags")
    add_flags(parser, command.options_class, command.positional)
    if command.launch:
        add_flags(parser, options.LaunchOptions)
    args = _parsed(parser, command, arguments)
    for field in command.required:
        if not hasattr(args, field):
            parser.error(f"--{field.replace('_', '-')} is missing")
    return args


def _parsed(parser: Parser, command: Command, arguments: list[str]) -> argparse.Namespace:
    """The arguments; a model or run behind a list of paths is none of them, though the list takes all that follows."""
    try:
        return parser.parse_args(arguments)
    except UsageError:
        place = _swallowed(arguments) if command.positional else None
        if place is None:
            raise
    return parser.parse_args([arguments[place], *arguments[:place], *arguments[place + 1 :]])


def _swallowed(arguments: list[str]) -> int | None:
    """Where a model or run stands that is the last of several words behind a flag that takes a list of paths."""
    flags = [place for place, word in enumerate(arguments) if word.startswith("--")]
    for start, end in zip(flags, [*flags[1:], len(arguments)], strict=True):
        takes_all = arguments[start].removeprefix("--").replace("-", "_") in PATH_LISTS
        names = [os.path.join(arguments[end - 1], name) for name in ("config.yaml", "config.json")]
        if takes_all and end - start > 2 and any(map(os.path.isfile, names)):
            return end - 1
    return None


def _overview() -> str:
    lines = [f"  {name:10s} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: mor COMMAND ... [--json]   (mor COMMAND --help lists its flags)", "", *lines])


def _show(name: str, result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(result), allow_nan=False))
        return
    from mor_jax.cli.tables import print_result

    print_result(name, plain(result))


def plain(value: Any) -> Any:
    """`value` in JSON's types: arrays become lists, paths text, and what is not finite null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) or value is None else str(value)


def exit_code(error: BaseException) -> int:
    """2 for what the user can mend: our own input errors, and any ValueError that our code raised itself; else 3."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    if not isinstance(error, ValueError):
        return 3
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    return 2 if raised_here or type(error).__module__.startswith("mor_jax.") else 3


def _report(error: Exception) -> int:
    code = exit_code(error)
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        _say(
            "out of memory: take a smaller batch, shorter rows or more devices; to train, --accumulate or --remat full"
        )
        return 3
    expected = hasattr(error, "exit_code") or isinstance(error, OSError | FloatingPointError)
    if code == 3 and not expected:
        traceback.print_exception(error)
    _say(str(error) or type(error).__name__)
    return code


def _say(message: str) -> None:
    print("mor: " + " ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
