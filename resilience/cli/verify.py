"""``resilience verify``: every byte of every checkpoint against its CRC, and the commit log against its hashes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resilience.cli.options import json_option, print_json, storage_option
from resilience.cli.progress import Report, progress
from resilience.errors import CorruptError, InvalidError

if TYPE_CHECKING:
    from resilience.history.load import RunReader
    from resilience.journal.state import Checkpoint, LogState
    from storage_backends import Storage


@dataclass
class Checked:
    """One checkpoint in one tier. ``absent``: nodes whose packs cannot be reached from here; they are not checked."""

    step: int
    generation: int
    tier: str
    size: int
    damage: list[CorruptError] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    retired: bool = False  # by the run, while it was being read: its bytes may be gone, and that is no damage

    @property
    def verdict(self) -> str:
        if self.retired:
            return "retired meanwhile"
        if self.damage:
            return "damaged"
        return "not on this machine" if self.absent else "whole"

    def to_json(self) -> dict[str, Any]:
        damage = [{"path": e.path, "start": e.start, "end": e.end, "message": e.message} for e in self.damage]
        names = ("step", "generation", "tier", "size", "verdict", "absent")
        return {**{name: getattr(self, name) for name in names}, "damage": damage}


@click.command("verify")
@click.argument("run")
@storage_option
@json_option
@click.option("--step", type=click.IntRange(min=0), help="Only checkpoints of this step.")
@click.option(
    "--nvme", metavar="DIR", help="Where the near tier is; default the one the run was started with."
)
def verify_command(run: str, storage: str, as_json: bool, step: int | None, nvme: str | None) -> None:
    """Check every byte of every checkpoint of RUN. Exit code 1 when anything is damaged.

    The near tier is checked as far as it lies on this machine; what does not is said, never counted as whole.
    """
    from resilience.history.load import open_run
    from resilience.journal.state import fold

    reader = open_run(storage, run)
    state = fold(reader.records())
    log = list(reader.warnings)
    chosen = _choose(state, run, step)
    near = nvme or nvme_of(reader)
    results: list[Checked] = []
    with progress(quiet=as_json) as report:
        for checkpoint in chosen:
            for tier in sorted(checkpoint.tiers):
                results.append(_check(reader, checkpoint, tier, near, report))
                if not as_json:
                    _tell(results[-1])
    whole = not log and not any(result.damage for result in results)
    if as_json:
        damaged = [{"path": path, "message": message} for path, message in log]
        print_json({"run": run, "ok": whole, "log": damaged, "checkpoints": [r.to_json() for r in results]})
    else:
        for _path, message in log:
            click.echo(f"commit log: {message}")
        _sum_up(results, len(log))
    if not whole:
        click.get_current_context().exit(1)


def _choose(state: LogState, run: str, step: int | None) -> list[Checkpoint]:
    if step is None:
        return list(state.checkpoints)
    chosen = [checkpoint for checkpoint in state.checkpoints if checkpoint.step == step]
    if not chosen:
        steps = sorted({checkpoint.step for checkpoint in state.checkpoints})
        raise InvalidError(
            f"run {run!r} has no checkpoint of step {step}",
            operation="verify",
            hint=f"it has those of steps {', '.join(map(str, steps)) or '(none)'}",
        )
    return chosen


def nvme_of(reader: RunReader) -> str | None:
    """The near tier's directory, as the run's newest start told it."""
    told = [event.data.get("nvme") for event in reader.events() if event.type == "run.started"]
    return told[-1] if told else None


def _check(reader: RunReader, checkpoint: Checkpoint, tier: str, nvme: str | None, report: Report) -> Checked:
    from resilience.checkpoint.restore import Source
    from resilience.checkpoint.verify import VerifyProgress, verify

    entry = checkpoint.tiers[tier]
    result = Checked(checkpoint.step, checkpoint.generation, tier, entry.size)
    sources = []
    for part in entry.parts:
        storage = reader.storage if tier == "shared" else node_storage(nvme, reader.run, part.node)
        if storage is None:
            if part.node not in result.absent:
                result.absent.append(part.node)
        else:
            sources.append(Source(part.rank, storage, part.name, part.sha256))
    if result.absent:
        return result  # a checkpoint is whole only with all of its packs
    title = f"{checkpoint.ref} in {tier}"

    def told(so_far: VerifyProgress) -> None:
        report(title, so_far.done, so_far.total)

    found = list(verify(sources, step=checkpoint.step, generation=checkpoint.generation, progress=told))
    if found and _retired_since(reader, checkpoint):
        result.retired = True
    else:
        result.damage.extend(found)
    return result


def node_storage(nvme: str | None, run: str, node: str) -> Storage | None:
    from storage_backends import child, open_storage

    if nvme is None:
        return None
    root = child(nvme, run, node)
    return open_storage(root) if Path(root).is_dir() else None


def _retired_since(reader: RunReader, checkpoint: Checkpoint) -> bool:
    from resilience.journal.state import fold

    return checkpoint.ref in fold(reader.records()).retired


def _tell(result: Checked) -> None:
    from resilience.history.format import size

    name = f"step {result.step}, generation {result.generation}, {result.tier}"
    where = f" (node {', '.join(result.absent)})" if result.absent else ""
    click.echo(f"{name}: {result.verdict}{where}, {size(result.size)}")
    for error in result.damage:
        span = "" if error.start is None else f" bytes {error.start}..{error.end}"
        click.echo(f"  {error.path}{span}: {error.message}")


def _sum_up(results: list[Checked], log: int) -> None:
    from resilience.history.format import count

    verdicts = [result.verdict for result in results]
    parts = [
        f"{verdicts.count(v)} {v}"
        for v in ("whole", "damaged", "not on this machine", "retired meanwhile")
        if v in verdicts
    ]
    text = ", ".join(parts) or "no checkpoints"
    click.echo(
        text
        + (f"; the commit log has {count(log, 'damaged record')}" if log else "; the commit log is whole")
    )
