"""Each worker's own cores and devices."""

from __future__ import annotations

import pytest

from lightning_bharat.tuning import slots as module
from lightning_bharat.tuning.slots import cuda_devices, slots


def test_cores_and_devices_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: {0, 1, 2, 3, 6})
    first, second = slots(2, ["4", "5", "7"])
    assert (first.cores, second.cores) == ((0, 1), (2, 3))
    assert (first.devices, second.devices) == (("4",), ("5",))
    assert first.environment(ranks=1) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "4"}
    assert slots(1)[0].environment(ranks=2) == {"OMP_NUM_THREADS": "2"}
    assert {slot.cores for slot in slots(9)} == {(0, 1, 2, 3, 6)}
    with pytest.raises(ValueError, match="workers=2 need a device each, and there are 1"):
        slots(2, ["0"])


def test_devices_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert cuda_devices() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_devices() == []
