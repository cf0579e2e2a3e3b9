"""Copies of modules that hold what can't be copied."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from lightning_bharat.plan.copies import copy_module


def test_what_cannot_be_copied_is_shared_and_all_else_is_not() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module.settings = {"depth": 1}
    module[0].make = partial(print, SimpleNamespace(lock=threading.Lock()))  # as LightningCLI makes a schedule
    copied = copy_module(module)
    assert copied[0].make is module[0].make
    assert copied.settings == module.settings and copied.settings is not module.settings
    assert copied[0].weight is not module[0].weight and torch.equal(copied[0].weight, module[0].weight)


def test_the_callers_stand_ins_are_kept() -> None:
    module = nn.Linear(2, 2)
    module.tied = module.weight
    module.lock = threading.Lock()
    other = nn.Parameter(torch.zeros(2, 2, device="meta"))
    copied = copy_module(module, {id(module.weight): other})
    assert copied.weight is other and copied.tied is other and copied.lock is module.lock
