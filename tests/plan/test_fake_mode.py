"""Fake tensors know without asking again whether there is an accelerator."""

from __future__ import annotations

import pytest
import torch

from lightning_bharat.plan.find import find_plan
from tests.plan.planned import Stack, of_stack


def test_a_dry_run_asks_for_accelerators_once_and_not_at_each_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1))
    find_plan(Stack(), of_stack, torch.ones(4, 3))
    assert 1 <= len(asked) <= 10  # for each of the modes that a plan takes; hundreds of operators run
