"""A module starts from the bits of plain Lightning on one process, wherever it is built, else from rank 0's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.modules import Trained, fit, zoo
from tests.ranks import run_ranks
from tests.strategies.test_initialize import Said

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
    "pipeline 2": (2, {"pipeline_parallel_size": 2}),
}
MODELS = ("nano", "qwen3", "gpt2")


class Built(Trained):
    """In ``__init__``, or in ``configure_model``, which Lightning calls when processes are connected."""

    def __init__(self, model: str, late: bool) -> None:
        super().__init__("stack")
        self.name, self.rows_of = model, model
        self.model = None if late else self.made()

    def made(self) -> nn.Module:
        made = zoo()[self.name]()
        made.register_buffer("noise", torch.randn(3))
        return made

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.made()


def begun(strategy: dict[str, Any] | None) -> dict[tuple[str, bool], dict[str, Tensor]]:
    found = {}
    for model in MODELS:
        for late in (False, True):
            made: list[Built] = []

            def module(model: str = model, late: bool = late, made: list[Built] = made) -> Built:
                made.append(Built(model, late))
                return made[0]

            weights = fit(module, strategy, steps=0).weights
            found[model, late] = weights | {"noise": made[0].model.noise}
    return found


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, bool], dict[str, Tensor]]:
    return run_ranks(begun, 1, None)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_of_plain_lightning_on_one_process(
    layout: str, plain: dict[tuple[str, bool], dict[str, Tensor]]
) -> None:
    for found in run_ranks(begun, *LAYOUTS[layout]):
        for case, tensors in plain.items():
            assert found[case].keys() == tensors.keys()
            assert all(torch.equal(found[case][name], tensor) for name, tensor in tensors.items()), case


def unseeded(strategy: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], str, int]:
    said, mine = Said(), dict[str, Tensor]()

    def module() -> Built:
        torch.manual_seed(int(os.environ["RANK"]))
        made = Built("nano", False)
        mine.update({name: tensor.detach().double() for name, tensor in made.named_parameters()})
        return made

    run = fit(module, strategy, steps=0)
    return mine, run.weights, run.explain, sum("rank 0's are taken" in words for words in said.words)


@pytest.mark.parametrize("layout", ["data 2", "pipeline 2"])  # others: test_initialize.py
def test_where_ranks_differ_rank_0s_count(layout: str) -> None:
    results = run_ranks(unseeded, *LAYOUTS[layout])
    first = results[0][0]
    assert not torch.equal(results[1][0]["model.head.weight"], first["model.head.weight"])
    for _, weights, explained, _ in results:
        assert weights.keys() == first.keys()
        assert all(torch.equal(weight, first[name]) for name, weight in weights.items())
        assert "weights: differed between ranks; rank 0's are taken" in explained
    assert [said for *_, said in results] == [1, 0]
