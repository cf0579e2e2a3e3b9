"""Where generators are at the start of a batch is known, though it is not copied for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightning_bharat.health.random_state import EVERY, AtBatches, put, taken

CPU = torch.device("cpu")


def _run(draws: Callable[[int], bool], epochs: int = 2, loader_draws: bool = True) -> list[tuple[bool, bool, bool]]:
    """Of each batch: whether what is said is so, whether it is said to be known, and whether it was copied."""
    states, found, before = AtBatches(CPU), [], None
    for epoch in range(epochs):
        if loader_draws:
            torch.rand(())
        for index in range(4 * EVERY):
            said, true = states.taken(index), taken(CPU, False)
            if draws(epoch * 4 * EVERY + index):
                torch.rand(())
            found.append((torch.equal(said[0], true[0]), states.are_known(), said is not before))
            before = said
    return found


@pytest.fixture(autouse=True)
def _same_numbers_afterwards() -> object:
    before = taken(CPU)
    yield
    put(before, CPU)


def test_a_module_that_draws_nothing() -> None:
    found = _run(lambda _: False)
    assert all(so and known for so, known, _ in found)
    # In each epoch until it is seen that nobody draws.
    copied = [i for i, (_, _, copied) in enumerate(found) if copied]
    assert copied == [e + i for e in (0, 4 * EVERY) for i in (*range(EVERY + 1), 2 * EVERY, 3 * EVERY)]


def test_a_module_that_always_draws() -> None:
    assert _run(lambda _: True) == [(True, True, True)] * 8 * EVERY


@pytest.mark.parametrize("begins", [EVERY - 1, EVERY, 2 * EVERY - 1, 2 * EVERY, 2 * EVERY + 1, 3 * EVERY - 1])
def test_a_module_that_begins_to_draw(begins: int) -> None:
    """What is said to be known is so, and all is known again soon."""
    found = _run(lambda batch: batch >= begins)
    assert all(so for so, known, _ in found if known)
    assert all(so and known for so, known, _ in (*found[:begins], *found[begins + 2 * EVERY :]))
