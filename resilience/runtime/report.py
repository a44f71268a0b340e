"""A third party's report of a card's fault, brought to the supervisors of the runs that have that card.

For whoever sees what drivers do not tell: a ping mesh, a stress test, an operator. Runs on the machine of the
reporter, which must reach the Ray cluster; decides nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import ray

from resilience.cards.codes import FaultCodes
from resilience.control.faults import Action
from resilience.errors import InvalidError, UnavailableError
from resilience.runtime.launch import knock
from resilience.runtime.supervisor import NAMESPACE, PREFIX, actor_name

_ANSWER_S = 30.0
_CARD = re.compile(r"(?P<node>.+)/(?P<index>\d+)")


def report_fault(
    card: str,
    code: str,
    *,
    run: str | None = None,
    storage: str | None = None,
    detail: str = "",
    action: str | None = None,
    source: str = "a report",
) -> list[str]:
    """Report a fault of a card to the runs that are going on this Ray cluster.

    What is done is what the code asks for (docs/cards.md), by the table that the run was launched with; a code
    that nobody knows is written into the run's journal and watched.

    Args:
        card: ``NODE/INDEX``, as ``resilience status`` names cards.
        code: an XID (``79``), an Ascend code (``80E18402``), a name of the tables, or one of your own.
        run: only this run. Default: every run that is going and has the card.
        storage: only runs that are kept there.
        detail: a sentence for the journal.
        action: what to do, whatever the code asks for: ``watch``, ``restart``, ``drain``, ``reset``,
            ``replace card`` or ``replace node``. A report with an action is never taken for a fault of software.
        source: who reports, for the journal.

    Returns:
        The names of the runs that took it.

    Raises:
        InvalidError: card, code or action are malformed, or no run that is going has the card.
        UnavailableError: no Ray cluster answers, no run is going, or its supervisor does not answer.
    """
    node, index = _parsed(card)
    if not code.strip():
        raise InvalidError("the code is empty", operation="report-fault", hint="give a code, such as 79")
    allowed = [each.value for each in Action]
    if action is not None and action not in allowed:
        near = difflib.get_close_matches(action, allowed, n=1)
        raise InvalidError(
            f"action={action!r} is not allowed",
            operation="report-fault",
            hint=(f"did you mean {near[0]!r}? " if near else "") + f"allowed: {', '.join(allowed)}",
        )
    known = FaultCodes.over({}).find(code)
    seen = {
        "index": index,
        "code": known.code if known else code.strip(),
        "detail": detail,
        "affects": (),
        "action": action,
        "source": source,
    }
    root = None if storage is None or "://" in storage else os.path.abspath(os.path.expanduser(storage))
    with _connected():
        going = _going(run)
        refusals: dict[str, str] = {}
        taken: list[str] = []
        answered = False
        for name in going:
            try:
                supervisor = ray.get_actor(actor_name(name), namespace=NAMESPACE)
                answer: Any = ray.get(
                    supervisor.report_fault.remote(node, seen, root or storage), timeout=_ANSWER_S
                )
                answered = True
            except (ValueError, ray.exceptions.RayError) as error:
                refusals[name] = f"its supervisor does not answer: {type(error).__name__}"
                continue
            if answer is None:
                taken.append(name)
            else:
                refusals[name] = str(answer)
    if not taken:
        told = "; ".join(f"run {name}: {why}" for name, why in refusals.items())
        raise (InvalidError if answered else UnavailableError)(
            f"no run took the report of card {card}: {told}",
            operation="report-fault",
            path=card,
            hint="resilience status RUN shows the nodes of a run and how many cards each has",
        )
    return taken


def _parsed(card: str) -> tuple[str, int]:
    found = _CARD.fullmatch(card.strip())
    if found is None:
        raise InvalidError(
            f"{card!r} is no card",
            operation="report-fault",
            path=card,
            hint="write it as NODE/INDEX, such as node-7/3, as resilience status does",
        )
    return found["node"], int(found["index"])


def _going(run: str | None) -> list[str]:
    """The runs to ask, by their supervisors' names."""
    named = ray.util.list_named_actors(all_namespaces=True)
    runs = sorted(
        each["name"].removeprefix(PREFIX)
        for each in named
        if each["namespace"] == NAMESPACE and each["name"].startswith(PREFIX)
    )
    if run is not None and run not in runs:
        near = difflib.get_close_matches(run, runs, n=1)
        raise UnavailableError(
            f"run {run!r} is not going on this Ray cluster",
            operation="report-fault",
            hint=(f"did you mean {near[0]!r}? " if near else "") + f"going: {', '.join(runs) or 'none'}",
        )
    if not runs:
        raise UnavailableError(
            "no run is going on this Ray cluster",
            operation="report-fault",
            hint="a card is reported to the run that uses it, while it goes on; is RAY_ADDRESS the right cluster?",
        )
    return runs if run is None else [run]


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """The cluster this process is in, that of ``RAY_ADDRESS``, or the one that runs on this machine."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except (ConnectionError, OSError) as error:
        told = str(error).strip().splitlines()
        raise UnavailableError(
            f"no Ray cluster answers at {address}: {told[0] if told else type(error).__name__}",
            operation="report-fault",
            hint="set RAY_ADDRESS to the head's address, host:port",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
