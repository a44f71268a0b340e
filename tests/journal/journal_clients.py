"""What the clients of a simulated world do: fence, write packs and parts, commit, acknowledge; and the parts that a
mutation test replaces by broken ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from journal_simulation import Client, SimStorage

from resilience.errors import FencedError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind, Record, canonical, digest
from resilience.journal.state import fold
from storage_backends.memory import MemoryStorage


def directory(step: int, generation: int) -> str:
    return f"checkpoints/step-{step}-g{generation}"


def write(me: Client, name: str, data: bytes) -> bool:
    """Stream an object; ``False`` when storage stays away."""

    def once() -> bool:
        with me.storage.sink(name) as sink:
            sink.write(data[: len(data) // 2])
            sink.write(data[len(data) // 2 :])
        return True

    return bool(me.insist(once))


def write_data(me: Client, step: int) -> dict[str, Any] | None:
    """Pack, then part, both durable; the body of the record that is to name them."""
    place = directory(step, me.log.generation)
    pack = f"{me.name} {me.new_id()} step {step} ".encode() * 3
    part = canonical({"pack": digest(pack), "step": step})
    if not write(me, f"{place}/rank-0.pack", pack) or not write(me, f"{place}/rank-0.json", part):
        return None
    name = f"{place}/rank-0.json"
    parts = [{"rank": 0, "node": me.name, "name": name, "sha256": digest(part)}]
    return {
        "step": step,
        "tier": "shared",
        "world_size": 1,
        "size": len(pack),
        "parts": parts,
        "op": me.new_id(),
    }


def save(me: Client, step: int) -> Record | None:
    """One checkpoint; acknowledged only when its record is known to be in the log."""
    body = write_data(me, step)
    return None if body is None else commit(me, Kind.CHECKPOINT, body)


def commit(me: Client, kind: Kind, body: dict[str, Any]) -> Record | None:
    def once() -> Record:
        if me.world.choices.next(2):
            me.log.refresh()  # may find what an earlier try has left
        return me.log.append(kind, body)

    record = me.insist(once)
    if record is not None:
        me.world.acked.append(record)
        me.world.answers.append((str(body.get("op")), record))
    return record


def begin(me: Client, wanted: int = 1) -> Record | None:
    """Fence, and note what is known at that moment."""
    body = {"run": "r", "supervisor": me.name, "reason": "start", "op": me.new_id()}
    record = me.insist(lambda: me.log.fence(wanted, body))
    if record is None:
        return None
    acks = len(me.world.acked)
    known = me.insist(me.log.refresh, tries=9)
    if known is not None:
        me.world.fenced.append((me, record, known, acks))
        me.world.answers.append((str(body["op"]), record))
    return record


def supervise(me: Client) -> None:
    """The life of a supervisor: fence, go on from the newest checkpoint, save, finish."""
    if begin(me) is None:
        return
    state = fold(me.log.refresh())
    newest = state.checkpoints[0].step if state.checkpoints else 0
    try:
        for step in range(newest + 1, newest + 4):
            me.world.parts.save(me, step)
    except FencedError:
        if me.log.generation:  # a zombie: its ranks have not heard of it yet and write one more
            write_data(me, newest + 9)
        raise


def verify(storage: MemoryStorage, record: Record) -> None:
    """Everything a checkpoint record names is there, with the bytes it had."""
    try:
        for part in record.body["parts"]:
            text = storage.read(part["name"])
            assert digest(text) == part["sha256"], f"slot {record.slot}: not the part that was committed"
            pack = storage.read(part["name"].replace(".json", ".pack"))
            assert f'"pack":"{digest(pack)}"'.encode() in text, f"slot {record.slot}: not its pack"
    except FileNotFoundError as error:
        raise AssertionError(f"slot {record.slot} names what is not there: {error}") from error


@dataclass(frozen=True)
class Parts:
    """What is under test; the mutation tests put broken ones in."""

    log: type[CommitLog] = CommitLog
    storage: type[SimStorage] = SimStorage
    save: Callable[[Client, int], Record | None] = save
    fold: Callable[..., Any] = fold
    order: str = "retire, wait, delete"
    sweep_own: bool = False
