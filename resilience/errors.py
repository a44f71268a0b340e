"""The errors users meet: six coarse classes, each saying what to do.

    ResilienceError
    ├── InvalidError      fix the call, the option or the state: retrying cannot help
    ├── UnavailableError  storage or cluster is away; it was retried already: look at the service, try later
    ├── CorruptError      bytes are not what was written; names the object and the byte range
    ├── FencedError       a newer generation of this run is in charge: this process must stop
    ├── ExhaustedError    a budget, the spares, the memory or the disk is used up
    └── TrainingError     the user's own code failed; the original traceback comes first

The message is for people and may change; the class and the attributes are API.
"""

from __future__ import annotations

from typing import Any


class ResilienceError(Exception):
    """Base of all errors of this package.

    Attributes:
        operation: what was being done, e.g. ``"restore"``.
        path: the object, file, option or key concerned.
        step: the training step concerned, if any.
        generation: the generation concerned, if any.
        hint: what to do next, usually a command to run.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str | None = None,
        path: str | None = None,
        step: int | None = None,
        generation: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.path = path
        self.step = step
        self.generation = generation
        self.hint = hint

    def __str__(self) -> str:
        context = ", ".join(
            f"{name} {value}"
            for name, value in (
                ("operation", self.operation),
                ("path", self.path),
                ("step", self.step),
                ("generation", self.generation),
            )
            if value is not None and str(value) not in self.message
        )
        text = f"{self.message} [{context}]" if context else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries; the default would lose the keyword-only attributes.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(cls: type[ResilienceError], message: str, attributes: dict[str, Any]) -> ResilienceError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(attributes)
    return error


class InvalidError(ResilienceError):
    """The call, an option, or the state handed over is wrong. Fix it; retrying cannot help."""


class UnavailableError(ResilienceError):
    """Storage or cluster is away. It has been retried already; nothing was lost. Try again later."""


class CorruptError(ResilienceError):
    """Stored bytes are not what was written.

    Attributes:
        start, end: the byte range within ``path`` that is wrong (half open), where known.
    """

    def __init__(
        self, message: str, *, start: int | None = None, end: int | None = None, **context: Any
    ) -> None:
        super().__init__(message, **context)
        self.start = start
        self.end = end


class FencedError(ResilienceError):
    """A newer generation of this run is in charge. Stop writing and exit; never retry."""


class ExhaustedError(ResilienceError):
    """A budget, the spares, the memory, or the disk is used up. Give more of it, then run again."""


class TrainingError(ResilienceError):
    """The user's own code failed. ``original`` is its traceback, ``output`` the rank's last lines.

    Attributes:
        rank: the rank whose code failed.
        original: the traceback text of the user's exception.
        output: the last lines that rank printed.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        original: str = "",
        output: str = "",
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.rank = rank
        self.original = original
        self.output = output

    def __str__(self) -> str:
        parts = [self.original.rstrip(), super().__str__()]
        output = self.output
        if self.original:  # which the rank has printed too: once is enough
            output = output.replace(self.original.strip(), "")
        if output.strip():
            parts.append(f"last output of rank {self.rank}:\n{output.rstrip()}")
        return "\n".join(part for part in parts if part)
