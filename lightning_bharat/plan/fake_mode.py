"""The mode in which a step is run on fake tensors."""

from __future__ import annotations

from functools import cached_property

from torch._subclasses.fake_tensor import FakeTensorMode


class FakeMode(FakeTensorMode):
    """Fake tensors, which real ones may meet.

    torch asks for an accelerator at each operator, and under Lightning each answer loads NVML anew: the first is kept.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    @cached_property
    def avoid_device_init(self) -> bool:
        return super().avoid_device_init
