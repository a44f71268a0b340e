"""The state that ``Checkpointer.save`` and ``restore`` take, as named objects, and back into its place.

Owns what a state's objects are called, which of their arrays are replicated, and what can be filled in place. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint import fit
from resilience.checkpoint.plan import ArraySpec
from resilience.checkpoint.snapshot import specs_of
from resilience.checkpoint.tree import flatten, segment
from resilience.errors import InvalidError

_WHOLE = "state"  # the name of a state that has no names
_RESERVED = ("rng",)  # a name with a meaning of its own for restore_into


def objects_of(state: Any) -> dict[str, Any]:
    """The objects of a state by name: the items of a dict with names for keys, as under ``Run.track``; any other
    state is one object."""
    named = isinstance(state, dict) and state and all(isinstance(key, str) and key for key in state)
    if named and not any(name in state for name in _RESERVED):
        return dict(state)
    return {_WHOLE: state}


def put_back(state: Any, objects: Mapping[str, Any]) -> None:
    """What was restored and could not change in place, into the dict it came from."""
    if set(objects) == {_WHOLE} and not (isinstance(state, dict) and set(state) == {_WHOLE}):
        return  # a list or dict changes in place as a whole
    state.update(objects)


def check_fillable(value: Any, path: str = "state") -> None:
    """``InvalidError`` if ``value`` itself would have to be replaced, where there is nobody to put the new one."""
    if isinstance(value, MutableMapping | list):
        return
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            check_fillable(item, f"{path}[{index}]")
        return
    kind = _arrays.kind(value)
    if kind == "torch" or (kind == "numpy" and value.flags.writeable):
        return
    if callable(getattr(value, "load_state_dict", None)):
        return
    raise InvalidError(
        f"{path} is a {type(value).__name__}: it cannot be filled in place",
        operation="restore",
        path=path,
        hint="put it into a dict or a list, where it can be replaced",
    )


def split(objects: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arrays by name, and the skeleton. ``InvalidError`` for what cannot be saved."""
    return flatten({name: fit.capture(value) for name, value in objects.items()}, prefix="")


def specs(
    arrays: Mapping[str, Any], objects: Mapping[str, Any], replicated: frozenset[str] | bool, *, rank: int
) -> tuple[ArraySpec, ...]:
    """Specs of the arrays. Beyond what is known to be replicated (DistributedDataParallel), those that
    ``replicated`` names are, and all below such a name; ``True``: all that are not shards.

    Raises:
        InvalidError: nothing bears a name of ``replicated``.
    """
    found = specs_of(arrays, objects, rank=rank)
    if not replicated:
        return found
    prefix = f"{_WHOLE}/" if set(objects) == {_WHOLE} else ""
    names = frozenset() if replicated is True else _quoted(replicated, prefix, arrays)
    return tuple(
        replace(spec, replicated=True)
        if spec.sharding is None and (replicated is True or _below(spec.name, names))
        else spec
        for spec in found
    )


def _quoted(given: frozenset[str] | bool, prefix: str, arrays: Mapping[str, Any]) -> frozenset[str]:
    assert not isinstance(given, bool)
    quoted = {name: prefix + "/".join(segment(part) for part in name.split("/")) for name in given}
    for name, full in quoted.items():
        if not any(_below(array, frozenset((full,))) for array in arrays):
            known = sorted({array.removeprefix(prefix) for array in arrays})
            near = difflib.get_close_matches(name, [*known, *(each.split("/")[0] for each in known)], n=1)
            raise InvalidError(
                f"replicated names {name!r}, and no array has that name or lies below it",
                operation="save",
                path="replicated",
                hint=(f"did you mean {near[0]!r}? " if near else "")
                + f"arrays: {', '.join(known[:20]) or 'none'}",
            )
    return frozenset(quoted.values())


def _below(name: str, names: frozenset[str]) -> bool:
    while name and name not in names:
        name = name.rpartition("/")[0]
    return bool(name)
