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
    bad: dict[str, set[int]] = {}
    for card in excluded:
        bad.setdefault(card.node, set()).add(card.index)
    if previous is not None and len(previous) == workers:
        return _repair(nodes, bad, previous, lost or {})
    free = {name: _healthy(node, bad.get(name)) for name, node in nodes.items()}
    if sum(map(len, free.values())) < workers:
        return None
    return _table(_fresh(nodes, free, workers))


def _healthy(node: Node, bad: Collection[int] | None) -> Sequence[int]:
    """Indices of the usable cards of ``node``, in order."""
    return [index for index in range(node.cards) if index not in bad] if bad else range(node.cards)


# --- fresh
# ---------------------------------------------------------------------------------------------------


@dataclass
class _Domain:
    """A subtree of the topology: inner ones have ``children``, a node has ``cards``."""

    key: Key
    size: int = 0
    children: dict[str, _Domain] = field(default_factory=dict)
    node: str = ""
    cards: Sequence[int] = ()


def _fresh(nodes: Mapping[str, Node], free: Mapping[str, Sequence[int]], workers: int) -> list[Card]:
    root = _Domain(())
    for name, cards in free.items():
        if not cards:
            continue
        domain = root
        domain.size += len(cards)
        for level in nodes[name].levels:
            child = domain.children.get("d" + level)
            if child is None:
                child = domain.children["d" + level] = _Domain(natural(level))
            domain = child
            domain.size += len(cards)
        domain.children["n" + name] = _Domain(natural(name), len(cards), node=name, cards=cards)
    return _take(root, workers)


def _take(domain: _Domain, wanted: int) -> list[Card]:
    """``wanted`` cards of ``domain``, in topological order."""
    if domain.node:
        return [Card(domain.node, index) for index in _run(domain.cards, wanted)]
    children = sorted(domain.children.values(), key=lambda child: child.key)
    takes = [0] * len(children)
    # Largest first uses the fewest children; the rest goes into the smallest that holds it.
    for at in sorted(range(len(children)), key=lambda at: -children[at].size):
        if children[at].size >= wanted:
            fits = (i for i, child in enumerate(children) if child.size >= wanted and not takes[i])
            takes[min(fits, key=lambda i: children[i].size)] = wanted
            break
        takes[at] = children[at].size
        wanted -= children[at].size
    return [card for child, take in zip(children, takes, strict=True) if take for card in _take(child, take)]


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
    bad: Mapping[str, Collection[int]],
    previous: Sequence[Assignment],
    lost: Mapping[str, Node],
) -> tuple[Assignment, ...] | None:
    homeless: dict[str, list[int]] = {}
    used = dict.fromkeys(nodes, 0)
    for assignment in previous:
        card = assignment.card
        if card.node in nodes and not (card.node in bad and card.index in bad[card.node]):
            used[card.node] += 1
        else:
            homeless.setdefault(card.node, []).append(assignment.rank)
    if not homeless:
        return tuple(previous)
    free = {
        name: set(_healthy(node, bad.get(name)))
        for name, node in nodes.items()
        if node.cards - len(bad.get(name, ())) > used[name]
    }
    for assignment in previous:
        if assignment.card.node in free:
            free[assignment.card.node].discard(assignment.card.index)
    spare: dict[str, Sequence[int]] = {name: sorted(indices) for name, indices in free.items() if indices}
    if sum(map(len, spare.values())) < sum(map(len, homeless.values())):
        return None
    moved: dict[int, Card] = {}
    for old, ranks in homeless.items():
        home = nodes.get(old) or lost.get(old) or Node(old, 0)
        moved.update(_rehouse(nodes, spare, home, ranks))
    return _table([moved.get(a.rank, a.card) for a in previous], previous)


def _rehouse(
    nodes: Mapping[str, Node], spare: dict[str, Sequence[int]], home: Node, ranks: Sequence[int]
) -> dict[int, Card]:
    """Cards for ``ranks``, which ran on ``home``: the nearest spare ones, on one node where one has room."""
    found: dict[int, Card] = {}
    waiting = list(ranks)
    while waiting:
        wanted = len(waiting)
        best = min(spare, key=lambda name: _distance(home, nodes[name], len(spare[name]), wanted))
        taken = _run(spare[best], min(wanted, len(spare[best])))
        for rank, index in zip(waiting, taken, strict=False):
            found[rank] = Card(best, index)
        waiting = waiting[len(taken) :]
        left = [index for index in spare[best] if index not in taken]
        if left:
            spare[best] = left
        else:
            del spare[best]
    return found


def _distance(home: Node, other: Node, room: int, wanted: int) -> tuple[int, bool, int, Key]:
    """Order of preference for a spare on ``other``: the nearest domain first; within it the node that just
    holds all that is wanted, else the one with most room."""
    fits = room >= wanted
    return (-near(home, other), not fits, room if fits else -room, natural(other.name))


def near(home: Node, other: Node) -> int:
    """How much of their topology two nodes share; the node itself is nearest."""
    if home.name == other.name:
        return 1 << 20
    depth = 0
    for mine, theirs in zip(home.levels, other.levels, strict=False):
        if mine != theirs:
            break
        depth += 1
    return depth


def _table(cards: Sequence[Card], previous: Sequence[Assignment] = ()) -> tuple[Assignment, ...]:
    """Ranks in the order of ``cards``; entries of ``previous`` that still hold are used again."""
    local: dict[str, int] = {}
    table = []
    for rank, card in enumerate(cards):
        index = local.get(card.node, 0)
        local[card.node] = index + 1
        same = previous[rank] if previous else None
        keep = same is not None and same.card is card and same.local_rank == index
        table.append(same if same is not None and keep else Assignment(rank, card, index))
    return tuple(table)


def natural(name: str) -> Key:
    """Sort key that puts ``node-2`` before ``node-10``."""
    return tuple((1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in _NUMBERS.split(name))
