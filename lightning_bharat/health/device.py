"""Errors of NVIDIA devices by NVML: memory that corrects itself no more, driver errors (XID), clocks held down.

Needs ``nvidia-ml-py``; without it, or without a device, nothing is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_bharat.health.finding import Finding

# Of nvidia-smi's reasons: these say that something is wrong, and not that a device rests or keeps to its power limit.
_THROTTLED = {
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "too hot",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}
# XIDs of the program, not of the device (NVIDIA, XID errors: user application faults).
_OF_PROGRAM = {13, 31, 43, 45}
_OFTEN = 3  # looks in a row with held clocks


class DeviceCheck:
    """Looks at one device.

    Args:
        uuid: of the device, as torch tells it.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = None
        self._throttled = 0
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            self._device = pynvml.nvmlDeviceGetHandleByUUID(name.encode())
        except pynvml.NVMLError:
            return
        self._nvml, self._uncorrected = pynvml, 0
        self._uncorrected = self._count_uncorrected() or 0
        self._events = pynvml.nvmlEventSetCreate()
        self._listens(pynvml.nvmlEventTypeXidCriticalError)

    @property
    def works(self) -> bool:
        """Whether there is something to look at."""
        return self._nvml is not None

    def look(self) -> Iterator[Finding]:
        """What has gone wrong since the last look."""
        if self._nvml is None:
            return
        yield from self._of_memory()
        yield from self._of_driver()
        yield from self._of_clocks()

    def _of_memory(self) -> Iterator[Finding]:
        now = self._count_uncorrected()
        if now is not None and now > self._uncorrected:
            yield Finding("device", f"{now - self._uncorrected} ECC errors that could not be corrected")
            self._uncorrected = now

    def _of_driver(self) -> Iterator[Finding]:
        try:
            event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
        except self._nvml.NVMLError:  # none has come
            return
        code = int(event.eventData)
        if code not in _OF_PROGRAM:
            yield Finding("device", f"the driver reports XID {code}", facts={"xid": code})

    def _of_clocks(self) -> Iterator[Finding]:
        try:
            now = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device)
        except self._nvml.NVMLError:
            return
        why = {words for name, words in _THROTTLED.items() if now & getattr(self._nvml, name, 0)}
        self._throttled = self._throttled + 1 if why else 0
        if self._throttled == _OFTEN:
            yield Finding("device", f"its clocks are held down: {', '.join(sorted(why))}")

    def _count_uncorrected(self) -> int | None:
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetTotalEccErrors(
                self._device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        except nvml.NVMLError:  # a device without ECC
            return None

    def _listens(self, what: int) -> None:
        try:
            self._nvml.nvmlDeviceRegisterEvents(self._device, what, self._events)
        except self._nvml.NVMLError:
            return
