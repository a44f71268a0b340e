"""``resilience run FILE.py:FUNCTION``: launch a training function without a ``__main__`` of its own."""

from __future__ import annotations

import ast
import json
from typing import Any

import click

from resilience.cli.options import json_option, print_table
from resilience.errors import (
    CorruptError,
    ExhaustedError,
    FencedError,
    ResilienceError,
    TrainingError,
    UnavailableError,
)

_AT_ONCE = "ended at once, without a last checkpoint; the same command goes on from the newest one there is"


@click.command("run", epilog="Exit code: 0 finished, 130 interrupted; the others are in docs/cli.md.")
@click.argument("target", metavar="FILE.py:FUNCTION")
@click.option("--workers", type=click.IntRange(min=1), help="Ranks to run, one card each.")
@click.option("--spares", type=click.IntRange(min=0), help="Cards to hold ready beyond that.")
@click.option(
    "--storage", envvar="RESILIENCE_STORAGE", show_envvar=True, metavar="URL", help="Where runs are kept."
)
@click.option("--nvme", metavar="DIR", help="Local directory for the near tier, on every node.")
@click.option(
    "--name", metavar="RUN", help="Name of the run; the same name goes on from its newest checkpoint."
)
@click.option(
    "--card", metavar="RESOURCE", help="Ray resource that stands for a card: GPU, NPU, or card (simulated)."
)
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), metavar="STEPS", help="Steps between checkpoints."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of the function; typed by its literal.",
)
@json_option
def run_command(target: str, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run FUNCTION of FILE.py to its end, over all failures.

    Options that are not given are those of the function's @resilience.job. Ctrl-C stops cleanly after a last
    checkpoint; the same command goes on from it.
    """
    arguments = parse_settings(settings)
    from resilience.job import load

    job = load(target).options(**{key: value for key, value in options.items() if value is not None})
    try:
        result = job.launch(view="json" if as_json else "auto", **arguments)
    except ResilienceError as error:
        if as_json:
            click.echo(json.dumps({"run": job.name, "result": _result_of(error), "reason": error.message}))
        raise
    except KeyboardInterrupt:
        if as_json:
            click.echo(json.dumps({"run": job.name, "result": "interrupted", "reason": _AT_ONCE}))
        else:
            click.echo(_AT_ONCE, err=True)
        raise
    ended = result.outcome.result.value
    if as_json:
        final = {"run": result.run, "result": ended, "steps": result.steps, "storage": result.storage}
        click.echo(json.dumps({**final, "reason": result.outcome.reason, "value": result.value}))
    else:
        from resilience.history.query import History
        from resilience.history.report import run_report

        with History(result.storage, result.run) as history:
            print_table(run_report(history, result.run))
    if ended != "finished":
        from resilience.cli.main import EXIT_CODES

        click.get_current_context().exit(EXIT_CODES[ended])


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as keyword arguments. A value is JSON or a Python literal if it reads as one, else text.

    ``click.UsageError`` (exit code 2) for a pair without ``=``, a key that is no name, or a key given twice.
    """
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.isidentifier():
            raise click.UsageError(
                f"--set {setting!r}: write it as KEY=VALUE, KEY a parameter of the function"
            )
        if key in arguments:
            raise click.UsageError(f"--set {key} is given twice")
        arguments[key] = _value(text)
    return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _result_of(error: ResilienceError) -> str:
    """The run's result that an error stands for, or ``not_started``."""
    match error:
        case TrainingError():
            return "user_error"
        case ExhaustedError():
            return "no_capacity" if error.operation == "no_capacity" else "budget_exhausted"
        case FencedError():
            return "fenced"
        case UnavailableError():
            return "unavailable"
        case CorruptError():
            return "no_checkpoint"
    return "not_started"
