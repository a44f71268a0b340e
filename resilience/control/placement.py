"""Where ranks run: contiguous cards of as few supernodes and nodes as possible, near ranks on near cards.

Owns one pure function of nodes, excluded cards and the previous table. A fresh placement walks the topology
from the outside in, always into the smallest domain that holds what is left, else filling the largest first.
After a failure every surviving rank stays; the others take a spare from the same node, the same supernode, or
the nearest domain outside. Linear in cards, apart from sorting nodes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from resilience.control.types import Assignment, Card, Node

_NUMBERS = re.compile(r"(\d+)")

Key = tuple[tuple[int, int, str], ...]


def place(
    nodes: Mapping[str, Node],
    excluded: Collection[Card],
    workers: int,
    previous: Sequence[Assignment] | None = None,
    *,
    lost: Mapping[str, Node] | None = None,
) -> tuple[Assignment, ...] | None:
    """A table of ``workers`` ranks, in rank order; ``None`` when there are too few healthy cards.

    ``lost`` holds former nodes, so that a spare near the place that failed can be found. The answer depends
    on nothing but the arguments, nor on the order of the mappings.
    """
    free = _healthy(nodes, excluded)
    if sum(map(len, free.values())) < workers:
        return None
    if previous is None or len(previous) != workers:
        return _table(_fresh(nodes, free, workers))
    return _table(_repair(nodes, free, previous, lost or {}))


def _healthy(nodes: Mapping[str, Node], excluded: Collection[Card]) -> dict[str, list[int]]:
    bad: dict[str, set[int]] = {}
    for card in excluded:
        bad.setdefault(card.node, set()).add(card.index)
    free = {}
    for name, node in nodes.items():
        out = bad.get(name)
        free[name] = [i for i in range(node.cards) if i not in out] if out else list(range(node.cards))
    return free


# --- fresh
# ---------------------------------------------------------------------------------------------------


@dataclass
class _Domain:
    """A subtree of the topology: inner ones have ``children``, a node has ``cards``."""

    key: Key
    size: int = 0
    children: dict[str, _Domain] = field(default_factory=dict)
    node: str = ""
    cards: list[int] = field(default_factory=list)


def _fresh(nodes: Mapping[str, Node], free: Mapping[str, list[int]], workers: int) -> list[Card]:
    root = _Domain(())
    for name, cards in free.items():
        if not cards:
            continue
        domain = root
        domain.size += len(cards)
        for level in nodes[name].levels:
            child = domain.children.get("d" + level)
            if child is None:
                child = domain.children["d" + level] = _Domain(_natural(level))
            domain = child
            domain.size += len(cards)
        domain.children["n" + name] = _Domain(_natural(name), len(cards), node=name, cards=cards)
    return _take(root, workers)


def _take(domain: _Domain, wanted: int) -> list[Card]:
    """``wanted`` cards of ``domain``, in topological order."""
    if domain.node:
        return [Card(domain.node, index) for index in _run(domain.cards, wanted)]
    children = sorted(domain.children.values(), key=lambda child: child.key)
    # Largest first uses the fewest children; the rest goes into the smallest that holds it.
    by_size = sorted(children, key=lambda child: -child.size)
    takes: dict[int, int] = {}
    for child in by_size:
        if wanted == 0:
            break
        if child.size >= wanted:
            best = min((c for c in children if c.size >= wanted and id(c) not in takes), key=lambda c: c.size)
            takes[id(best)] = wanted
            wanted = 0
        else:
            takes[id(child)] = child.size
            wanted -= child.size
    return [card for child in children if id(child) in takes for card in _take(child, takes[id(child)])]


def _run(cards: Sequence[int], wanted: int) -> Sequence[int]:
    """``wanted`` of ``cards``: the shortest window, the lowest of equals, so that they are neighbours."""
    if wanted >= len(cards):
        return cards
    start = min(range(len(cards) - wanted + 1), key=lambda at: (cards[at + wanted - 1] - cards[at], at))
    return cards[start : start + wanted]


# --- repair
# --------------------------------------------------------------------------------------------------


def _repair(
    nodes: Mapping[str, Node],
    free: dict[str, list[int]],
    previous: Sequence[Assignment],
    lost: Mapping[str, Node],
) -> list[Card]:
    left = {name: set(cards) for name, cards in free.items()}
    cards: list[Card | None] = []
    homeless: dict[str, list[int]] = {}
    for assignment in previous:
        card = assignment.card
        if card.index in left.get(card.node, ()):
            left[card.node].remove(card.index)
            cards.append(card)
        else:
            homeless.setdefault(card.node, []).append(assignment.rank)
            cards.append(None)
    if homeless:
        spare = {name: sorted(indices) for name, indices in left.items() if indices}
        for old, ranks in homeless.items():
            home = nodes.get(old) or lost.get(old) or Node(old, 0)
            _rehouse(nodes, spare, home, ranks, cards)
    return [card for card in cards if card is not None]


def _rehouse(
    nodes: Mapping[str, Node],
    spare: dict[str, list[int]],
    home: Node,
    ranks: Sequence[int],
    cards: list[Card | None],
) -> None:
    """Give ``ranks``, which ran on ``home``, the nearest spare cards; together on one node where one has
    room."""
    waiting = list(ranks)
    while waiting:
        wanted = len(waiting)
        best = min(spare, key=lambda name: _distance(home, nodes[name], len(spare[name]), wanted))
        taken = list(_run(spare[best], min(len(waiting), len(spare[best]))))
        for rank, index in zip(waiting, taken, strict=False):
            cards[rank] = Card(best, index)
        waiting = waiting[len(taken) :]
        spare[best] = [index for index in spare[best] if index not in taken]
        if not spare[best]:
            del spare[best]


def _distance(home: Node, other: Node, room: int, wanted: int) -> tuple[int, bool, int, Key]:
    """Order of preference for a spare on ``other``: the nearest domain first; within it the node that just
    holds all that is wanted, else the one with most room."""
    fits = room >= wanted
    return (-_near(home, other), not fits, room if fits else -room, _natural(other.name))


def _near(home: Node, other: Node) -> int:
    """How much of their topology two nodes share; the node itself is nearest."""
    if home.name == other.name:
        return 1 << 20
    depth = 0
    for mine, theirs in zip(home.levels, other.levels, strict=False):
        if mine != theirs:
            break
        depth += 1
    return depth


def _table(cards: Sequence[Card]) -> tuple[Assignment, ...]:
    local: dict[str, int] = {}
    table = []
    for rank, card in enumerate(cards):
        table.append(Assignment(rank, card, local.get(card.node, 0)))
        local[card.node] = local.get(card.node, 0) + 1
    return tuple(table)


def _natural(name: str) -> Key:
    """Sort key that puts ``node-2`` before ``node-10``."""
    return tuple((1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in _NUMBERS.split(name))
