"""Reading what a run left in storage: its FORMAT, its commit log and its event journal. No cluster is needed.

Owns the tolerance of history: whatever is damaged or missing becomes a warning beside the rest, never silence and
never the end of reading. Must never write, and no decision about recovery may use what is read here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from resilience.errors import CorruptError, InvalidError, ResilienceError
from resilience.journal.event import Event
from resilience.journal.event_reader import Gap, read_events
from resilience.journal.format_file import NAME as FORMAT
from resilience.journal.format_file import read_format
from resilience.journal.log import CommitLog, slot_name
from resilience.journal.records import FIRST_SLOT, Kind, Record, decode
from storage_backends import Storage, open_storage


@dataclass
class RunReader:
    """One run in storage. Iterate ``events`` once; ``warnings`` is complete only after that and ``records``.

    Attributes:
        run: its name, the directory below the storage URL.
        url: of its root.
        created: ISO time of its FORMAT, empty when that is damaged.
        storage: rooted at the run.
        warnings: (object concerned or empty, what is wrong), one for each damage met.
    """

    run: str
    url: str
    created: str
    storage: Storage
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def events(self) -> Iterator[Event]:
        """All events, oldest generation first, one segment in memory at a time."""
        reader = read_events(self.storage)
        yield from reader
        named = {gap.path for gap in reader.gaps if gap.first is not None}  # says the same, and which events
        for gap in reader.gaps:
            if gap.first is not None or gap.path not in named:
                self._warn(gap.path, _tell(gap))

    def records(self) -> tuple[Record, ...]:
        """The commit log. When it is damaged: the records that can still be read, and a warning for each other."""
        try:
            return _log(self.storage).refresh()
        except CorruptError as error:
            self.warnings.append((error.path or "log", error.message))
        names = [name for name in self.storage.list("log") if name.endswith(".json")]
        newest = max((int(name[4:-5]) for name in names if name[4:-5].isdigit()), default=0)
        found = []
        for slot in range(FIRST_SLOT, newest + 1):
            try:
                found.append(decode(self.storage.read(slot_name(slot)), path=slot_name(slot)))
            except FileNotFoundError:
                self._warn(slot_name(slot), f"log record {slot_name(slot)} is missing")
            except (CorruptError, InvalidError) as error:
                self._warn(slot_name(slot), error.message)
        return tuple(found)

    def _warn(self, path: str, message: str) -> None:
        if (path, message) not in self.warnings:
            self.warnings.append((path, message))


def list_runs(url: str) -> list[str]:
    """Names of the runs under a storage URL: its children that hold a FORMAT, sorted."""
    storage = open_storage(url)
    try:
        children = [name.rstrip("/") for name in storage.list() if name.endswith("/")]
        return [name for name in children if _has_format(storage, name)]
    finally:
        storage.close()


def open_run(url: str, run: str) -> RunReader:
    """The run ``run`` under ``url``.

    Raises ``InvalidError`` when there is none (suggests the nearest name and lists those there are), or when its
    format is of a newer version. A damaged FORMAT is a warning: the rest can still be read.
    """
    root = f"{url.rstrip('/')}/{run}"
    known: list[str] | None = None
    try:
        storage = open_storage(root)
        try:
            return RunReader(run, root, read_format(storage).created, storage)
        except InvalidError as error:
            if not _damaged(storage):
                raise
            return RunReader(run, root, "", storage, [(FORMAT, error.message)])
    except FileNotFoundError:
        known = list_runs(url)
    raise unknown_run(url, run, known)


def open_runs(url: str) -> Iterator[RunReader]:
    """Every run under ``url``. One that cannot be read at all (a newer format) still comes, as a warning alone."""
    for name in list_runs(url):
        try:
            yield open_run(url, name)
        except InvalidError as error:
            yield UnreadableRun(
                name, f"{url.rstrip('/')}/{name}", "", open_storage(url), [(FORMAT, error.message)]
            )


class UnreadableRun(RunReader):
    """A run of which only the name is known: nothing in it may be interpreted."""

    def events(self) -> Iterator[Event]:
        return iter(())

    def records(self) -> tuple[Record, ...]:
        return ()


def in_charge(records: tuple[Record, ...]) -> list[bool]:
    """For each record whether its writer was still in charge: its generation is not below an earlier fence's."""
    newest, answers = 0, []
    for record in records:
        answers.append(record.generation >= newest)
        if answers[-1] and record.kind is Kind.FENCE:
            newest = record.generation
    return answers


def unknown_run(url: str, run: str, known: list[str]) -> InvalidError:
    """The error for a run that is not there."""
    near = difflib.get_close_matches(run, known, n=1, cutoff=0.5)
    if not known:
        hint = "there are no runs at all here: is this the storage the run was started with? (--storage URL)"
    else:
        shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        hint = f"{f'did you mean {near[0]!r}? ' if near else ''}runs here: {shown}"
    return InvalidError(f"there is no run {run!r} under {url}", operation="history", hint=hint)


def _log(storage: Storage) -> CommitLog:
    def new_id() -> str:
        raise AssertionError("history never writes")

    return CommitLog(storage, new_id=new_id)


def _has_format(storage: Storage, name: str) -> bool:
    try:
        storage.size(f"{name}/{FORMAT}")
    except (FileNotFoundError, InvalidError):  # InvalidError: not a name any of our runs could have
        return False
    return True


def _damaged(storage: Storage) -> bool:
    """Whether FORMAT is not even JSON of ours, as opposed to one of a newer version (which forbids guessing)."""
    try:
        fields = json.loads(storage.read(FORMAT))
    except (ValueError, RecursionError):
        return True
    except ResilienceError:
        return False
    return not isinstance(fields, dict)


def _tell(gap: Gap) -> str:
    where = f" ({gap.path})" if gap.path else ""
    what = "is torn" if gap.reason == "torn" else "is missing"
    if gap.first is None:
        return f"a line of {gap.source} in generation {gap.generation} {what}{where}"
    span = f"event {gap.first}" if gap.first == gap.last else f"events {gap.first}..{gap.last}"
    if gap.first != gap.last:
        what = what.replace("is", "are", 1)
    return f"{span} of {gap.source} in generation {gap.generation} {what}{where}"
