"""What the supervisor knows, as one immutable value, and the turn in which one event changes it.

Owns the records only; the rules live in ``starting``, ``recovery``, ``checkpoints`` and ``stopping``. Sums
that events need are kept beside what they are sums of, so that no common event looks at every card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from resilience.control.blame import Signal
from resilience.control.cadence import Cadence
from resilience.control.commands import Command, Record
from resilience.control.faults import Sightings
from resilience.control.persistent import Ranks
from resilience.control.progress import Pages
from resilience.control.restore import Place
from resilience.control.retention import Kept
from resilience.control.saves import Saves
from resilience.control.types import Assignment, Candidate, Card, Incident, Node, Outcome, Phase, Policy

MOST_SIGNALS = 32  # signs kept of one failure


@dataclass(frozen=True)
class Cluster:
    """Nodes and cards.

    ``excluded`` cards have faulted and are never used again in this run; ``avoided`` ones failed twice in a
    row and are used only when nothing else is left. ``available``: cards on living nodes that are not
    excluded. A name that was lost does not come back: its node would be another one, under another name.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    lost: dict[str, Node] = field(default_factory=dict)
    excluded: frozenset[Card] = frozenset()
    avoided: frozenset[Card] = frozenset()
    available: int = 0

    @property
    def unblemished(self) -> int:
        """Cards on living nodes that are neither excluded nor avoided."""
        return self.available - sum(card.node in self.nodes for card in self.avoided - self.excluded)

    def knows(self, name: str) -> bool:
        return name in self.nodes or name in self.lost

    def join(self, node: Node) -> Cluster:
        bad = sum(card.node == node.name and card.index < node.cards for card in self.excluded)
        nodes = {**self.nodes, node.name: node}
        return replace(self, nodes=nodes, available=self.available + node.cards - bad)

    def lose(self, name: str) -> Cluster:
        node = self.nodes[name]
        nodes = {key: value for key, value in self.nodes.items() if key != name}
        bad = sum(card.node == name and card.index < node.cards for card in self.excluded)
        lost = {**self.lost, name: node}
        return replace(self, nodes=nodes, lost=lost, available=self.available - node.cards + bad)

    def exclude(self, card: Card) -> Cluster:
        node = self.nodes.get(card.node)
        here = node is not None and 0 <= card.index < node.cards
        return replace(self, excluded=self.excluded | {card}, available=self.available - here)

    def readmit(self, card: Card) -> Cluster:
        """An excluded card after all may be used: what it reported was not its own fault."""
        node = self.nodes.get(card.node)
        here = node is not None and 0 <= card.index < node.cards
        return replace(self, excluded=self.excluded - {card}, available=self.available + here)


@dataclass(frozen=True)
class Running:
    """Where processes of ``generation`` may be: on ``nodes`` (name → place) less those ``gone``. ``told_at``:
    when they were told to end, ``None`` while they are not."""

    generation: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    gone: Ranks = field(default_factory=Ranks)
    told_at: float | None = None

    def __bool__(self) -> bool:
        return self.gone.count < len(self.nodes)

    def __contains__(self, name: str) -> bool:
        return name in self.nodes and self.nodes[name] not in self.gone

    def left(self) -> list[str]:
        return [name for name, place in self.nodes.items() if place not in self.gone]

    def without(self, name: str) -> Running:
        return replace(self, gone=self.gone.add(self.nodes[name])) if name in self else self


@dataclass(frozen=True)
class Waiting:
    """Too few cards, or spares still joining. ``since`` is when it began, ``enough_at`` when the workers'
    cards were complete, ``told`` the number of cards last written to the journal."""

    since: float
    enough_at: float | None = None
    told: int = -1


@dataclass(frozen=True)
class Attempt:
    """One try at a new generation.

    ``asked`` is the number asked of the log; the store answers to it. ``won`` is the log's answer, at least
    ``asked``, and what the ranks run under (0 while it is awaited). ``spoiled``: the table lost a card; once
    the fence is answered the next attempt begins, so that never two fences are asked for at once.
    """

    asked: int
    since: float
    table: tuple[Assignment, ...]
    nodes: tuple[str, ...]
    store_node: str
    store: str = ""
    won: int = 0
    restore: Candidate | None = None
    started_at: float | None = None
    spoiled: bool = False


@dataclass(frozen=True)
class Trouble:
    """Signs of a failure that wait for a better explanation until ``until``; ``exited``: ranks among them."""

    until: float
    signals: tuple[Signal, ...] = ()
    exited: Ranks = field(default_factory=Ranks)

    def add(self, signal: Signal) -> Trouble:
        """With one more sign. When thousands of ranks lose the same peer, the first and the strongest are
        kept."""
        exited = self.exited
        if signal.exit is not None and signal.rank is not None:
            exited = exited.add(signal.rank)
        signals = self.signals
        if len(signals) < MOST_SIGNALS:
            signals = (*signals, signal)
        elif signal.strength > max(each.strength for each in signals):
            signals = (*signals[:-1], signal)
        return replace(self, signals=signals, exited=exited)


@dataclass(frozen=True)
class Drain:
    """Ranks are being ended; saves of ``steps`` that all of them have sealed are awaited until ``until``.
    Then comes a new generation, or ``end``."""

    until: float
    steps: frozenset[int] = frozenset()
    end: Outcome | None = None


@dataclass(frozen=True)
class Failures:
    """Generations that failed since there was progress: how many, their stories, the highest step any of them
    had begun, and how often each card was blamed."""

    count: int = 0
    story: tuple[str, ...] = ()
    step: int = -1
    blamed: dict[Card, int] = field(default_factory=dict)
    committed: bool = False  # a checkpoint was committed since the last failure


@dataclass(frozen=True)
class Stopping:
    """A clean stop: asked for at ``since``; all ranks are to park after ``step`` steps; the newest of
    those ``parked`` came there at ``parked_at``."""

    since: float
    reason: str
    step: int = 0
    widen: int = 1
    parked: Ranks = field(default_factory=Ranks)
    parked_at: float = 0.0
    released: bool = False
    note: str = ""  # why the last checkpoint is not durable, if it is not


@dataclass(frozen=True)
class Finishing:
    """The finish record is being written, for the ``tries``-th time; ``outcome`` holds once it is there.
    ``again_at``: when it is tried again, ``None`` while an answer is awaited."""

    outcome: Outcome
    steps: int
    tries: int = 1
    again_at: float | None = None


@dataclass(frozen=True)
class State:
    """Everything that decisions depend on. Made by ``State.initial``, changed by ``supervise.step`` only.

    Attributes:
        now: newest time any event carried, seconds on the supervisor's clock.
        generation: the newest generation won in the log; 0 before the first.
        table: the newest placement, in rank order.
        running: where processes of the newest generation that was started may be.
        orphans: commits sent for an earlier generation that were not answered before the next fence was asked
        for. candidates: what the last fence found in the log; ``unusable``: recorded there, but quarantined.
        kept: committed checkpoints that are not retired, newest first. damaged, unread: checkpoint and tier →
        why it is not restored (for good; until the next success). open: incidents that are not over, oldest
        first; ``counted``: incidents so far;
            ``believed``: strength of the sign that the newest one's blame rests on.
        restored: ranks of the current generation that have their state.
        restored_step: the step it began at.
        safe_at: when a checkpoint was last committed, or the run began.
    """

    policy: Policy
    run: str
    now: float = 0.0
    phase: Phase = Phase.WAITING
    generation: int = 0
    cluster: Cluster = field(default_factory=Cluster)
    waiting: Waiting | None = None
    attempt: Attempt | None = None
    drain: Drain | None = None
    trouble: Trouble | None = None
    stopping: Stopping | None = None
    table: tuple[Assignment, ...] = ()
    running: Running = field(default_factory=Running)
    pages: Pages = field(default_factory=Pages)
    restored: Ranks = field(default_factory=Ranks)
    restored_step: int = 0
    saves: Saves = field(default_factory=Saves)
    orphans: frozenset[Place] = frozenset()
    cadence: Cadence = field(default_factory=Cadence)
    candidates: tuple[Candidate, ...] = ()
    unusable: tuple[Candidate, ...] = ()
    kept: tuple[Kept, ...] = ()
    damaged: dict[Place, str] = field(default_factory=dict)
    unread: dict[Place, str] = field(default_factory=dict)
    open: tuple[Incident, ...] = ()
    counted: int = 0
    believed: int = 0
    failures: Failures = field(default_factory=Failures)
    sightings: Sightings = field(default_factory=Sightings)
    safe_at: float = 0.0
    ending_at: float | None = None  # all ranks have finished: since when their last saves are awaited
    finishing: Finishing | None = None
    outcome: Outcome | None = None

    @classmethod
    def initial(cls, policy: Policy, run: str, *, at: float = 0.0) -> State:
        """A run of which nothing is known yet, at time ``at``."""
        return cls(policy, run, now=at, waiting=Waiting(at), safe_at=at)

    @property
    def incidents(self) -> int:
        """Incidents of this supervisor so far."""
        return self.counted

    @property
    def step(self) -> int:
        """The highest step any rank of the current generation has begun (= completed steps)."""
        return self.pages.top

    def card_of(self, rank: int) -> Card | None:
        return self.table[rank].card if 0 <= rank < len(self.table) else None


class Turn:
    """One event being answered: the state so far and the commands so far. Lives within one ``step`` call."""

    __slots__ = ("commands", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self.commands: list[Command] = []

    @property
    def now(self) -> float:
        return self.state.now

    def put(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def do(self, *commands: Command) -> None:
        self.commands.extend(commands)

    def record(
        self,
        event: str,
        data: Mapping[str, Any] | None = None,
        *,
        rank: int | None = None,
        node: str | None = None,
        card: str | None = None,
        step: int | None = None,
        urgent: bool = False,
    ) -> None:
        """One line for the journal."""
        self.do(Record(event, dict(data or {}), rank, node, card, step, urgent))
