"""Aim: where each saved array of an object lands, checked as far as can be without reading data. Changes nothing.

Owns the matching of a saved skeleton with a live object: by the names of their places. Must never let two arrays land
in one memory, nor anything land where loading it would not put it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint import fit, tree
from resilience.checkpoint.landing import Landing, fresh, landing
from resilience.checkpoint.part import PartArray
from resilience.checkpoint.shard import Shard


@dataclass(frozen=True)
class Aim:
    """One object on its way.

    Attributes:
        node: its skeleton, as saved.
        landings: where each of its arrays lands, by key.
        ready: those landings' objects that take their place in the state as they are, by key.
        in_place: what lands, lands in what the user has.
    """

    node: Any
    landings: dict[str, Landing]
    ready: dict[str, Any]
    in_place: bool = False

    def state(self) -> Any:
        """The saved state, once its arrays have landed."""
        arrays = {key: target.value for key, target in self.landings.items() if key not in self.ready}
        return tree.unflatten(self.node, arrays, self.ready)


def at_object(name: str, node: Any, saved: Mapping[str, PartArray], value: Any, *, in_place: bool) -> Aim:
    """Aim at ``value``; unless ``in_place``, at new memory like its own.

    Args:
        saved: arrays that the skeleton names, by key.

    Raises:
        InvalidError: the state does not fit; lists missing, unexpected and mis-shaped keys.
    """
    # Of the saved arrays, type and shape: an array of one element, seen as many.
    outlines = {
        key: np.broadcast_to(np.zeros((), _arrays.numpy_dtype(array.dtype)), array.shape)
        for key, array in saved.items()
    }
    outline = tree.unflatten(node, outlines, outlines)
    fit.check_fit(value, outline, name=name)
    there = tree.places(fit.targets(value, outline) if in_place else fit.blanks(value), prefix=name)
    return Aim(node, *_match(list(tree.leaves(node)), saved, there), in_place)


def at_new_memory(node: Any, saved: Mapping[str, PartArray]) -> Aim:
    """Aim at whole NumPy arrays."""
    return Aim(node, {key: fresh(array.dtype, array.shape) for key, array in saved.items()}, {})


def _match(
    leaves: Sequence[tuple[str, str]], saved: Mapping[str, PartArray], there: Mapping[str, tuple[Any, Any]]
) -> tuple[dict[str, Landing], dict[str, Any]]:
    """Where each saved array lands, and those objects among them that are at their place already.

    Two saved arrays whose places are now one memory do not both land there: the second is loaded after the first.
    """
    landings: dict[str, Landing] = {}
    ready: dict[str, Any] = {}
    taken = set()
    for place, key in leaves:
        if key in ready or place not in there:
            continue
        array, value = there[place]
        target = landing(array)
        if target is None and isinstance(
            array, Shard
        ):  # its memory never changes: another of its shape is filled
            dtype = _arrays.numpy_dtype(saved[key].dtype)
            array = value = replace(array, local=np.empty(tuple(array.local.shape), dtype))
            target = landing(array)
        if target is None or _arrays.describe(array) != (saved[key].dtype, saved[key].shape):
            continue
        memory = _arrays.identity(array)
        if memory not in taken:
            taken |= {memory} - {None}
            landings[key], ready[key] = target, value
    for key, array in saved.items():
        if key not in ready:
            landings[key] = fresh(array.dtype, array.shape)
    return landings, ready
