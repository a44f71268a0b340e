"""Health of Ascend cards from the text of ``npu-smi``, for nodes where libdcmi is not readable (containers).

Owns the reading of two of its reports: the table of ``npu-smi info`` (910B: ``Chip``; 910C: ``Chip  Phy-ID``) and,
of cards that are not OK only, ``npu-smi info -t health``. What it does not understand is a gap, never health.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilience.cards.ascend import Die, Reading, Readings
from resilience.cards.health import CardFault
from resilience.errors import UnavailableError

_PATIENCE_S = 60.0  # the tool asks the driver, which may hang; the thread that waits here is nobody else's
_HEALTH = {"OK": 0, "Warning": 1, "Alarm": 2, "Critical": 3}
_CODE = re.compile(r"\b(?:0x)?([0-9A-Fa-f]{8})\b")


@dataclass(frozen=True)
class Chip:
    """One die as the table shows it."""

    npu: int
    chip: int
    health: str


def parse_info(text: str) -> list[Chip]:
    """The dies of ``npu-smi info``, in its order (that of the runtime's logical ids). Two lines each: the first has
    the NPU and the health, the second the chip and the bus. Rows of the process table have neither."""
    chips: list[Chip] = []
    upper: tuple[int, str] | None = None
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|") or len(cells) < 3 or not cells[0] or not cells[0][0].isdigit():
            if line.lstrip().startswith("+"):
                upper = None
            continue
        number = int(cells[0][0])
        if upper is None:
            if len(cells[0]) >= 2 and len(cells[1]) == 1:
                upper = (number, cells[1][0])
        elif cells[1] and ":" in cells[1][0]:
            chips.append(Chip(upper[0], number, upper[1]))
            upper = None
    return chips


def parse_health(text: str) -> tuple[str, ...]:
    """The error codes of ``npu-smi info -t health -i N -c C``, as hex; empty where it names none."""
    codes: list[str] = []
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip().lower().startswith("error code"):
            codes += [found.upper() for found in _CODE.findall(value)]
    return tuple(dict.fromkeys(codes))


class NpuSmiCards:
    """A ``HealthProbe`` over ``npu-smi``.

    Raises:
        UnavailableError: the tool is not on the PATH, or shows no card.
    """

    def __init__(self, visible: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        tool = shutil.which("npu-smi")
        if tool is None:
            raise UnavailableError(
                "neither libdcmi.so nor npu-smi is here",
                operation="card health",
                hint="mount /usr/local/dcmi and /usr/local/bin/npu-smi into the container, or install the driver",
            )
        self._tool = tool
        self._gaps: dict[str, str] = {}
        chips = self._chips()
        dies = [Die(chip.npu, chip.chip, logic) for logic, chip in enumerate(chips)]
        self._readings = Readings(visible, dies, clock)
        self._last = {index: Reading() for index in self._readings.dies}
        for device in self._readings.missing:
            self._gaps[device] = f"device {device} is not among those that npu-smi shows"

    def poll(self) -> list[CardFault]:
        shown = {(chip.npu, chip.chip): chip for chip in self._chips()}
        for index, die in self._readings.dies.items():
            chip = shown.get((die.module, die.device))
            if chip is None:
                self._last[index] = Reading(lost=True)
            elif chip.health in _HEALTH:
                codes: tuple[str, ...] = ()
                if _HEALTH[chip.health]:
                    codes = parse_health(
                        self._run("info", "-t", "health", "-i", str(chip.npu), "-c", str(chip.chip))
                    )
                self._last[index] = Reading(_HEALTH[chip.health], codes)
            else:
                self._gaps.setdefault(
                    chip.health, f"npu-smi shows {chip.health} as the health of card {index}"
                )
        return self._readings.news(self._last)

    def gaps(self) -> list[str]:
        return list(self._gaps.values())

    def _chips(self) -> list[Chip]:
        chips = parse_info(self._run("info"))
        if not chips:
            raise UnavailableError(
                "npu-smi info shows no card", operation="card health", hint="run npu-smi info on this node"
            )
        return chips

    def _run(self, *arguments: str) -> str:
        command = " ".join(("npu-smi", *arguments))
        try:
            done = subprocess.run(
                [self._tool, *arguments], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(
                f"{command}: {error}", operation="card health", hint=f"run {command} on this node"
            ) from error
        if done.returncode:
            told = (done.stderr or done.stdout).strip().splitlines()
            raise UnavailableError(
                f"{command} ended with {done.returncode}: {told[-1] if told else 'no word'}",
                operation="card health",
                hint=f"run {command} on this node",
            )
        return done.stdout
