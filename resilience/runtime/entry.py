"""Where the user's function is, as data that another process can load it from.

A function is found again by the file (or module) it was written in and its name, the way ``multiprocessing``'s
spawn does: the module is imported under its own name, so an ``if __name__ == "__main__"`` block does not run
again. Closures and functions typed into an interpreter cannot be found again and are refused by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resilience.errors import InvalidError


@dataclass(frozen=True)
class Entry:
    """A function's address: ``file`` (absolute) or ``module``, and its ``name`` in there."""

    name: str
    file: str | None = None
    module: str | None = None
    path: tuple[str, ...] = ()  # sys.path entries of the launching process

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Entry:
        """Address of ``function``. Raises ``InvalidError`` where it has none."""
        name = function.__qualname__
        if "<" in name:
            raise InvalidError(
                f"{name} is a closure or lambda: other processes cannot import it",
                operation="launch",
                hint="define the training function at the top level of a file",
            )
        module = sys.modules.get(function.__module__)
        file = getattr(module, "__file__", None)
        path = tuple(p for p in sys.path if p)
        if file is None:
            raise InvalidError(
                f"{name} was defined interactively: other processes cannot import it",
                operation="launch",
                hint="write the training function to a file and run that",
            )
        spec = getattr(module, "__spec__", None)
        if function.__module__ != "__main__" and spec is not None and spec.origin == file:
            return cls(name=name, module=function.__module__, file=str(Path(file).resolve()), path=path)
        return cls(name=name, file=str(Path(file).resolve()), path=path)

    def load(self) -> Callable[..., Any]:
        """Import and return what stands at this address (a function, or a ``Job`` around it)."""
        for entry in self.path:
            if entry not in sys.path:
                sys.path.append(entry)
        target: Any = self._module()
        for part in self.name.split("."):
            target = getattr(target, part)
        return target  # type: ignore[no-any-return]

    def _module(self) -> Any:
        if self.module is not None:
            try:
                return importlib.import_module(self.module)
            except ModuleNotFoundError as error:
                if error.name != self.module.split(".")[0] or self.file is None:
                    raise
        return load_file(str(self.file))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        return cls(**{**data, "path": tuple(data["path"])})


def load_file(file: str) -> Any:
    """Import the Python file ``file`` as a module of its own name, once per process."""
    path = Path(file)
    if not path.is_file():
        raise InvalidError(
            f"no such file: {file}",
            operation="launch",
            path=file,
            hint="give the path of a Python file that every node can read",
        )
    name = f"resilience_job_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidError(
            f"{file} is not a Python file", operation="launch", path=file, hint="give a .py file"
        )
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # the file's own neighbours, as when it is run as a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
