"""Launching: find or start a Ray cluster, start the supervisor, show what happens, bring back the result.

The caller's process holds nothing of the run: if it dies on an existing cluster, the run goes on, and the same
launch finds it again by its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resilience.control.types import Outcome
from resilience.errors import UnavailableError
from resilience.runtime.supervisor import NAMESPACE, Supervisor, actor_name, supervisor_options

_VIEW_EVERY_S = 0.25
_NAME_TAKEN_S = 30.0
_KNOCK_S = 5.0
_ANSWER_S = 5.0
_ABANDON_S = 120.0


def run_to_end(spec: dict[str, Any], *, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run ``spec`` (or attach to the run of that name that is going already) until it ends.

    Returns ``{"outcome": Outcome, "value": JSON text or None, "view": dict}``. Ctrl-C asks for a clean stop; a
    second one ends the run at once with ``KeyboardInterrupt``, or only our watching where others follow it too.
    Nothing else that happens to this process ends the run.
    """
    with _Interrupts() as interrupts, cluster(spec["card"], spec["wanted"]):
        if interrupts.count:
            raise KeyboardInterrupt  # nothing has begun that could be stopped cleanly
        spec = {**spec, "card": spec["card"] or card_kind()}
        supervisor, attached = _supervisor(spec)
        screen = _Screen(show)
        try:
            if attached:
                screen.show({**ray.get(supervisor.view.remote()), "attached": True})
            return _follow(supervisor, screen, interrupts)
        except KeyboardInterrupt:
            _abandon(supervisor)
            raise
        except ray.exceptions.RayActorError as error:
            raise UnavailableError(
                f"the supervisor of run {spec['run']!r} died: {error}",
                operation="launch",
                hint="run the same command again: it goes on from the newest checkpoint",
            ) from error
        finally:
            _dismiss(supervisor, spec["run"])


class _Screen:
    """Shows views until that fails (a closed pipe): looking on must not end a run."""

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self._show: Callable[[dict[str, Any]], None] | None = show

    def show(self, view: dict[str, Any]) -> None:
        if self._show is None:
            return
        try:
            self._show(view)
        except OSError:
            self._show = None


class _WithoutRay:
    """Passes on what is written, less Ray's own news of dying raylets: pages of state, printed to stdout, which
    belongs to the caller's program. What died is an event of ours."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        dropped = "(raylet)" in text or (self._dropped and text == "\n")
        self._dropped = "(raylet)" in text
        if not dropped:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_ray() -> contextlib.redirect_stdout[Any]:
    """While in this block, Ray's news does not reach stdout."""
    return contextlib.redirect_stdout(_WithoutRay(sys.stdout))


@contextlib.contextmanager
def cluster(card: str | None, cards: int) -> Iterator[None]:
    """A Ray cluster to run on: the one this process is in, the one of ``RAY_ADDRESS``, or a local one of our own
    that ends with the block; that one has ``cards`` simulated cards beside its real ones, or of the name ``card``."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if address:
        try:
            knock(address)
            ray.init(address=address, **quiet)
        except (ConnectionError, OSError) as error:
            raise UnavailableError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: {error}",
                operation="launch",
                hint="start it (ray start --head), or unset RAY_ADDRESS to use a local one",
            ) from error
    else:
        with _env("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"):
            own: dict[str, Any] = {} if card in ("GPU", "NPU") else {"resources": {card or "card": cards}}
            ray.init(address="local", include_dashboard=False, **own, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """``OSError`` if nobody listens at ``host:port``: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if "/" not in address and colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def card_kind() -> str:
    """The accelerator of the cluster this process is connected to; simulated cards where it has none."""
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return next((kind for kind in ("GPU", "NPU") if resources.get(kind)), "card")


@contextlib.contextmanager
def _env(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _supervisor(spec: dict[str, Any]) -> tuple[Any, bool]:
    """The supervisor of the run: the one that is there, or a new one."""
    name = actor_name(spec["run"])
    options = supervisor_options(spec["run"])
    place = _quiet_node(spec["card"])
    if place is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(place, soft=False)
    deadline = time.monotonic() + _NAME_TAKEN_S
    while True:
        with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
            going = ray.get_actor(name, namespace=NAMESPACE)
            ray.get(going.attach.remote())
            return going, True
        try:
            supervisor: Any = ray.remote(Supervisor).options(**options).remote(spec)
        except ValueError as error:
            # Another launch of this run was quicker, or the name of an ended supervisor is not free yet: look again.
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"the supervisor of run {spec['run']!r} is there, and does not answer: {error}",
                    operation="launch",
                    hint="launch again in a moment",
                ) from error
            time.sleep(0.05)
            continue
        try:
            ray.get(supervisor.start.remote())
        except ray.exceptions.RayError as error:
            ray.kill(supervisor)
            raise UnavailableError(
                f"the supervisor of run {spec['run']!r} could not start: {error}",
                operation="launch",
                hint="is this package installed, and the storage reachable, on every node of the cluster?",
            ) from error
        return supervisor, False


def _quiet_node(card: str) -> str | None:
    """A node without cards, where there is one: what fails there does not fail with a rank."""
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    without = [n for n in nodes if not n["Resources"].get(card)]
    heads = [n for n in nodes if "node:__internal_head__" in n["Resources"]]
    for group in (without, heads):
        if group:
            return str(group[0]["NodeID"])
    return None


def _follow(supervisor: Any, screen: _Screen, interrupts: _Interrupts) -> dict[str, Any]:
    asked = False
    interrupts.watched = True
    while True:
        ended: dict[str, Any] | None = ray.get(supervisor.wait.remote(_VIEW_EVERY_S))
        if ended is not None:
            screen.show(ended["view"])
            assert isinstance(ended["outcome"], Outcome)
            return ended
        screen.show(ray.get(supervisor.view.remote()))
        if interrupts.count > 1:
            raise KeyboardInterrupt
        if interrupts.count == 1 and not asked:
            asked = True
            ray.get(supervisor.request_stop.remote("interrupted (Ctrl-C)"))


class _Interrupts:
    """Counts Ctrl-C instead of raising, while the block runs; leaves signals alone outside the main thread.

    An exception in the middle of starting a local cluster would leave processes of Ray's behind. A second Ctrl-C is
    raised all the same, unless somebody looks at the count (``watched``): starting may take for ever.
    """

    def __init__(self) -> None:
        self.count = 0
        self.watched = False
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.count += 1
        if self.count > 1 and not self.watched:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _abandon(supervisor: Any) -> None:
    """End the run at once, unless others follow it."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(supervisor.abandon.remote(), timeout=_ABANDON_S)


def _dismiss(supervisor: Any, run: str) -> None:
    """We follow no longer. Takes the supervisor down if its run is over and nobody else wants the result."""
    try:
        over = ray.get(supervisor.wait.remote(0.0), timeout=_ANSWER_S) is not None
        if ray.get(supervisor.collected.remote(), timeout=_ANSWER_S) > 0 or not over:
            return
    except ray.exceptions.GetTimeoutError:
        return
    except ray.exceptions.RayError:
        pass  # it is gone, or going: only its name is left to wait for
    ray.kill(supervisor)
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline:  # until the name is free again: the next launch may use it at once
        named = {(a["namespace"], a["name"]) for a in ray.util.list_named_actors(all_namespaces=True)}
        if (NAMESPACE, actor_name(run)) not in named:
            return
        time.sleep(0.01)
