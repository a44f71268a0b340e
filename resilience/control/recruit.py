"""Which nodes of the cluster are enlisted for a run: enough healthy cards, of as few supernodes as possible.

Owns one pure function of the nodes on offer and those that are ours already. Nodes are chosen near the ones
enlisted, so that a spare or a replacement comes from the same supernode; where nothing is enlisted the
topology is walked from the outside in, as ``placement`` does. It never gives a node back, nor counts cards:
how many are healthy is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from resilience.control.placement import Key, natural, near
from resilience.control.types import Node


def recruit(offers: Sequence[Node], enlisted: Sequence[Node], wanted: int, healthy: int) -> tuple[str, ...]:
    """Names of the ``offers`` to enlist now, in the order to enlist them; empty when enough are there.

    ``offers``: nodes that could be enlisted, with all the cards they would bring. ``enlisted``: nodes that are
    ours and alive, for their place in the topology only. ``wanted``: cards the run asks for, workers and spares.
    ``healthy``: cards of ``enlisted`` that are usable, or of nodes still joining; never those excluded. When
    the offers hold less than what is missing, all of them are taken. The answer does not depend on the order
    of ``offers`` and ``enlisted``.
    """
    missing = wanted - healthy
    useful = {node.name: node for node in offers if node.cards > 0}
    for node in enlisted:
        useful.pop(node.name, None)
    chosen: list[str] = []
    # The domain nearest to what is ours first: the same supernode, then the same pod, then anything.
    by_depth: dict[int, list[Node]] = {}
    for node in useful.values():
        depth = max((near(node, ours) for ours in enlisted), default=0)
        by_depth.setdefault(depth, []).append(node)
    for depth in sorted(by_depth, reverse=True):
        if missing <= 0:
            break
        taken = _take(_tree(by_depth[depth]), missing)
        chosen += (node.name for node in taken)
        missing -= sum(node.cards for node in taken)
    return tuple(chosen)


@dataclass
class _Domain:
    """A subtree of the topology: inner ones have ``children``, leaves are a node."""

    key: Key
    size: int = 0
    children: dict[str, _Domain] = field(default_factory=dict)
    node: Node | None = None


def _tree(nodes: Sequence[Node]) -> _Domain:
    root = _Domain(())
    for node in nodes:
        domain = root
        domain.size += node.cards
        for level in node.levels:
            domain = domain.children.setdefault("d" + level, _Domain(natural(level)))
            domain.size += node.cards
        domain.children["n" + node.name] = _Domain(natural(node.name), node.cards, node=node)
    return root


def _take(domain: _Domain, wanted: int) -> list[Node]:
    """Nodes of ``domain`` with ``wanted`` cards, or all of them: whole nodes, in topological order within each
    domain."""
    if domain.node is not None:
        return [domain.node]
    taken: list[Node] = []
    left = sorted(domain.children.values(), key=lambda child: child.key)
    while wanted > 0 and left:
        # The smallest that holds what is left wastes least; else the largest leaves least to others.
        fits = [child for child in left if child.size >= wanted]
        best = min(fits, key=lambda child: child.size) if fits else max(left, key=lambda child: child.size)
        left.remove(best)
        nodes = _take(best, wanted)
        taken += nodes
        wanted -= sum(node.cards for node in nodes)
    return taken
