"""Restore: a checkpoint into what a rank of any world has, every byte verified before it is used.

Owns what is read for whom: the live state says which boxes of which arrays it wants, the parts say where they lie.
Everything that can be checked without reading data is checked before anything changes. Must never hand out an array
that was not verified completely, and never fill a gap with zeros: what is missing is an error that names array and
box.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilience.checkpoint import fit, rng, tree
from resilience.checkpoint.aim import Aim, at_new_memory, at_object
from resilience.checkpoint.arrays import AnyArray
from resilience.checkpoint.box import Box, cells
from resilience.checkpoint.coverage import Coverage, Want
from resilience.checkpoint.landing import Landing
from resilience.checkpoint.part import Part, PartArray
from resilience.checkpoint.plan import Scope, owners
from resilience.checkpoint.reader import Job, Traffic, read
from resilience.checkpoint.source import HINT, Parts, Source, check_together, corrupt, load_part
from resilience.checkpoint.world import check_alike, neighbours
from resilience.errors import CorruptError, InvalidError, UnavailableError

__all__ = [
    "RNG",
    "Checkpoint",
    "Restored",
    "Source",
    "check_together",
    "load_part",
    "restore",
    "restore_into",
]

RNG = "rng"  # the name under which the states of random number generators are saved
_BATCH = 32  # parts looked at before asking whether that was enough


@dataclass(frozen=True)
class Restored:
    """A rank's state as saved. ``arrays`` are NumPy (fresh, writable), by key; see ``tree.unflatten``."""

    run: str
    step: int
    generation: int
    skeleton: Any
    arrays: dict[str, AnyArray]


def restore_into(
    sources: Sequence[Source],
    objects: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    run: str | None = None,
    step: int | None = None,
    generation: int | None = None,
    threads: int = 4,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Fill the tracked objects (name -> value, as ``Run.track`` takes them) in place from a checkpoint.

    An object named ``rng`` (its value does not matter) puts the random number generators back, last.

    Args:
        sources: one per rank of the saved world.
        objects: by the names that they were saved under; what else the checkpoint holds is left alone.
        rank, world_size: of the world that restores; may differ from the one that saved.
        run, step, generation: what the log says the checkpoint is; ``None`` = not checked.
        threads: that read and verify at the same time.
        warn: told what could not be restored and need not be (generators of ranks that were not saved).

    Returns:
        name -> value: what cannot change in place (plain values, tuples, JAX arrays) is replaced.

    Raises:
        CorruptError: anything is missing, damaged or of another checkpoint; names file and byte range, or array
            and box. Says so if the state is partly overwritten by then: restore another checkpoint into it.
        InvalidError: the state does not fit (lists missing, unexpected and mis-shaped keys), or belongs to single
            ranks of another world. Nothing was changed.
        UnavailableError: the storage is away. As ``CorruptError``.
    """
    checkpoint = Checkpoint(
        sources,
        rank=rank,
        world_size=world_size,
        run=run,
        step=step,
        generation=generation,
        threads=threads,
        warn=warn,
    )
    found = checkpoint.into({name: value for name, value in objects.items() if name != RNG})
    if RNG in objects:
        found[RNG] = objects[RNG]
        state = checkpoint.generators()
        if state is not None:
            rng.apply(state)
    return found


def restore(
    sources: Sequence[Source],
    *,
    rank: int,
    world_size: int,
    run: str | None = None,
    step: int | None = None,
    generation: int | None = None,
    threads: int = 4,
) -> Restored:
    """Read the state of ``rank`` as NumPy: its own arrays, and the others whole, whoever held how much of them.

    Arguments and errors are those of ``restore_into``.
    """
    checkpoint = Checkpoint(
        sources,
        rank=rank,
        world_size=world_size,
        run=run,
        step=step,
        generation=generation,
        threads=threads,
    )
    return checkpoint.whole()


class Checkpoint:
    """A committed checkpoint, seen by one rank of the world that restores it. Arguments and errors are those of
    ``restore_into``.

    Attributes:
        run, step, generation: which one it is.
        names: of the objects in it, the random number generators left out.
        traffic: what was moved so far.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        rank: int,
        world_size: int,
        run: str | None = None,
        step: int | None = None,
        generation: int | None = None,
        threads: int = 4,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._parts = Parts(sources, run=run, step=step, generation=generation)
        self._rank, self._world_size = rank, world_size
        self._threads, self._warn = threads, warn
        self._own = self._parts[rank % len(self._parts)]
        if world_size != len(self._parts):
            near = self._parts.load(neighbours(rank, world_size, len(self._parts)))
            check_alike(self._own, near, world_size, ignore=RNG)
        self._arrays = {self._own.key(array): array for array in self._own.arrays}
        self._objects = _items(self._own)
        self.run, self.step, self.generation = self._own.run, self._own.step, self._own.generation
        self.names = tuple(name for name in self._objects if name != RNG)
        self.traffic = Traffic()

    def into(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        """Fill ``objects`` in place; name -> value, replaced where that cannot change in place."""
        aims = [self._aim(name, value, in_place=True) for name, value in objects.items()]
        self._read(aims)
        return {
            name: fit.load(value, it.state()) for it, (name, value) in zip(aims, objects.items(), strict=True)
        }

    def prepare(self, objects: Mapping[str, Any]) -> list[Job]:
        """What ``into`` would read, all that can be checked without data checked. Changes nothing."""
        aims = [self._aim(name, value, in_place=True) for name, value in objects.items()]
        return self._jobs(self._landings(aims))

    def rebuild(self, name: str, value: Any) -> Any:
        """A new tree like ``value`` holding what was saved under ``name``. For functional state (JAX)."""
        it = self._aim(name, value, in_place=False)
        self._read([it])
        return fit.build(value, it.state())

    def generators(self) -> Any:
        """The states of this rank's random number generators, for ``rng.apply``; ``None`` if there are none."""
        if RNG not in self._objects:
            return None
        if self._rank >= len(self._parts):
            self._warn(
                f"the checkpoint was saved by {len(self._parts)} ranks: the random number generators of rank "
                f"{self._rank} of {self._world_size} stay as they are"
            )
            return None
        node = self._node(RNG)
        it = at_new_memory(node, self._saved(node))
        self._read([it])
        return it.state()

    def whole(self) -> Restored:
        """Everything that its own part knows, as NumPy."""
        state = self._own.state
        it = at_new_memory(state, self._arrays)
        self._read([it])
        arrays = {key: target.value for key, target in it.landings.items()}
        return Restored(self.run, self.step, self.generation, state, arrays)

    def _aim(self, name: str, value: Any, *, in_place: bool) -> Aim:
        node = self._node(name)
        return at_object(name, node, self._saved(node), value, in_place=in_place)

    def _saved(self, node: Any) -> dict[str, PartArray]:
        """The arrays that a skeleton names."""
        return {key: self._array(key) for _, key in tree.leaves(node)}

    def _read(self, aims: Sequence[Aim]) -> None:
        landings = self._landings(aims)
        jobs = self._jobs(landings)
        traffic = Traffic()
        try:
            read(jobs, landings, threads=self._threads, traffic=traffic)
        except (CorruptError, UnavailableError) as error:
            if traffic.begun and any(it.in_place for it in aims):
                error.message += "; the state that was being restored into is partly overwritten"
                error.args = (error.message,)
            raise
        finally:
            self.traffic.read += traffic.read
            self.traffic.landed += traffic.landed

    def _landings(self, aims: Iterable[Aim]) -> dict[str, Landing]:
        """By name of the array in the checkpoint."""
        return {self._array(key).name: target for it in aims for key, target in it.landings.items()}

    def _jobs(self, landings: Mapping[str, Landing]) -> list[Job]:
        """What to take from which pack. ``CorruptError`` if something wanted is in none."""
        arrays = {array.name: array for array in self._own.arrays}
        coverage = Coverage(
            Want(name, arrays[name].dtype, arrays[name].shape, target.boxes)
            for name, target in landings.items()
        )
        jobs = []
        for ranks in self._stages(coverage):
            for part in self._parts.load(ranks):
                takes = coverage.absorb(part)
                if takes:
                    jobs.append(Job(self._parts.source(part.rank), part, takes))
            if not coverage.left:
                break
        for name, boxes in coverage.left.items():
            hole = boxes[0][1]
            problem = f"is not whole: {name} lacks the box of shape {list(hole.shape)} at {list(hole.offset)}"
            raise corrupt(self._own.directory, problem, None, None)
        return sorted(jobs, key=lambda job: job.part.rank)

    def _stages(self, coverage: Coverage) -> Iterator[list[int]]:
        """Ranks whose parts to look at next: first where most lies, then where the rest should lie, then all others,
        nearest first (ranks that are close hold what is close)."""
        seen = {self._own.rank}
        yield [self._own.rank]
        saved = len(self._parts)
        middle = self._rank * saved // self._world_size
        for guess in (
            neighbours(self._rank, self._world_size, saved, all_below=0),
            self._owners(coverage.left),
            sorted(range(saved), key=lambda rank: (abs(rank - middle), rank)),
        ):
            ranks = [rank for rank in guess if rank not in seen]
            seen.update(ranks)
            for at in range(0, len(ranks), _BATCH):
                yield ranks[at : at + _BATCH]

    def _owners(self, names: Iterable[str]) -> list[int]:
        """Ranks whose packs hold those of the arrays that are replicated: the plan can be computed from any part."""
        chunks = [
            (-array.payload(box), array.name, box.offset)
            for array in self._own.arrays
            if array.scope is Scope.REPLICATED and array.grid is not None
            for box in cells(Box.whole(array.shape), array.grid)
        ]
        wanted = set(names)
        return sorted({owner for name, _, owner in owners(chunks, range(len(self._parts))) if name in wanted})

    def _array(self, key: str) -> PartArray:
        if key not in self._arrays:
            raise corrupt(self._own.name, f"does not list the array {key}, which its state needs", 0, None)
        return self._arrays[key]

    def _node(self, name: str) -> Any:
        if name in self._objects:
            return self._objects[name]
        raise InvalidError(
            f"the checkpoint holds no {name!r}; it holds {', '.join(sorted(self.names)) or 'nothing'}",
            operation="restore",
            path=name,
            step=self.step,
            hint="track it under the name it was saved by, or start a new run with --name",
        )


def _items(part: Part) -> dict[str, Any]:
    """Skeletons of the objects in a part by name."""
    state = part.state
    if not isinstance(state, dict) or state.get("t") != "dict":
        raise CorruptError(
            f"part {part.name} holds no state of named objects",
            operation="restore",
            path=part.name,
            step=part.step,
            generation=part.generation,
            hint=HINT,
        )
    return dict(zip(state["k"], state["v"], strict=True))
