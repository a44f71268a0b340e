"""pytest plugin: the ``chaos`` fixture. Light to import, since pytest loads it in every session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chaos.harness import Chaos


@pytest.fixture
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """Run jobs under planned faults on a virtual cluster; fails the test if anything of ours is left behind."""
    from chaos.harness import Chaos

    with Chaos(tmp_path_factory.mktemp("chaos")) as harness:
        yield harness
