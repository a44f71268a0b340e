"""Health of Ascend cards, read through libdcmi (ctypes), or from ``npu-smi`` where the library is not here.

A card here is one device of the runtime: on a 910B an NPU, on a 910C one of its two dies, each of which Ray counts
as one ``NPU``. The dies of one module share a reset ring: what one reports affects the other.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resilience.cards.health import CardFault, HealthProbe, Levels
from resilience.errors import UnavailableError

#: In the loader's path, and where the driver package puts it.
LIBRARIES = (
    "libdcmi.so",
    "/usr/local/dcmi/libdcmi.so",
    "/usr/local/Ascend/driver/lib64/driver/libdcmi.so",
)
_MOST_CARDS = 64
_MOST_CODES = 128  # what dcmi_get_device_errorcode_v2 takes at most
_ABSENT = 0xFFFFFFFF
_NOT_THERE = -8008  # DCMI_ERR_CODE_DEVICE_NOT_EXIST
_HEALTH = {1: "npu-health-minor", 2: "npu-health-major", 3: "npu-health-critical"}


@dataclass(frozen=True)
class Die:
    """One device of the runtime: ``device`` of module ``module`` in the driver's terms, ``logic`` in the runtime's."""

    module: int
    device: int
    logic: int


@dataclass(frozen=True)
class Reading:
    """What one look at a die said: ``health`` 0 good, 1 minor, 2 major, 3 critical; its codes as hex."""

    health: int = 0
    codes: tuple[str, ...] = ()
    lost: bool = False


class Readings:
    """Readings of dies → news by card. What libdcmi and ``npu-smi`` have in common."""

    def __init__(self, visible: Sequence[str], dies: Sequence[Die], clock: Callable[[], float]) -> None:
        by_logic = {str(die.logic): die for die in dies}
        self.dies = {index: by_logic[device] for index, device in enumerate(visible) if device in by_logic}
        self.missing = [device for device in visible if device not in by_logic]
        self._levels: Levels[tuple[int, str, str]] = Levels(clock)

    def news(self, readings: Mapping[int, Reading]) -> list[CardFault]:
        """What is new in ``readings`` (index → reading). A die that was not read keeps what it had."""
        current: list[tuple[int, str, str]] = []
        for index, reading in readings.items():
            if reading.lost:
                current.append((index, "npu-lost", "the driver does not find the device any more"))
            current += [(index, code, f"error code {code}") for code in reading.codes]
            if reading.health in _HEALTH and not reading.codes:
                current.append((index, _HEALTH[reading.health], "the driver gives no error code"))
        return [
            CardFault(index, code, why, self.ring(index))
            for index, code, why in self._levels.appeared(current)
        ]

    def ring(self, index: int) -> tuple[int, ...]:
        """The other cards on the module of card ``index``."""
        module = self.dies[index].module
        return tuple(i for i, die in self.dies.items() if die.module == module and i != index)


class DcmiCards:
    """A ``HealthProbe`` over libdcmi.

    Raises:
        UnavailableError: the library finds no driver.
    """

    def __init__(
        self, library: ctypes.CDLL, visible: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lib = library
        self._gaps: dict[str, str] = {}
        self._check("dcmi_init")
        self._readings = Readings(visible, self._dies(), clock)
        self._last = {index: Reading() for index in self._readings.dies}
        for device in self._readings.missing:
            self._gaps[device] = f"device {device} is not among those that libdcmi lists"

    def _dies(self) -> list[Die]:
        count, modules = ctypes.c_int(), (ctypes.c_int * _MOST_CARDS)()
        self._check("dcmi_get_card_list", ctypes.byref(count), modules, _MOST_CARDS)
        dies = []
        for module in modules[: count.value]:
            devices, mcu, cpu = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            self._check(
                "dcmi_get_device_id_in_card",
                module,
                ctypes.byref(devices),
                ctypes.byref(mcu),
                ctypes.byref(cpu),
            )
            for device in range(devices.value):
                logic = ctypes.c_int()
                self._check("dcmi_get_device_logic_id", ctypes.byref(logic), module, device)
                dies.append(Die(module, device, logic.value))
        return dies

    def poll(self) -> list[CardFault]:
        answered = 0
        for index, die in self._readings.dies.items():
            reading = self._read(index, die)
            if reading is not None:
                answered += 1
                self._last[index] = reading
        if self._readings.dies and not answered:
            raise _unavailable("libdcmi answers for none of the cards", "npu-smi info tells more")
        return self._readings.news(self._last)

    def gaps(self) -> list[str]:
        return list(self._gaps.values())

    def _read(self, index: int, die: Die) -> Reading | None:
        health, count = ctypes.c_uint(), ctypes.c_int()
        codes = (ctypes.c_uint * _MOST_CODES)()
        status = self._call("dcmi_get_device_health", die.module, die.device, ctypes.byref(health))
        if status == _NOT_THERE or (status == 0 and health.value == _ABSENT):
            return Reading(lost=True)
        if status != 0:
            self._gaps.setdefault(
                f"health {index} {status}", f"dcmi_get_device_health of card {index}: {status}"
            )
            return None
        status = self._call(
            "dcmi_get_device_errorcode_v2", die.module, die.device, ctypes.byref(count), codes, _MOST_CODES
        )
        if status != 0:
            self._gaps.setdefault(
                f"codes {index} {status}", f"dcmi_get_device_errorcode_v2 of card {index}: {status}"
            )
            return Reading(health.value, self._last[index].codes)
        found = codes[: min(max(count.value, 0), _MOST_CODES)]
        return Reading(health.value, tuple(f"{code:08X}" for code in found))

    def _call(self, name: str, *arguments: object) -> int:
        try:
            return int(getattr(self._lib, name)(*arguments))
        except AttributeError as error:
            raise _unavailable(f"libdcmi has no {name}", "is the driver of Ascend 910 or newer?") from error

    def _check(self, name: str, *arguments: object) -> None:
        if status := self._call(name, *arguments):
            hint = "is the driver loaded, and may this user read it (group HwHiAiUser)?"
            raise _unavailable(f"{name} failed with {status}", hint)


def open_ascend(visible: Sequence[str]) -> HealthProbe:
    """libdcmi where it is, ``npu-smi`` where that is on the PATH.

    Raises:
        UnavailableError: neither is here, or no driver answers.
    """
    for path in LIBRARIES:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        return DcmiCards(library, visible)
    from resilience.cards.npu_smi import NpuSmiCards

    return NpuSmiCards(visible)


def _unavailable(message: str, hint: str) -> UnavailableError:
    return UnavailableError(message, operation="card health", hint=hint)
