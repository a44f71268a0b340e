"""Sources: where the parts of a checkpoint lie, read lazily, each checked against the log and the others.

Owns which parts are looked at, and that those belong together. A rank of ten thousand must not read ten thousand
parts, so they are loaded as they are asked for. Must never hand out a part whose SHA-256 is not the recorded one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from resilience.checkpoint.part import Part, sha256
from resilience.errors import CorruptError, InvalidError
from storage_backends import open_storage
from storage_backends.base import Storage

HINT = "restore an older checkpoint; `resilience verify` lists the damaged ones"
_LOADERS = 8  # parts read at once: small objects, so waiting for the storage is most of it


@dataclass(frozen=True)
class Source:
    """Where the part of one rank of the saved world lies, and what the commit log says of it.

    Attributes:
        storage: root that ``part`` and the pack's name are relative to.
        part: object name of the part.
        sha256: of the part's bytes, as recorded.
    """

    rank: int
    storage: Storage
    part: str
    sha256: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Source:
        """From ``{"rank", "storage": URL, "part", "sha256"}``."""
        return cls.all_from_json([data])[0]

    @classmethod
    def all_from_json(cls, items: Iterable[Mapping[str, Any]]) -> list[Source]:
        """As ``from_json``, opening each storage once."""
        opened: dict[str, Storage] = {}
        found = []
        for item in items:
            url = item["storage"]
            if url not in opened:
                opened[url] = open_storage(url)
            found.append(cls(item["rank"], opened[url], item["part"], item["sha256"]))
        return found


def load_part(source: Source, like: Part | None = None) -> Part:
    """Read a part. ``CorruptError`` when it is missing, other than recorded, or not of its rank and place. ``like``:
    another part of the checkpoint (see ``Part.from_json``)."""
    try:
        data = source.storage.read(source.part)
    except FileNotFoundError as error:
        raise corrupt(source.part, "is missing", 0, None) from error
    found = sha256(data)
    if found != source.sha256:
        raise corrupt(source.part, f"has the SHA-256 {found}, recorded is {source.sha256}", 0, len(data))
    part = Part.decode(data, path=source.part, like=like)
    if (part.rank, part.name) != (source.rank, source.part):
        raise corrupt(source.part, f"says it is {part.name}, for rank {source.rank}", 0, len(data))
    return part


def check_together(
    parts: Sequence[Part],
    *,
    run: str | None = None,
    step: int | None = None,
    generation: int | None = None,
) -> None:
    """``CorruptError`` unless the parts are those of one whole checkpoint, and of the one asked for."""
    first = parts[0]
    for part in parts:
        _check_one(part, first, len(parts), run=run, step=step, generation=generation)
    _check_ranks([part.rank for part in parts], first.directory)


class Parts:
    """The parts of one checkpoint by rank of the saved world. Thread-safe.

    Args:
        sources: one per rank of the saved world, in any order.
        run, step, generation: what the log says the checkpoint is; ``None`` = not checked.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        run: str | None = None,
        step: int | None = None,
        generation: int | None = None,
    ) -> None:
        if not sources:
            raise InvalidError("restore without sources", operation="restore", hint="give one per saved rank")
        _check_ranks([source.rank for source in sources], sources[0].part.rpartition("/")[0])
        self._sources = {source.rank: source for source in sources}
        self._expected = {"run": run, "step": step, "generation": generation}
        self._loaded: dict[int, Part] = {}
        self._first: Part | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Ranks of the saved world."""
        return len(self._sources)

    def source(self, rank: int) -> Source:
        return self._sources[rank]

    def __getitem__(self, rank: int) -> Part:
        """The part of ``rank``. Raises as ``load_part`` and ``check_together``."""
        with self._lock:
            if rank in self._loaded:
                return self._loaded[rank]
        part = load_part(self._sources[rank], self._first)
        with self._lock:
            first = self._first = self._first or part
        _check_one(part, first, len(self), **self._expected)
        with self._lock:
            self._loaded[rank] = part
        return part

    def load(self, ranks: Iterable[int]) -> list[Part]:
        """The parts of ``ranks``, in that order, several read at once."""
        wanted = list(ranks)
        if len(wanted) < 2:
            return [self[rank] for rank in wanted]
        with ThreadPoolExecutor(min(_LOADERS, len(wanted)), thread_name_prefix="parts") as pool:
            return list(pool.map(self.__getitem__, wanted))


def _check_one(
    part: Part, first: Part, world_size: int, *, run: Any = None, step: Any = None, generation: Any = None
) -> None:
    expected = {
        "run": first.run if run is None else run,
        "step": first.step if step is None else step,
        "generation": first.generation if generation is None else generation,
        "world_size": world_size,
        "plan_hash": first.plan_hash,
    }
    for name, value in expected.items():
        if getattr(part, name) != value:
            raise corrupt(part.name, f"has {name} {getattr(part, name)!r}, expected is {value!r}", 0, None)


def _check_ranks(ranks: Sequence[int], directory: str) -> None:
    if sorted(ranks) != list(range(len(ranks))):
        shown = f"{sorted(ranks)[:20]}{' and more' if len(ranks) > 20 else ''}"
        raise corrupt(directory, f"has the parts of ranks {shown}", None, None)


def corrupt(path: str, problem: str, start: int | None, end: int | None) -> CorruptError:
    return CorruptError(
        f"{path or 'the checkpoint'} {problem}",
        operation="restore",
        path=path or None,
        start=start,
        end=end,
        hint=HINT,
    )
