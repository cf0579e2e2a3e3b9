"""A loss that never holds all logits: torch's ``linear_cross_entropy`` over chunks of the tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from tests.modules import Batch, Result, Trained, assert_equal, fit
from tests.ranks import run_ranks

LAYOUTS = {
    "data 2": {},
    "tensor 2": {"tensor_parallel_size": 2},
    "pipeline 2": {"pipeline_parallel_size": 2, "num_microbatches": 2},
    "context 2": {"context_parallel_size": 2},
}


class Chunked(Trained):
    def loss(self, batch: Batch) -> Tensor:
        hidden, labels = self.model.hidden(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
        head, options = self.model.lm_head.weight, LinearCrossEntropyOptions(batch_chunk_size=7)
        return F.linear_cross_entropy(hidden, head, labels, options=options)


def chunked() -> Trained:
    return Chunked("gpt")


def train(module: Any, strategy: dict[str, Any] | None, ragged: bool) -> Result:
    return fit(module, strategy, steps=4, ragged=ragged)


@cache
def one_process(ragged: bool) -> Result:
    return run_ranks(train, 1, "gpt", None, ragged)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_loss_of_all_logits(layout: str) -> None:
    for found in run_ranks(train, 2, chunked, LAYOUTS[layout], False):
        assert_equal(found, one_process(False))


def test_its_labels_are_counted() -> None:
    for found in run_ranks(train, 2, chunked, {"token_weighted": True}, True):
        for name, gradient in one_process(True).gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
