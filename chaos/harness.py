"""Run jobs under planned faults, and check what must hold afterwards.

The oracles: the run ends by itself, its result equals that of the same training never interrupted, every
planned fault fired and is in the journal, and nothing of ours is left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos import leaks
from chaos.faults import Fault
from resilience.job import Job, JobResult

_numbers = itertools.count()


class Chaos:
    """Faulty runs in one directory. A context manager: leaving it checks for leaks.

    Args:
        directory: where runs keep their storage and their nvme tiers.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs: list[str] = []
        self._files = leaks.files_of_ours()

    def __enter__(self) -> Chaos:
        return self

    @property
    def storage(self) -> str:
        return str(self.directory / "storage")

    @property
    def nvme(self) -> str:
        return str(self.directory / "nvme")

    def options(self, job: Job, faults: Sequence[Fault] = (), **options: Any) -> Job:
        """``job`` with a name, storage and nvme tier of its own, and ``faults`` planned."""
        name = options.pop("name", None) or f"{job.name}-{os.getpid()}-{next(_numbers)}"
        self.runs.append(name)
        base: dict[str, Any] = {"storage": self.storage, "nvme": self.nvme, "card": "card"}
        return job.options(**{**base, **options}, name=name, faults=tuple(f.to_json() for f in faults))

    def run(
        self,
        job: Job,
        faults: Sequence[Fault] = (),
        *,
        arguments: dict[str, Any] | None = None,
        expect_fired: bool = True,
        **options: Any,
    ) -> JobResult:
        """Run ``job`` to its end under ``faults``; every one of them must have fired."""
        faulty = self.options(job, faults, **options)
        result = faulty.launch(view="none", **(arguments or {}))
        if expect_fired:
            self.check_fired(result, faults)
        return result

    def check_fired(self, result: JobResult, faults: Sequence[Fault]) -> None:
        """Every planned fault is in the journal exactly once."""
        fired = sorted(row["plan_index"] for row in result.history.sql("select plan_index from chaos"))
        if fired != list(range(len(faults))):
            missing = [faults[i] for i in set(range(len(faults))) - set(fired)]
            raise AssertionError(f"planned faults that did not fire exactly once: {missing}; fired: {fired}")

    def check_no_leaks(self) -> None:
        """Nothing of any run of ours is left."""
        for run in self.runs:
            left = leaks.wait_until_gone(run)
            if left:
                raise AssertionError(f"run {run} left processes behind:\n" + "\n".join(left))
        new = leaks.files_of_ours() - self._files
        if new:
            raise AssertionError(f"files left behind: {sorted(new)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.check_no_leaks()
        else:
            self.end_runs()

    def end_runs(self) -> None:
        """End what a failed test left running, so that it takes no cards from the next one."""
        import ray

        from resilience.runtime.supervisor import NAMESPACE, actor_name

        for run in self.runs if ray.is_initialized() else ():
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                supervisor = ray.get_actor(actor_name(run), namespace=NAMESPACE)
                ray.get(supervisor.abandon.remote(), timeout=30)
                ray.kill(supervisor)
