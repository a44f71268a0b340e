"""P1-P11, each as a function of one byte string: it plays a world and raises AssertionError where it is broken.

The property tests draw the strings with hypothesis; the mutation tests hand in broken parts and see each caught.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import pytest
from journal_clients import Parts, begin, supervise, verify
from journal_simulation import SLOT, Choices, Client, Faults, World

from resilience.errors import CorruptError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind, Record, decode
from storage_backends.disk import Disk, worst
from storage_backends.memory import MemoryStorage

PARTS = Parts()


@contextlib.contextmanager
def world_of(data: bytes, parts: Parts, *, faults: Faults | None = None) -> Iterator[World]:
    choices = Choices(data)
    semantics = ("page_cache", "object")[choices.next(2)]
    world = World(choices, parts, semantics, Faults() if faults is None else faults)
    try:
        yield world
    finally:
        world.close()


def play(world: World, *, supervisors: int = 3, turns: int = 400) -> tuple[Record, ...]:
    """Racing supervisors under all faults, then peace until everybody is done; the log as it is then."""
    for _ in range(supervisors):
        world.start(supervise)
    world.run(turns, fresh=supervise)
    world.heal()
    world.run(5000)
    assert not world.running()
    return world.records()


def slots_of(disk: Disk) -> list[int]:
    """The slots that are taken."""
    return sorted(int(match[1]) for match in map(SLOT.fullmatch, disk.names()) if match)


def dense(slots: Iterable[int]) -> None:
    taken = list(slots)
    assert taken == list(range(1, len(taken) + 1)), f"a gap: {taken}"


def p1_agreement_and_density(data: bytes, parts: Parts = PARTS) -> None:
    """One record per slot, whoever looks and whenever; no slot without its predecessor, at any moment."""
    with world_of(data, parts) as world:
        once: dict[int, bytes] = {}

        def dense_and_stable(world: World) -> None:
            dense(world.slots)
            dense(slots_of(world.if_power_failed()))
            for slot, held in world.slots.items():
                before = once.setdefault(slot, held)
                if (
                    before != held
                ):  # only what nobody relied on may have gone with the power, and be taken anew
                    assert all(record.slot < slot for record in world.acked if record.writer in str(before))
                    once[slot] = held

        world.watchers.append(dense_and_stable)
        final = play(world)
        for slot, held in world.slots.items():
            assert world.clean().read(f"log/{slot:020d}.json") == held, f"slot {slot} was rewritten"
        for client in world.clients:
            if client.storage.alive:
                known = client.log.refresh()
                assert known == final[: len(known)], f"{client.name} saw another log"


def p2_references_before_records(data: bytes, parts: Parts = PARTS) -> None:
    """What a record names is whole as soon as the record is visible, and survives whatever power loss it survives."""
    with world_of(data, parts) as world:
        checked: set[int] = set()

        def named_is_there(world: World) -> None:
            for slot in world.slots.keys() - checked:
                checked.add(slot)
                record = world.record(slot)
                if record.kind is Kind.CHECKPOINT:
                    verify(world.clean(), record)
            after = world.if_power_failed()
            for slot in slots_of(after)[-1:]:
                record = world.record(slot)
                if record.kind is Kind.CHECKPOINT:
                    verify(MemoryStorage(after), record)

        world.watchers.append(named_is_there)
        for _ in range(2):
            world.start(supervise)
        world.run(40 + 2 * world.choices.next(256), fresh=supervise)
        world.power_loss(worst)
        world.look()
        checked.clear()
        named_is_there(world)


def p3_fencing(data: bytes, parts: Parts = PARTS) -> None:
    """After the fence of a generation, nothing older is written behind it; generations only grow."""
    with world_of(data, parts) as world:
        final = play(world, supervisors=4)
        generation = 0
        for record in final:
            if record.kind is Kind.FENCE:
                assert record.generation > generation, f"slot {record.slot}: generation used twice"
                generation = record.generation
            assert record.generation == generation, (
                f"slot {record.slot}: {record.generation} after {generation}"
            )
        for client in world.clients:
            if client.outcome == "done" and client.log.generation:
                later = [r.generation for _, r, _, _ in world.fenced if r.generation > client.log.generation]
                mine = [r for _, r in world.answers if r.writer.startswith(f"{client.name}-")]
                fence = next((r for r in final if later and r.generation == min(later)), None)
                assert all(fence is None or r.slot < fence.slot for r in mine)


def p4_no_lost_acknowledgement(data: bytes, parts: Parts = PARTS) -> None:
    """Every later attempt finds what was acknowledged before it won its fence, through any power loss."""
    with world_of(data, parts) as world:

        def acknowledged_is_durable(world: World) -> None:
            if world.acked:
                after = slots_of(world.if_power_failed())
                assert world.acked[-1].slot in after, f"slot {world.acked[-1].slot} would be gone"

        world.watchers.append(acknowledged_is_durable)
        final = play(world)
        for record in world.acked:
            assert record in final, f"slot {record.slot} was acknowledged and is gone"
        for client, fence, known, acks in world.fenced:
            for record in world.acked[:acks]:
                assert record in known, (
                    f"{client.name} fenced {fence.generation} without seeing slot {record.slot}"
                )
        state = parts.fold(final)
        found = {(checkpoint.step, checkpoint.generation) for checkpoint in state.checkpoints}
        for record in world.acked:
            assert (record.body["step"], record.generation) in found
            verify(world.clean(), record)


def p5_no_phantom(data: bytes, parts: Parts = PARTS) -> None:
    """At every moment, also right after a power loss, a slot holds a whole record or nothing."""
    with world_of(data, parts) as world:

        def whole(world: World) -> None:
            for slot, held in list(world.slots.items())[-3:]:
                current = world.clean().read(f"log/{slot:020d}.json")
                assert current == held, f"slot {slot} changed under its readers"
                decode(held, path=f"slot {slot}")
            after = world.if_power_failed()
            for slot in slots_of(after)[-1:]:
                decode(MemoryStorage(after).read(f"log/{slot:020d}.json"), path=f"slot {slot}")

        world.watchers.append(whole)
        try:
            play(world)
            world.power_loss()
            world.look()
            whole(world)
        except CorruptError as error:
            raise AssertionError(f"a phantom: {error}") from error


def p6_idempotence(data: bytes, parts: Parts = PARTS) -> None:
    """One call, one record: lost, late and doubled replies neither repeat a record nor lose a success."""
    with world_of(data, parts, faults=Faults(power=0, lost_reply=90, delayed=60, land=60)) as world:
        final = play(world)
        calls = [record.body["op"] for record in final]
        assert len(calls) == len(set(calls)), "the same call was recorded twice"
        for call, record in world.answers:
            assert final[record.slot - 1] == record and record.body["op"] == call


def p7_zombies_stay_in_their_prefix(data: bytes, parts: Parts = PARTS) -> None:
    """Committed bytes never change, however long the writers of older generations go on."""
    with world_of(data, parts, faults=Faults(power=0)) as world:
        held: dict[str, bytes] = {}

        def note(world: World) -> None:
            for slot in list(world.slots)[len(held) :]:
                record = world.record(slot)
                held[f"slot {slot}"] = b""
                for part in record.body.get("parts", ()):
                    for name in (part["name"], part["name"].replace(".json", ".pack")):
                        held[name] = world.clean().read(name)

        world.watchers.append(note)
        play(world, supervisors=4)
        for name, before in held.items():
            assert name.startswith("slot") or world.clean().read(name) == before, f"{name} was written again"


def p8_integrity(data: bytes, parts: Parts = PARTS) -> None:
    """Any flipped bit, cut, or swap in any record is a CorruptError that names it."""
    choices = Choices(data)
    storage = MemoryStorage(Disk())
    serial = itertools.count()
    log = CommitLog(storage, new_id=lambda: f"w{next(serial)}")
    log.fence(1, {"run": "r"})
    for step in range(1 + choices.next(4)):
        log.append(Kind.QUARANTINE, {"step": step, "generation": 1, "tier": "nvme", "reason": "é\n\u2028"})
    count = len(log.refresh())
    slot = 1 + choices.next(count)
    name = f"log/{slot:020d}.json"
    good = storage.read(name)
    harm = choices.next(4)
    if harm == 0:
        at = (choices.next(256) * 256 + choices.next(256)) % len(good)
        bad = good[:at] + bytes([good[at] ^ (1 << choices.next(8))]) + good[at + 1 :]
    elif harm == 1:
        bad = good[: (choices.next(256) * 256 + choices.next(256)) % len(good)] or b"\0"
    elif harm == 2:
        bad = good + bytes([choices.next(256)])
    else:
        bad = storage.read(f"log/{1 + slot % count:020d}.json")
    with storage.sink(name) as sink:
        sink.write(bad)
    with pytest.raises(CorruptError) as caught:
        parts.log(storage, new_id=lambda: "reader").refresh()
    assert caught.value.path == name


def p9_gc_safety(data: bytes, parts: Parts = PARTS) -> None:
    """Deleting never takes a byte from a live checkpoint, nor from a restore that began before it was retired."""
    with world_of(data, parts, faults=Faults(power=1, kill=2, stale_read=0, delayed=100)) as world:
        seen = {"slots": 0, "files": frozenset[str]()}

        def live_is_whole(world: World) -> None:
            files = frozenset(name for name in world.disk.names() if name.startswith("checkpoints/"))
            if seen != (now := {"slots": len(world.slots), "files": files}):
                seen.update(now)
                records = [world.record(slot) for slot in world.slots]
                for checkpoint in parts.fold(records).checkpoints:
                    verify(world.clean(), records[checkpoint.tiers["shared"].slot - 1])

        world.watchers.append(live_is_whole)
        for program in (retain, restore, retain):
            world.start(program)
        for turns in (150, 150, 150, 150):
            world.start(restore if world.choices.next(2) else retain)
            world.run(turns, fresh=retain, most=12)
        world.heal()
        world.run(5000)


def retain(me: Client) -> None:
    """A supervisor that keeps one checkpoint and deletes what it retires and what older generations left."""
    parts, world = me.world.parts, me.world
    if begin(me) is None:
        return
    sweep(me)
    state = parts.fold(me.log.refresh())
    newest = max([checkpoint.step for checkpoint in state.checkpoints], default=0)
    for step in range(newest + 1, newest + 4):
        parts.save(me, step)
        if parts.sweep_own:
            sweep(me)
        old = parts.fold(me.log.refresh()).checkpoints[1:]
        if not old:
            continue
        refs = [{"step": checkpoint.step, "generation": checkpoint.generation} for checkpoint in old]
        body = {"refs": refs, "op": me.new_id()}

        def delete(refs: list[dict[str, int]] = refs) -> None:
            for ref in refs:
                me.insist(lambda ref=ref: erase(me, f"step-{ref['step']}-g{ref['generation']}"))

        if parts.order.startswith("delete"):
            delete()
        record = me.insist(lambda body=body: me.log.append(Kind.RETIRE, body))
        if record is None:
            continue  # not known to be retired: nothing may go
        retired_at = world.turn
        while "wait" in parts.order and any(began <= retired_at for began in world.restores.values()):
            me.pause()  # the grace period is longer than any restore
        delete()


def sweep(me: Client) -> None:
    """Orphans: what generations before ours left and the log does not name; and what they retired."""
    state = me.world.parts.fold(me.log.refresh())
    live = {str(checkpoint.ref) for checkpoint in state.checkpoints}
    mine = me.log.generation + (1 if me.world.parts.sweep_own else 0)
    begun = me.world.turn
    while any(began <= begun for began in me.world.restores.values()):
        me.pause()
    for name in me.insist(lambda: me.storage.list("checkpoints")) or ():
        leaf = name.rstrip("/").rpartition("/")[2]
        if leaf not in live and int(leaf.rpartition("-g")[2]) < mine:
            me.insist(lambda leaf=leaf: erase(me, leaf))


def erase(me: Client, leaf: str) -> None:
    for file in ("rank-0.json", "rank-0.pack"):
        me.storage.delete(f"checkpoints/{leaf}/{file}")


def restore(me: Client) -> None:
    """A reader: chooses the newest checkpoint, and may be stopped for long before it has read all of it."""
    token = object()
    me.world.restores[token] = me.world.turn
    try:
        records = me.insist(me.log.refresh)
        state = me.world.parts.fold(records or ())
        for checkpoint in state.checkpoints[:1]:
            for _ in range(me.world.choices.next(16)):
                me.pause()
            record = records[checkpoint.tiers["shared"].slot - 1]
            me.insist(lambda record=record: verify(me.storage, record))
    finally:
        me.world.restores.pop(token, None)


def p10_liveness_after_heal(data: bytes, parts: Parts = PARTS) -> None:
    """When faults stop, some attempt fences, in a bounded number of steps, under any schedule and any rivals."""
    with world_of(data, parts) as world:
        for _ in range(3):
            world.start(supervise)
        world.run(world.choices.next(256), fresh=supervise)
        world.heal()
        before, started = len(world.fenced), len(world.clients)
        for _ in range(3):
            world.start(supervise)
        rivals = len(world.running())
        world.run(rivals * 400)  # a save is some 30 steps; every lost slot is somebody else's progress
        assert not world.running(), "nobody stops, nobody wins"
        assert len(world.fenced) > before, "nobody fenced although nothing failed any more"
        assert {client.outcome for client in world.clients[started:]} <= {"done", "fenced"}


def p11_no_clock(data: bytes, parts: Parts = PARTS) -> list[bytes]:
    """The log after a world was played; the caller compares it under different clocks."""
    with world_of(data, parts) as world:
        play(world)
        world.look()
        return list(world.slots.values())
