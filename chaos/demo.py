"""``resilience demo``: train a small GPT, kill a rank, kill a node, watch it go on, and prove that nothing changed.

Three virtual nodes with two simulated cards each, one node a spare; the same training once more without faults;
the SHA-256 of the final parameters must be the same. Everything real: processes, signals, Ray, storage.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from resilience.errors import InvalidError

_NAME = "demo"
_REFERENCE = "demo-uninterrupted"


@click.command("demo")
@click.option("--steps", type=click.IntRange(min=40), default=120, show_default=True, help="Steps to train.")
@click.option(
    "--dir", "directory", type=click.Path(file_okay=False), help="Where to keep the runs (default: new)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def demo_command(steps: int, directory: str | None, as_json: bool) -> None:
    """Train a small GPT on simulated cards, kill a rank and a node under it, and prove that the result is the same.

    Exit code: 0 when it is, 1 when it is not.
    """
    where = Path(directory) if directory else Path(tempfile.mkdtemp(prefix="resilience-demo-"))
    if (where / "storage" / _NAME).exists():
        raise InvalidError(
            f"{where} holds a demo already",
            operation="demo",
            path=str(where),
            hint="give --dir another directory",
        )
    from resilience.runtime.launch import quiet_ray

    with quiet_ray():
        report = Demo(where, steps, quiet=as_json).run()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    if not report["proof"]["equal"]:
        click.get_current_context().exit(1)


def example_path() -> Path:
    """``examples/char_gpt.py``: beside the packages in a checkout, inside ``resilience`` where it is installed."""
    import resilience

    package = Path(resilience.__file__).parent
    for place in (package.parent / "examples", package / "examples"):
        if (place / "char_gpt.py").is_file():
            return place / "char_gpt.py"
    raise InvalidError("examples/char_gpt.py is missing", operation="demo", hint="reinstall the package")


class Demo:
    """One demo in ``directory``.

    Args:
        steps: training steps; the rank dies at a quarter of them, the node at two thirds.
        quiet: print nothing.
    """

    def __init__(self, directory: Path, steps: int, *, quiet: bool = False) -> None:
        self.directory = directory
        self.steps = steps
        self.quiet = quiet

    def run(self) -> dict[str, Any]:
        """Do it all; the report as plain data."""
        from chaos.faults import kill, kill_node
        from chaos.virtual_cluster import VirtualCluster
        from resilience.job import load

        began = time.monotonic()
        job = load(f"{example_path()}:train").options(
            workers=4,
            spares=2,
            storage=str(self.directory / "storage"),
            nvme=str(self.directory / "nvme"),
            card="card",
            checkpoint_every=10,
            keep_last=3,
        )
        rank_step, node_step = self.steps // 4 + 3, self.steps * 2 // 3 + 4
        faults = (kill(2, step=rank_step), kill_node(0, step=node_step))
        view = "none" if self.quiet else "auto"
        self._say("[bold]Three virtual nodes with two simulated cards each; one node is the spare.[/]")
        with VirtualCluster([2, 2, 2]):
            self._say(
                f"Training a small GPT, 4 ranks, {self.steps} steps. Rank 2 will be killed in step {rank_step}, "
                f"the node of rank 0 in step {node_step}."
            )
            faulty = job.options(name=_NAME, faults=tuple(f.to_json() for f in faults)).launch(
                view=view, steps=self.steps
            )
            self._say("The same training once more, never interrupted, for comparison.")
            calm = job.options(name=_REFERENCE).launch(view=view, steps=self.steps)
        proof = {
            "sha256": faulty.value["sha256"],
            "sha256_uninterrupted": calm.value["sha256"],
            "samples_equal": faulty.value["samples"] == calm.value["samples"],
            "equal": faulty.value == calm.value and faulty.steps == calm.steps == self.steps,
        }
        history = faulty.history
        picture = self._picture(history)
        report = {
            "run": _NAME,
            "storage": faulty.storage,
            "steps": faulty.steps,
            "incidents": faulty.incidents,
            "checkpoints": history.checkpoints,
            "generations": history.generations,
            "chaos": history.sql("select * from chaos"),
            "proof": proof,
            "picture": picture,
            "seconds": round(time.monotonic() - began, 1),
        }
        self._show(history, report)
        from resilience.history.query import jsonable

        plain: dict[str, Any] = jsonable(report)
        return plain

    def _picture(self, history: Any) -> str | None:
        from resilience.history.picture import picture

        path = picture(history, self.directory / "loss.png", _NAME)
        return str(path) if path else None

    def _show(self, history: Any, report: dict[str, Any]) -> None:
        if self.quiet:
            return
        from rich.text import Text

        from resilience.history.format import console
        from resilience.history.picture import text
        from resilience.history.report import run_report

        out = console()
        out.print()
        out.print(run_report(history, _NAME))
        if report["picture"] is None:
            out.print(text(history, _NAME), markup=False)
        proof = report["proof"]
        out.print()
        out.print(f"SHA-256 of the final parameters  {proof['sha256']}", highlight=False)
        out.print(f"of the uninterrupted training    {proof['sha256_uninterrupted']}", highlight=False)
        verdict = "[bold green]equal: nothing was lost" if proof["equal"] else "[bold red]NOT EQUAL"
        out.print(
            Text.from_markup(
                f"{verdict}[/], after {len(report['incidents'])} incidents, in {report['seconds']} s"
            )
        )
        if report["picture"]:
            out.print(f"loss curve with the incidents: {report['picture']}", highlight=False, soft_wrap=True)
        out.print(
            f"ask again: resilience history {_NAME} --storage {report['storage']}",
            highlight=False,
            soft_wrap=True,
        )

    def _say(self, text: str) -> None:
        if not self.quiet:
            from rich.text import Text

            from resilience.history.format import console

            console().print(Text.from_markup(text))
