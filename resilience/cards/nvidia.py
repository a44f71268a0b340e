"""Health of NVIDIA cards, read through NVML.

XIDs come as events of the driver; what lasts (recovery action, rows that wait for a reset or could not be remapped,
slowdowns) and what is counted (ECC errors, remapped rows) is polled, and told when it changes. A card that has
fallen off the bus is known by the error that any question about it gets. Never changes anything of a card.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from resilience.cards.health import CardFault, Levels
from resilience.errors import UnavailableError

_MOST_EVENTS = 256  # read in one poll: a card that floods must not keep us from the others
_SLOW_HOLD_S = 60.0  # clocks go up and down with the heat: one slowdown
_SLOWDOWNS = {
    0x08: "nvml-slowdown-hw",
    0x20: "nvml-slowdown-sw-thermal",
    0x40: "nvml-slowdown-hw-thermal",
    0x80: "nvml-slowdown-hw-power-brake",
}
# NVML_FI_DEV_GET_GPU_RECOVERY_ACTION and its values (nvml.h; drivers from about 570 on answer).
_RECOVERY_FIELD = 230
_RECOVERY = {
    1: "gpu-reset",
    2: "node-reboot",
    3: "drain-p2p",
    4: "drain-and-reset",
    5: "recover-imex-domain",
    6: "bus-reset",
    7: "system-reboot",
}


class NvidiaCards:
    """A ``HealthProbe`` over NVML.

    Args:
        visible: the device of each card by index: NVML's index (PCI order), or a UUID.

    Raises:
        UnavailableError: no ``nvidia-ml-py``, no NVML, or no driver.
    """

    def __init__(self, visible: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise _unavailable(
                f"nvidia-ml-py is not installed ({error})", "pip install 'resilience[nvidia]' on every node"
            ) from error
        self._gaps: dict[str, str] = {}
        self._unread: set[tuple[int, str]] = set()
        self._lasting: Levels[tuple[int, str]] = Levels(clock)
        self._slow: Levels[tuple[int, str]] = Levels(clock, _SLOW_HOLD_S)
        self._counts: dict[tuple[int, str], int] = {}
        self._gone: set[int] = set()
        self._visible = visible
        try:
            self._nvml.nvmlInit()
            self._handles = {index: self._handle(device) for index, device in enumerate(visible)}
            self._events = self._nvml.nvmlEventSetCreate()
        except self._nvml.NVMLError as error:
            raise _unavailable(f"NVML: {error}", "is the NVIDIA driver loaded on this node?") from error
        self._index = {_address(h): index for index, h in self._handles.items() if h is not None}
        for index in self._handles:
            self._ask(index, "XID events", self._listen)

    def _handle(self, device: str) -> Any:
        """Of one card; ``None`` where it is gone already (``_levels`` says so)."""
        nvml = self._nvml
        try:
            if device.isdigit():
                return nvml.nvmlDeviceGetHandleByIndex(int(device))
            return nvml.nvmlDeviceGetHandleByUUID(device.encode())
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_NotFound):
            return None

    def _listen(self, handle: Any) -> None:
        self._nvml.nvmlDeviceRegisterEvents(handle, self._nvml.nvmlEventTypeXidCriticalError, self._events)

    def poll(self) -> list[CardFault]:
        faults = self._xids()
        lasting: list[tuple[int, str, str]] = []
        slow: list[tuple[int, str]] = []
        for index, handle in self._handles.items():
            if handle is None or index in self._gone:
                lasting.append((index, "nvml-lost", f"device {self._visible[index]} does not answer"))
                continue
            lasting += self._lasting_of(index)
            slow += self._slow_of(index)
            faults += self._counted(index)
            if index in self._gone:
                lasting.append((index, "nvml-lost", "the driver says that the card is lost"))
        why = {(index, code): text for index, code, text in lasting}
        faults += [CardFault(*what, why[what]) for what in self._lasting.appeared(why)]
        faults += [CardFault(index, code) for index, code in self._slow.appeared(slow)]
        return faults

    def gaps(self) -> list[str]:
        return list(self._gaps.values())

    def _xids(self) -> list[CardFault]:
        found: list[CardFault] = []
        nvml = self._nvml
        for _ in range(_MOST_EVENTS):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError_Timeout:
                break
            except nvml.NVMLError_GpuIsLost:
                break  # which one, the questions about each will tell
            except nvml.NVMLError as error:
                raise _unavailable(f"NVML events: {error}", "nvidia-smi tells more") from error
            index = self._index.get(_address(event.device))
            if index is not None and event.eventType == nvml.nvmlEventTypeXidCriticalError:
                found.append(CardFault(index, str(event.eventData), f"XID {event.eventData}"))
        return found

    def _lasting_of(self, index: int) -> list[tuple[int, str, str]]:
        nvml, found = self._nvml, []
        fields = self._ask(
            index, "the recovery action", lambda h: nvml.nvmlDeviceGetFieldValues(h, [_RECOVERY_FIELD])
        )
        if fields is not None and self._field_read(index, fields[0]):
            action = fields[0].value.uiVal
            if action:
                name = _RECOVERY.get(action, str(action))
                found.append((index, f"nvml-recovery-{name}", f"the driver's recovery action is {name}"))
        rows = self._ask(index, "remapped rows", nvml.nvmlDeviceGetRemappedRows)
        if rows is not None:
            _, _, pending, failed = rows
            if pending:
                found.append((index, "nvml-remap-pending", "rows wait for a reset to be remapped"))
            if failed:
                found.append((index, "nvml-remap-failed", "a row could not be remapped"))
        if (index, "reset required") in self._unread:
            found.append((index, "nvml-reset-required", "the driver says that the card must be reset"))
        return found

    def _field_read(self, index: int, field: Any) -> bool:
        if field.nvmlReturn == self._nvml.NVML_SUCCESS:
            return True
        self._miss(index, "the recovery action", "this driver does not tell it")
        return False

    def _slow_of(self, index: int) -> list[tuple[int, str]]:
        nvml = self._nvml

        def reasons(handle: Any) -> int:
            try:
                return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
            except nvml.NVMLError_FunctionNotFound:  # drivers before 535 call it so
                return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

        mask = self._ask(index, "slowdown reasons", reasons) or 0
        return [(index, code) for bit, code in _SLOWDOWNS.items() if mask & bit]

    def _counted(self, index: int) -> list[CardFault]:
        """Counters that have grown since the last poll."""
        nvml, found = self._nvml, []

        def errors(counter: int) -> Callable[[Any], int]:
            return lambda h: nvml.nvmlDeviceGetTotalEccErrors(
                h, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, counter
            )

        counters: dict[str, tuple[str, Callable[[Any], int]]] = {
            "nvml-ecc-uncorrectable": ("ECC errors", errors(nvml.NVML_VOLATILE_ECC)),
            "nvml-ecc-uncorrectable-lifetime": ("ECC errors", errors(nvml.NVML_AGGREGATE_ECC)),
            "nvml-rows-remapped": ("remapped rows", lambda h: nvml.nvmlDeviceGetRemappedRows(h)[1]),
        }
        for code, (what, read) in counters.items():
            count = self._ask(index, what, read)
            if count is None:
                continue
            before = self._counts.get((index, code), count)
            self._counts[index, code] = count
            if count > before:
                found.append(CardFault(index, code, f"{before} → {count}"))
        return found

    def _ask(self, index: int, what: str, question: Callable[[Any], Any]) -> Any:
        """The answer about a card, ``None`` where there is none. What it does not have is not asked again."""
        nvml, handle = self._nvml, self._handles[index]
        if handle is None or index in self._gone or (index, what) in self._unread:
            return None
        try:
            return question(handle)
        except nvml.NVMLError_GpuIsLost:
            self._gone.add(index)
        except nvml.NVMLError_ResetRequired:
            self._unread.add((index, "reset required"))
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
        ) as error:
            self._miss(index, what, str(error))
        except nvml.NVMLError as error:
            self._gaps.setdefault(
                f"{index} {what} {error}", f"{what} of card {index} cannot be read now: {error}"
            )
        return None

    def _miss(self, index: int, what: str, why: str) -> None:
        self._unread.add((index, what))
        self._gaps.setdefault(what, f"{what} cannot be read (card {index}): {why}")


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _unavailable(message: str, hint: str) -> UnavailableError:
    return UnavailableError(message, operation="card health", hint=hint)
