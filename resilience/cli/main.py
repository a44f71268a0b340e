"""The command group: which commands there are, and how errors become messages and exit codes.

Owns the exit codes (docs/cli.md). Must never show a traceback for an error of ours: message and hint are enough,
except the user's own, which comes first. Importing this module must stay cheap.
"""

from __future__ import annotations

import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import click

from resilience.errors import (
    CorruptError,
    ExhaustedError,
    FencedError,
    InvalidError,
    ResilienceError,
    TrainingError,
    UnavailableError,
)

#: Command → (module, attribute, one line of help). Listed here so that --help imports none of them.
COMMANDS = {
    "run": ("resilience.cli.run", "run_command", "Run a training function to its end, over all failures."),
    "status": ("resilience.cli.status", "status_command", "Show where a run is, while it goes and after."),
    "history": ("resilience.cli.history", "history_command", "List runs, or tell what happened in one."),
    "verify": ("resilience.cli.verify", "verify_command", "Check every byte of every checkpoint of a run."),
    "inspect": (
        "resilience.cli.inspect",
        "inspect_command",
        "Show what a checkpoint holds, without reading its data.",
    ),
    "export": (
        "resilience.cli.export",
        "export_command",
        "Write a checkpoint as safetensors, Zarr or torch's DCP.",
    ),
    "import": (
        "resilience.cli.importing",
        "import_command",
        "Make a run from a safetensors or DCP checkpoint.",
    ),
    "logs": ("resilience.cli.logs", "logs_command", "Print what the ranks of a run printed."),
    "report-fault": (
        "resilience.cli.report_fault",
        "report_fault_command",
        "Tell running runs that a card is bad.",
    ),
    "demo": ("chaos.demo", "demo_command", "Train a small GPT, break it, and watch it go on."),
}
#: How a run ended → exit code. 2 is bad usage (click's own).
EXIT_CODES = {
    "finished": 0,
    "user_error": 1,
    "budget_exhausted": 3,
    "no_capacity": 4,
    "fenced": 5,
    "unavailable": 6,
    "no_checkpoint": 7,
    "interrupted": 130,
}


def exit_code(error: ResilienceError) -> int:
    """The exit code that tells a script what kind of error it was."""
    match error:
        case InvalidError():
            return 2
        case ExhaustedError():
            return EXIT_CODES["no_capacity" if error.operation == "no_capacity" else "budget_exhausted"]
        case FencedError():
            return EXIT_CODES["fenced"]
        case UnavailableError():
            return EXIT_CODES["unavailable"]
        case CorruptError() if error.operation == "run":
            return EXIT_CODES["no_checkpoint"]
    return EXIT_CODES["user_error"]


class Commands(click.Group):
    """Imports a command when it is asked for, and turns our errors into message, hint and exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        try:
            command = getattr(import_module(module), attribute)
        except ImportError as error:
            raise InvalidError(
                f"the command {cmd_name!r} is not available: {error}",
                operation=cmd_name,
                hint="install its extra: pip install 'resilience[torch,demo]'",
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"there is no command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ResilienceError as error:
            click.echo(tell(error), err=True)
            ctx.exit(exit_code(error))
        except KeyboardInterrupt:
            ctx.exit(EXIT_CODES["interrupted"])


def tell(error: ResilienceError) -> str:
    """What is printed for an error: the user's traceback first, then message and hint."""
    text = str(error)
    return text if isinstance(error, TrainingError) else f"error: {text}"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes and options: docs/cli.md.",
)
@click.version_option(package_name="resilience")
def main() -> None:
    """Training that goes on by itself while cards, processes and nodes fail under it."""
    if isinstance(sys.stdout, TextIOWrapper):  # a locale without some character must not end what prints it
        sys.stdout.reconfigure(errors="replace")
