"""State: a model and its optimizers as one state under the parameters' own names, whatever parallelises them.

Owns the naming (that of torch's ``get_state_dict``: no wrapper leaves a trace in a name, and the optimizers' state
is keyed by parameter), which makes a checkpoint of one parallelism readable by another. Must never call a
collective, never run an optimizer, and never change anything by being looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint import fit
from resilience.checkpoint.box import Box
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.tree import segment
from resilience.errors import InvalidError
from resilience.integrations.torch import parameters_of, replicated_parameters, shards_its_state, unwrap
from resilience.integrations.torch_sharding import members, shard_of

_WRAPPERS = frozenset(
    ("_orig_mod", "_checkpoint_wrapped_module")
)  # of torch.compile, activation checkpointing


class State:
    """A model and its optimizers, to be tracked as one: ``run.track(train=State(model, optimizer))``.

    Works for plain models, DistributedDataParallel, ``fully_shard`` (FSDP2), ``parallelize_module`` and their
    combinations on meshes of any number of dimensions; what one saves, any other loads, with any number of ranks.
    Parameters are saved as they lie (no rank gathers anything). Tensors that are no DTensors and that no wrapper
    keeps equal (buffers, parameters no parallelism touches) belong to each rank, and are restored by as many ranks
    as saved them; ``replicated=True`` is your word that they are the same on every rank, which makes them free of
    the number of ranks (what torch's DCP takes for granted).

    Args:
        model: the module, wrapped or not.
        optimizers: whose parameters are the model's.
        replicated: all tensors that are no DTensors hold the same bytes on every rank.

    Raises:
        InvalidError: the model is wrapped in FullyShardedDataParallel (FSDP1), or an optimizer has parameters that
            are not the model's.
    """

    def __init__(
        self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer, replicated: bool = False
    ) -> None:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise InvalidError(
                "the model is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters hide the model's own",
                operation="track",
                hint="use torch.distributed.fsdp.fully_shard (FSDP2)",
            )
        self._model, self._optimizers, self._replicated = model, optimizers, replicated
        for optimizer in optimizers:
            self._named(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optimizer": {"state": {name: {…}}, "param_groups": […]}}``: references.

        Plain tensors in the state of a sharded parameter (Adam's ``step``) are shards that all of its mesh holds.
        """
        saved: dict[str, Any] = {
            "model": {_plain(key): value for key, value in self._module.state_dict().items()}
        }
        if not self._optimizers:
            return saved
        state: dict[str, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer in self._optimizers:
            named, own = self._named(optimizer), optimizer.state_dict()
            for number, values in own["state"].items():
                name, parameter = named[number]
                state[name] = {key: _shared(value, parameter) for key, value in values.items()}
            for group in own["param_groups"]:
                groups.append({**group, "params": [named[number][0] for number in group["params"]]})
        return {**saved, "optimizer": {"state": state, "param_groups": groups}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` of any parallelism returned: shards and DTensors of this one's placements, or whole
        tensors, of which this rank takes its share.

        Raises:
            InvalidError: the parameters of one group were saved in several groups, or in none.
        """
        here = self._module.state_dict()
        keys = self._keys(here)
        with torch.no_grad():
            model = {keys.get(name, name): value for name, value in state["model"].items()}
            fit.load(self._module, {key: _settled(value, here.get(key)) for key, value in model.items()})
            for optimizer in self._optimizers:
                self._load_optimizer(optimizer, state["optimizer"])

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        named, own = self._named(optimizer), optimizer.state_dict()
        values = {}
        for number, (name, parameter) in enumerate(named):
            if name in saved["state"]:
                present = own["state"].get(number, {})
                values[number] = {
                    key: _settled(value, present.get(key), parameter)
                    for key, value in saved["state"][name].items()
                }
        groups = [
            {**saved_group, "params": group["params"]}
            for saved_group, group in zip(
                _saved_groups(named, own["param_groups"], saved), own["param_groups"], strict=True
            )
        ]
        optimizer.load_state_dict({"state": values, "param_groups": groups})

    def restore_targets(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state like the saved one whose arrays may be filled in place before ``load_state_dict``: the memory of
        model and optimizers, and new memory, placed as the parameter, for what these have only after a step.

        Args:
            state: the saved one; of its arrays only type and shape are looked at.
        """
        keys = self._keys(self._module.state_dict())
        model = fit.targets(
            self._module, {keys.get(name, name): value for name, value in state["model"].items()}
        )
        found: dict[str, Any] = {"model": {_plain(key): value for key, value in model.items()}}
        if not self._optimizers:
            return found
        saved = state.get("optimizer", {"state": {}, "param_groups": []})
        states: dict[str, Any] = {}
        for optimizer in self._optimizers:
            named, own = self._named(optimizer), optimizer.state_dict()
            _saved_groups(named, own["param_groups"], saved)
            numbered = {
                n: saved["state"][name] for n, (name, _) in enumerate(named) if name in saved["state"]
            }
            made = fit.targets(optimizer, {"state": numbered, "param_groups": own["param_groups"]})["state"]
            for number, values in numbered.items():
                name, parameter = named[number]
                states[name] = {}
                for key, value in values.items():
                    if key in made[number]:
                        states[name][key] = _shared(made[number][key], parameter)
                    elif _arrays.kind(value) is None or not value.shape or not isinstance(parameter, DTensor):
                        states[name][key] = value
                    # Otherwise nobody knows how the parts of such a thing lie: it is left out, and so refused.
        found["optimizer"] = {"state": states, "param_groups": saved["param_groups"]}
        return found

    @staticmethod
    def _keys(state: Mapping[str, Any]) -> dict[str, str]:
        """Name -> key in the module's own state."""
        return {_plain(key): key for key in state}

    def replicated_names(self) -> Iterator[str]:
        """Names in the state, or above, of arrays whose bytes are the same on every rank (shards aside)."""
        if self._replicated:
            yield "model"
            yield "optimizer"
            return
        alike = replicated_parameters(self._model)
        for key, parameter in self._module.named_parameters(remove_duplicate=False):
            if id(parameter) in alike:
                yield f"model/{segment(_plain(key))}"
        for optimizer in self._optimizers:
            if not shards_its_state(optimizer):
                for name, parameter in self._named(optimizer):
                    if id(parameter) in alike:
                        yield f"optimizer/state/{segment(name)}"

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        return self._optimizers

    @property
    def _module(self) -> torch.nn.Module:
        module: torch.nn.Module = unwrap(self._model)
        return module

    def parameter_names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in the order in which it numbers them."""
        return [name for name, _ in self._named(optimizer)]

    def _named(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
        """An optimizer's parameters in the order of its groups, with their names."""
        names: dict[int, str] = {id(value): _plain(key) for key, value in self._module.named_parameters()}
        try:
            return [(names[id(parameter)], parameter) for parameter in parameters_of(optimizer)]
        except KeyError:
            raise InvalidError(
                f"{type(optimizer).__name__} has parameters that are not the model's",
                operation="track",
                hint="make the optimizer after fully_shard and parallelize_module, which replace parameters, "
                "and give State the model that it was made for",
            ) from None


def _plain(key: str) -> str:
    """A key of a module's state without the traces of wrappers inside of it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _shared(value: Any, parameter: torch.Tensor) -> Any:
    """A value of an optimizer's state. All ranks of a sharded parameter's mesh step it together, so what is beside
    its DTensors is the same on each."""
    if (
        not isinstance(parameter, DTensor)
        or isinstance(value, DTensor)
        or not isinstance(value, torch.Tensor)
    ):
        return value
    shape, holders = tuple(value.shape), members(parameter.device_mesh)
    return Shard(value, shape, () if holders is None else (Box.whole(shape),), holders, shape)


def _settled(value: Any, present: Any, parameter: torch.Tensor | None = None) -> Any:
    """What to load for ``value``: ``present``, a tensor here that holds its bytes then, where the two are the same or
    differ in placement only. Without it, one placed as ``parameter`` where that has the shape of ``value``."""
    if isinstance(value, DTensor) or _arrays.kind(value) is None:
        return value
    plain = value.local if isinstance(value, Shard) else value
    if not isinstance(plain, torch.Tensor):
        return plain
    if present is None and isinstance(parameter, DTensor) and plain.shape == parameter.shape:
        present = torch.empty_like(parameter.detach(), dtype=plain.dtype)
    if not isinstance(present, torch.Tensor):
        return plain
    share = shard_of(present) if isinstance(present, DTensor) else None
    if isinstance(value, Shard):
        local = present if share is None else share.local
        if local.data_ptr() != plain.data_ptr():
            local.copy_(plain)
        return present
    if share is None or tuple(plain.shape) != share.shape:
        return value
    for box, view in zip(share.boxes, share.views(share.local), strict=True):
        view.copy_(plain[box.slices(Box.whole(share.shape))])
    return present


def _saved_groups(
    named: list[tuple[str, torch.nn.Parameter]], groups: list[dict[str, Any]], saved: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For each of an optimizer's groups the saved one that holds its parameters; of an empty one, that at its place."""
    found = []
    for index, group in enumerate(groups):
        names = {named[number][0] for number in group["params"]}
        alike = [each for each in saved["param_groups"] if not names.isdisjoint(each["params"])]
        if not names:
            alike = saved["param_groups"][index : index + 1]
        if len(alike) != 1 or not names <= set(alike[0]["params"]):
            raise InvalidError(
                f"the {len(names)} parameters of the optimizer's group {index} ({', '.join(sorted(names)[:3])}, ...) "
                f"were saved in {len(alike)} groups, not all in one",
                operation="restore",
                hint="make the optimizer with the parameter groups it had when it was saved",
            )
        found.append(alike[0])
    return found
