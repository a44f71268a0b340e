"""The table at which the ranks of one start agree on what they restore, in shared storage.

Owns ``restores/g<generation>/<number>/``: rank 0's proposal, one answer a rank, rank 0's ruling; each created once.
Without it a rank that finds damage would go back to an older checkpoint alone. Every rank asks for the same
number of agreements, in the same order. With one rank nothing is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from resilience.engine.pause import Pause
from resilience.errors import UnavailableError
from resilience.journal.records import canonical
from storage_backends.base import Storage

ROOT = "restores"


class Table:
    """Args:
    storage: rooted at the run.
    deadline: seconds to wait for the others, each time.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        generation: int,
        rank: int,
        world_size: int,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._storage = storage
        self._root = f"{ROOT}/g{generation}"
        self._rank, self._world = rank, world_size
        self._deadline, self._clock, self._sleep = deadline, clock, sleep
        self._number = 0

    def clear(self, below: int) -> None:
        """Remove what older generations left. Only rank 0, after its fence."""
        for name in self._storage.list(ROOT):
            number = name.rstrip("/").rpartition("/g")[2]
            if number.isdigit() and int(number) < below:
                self._storage.delete_all(name.rstrip("/"))

    def propose(self, proposal: dict[str, Any]) -> None:
        """Rank 0: begin an agreement."""
        self._number += 1
        self._write("proposal", proposal)

    def proposal(self) -> dict[str, Any]:
        """The others: what rank 0 proposes next."""
        self._number += 1
        return self._await("proposal", "rank 0 has proposed nothing to restore: does it call restore()?")

    def answer(self, answer: dict[str, Any]) -> None:
        """The others: how it went."""
        self._write(f"rank-{self._rank}", answer)

    def answers(self) -> dict[int, dict[str, Any]]:
        """Rank 0: of all others."""
        others = range(1, self._world)
        found: dict[int, dict[str, Any]] = {}
        end, pause = self._clock() + self._deadline, Pause(1.0)
        while len(found) < len(others):
            there = set(self._storage.list(self._path("").rstrip("/")))
            for rank in others:
                if rank not in found and f"{self._path(f'rank-{rank}')}" in there:
                    found[rank] = json.loads(self._storage.read(self._path(f"rank-{rank}")))
            missing = [rank for rank in others if rank not in found]
            if missing and self._clock() > end:
                shown = ", ".join(map(str, missing[:8]))
                raise self._late(
                    f"ranks {shown} have not said how their restore went: do all call restore()?"
                )
            if missing:
                self._sleep(pause.next())
        return found

    def rule(self, ruling: dict[str, Any]) -> None:
        """Rank 0: whether what was proposed holds."""
        self._write("ruling", ruling)

    def ruling(self) -> dict[str, Any]:
        """The others."""
        return self._await("ruling", "rank 0 has not said whether all ranks could restore")

    def _path(self, name: str) -> str:
        where = f"{self._root}/{self._number}/"
        return f"{where}{name}.json" if name else where

    def _write(self, name: str, value: dict[str, Any]) -> None:
        if self._world > 1:
            self._storage.create(self._path(name), canonical(value) + b"\n")

    def _await(self, name: str, complaint: str) -> dict[str, Any]:
        end, pause = self._clock() + self._deadline, Pause(1.0)
        while True:
            try:
                return dict(json.loads(self._storage.read(self._path(name))))
            except FileNotFoundError:
                if self._clock() > end:
                    raise self._late(complaint) from None
            self._sleep(pause.next())

    def _late(self, complaint: str) -> UnavailableError:
        return UnavailableError(
            f"{complaint} ({self._deadline:g} s waited)",
            operation="restore",
            hint="every rank calls restore() as often as rank 0; give deadline= more seconds if they are slow",
        )
