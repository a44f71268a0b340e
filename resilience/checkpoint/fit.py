"""Fit: taking state out of what users track, and putting saved state back, checked before anything changes.

Owns what an object's state is (``state_dict`` or the tree itself), the comparison of saved with present
state, and loading in place. A state that does not fit is refused as a whole, with what is missing, unexpected
and mis-shaped. Must never load half of a state, nor change a shape or a data type on the way.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint import tree
from resilience.checkpoint.landing import blank
from resilience.checkpoint.shard import Shard
from resilience.errors import InvalidError

_SHOWN = 20  # keys listed of each kind of misfit
# Optimizer state that has its parameter's shape in torch's own optimizers; others may factor or pack theirs.
_LIKE_PARAMETER = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta")
)


def check(value: Any, *, name: str) -> None:
    """``InvalidError`` if the state of ``value`` cannot be saved; names key and type."""
    tree.flatten(capture(value), prefix=name)


def capture(value: Any) -> Any:
    """The state of a tracked object, for ``tree.flatten``: references, not copies.

    ``state_dict()`` where there is one (of the module inside DistributedDataParallel and torch.compile);
    dicts, lists and tuples are walked for such objects; arrays and plain values are their own state.
    """
    value = _unwrap(value)
    if _has_state_dict(value):
        return value.state_dict()
    if isinstance(value, Mapping):
        items = {key: capture(item) for key, item in value.items()}
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if isinstance(value, list):
        return [capture(item) for item in value]
    if isinstance(value, tuple) and not _is_size(value):
        return _like(value, [capture(item) for item in value])
    return value


def apply(value: Any, state: Any, *, name: str) -> Any:
    """Load ``state`` into ``value`` in place, and return it.

    What cannot change in place (plain values, tuples, JAX arrays) is replaced within its dict or list; where
    ``value`` itself is such a thing, use what is returned.

    Raises:
        InvalidError: the state does not fit, and nothing was changed. Lists missing, unexpected and
            mis-shaped keys.
    """
    check_fit(value, state, name=name)
    return load(value, state)


def rebuild(value: Any, state: Any, *, name: str) -> Any:
    """A new tree like ``value`` holding ``state``; ``value`` stays as it is. For functional state (JAX).

    Raises:
        InvalidError: as ``apply``.
    """
    check_fit(value, state, name=name)
    return build(value, state)


def targets(value: Any, state: Any) -> Any:
    """A state like ``capture(value)`` whose arrays may be filled with saved bytes before ``load``.

    They are the object's own memory where loading means copying into it (torch modules, optimizers, arrays and
    shards in dicts, lists and tuples), and new memory where an object decides itself what to do with its state.
    torch's optimizers have no state before their first step: it is made here, and ``load`` lets them adopt it.

    Args:
        state: the saved one; of its arrays only type and shape are looked at.
    """
    value = _unwrap(value)
    if callable(getattr(value, "restore_targets", None)):  # it knows best itself (integrations.torch.State)
        return value.restore_targets(state)
    if _has_state_dict(value):
        captured = value.state_dict()
        if _is_torch(value, "Optimizer") and _is_plain_optimizer(value):
            return _with_state(value, captured, state)
        return captured if _is_torch(value, "Module") and _is_plain_module(value) else blanks(captured)
    if isinstance(value, Mapping):
        return {key: targets(item, state[key]) for key, item in value.items()}
    if isinstance(value, list | tuple) and not _is_size(value):
        return [targets(item, saved) for item, saved in zip(value, state, strict=True)]
    return value


def blanks(state: Any) -> Any:
    """``state`` with new memory for every array."""
    if _arrays.kind(state) is not None:
        return blank(state)
    if isinstance(state, Mapping):
        return {key: blanks(item) for key, item in state.items()}
    if isinstance(state, list | tuple) and not _is_size(state):
        return [blanks(item) for item in state]
    return state


def _is_plain_optimizer(optimizer: Any) -> bool:
    """Whether it loads as torch's do: it takes the tensors that it is given."""
    base = sys.modules["torch"].optim.Optimizer
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    return type(optimizer).load_state_dict is base.load_state_dict and not hooks


def _is_plain_module(module: Any) -> bool:
    """Whether it loads as torch's do: by copying each tensor into its own, unchanged."""
    base = sys.modules["torch"].nn.Module
    return type(module).load_state_dict is base.load_state_dict and all(
        _from_torch(type(each)._load_from_state_dict)
        and all(
            map(
                _from_torch,
                (*each._load_state_dict_pre_hooks.values(), *each._load_state_dict_post_hooks.values()),
            )
        )
        for each in module.modules()
    )


def _from_torch(function: Any) -> bool:
    """Those of torch that change bytes on loading (parametrizations, lazy modules) are not among these."""
    function = getattr(function, "hook", function)  # torch wraps hooks to hand the module over
    where = getattr(function, "__module__", None) or ""
    return where == "torch.nn.modules.module" or where.startswith(("torch.nn.modules.", "torch.distributed."))


def _with_state(optimizer: Any, captured: Any, saved: Any) -> Any:
    """The captured state of an optimizer, with what it lacks of the saved one where that is like a parameter."""
    torch = sys.modules["torch"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = dict(captured["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        mine = dict(state.get(number, {}))
        for key, item in saved["state"].get(number, {}).items():
            if (
                key not in mine
                and _arrays.kind(item) is not None
                and tuple(item.shape) == tuple(parameter.shape)
            ):
                dtype = getattr(torch, _arrays.describe(item)[0])
                mine[key] = torch.empty_like(parameter.detach(), dtype=dtype)
        state[number] = mine
    return {**captured, "state": state}


def _unwrap(value: Any) -> Any:
    if "torch" not in sys.modules:
        return value
    from resilience.integrations.torch import unwrap

    return unwrap(value)


def _has_state_dict(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _is_torch(value: Any, kind: str) -> bool:
    """Whether ``value`` is a torch ``Module`` or ``Optimizer``."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(value, torch.nn.Module if kind == "Module" else torch.optim.Optimizer)


def _is_size(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Size)


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """``items`` as a tuple of the type of ``value``."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def load(value: Any, state: Any) -> Any:
    """As ``apply``, of a state that is known to fit. Arrays that are the object's own memory are left as they are."""
    inner = _unwrap(value)
    if _has_state_dict(inner):
        if _is_torch(inner, "Module") and _is_plain_module(inner):
            _load_module(inner, state)
        else:
            inner.load_state_dict(state)
        return value
    if _arrays.kind(value) is not None:
        return _load_array(value, state)
    if isinstance(value, Mapping):
        loaded = {key: load(item, state[key]) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return loaded
        value.update(loaded)
        return value
    if isinstance(value, list):
        value[:] = [load(item, saved) for item, saved in zip(value, state, strict=True)]
        return value
    if isinstance(value, tuple) and not _is_size(value):
        return _like(value, [load(item, saved) for item, saved in zip(value, state, strict=True)])
    return state


def _load_module(module: Any, state: Any) -> None:
    """What was filled in place need not be copied onto itself; everything else takes torch's own way."""
    own = module.state_dict()
    rest = OrderedDict(
        (key, item) for key, item in state.items() if key not in own or not _same_memory(own[key], item)
    )
    module.load_state_dict(rest, strict=len(rest) == len(own))


def _same_memory(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if _arrays.kind(a) is None or _arrays.kind(b) is None:
        return False
    found = [_arrays.identity(tree.flatten(value, prefix="x")[0]["x"]) for value in (a, b)]
    return found[0] is not None and found[0] == found[1]


def _load_array(value: Any, state: Any) -> Any:
    if _same_memory(value, state):
        return value
    if isinstance(value, Shard) and isinstance(state, Shard):
        return replace(value, local=_load_array(value.local, state.local))
    match _arrays.kind(value):
        case "torch":
            torch = sys.modules["torch"]
            with torch.no_grad():
                value.copy_(state if isinstance(state, torch.Tensor) else _build_array(value, state))
            return value
        case "numpy" if value.flags.writeable:
            np.copyto(value, _numpy(state))
            return value
        case _:
            return _build_array(value, state)


def build(value: Any, state: Any) -> Any:
    """As ``rebuild``, of a state that is known to fit."""
    if _arrays.kind(value) is not None:
        return _build_array(value, state)
    if isinstance(value, Mapping):
        items = {key: build(item, state[key]) for key, item in value.items()}
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if isinstance(value, list):
        return [build(item, saved) for item, saved in zip(value, state, strict=True)]
    if isinstance(value, tuple) and not _is_size(value):
        return _like(value, [build(item, saved) for item, saved in zip(value, state, strict=True)])
    return state


def _build_array(value: Any, state: Any) -> Any:
    if isinstance(value, Shard) and isinstance(state, Shard):
        return replace(value, local=_build_array(value.local, state.local))
    kind = _arrays.kind(value)
    return state if _arrays.kind(state) == kind else _arrays.build(_numpy(state), str(kind))


def _numpy(state: Any) -> _arrays.AnyArray:
    return _arrays.raw(state).view(_arrays.numpy_dtype(_arrays.describe(state)[0]))


# Comparison. A misfit is (kind, path, what is wrong).

Misfit = tuple[str, str, str]


def check_fit(value: Any, state: Any, *, name: str) -> None:
    """``InvalidError`` unless ``state`` can be loaded into ``value``. Of its arrays only type and shape count."""
    found = list(_misfits(value, state, name))
    if not found:
        return
    lines = []
    for kind in ("missing", "unexpected", "different"):
        rows = [f"{path}{': ' + what if what else ''}" for kind_, path, what in found if kind_ == kind]
        if rows:
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            lines.append(f"{kind} ({len(rows)}): {'; '.join(rows[:_SHOWN])}{more}")
    raise InvalidError(
        f"the saved state of {name!r} does not fit: {'. '.join(lines)}",
        operation="restore",
        path=name,
        hint="missing: the checkpoint lacks it; unexpected: the object lacks it. Build the object as it was "
        "when it was saved, or start a new run",
    )


def _misfits(value: Any, state: Any, path: str) -> Iterator[Misfit]:
    value = _unwrap(value)
    if _is_torch(value, "Optimizer"):
        yield from _optimizer_misfits(value, state, path)
    elif callable(getattr(value, "restore_targets", None)):
        yield from _misfits(value.restore_targets(state), state, path)
    elif _has_state_dict(value):
        # Modules load by key, and torch would broadcast or cast without a word. Other objects know best
        # themselves what they can load.
        if _is_torch(value, "Module"):
            yield from _misfits(value.state_dict(), state, path)
    elif _arrays.kind(value) is not None:
        yield from _array_misfits(value, state, path)
    elif isinstance(value, Mapping):
        if not isinstance(state, Mapping):
            yield "different", path, f"a dict here, {type(state).__name__} in the checkpoint"
            return
        for key, item in value.items():
            if key in state:
                yield from _misfits(item, state[key], f"{path}/{key}")
            else:
                yield "missing", f"{path}/{key}", ""
        for key in state:
            if key not in value:
                yield "unexpected", f"{path}/{key}", ""
    elif isinstance(value, list | tuple) and not _is_size(value):
        if not isinstance(state, list | tuple) or len(state) != len(value):
            length = f" of {len(state)}" if isinstance(state, list | tuple) else ""
            here = f"{type(value).__name__} of {len(value)} here"
            yield "different", path, f"{here}, {type(state).__name__}{length} in the checkpoint"
            return
        for index, (item, saved) in enumerate(zip(value, state, strict=True)):
            yield from _misfits(item, saved, f"{path}/{index}")
    elif _arrays.kind(state) is not None or (
        isinstance(state, Mapping | list | tuple) and not _is_size(state)
    ):
        yield "different", path, f"{type(value).__name__} here, {type(state).__name__} in the checkpoint"


def _array_misfits(value: Any, state: Any, path: str) -> Iterator[Misfit]:
    if _arrays.kind(state) is None:
        yield "different", path, f"an array here, {type(state).__name__} in the checkpoint"
        return
    here, saved = _arrays.describe(value), _arrays.describe(state)
    if here != saved:
        yield (
            "different",
            path,
            f"{here[0]}{list(here[1])} here, {saved[0]}{list(saved[1])} in the checkpoint",
        )


def _optimizer_misfits(value: Any, state: Any, path: str) -> Iterator[Misfit]:
    """Groups and shapes only: before its first step an optimizer has no state to compare with."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or not isinstance(state.get("state"), Mapping):
        yield "different", path, "an optimizer here, something else in the checkpoint"
        return
    here = [len(group["params"]) for group in value.param_groups]
    saved = [len(group["params"]) for group in groups]
    if here != saved:
        yield "different", f"{path}/param_groups", f"groups of {here} here, of {saved} in the checkpoint"
        return
    parameters = [parameter for group in value.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, item in state["state"].get(number, {}).items():
            mine = value.state.get(parameter, {}).get(key)
            wanted = mine if _arrays.kind(mine) is not None else None
            if wanted is None and key in _LIKE_PARAMETER:
                wanted = parameter
            if wanted is None or _arrays.kind(item) is None or tuple(item.shape) == tuple(wanted.shape):
                continue
            shapes = f"{list(wanted.shape)} here, {list(item.shape)} in the checkpoint"
            yield "different", f"{path}/state/{number}/{key}", shapes
