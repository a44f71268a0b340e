"""``@resilience.job``: a training function with its policy, and the ways to run it."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

from resilience.control.types import Outcome
from resilience.control.types import Result as End
from resilience.errors import (
    CorruptError,
    ExhaustedError,
    FencedError,
    InvalidError,
    ResilienceError,
    TrainingError,
    UnavailableError,
)
from resilience.options import Options, checked
from resilience.run import Interrupted, LocalHost, Run

if TYPE_CHECKING:
    from resilience.history import History


@dataclass(frozen=True)
class JobResult:
    """How a launch ended.

    Attributes:
        run: the run's name.
        outcome: ``outcome.result`` is ``finished`` or ``interrupted`` (every other end is raised).
        value: what the function returned on rank 0 (JSON values), ``None`` if it was interrupted.
        steps: completed steps.
        storage: where the run is kept: the root that was given to the launch.
    """

    run: str
    outcome: Outcome
    value: Any
    steps: int
    storage: str

    @property
    def finished(self) -> bool:
        return self.outcome.result is End.FINISHED

    @property
    def history(self) -> History:
        """What happened, from the journal."""
        from resilience.history import history

        return history(self.storage, run=self.run)

    @property
    def incidents(self) -> list[Any]:
        """The run's incidents, oldest first."""
        return list(self.history.incidents)


class Job:
    """A training function with its options. Calling it calls the function."""

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        self.function = function
        self._options = options
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        """The run's name."""
        derived = re.sub(r"[^A-Za-z0-9._-]", "-", self.function.__name__).lstrip("._-")[:100]
        return self._options.name or derived or "job"

    def options(self, **overrides: Any) -> Job:
        """The same function with some options changed. ``InvalidError`` for an unknown or impossible one."""
        return Job(self.function, replace(self._options, **checked(overrides)))

    def launch(self, *, view: str = "auto", **arguments: Any) -> JobResult:
        """Run to the end, over all failures; blocks, with a live view.

        Args:
            view: ``auto`` (a panel in a terminal, lines elsewhere), ``plain``, ``json``, ``none``.
            arguments: keyword arguments of the function, plain JSON values.

        Raises:
            TrainingError: the function raised, or what it tracks cannot be saved or does not fit what was saved; the
                original traceback comes first.
            ExhaustedError: not enough cards by the deadline, or too many failures without progress.
            CorruptError: checkpoints are recorded, but none of them can be restored.
            FencedError: another launch of this run took over.
            UnavailableError: storage or cluster is away.
            InvalidError: an option, an argument or the storage cannot be used as it is.
        """
        from resilience.history.live import LiveView
        from resilience.runtime.launch import quiet_ray, run_to_end

        spec = self._spec(arguments)
        with LiveView(mode=view) as live, quiet_ray():
            ended = run_to_end(spec, show=live.update)
        return self._result(spec, ended)

    def local(self, **arguments: Any) -> Any:
        """Run the body in this process: one rank, no Ray, nothing saved or restored; for a debugger."""
        self._bind(arguments)
        with _single_process_environment():
            try:
                return self.function(Run(LocalHost(self.name)), **arguments)
            except Interrupted:
                return None

    def _bind(self, arguments: dict[str, Any]) -> None:
        try:
            inspect.signature(self.function).bind(None, **arguments)
        except TypeError as error:
            raise InvalidError(
                f"{self.function.__name__}: {error}",
                operation="launch",
                hint=f"its signature is {self.function.__name__}{inspect.signature(self.function)}",
            ) from error

    def _spec(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Everything other processes need, as plain data; checked before anything is started."""
        from resilience.cards.codes import VARIABLE, read_overrides
        from resilience.journal.format_file import ensure_format
        from resilience.runtime.entry import Entry
        from storage_backends import child, open_storage, probe

        options = self._options
        self._bind(arguments)
        fault_codes = read_overrides(str(options.fault_codes or os.environ.get(VARIABLE, "")))
        for name, value in arguments.items():
            if not _plain(value):
                raise InvalidError(
                    f"the argument {name} is not a plain value: {value!r:.100}",
                    operation="launch",
                    path=name,
                    hint="pass numbers, strings, lists and dicts with string keys; build objects in the function",
                )
        entry = Entry.of(self.function)
        root = _absolute(str(options.storage))
        nvme = _absolute(str(options.nvme)) if options.nvme else None
        _check_places(root, nvme)
        shared = child(root, self.name)
        storage = open_storage(shared)
        probe(storage)
        ensure_format(storage, run=self.name, created=_utc_now())
        storage.close()
        wanted = options.workers + options.spares
        return {
            "run": self.name,
            "entry": entry.to_json(),
            "arguments": arguments,
            "policy": asdict(options.policy()),
            "card": options.card,
            "levels": list(options.topology),
            "storage": root,
            "shared": shared,
            "nvme": nvme,
            "drain_rate": options.drain_rate,
            "snapshot": options.snapshot,
            "wanted": wanted,
            "faults": list(options.faults),
            "fault_codes": fault_codes,
            "env": {
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                **options.env,
            },
            "describe": {
                "job": self.function.__name__,
                "entry": f"{entry.file}:{entry.name}",
                "workers": options.workers,
                "spares": options.spares,
                "storage": root,
                "nvme": nvme,
                "policy": asdict(options.policy()),
                "launcher": socket.gethostname(),
            },
        }

    def _result(self, spec: dict[str, Any], ended: dict[str, Any]) -> JobResult:
        outcome: Outcome = ended["outcome"]
        value = json.loads(ended["value"]) if ended["value"] else None
        result = JobResult(self.name, outcome, value, ended["steps"], spec["storage"])
        context: dict[str, Any] = {"operation": "run", "step": result.steps}
        again = f"see: resilience history {self.name} --storage {spec['storage']}"
        match outcome.result:
            case End.FINISHED | End.INTERRUPTED:
                return result
            case End.USER_ERROR:
                exit_ = outcome.exit
                raise TrainingError(
                    outcome.reason,
                    rank=outcome.rank,
                    original=exit_.traceback if exit_ else "",
                    output=exit_.output if exit_ else "",
                    hint=again,
                    **context,
                )
            case End.NO_CAPACITY | End.BUDGET_EXHAUSTED:
                context["operation"] = outcome.result.value
                raise ExhaustedError(outcome.reason, hint=again, **context)
            case End.NO_CHECKPOINT:
                raise CorruptError(
                    outcome.reason, hint=f"resilience verify {self.name} tells what is damaged", **context
                )
            case End.FENCED:
                raise FencedError(outcome.reason, hint=again, **context)
        raise UnavailableError(outcome.reason, hint=again, **context)


def job(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a training function a job: it goes on by itself over failures of cards, nodes and processes.

    ``@job`` or ``@job(workers=8, spares=1, storage="s3://bucket/runs")``; the options are those of ``Options``,
    checked here. The function's first parameter is the ``Run``; the others are keyword arguments of ``launch``.
    """
    given = Options(**checked(options))

    def decorate(body: Callable[..., Any]) -> Job:
        if not inspect.signature(body).parameters:
            raise InvalidError(
                f"{body.__name__}() takes no argument",
                operation="job",
                hint="its first parameter must be the run: def train(run: resilience.Run, *, ...)",
            )
        return Job(body, given)

    return decorate(function) if function is not None else decorate


def load(target: str) -> Job:
    """The job at ``FILE.py:FUNCTION``; a plain function becomes a job with default options.

    Raises:
        InvalidError: there is no such file or function, or it takes no run.
        TrainingError: the file cannot be imported; their traceback comes first.
    """
    from resilience.runtime.entry import load_file

    file, colon, name = target.rpartition(":")
    if not colon or not name or not file:
        raise InvalidError(
            f"{target!r} names no function", operation="run", hint="write it as FILE.py:FUNCTION"
        )
    path = os.path.abspath(file)
    try:
        module = load_file(path)
    except ResilienceError:
        raise
    except (Exception, SystemExit) as error:
        # Their code, not ours: what they see is their traceback, and none of the frames that led there.
        raise TrainingError(
            f"{file} could not be imported: {type(error).__name__}: {error}",
            original=_their_traceback(error, path),
            operation="run",
            path=file,
            hint=f"python {file} shows the same; a name that is missing may have to be installed",
        ) from error
    found = getattr(module, name, None)
    if isinstance(found, Job):
        return found
    if not callable(found):
        near = [n for n, v in vars(module).items() if isinstance(v, Job)]
        raise InvalidError(
            f"{file} has no function {name!r}",
            operation="run",
            path=file,
            hint=f"its jobs: {', '.join(near) or 'none; decorate one with @resilience.job'}",
        )
    made: Job = job(found)
    return made


def _their_traceback(error: BaseException, path: str) -> str:
    """The traceback of an import that failed, from the first frame in the file at ``path`` on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != path:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _check_places(root: str, nvme: str | None) -> None:
    """Refuse what a run of several processes cannot use, although this process could."""
    from storage_backends import open_storage

    if root.startswith("memory:"):
        raise InvalidError(
            f"{root} is memory of this process: the other processes of a run see nothing of it",
            operation="launch",
            path=root,
            hint="give a path that every node sees, or a URL such as s3://bucket/runs; "
            "for a run without any storage use .local()",
        )
    if nvme is not None and not open_storage(nvme).capabilities.local:
        raise InvalidError(
            f"nvme={nvme!r} is no local directory",
            operation="launch",
            path=nvme,
            hint="give a directory that every node has for itself, or leave nvme out",
        )


def _plain(value: Any) -> bool:
    """Whether a value is the same in every process: the way there is JSON (which makes lists of tuples)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def _utc_now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _single_process_environment() -> Iterator[None]:
    """The variables a launcher would set, for a world of one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ours = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
