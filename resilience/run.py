"""``Run``: all that a training function touches.

It resumes, counts steps, heartbeats, snapshots and stops; it decides nothing about failures. What it does to
the outside goes through a ``Host``: the rank's process under supervision, or nothing at all in ``train.local()``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from resilience.checkpoint import fit, rng
from resilience.errors import InvalidError

_RNG = "rng"


class Interrupted(BaseException):
    """Unwinds the training function at a stop point, after the last checkpoint. Not an error: the run goes on
    from there when it is launched again. A ``BaseException`` so that ``except Exception`` does not catch it."""


class Saved(Protocol):
    """What a ``Run`` begins from. ``resilience.checkpoint.restore.Checkpoint`` is one; its docstrings say more."""

    @property
    def step(self) -> int:
        """Completed steps."""

    @property
    def names(self) -> Collection[str]:
        """Of the objects that it holds, the random number generators left out."""

    def into(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        """Fill objects (by name) in place, and return them."""

    def rebuild(self, name: str, value: Any) -> Any:
        """A new tree like ``value``, of what was saved under ``name``."""

    def generators(self) -> Any:
        """States of the random number generators, for ``rng.apply``; ``None`` if there are none for this rank."""


class Host(Protocol):
    """What a ``Run`` runs on. Called from the thread that runs the training function."""

    rank: int
    world_size: int
    local_rank: int
    name: str
    generation: int

    def restored(self) -> Saved | None:
        """What to begin from; ``None`` from scratch. The same answer however often it is called."""

    def ready(self) -> None:
        """Everything has been restored: the loop begins."""

    def begin(self, step: int) -> None:
        """A step begins (``step`` are completed)."""

    def end(self, done: int, total: int) -> bool:
        """``done`` steps are completed, nothing changes until this returns. True: save now."""

    def save(self, done: int, capture: Callable[[], dict[str, Any]], objects: dict[str, Any]) -> None:
        """Take the snapshot; returns when training may go on."""

    def stop_point(self, done: int) -> bool:
        """True: leave the loop here (all ranks agree, and the last checkpoint is durable)."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def enter(self, section: str) -> None: ...


class Run:
    """One rank's view of the run. Made by the launcher; training functions receive it as first argument.

    Attributes:
        name: the run's name.
        rank, world_size, local_rank: as in collectives; one rank, one process, one card.
        generation: the incarnation of the workers; grows with every recovery.
        step: the step being worked on (completed steps so far); where training resumes, before the loop.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.name = host.name
        self.rank = host.rank
        self.world_size = host.world_size
        self.local_rank = host.local_rank
        self.generation = host.generation
        self._objects: dict[str, Any] = {}
        self._functional: Any = None
        self._with_rng = True
        self._sections = ["start"]
        self._in_loop = False
        self._looped = False
        self._asked = False
        restored = host.restored()
        self.step = restored.step if restored else 0

    def track(self, *, rng: bool = True, **objects: Any) -> None:
        """Name what belongs to the training state; restored here if there is anything to restore.

        Args:
            rng: also save and restore the random number generators of Python, NumPy and torch (default). They
                are restored as the loop of ``steps`` begins, so that set-up code may draw from them.
            objects: anything with ``state_dict`` and ``load_state_dict`` (torch modules, optimizers, schedulers,
                loaders), or nested dicts, lists and tuples of arrays and plain values, restored in place.

        Raises:
            InvalidError: a name is taken, the loop has begun, an object cannot be saved (names key and type), or
                the saved state does not fit (lists missing, unexpected and mis-shaped keys).
        """
        if not isinstance(rng, bool):
            raise InvalidError(
                "'rng' says whether the random number generators are tracked: it is no name for an object",
                operation="track",
                hint="give rng=True or rng=False, and the object another name",
            )
        if self._looped:
            raise InvalidError(
                "track() was called after steps() began",
                operation="track",
                hint="track everything before the loop",
            )
        for name, value in objects.items():
            if name in self._objects or name in (_RNG, "functional"):
                raise InvalidError(
                    f"{name!r} is tracked already or reserved", operation="track", hint="use another keyword"
                )
            if not name.isidentifier():
                raise InvalidError(
                    f"{name!r} is not a valid name", operation="track", hint="use an identifier"
                )
            fit.check(value, name=name)
            restored = self._host.restored()
            if restored is not None:
                if name not in restored.names:
                    held = ", ".join(sorted(restored.names)) or "nothing"
                    raise InvalidError(
                        f"the checkpoint holds no {name!r}; it holds {held}",
                        operation="restore",
                        path=name,
                        step=restored.step,
                        hint="track it under the name it was saved by, or start a new run with --name",
                    )
                self._host.enter("restore")
                restored.into({name: value})
                self._host.enter(self._sections[-1])
            self._objects[name] = value
        self._with_rng = self._with_rng and rng

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps still to do, ``resumed .. total-1``: heartbeat, snapshot, checkpoint and stop point are
        at the boundary between two of them. One loop a run. A step left with ``break`` does not count as completed;
        ``run.checkpoint()`` after the loop saves what there is then, as of the steps completed.

        Args:
            total: steps of the whole run, over all its generations.
        """
        if self._looped:
            raise InvalidError(
                "steps() was called twice", operation="steps", hint="use one loop over all steps of the run"
            )
        if not isinstance(total, int) or total < 0:
            raise InvalidError(
                f"steps({total!r}): give a number of steps >= 0", operation="steps", hint="an int"
            )
        if total < self.step:
            raise InvalidError(
                f"steps({total}): the run has completed {self.step} already",
                operation="steps",
                step=self.step,
                hint="give at least that many, or start a new run with --name",
            )
        self._looped = True
        return self._loop(total)

    def _loop(self, total: int) -> Iterator[int]:
        host = self._host
        self._check_all_restored()
        restored = host.restored()
        if restored is not None and self._with_rng:
            state = restored.generators()
            if state is not None:
                rng.apply(state)
        host.ready()
        self._in_loop = True
        self._sections = ["step"]
        host.enter("step")
        try:
            for step in range(self.step, total):
                self.step = step
                host.begin(step)
                yield step
                done = step + 1
                self.step = done
                if host.end(done, total) or self._asked:
                    self._save(done)
                if host.stop_point(done):
                    raise Interrupted
        finally:
            # Also when the caller leaves the loop with ``break``: what follows is no step, and may take long.
            self._in_loop = False
            self._sections = ["end"]
            host.enter("end")

    def _check_all_restored(self) -> None:
        """Nothing that was saved is dropped silently: an optimizer that is not tracked any more, for one."""
        restored = self._host.restored()
        if restored is None:
            return
        left = set(restored.names) - set(self._objects)
        if self._functional is not None:
            left.discard("functional")
        if left:
            raise InvalidError(
                f"the checkpoint also holds {', '.join(sorted(left))}, which nothing tracks",
                operation="restore",
                step=restored.step,
                hint="track it under that name (run.restore for functional state), or start a new run with --name",
            )

    def checkpoint(self) -> None:
        """Make a checkpoint now, by hand. Call it on every rank at the same step.

        Inside the loop the snapshot is taken as soon as the step that is being worked on is complete (a state in
        the middle of a step could not be resumed from); outside of it, at once.
        """
        if self._in_loop:
            self._asked = True
        else:
            self._save(self.step)

    def _save(self, done: int) -> None:
        self._asked = False
        self._host.save(done, self._capture, self._objects)

    def _capture(self) -> dict[str, Any]:
        state = {name: fit.capture(value) for name, value in self._objects.items()}
        if self._functional is not None:
            state["functional"] = self._functional
        if self._with_rng:
            state[_RNG] = rng.capture()
        return state

    def restore(self, state: Any) -> Any:
        """For functional state (JAX): the saved state of the same structure, or ``state`` where there is none.
        Also begins tracking it: hand every new state to ``save``."""
        self._functional = state
        restored = self._host.restored()
        if restored is None or "functional" not in restored.names:
            return state
        self._host.enter("restore")
        self._functional = restored.rebuild("functional", state)
        self._host.enter(self._sections[-1])
        return self._functional

    def save(self, state: Any) -> None:
        """Name the functional state that the next snapshot holds. Costs nothing: the copy is made at the boundary."""
        self._functional = state

    def log(self, **values: float) -> None:
        """Record numbers of this step (loss, learning rate …): they go to the journal, and are history afterwards."""
        numbers = {}
        if "step" in values:
            raise InvalidError("run.log(step=...)", operation="log", hint="the step is recorded by itself")
        for key, value in values.items():
            try:
                numbers[key] = float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise InvalidError(
                    f"run.log({key}=...) got {type(value).__name__}",
                    operation="log",
                    path=key,
                    hint="log numbers",
                ) from error
        self._host.log(self.step, numbers)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name a long phase (``with run.section("eval"):``) so that it is not taken for a hang."""
        self._sections.append(name)
        self._host.enter(name)
        try:
            yield
        finally:
            self._sections.pop()
            self._host.enter(self._sections[-1])


class LocalHost:
    """Nothing outside: the body runs in this process, nothing is saved or restored."""

    rank = 0
    world_size = 1
    local_rank = 0
    generation = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.logged: list[tuple[int, dict[str, float]]] = []

    def restored(self) -> None:
        return None

    def ready(self) -> None: ...

    def begin(self, step: int) -> None: ...

    def end(self, done: int, total: int) -> bool:
        return False

    def save(self, done: int, capture: Callable[[], dict[str, Any]], objects: dict[str, Any]) -> None:
        capture()  # still says what could not be saved

    def stop_point(self, done: int) -> bool:
        return False

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))

    def enter(self, section: str) -> None: ...
