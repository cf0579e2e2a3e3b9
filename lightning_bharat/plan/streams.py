"""Random numbers inside a tensor cut: another stream on each rank, and the common one untouched for all.

What tensor ranks compute alike (dropout on the hidden state) must draw the same numbers on each of them; what they
divide (dropout on their heads or channels) must not. Inside a cut a rank's stream is seeded by one number drawn from
the common stream, so that recomputation in the backward pass draws the same again (as in Megatron-LM).
"""

from __future__ import annotations

import torch


class TensorStream:
    """The random stream of one tensor rank inside its cuts."""

    def __init__(self, rank: int) -> None:
        self.rank, self._device = rank, torch.device("cpu")
        self._common: torch.Tensor | None = None

    def enter(self, device: torch.device) -> None:
        """Go over to this rank's stream."""
        if device.type == "meta" or self._common is not None:
            return
        seed = int(torch.empty((), dtype=torch.int64, device=device).random_())
        self._device, self._common = device, _generator(device).get_state()
        _generator(device).manual_seed((seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)

    def leave(self) -> None:
        """Come back to the common stream."""
        if self._common is not None:
            _generator(self._device).set_state(self._common)
            self._common = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[device.index if device.index is not None else module.current_device()]
