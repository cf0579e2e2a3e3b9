"""What a dry run counts: against hand-computed cases, and against what autograd keeps in a real run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_bharat.models import GPT, GPTConfig
from lightning_bharat.plan import count_work as room
from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.count_work import count_work, resized
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.moved import Counters, CountingPeers, Moved
from lightning_bharat.plan.work import MODES
from lightning_bharat.strategies.recompute import recompute
from lightning_bharat.strategies.tensor import cut_module
from tests.plan.planned import Block, Stack, decoder, mixture, of_decoder, of_stack, share

ALL = range(4)  # before, two blocks, after


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_stack_of_linears_by_hand(rows: int) -> None:
    work = count_work(Stack(), ("blocks.0", "blocks.1"), of_stack, torch.zeros(5, 3)).at(rows)
    assert [part.flops for part in work.parts] == [2 * rows * n for n in (3 * 4, 2 * 4 * 8, 2 * 4 * 8, 4)]
    assert work.hidden == rows * 4 * 4
    batch, hidden, inner, loss = rows * 3 * 4, rows * 4 * 4, rows * 8 * 4, rows * 4
    assert work.kept_bytes(ALL, None) == batch + 2 * (hidden + inner) + hidden + loss
    assert work.kept_bytes(ALL, "full") == batch + 2 * hidden + hidden + loss
    assert work.kept_bytes(range(2, 3), None) == hidden + inner
    assert work.kept_bytes(range(2, 3), "full") == hidden
    assert work.kept_bytes(range(2, 3), "selective") == hidden + inner + hidden  # its input, two matrix products
    assert work.temporary_bytes(range(2, 3), "full") >= inner  # computed again


def test_bytes_are_those_that_autograd_keeps_in_a_real_run() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4))
    batch = torch.randint(96, (3, 24))
    names = tuple(f"layers.{i}" for i in range(3))
    growth = count_work(model, names, of_decoder, batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = of_decoder(model, batch)
    assert growth.at(3).kept_bytes(range(5), None) == sum(kept.values())
    loss.backward()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_keeps_less_and_needs_a_block_meanwhile(mode: str) -> None:
    growth = count_work(decoder(3), tuple(f"layers.{i}" for i in range(3)), of_decoder, torch.zeros(2, 8).long())
    work = growth.at(4)
    blocks = range(1, 4)
    assert work.kept_bytes(blocks, mode) < work.kept_bytes(blocks, None)
    assert work.temporary_bytes(blocks, mode) > work.temporary_bytes(blocks, None)
    recompute(decoder(3).layers[0], mode)  # the strategy knows this mode


def test_bytes_grow_with_rows_and_length() -> None:
    names = tuple(f"layers.{i}" for i in range(8))
    short, long = (count_work(decoder(), names, of_decoder, torch.zeros(2, 8).long(), time) for time in (8, 16))
    everything = range(10)
    assert short.at(4).parts[1].flops == 4 * short.at(1).parts[1].flops
    assert long.at(1).kept_bytes(everything, None) == pytest.approx(2 * short.at(1).kept_bytes(everything, None), 0.01)
    assert long.at(1).parts[1].flops > 2 * short.at(1).parts[1].flops  # attention grows with the square


@pytest.mark.parametrize("sequence", [False, True])
def test_exchanges_of_tensor_ranks(sequence: bool) -> None:
    module, batch = decoder(2), torch.zeros(2, 16, dtype=torch.long)
    plan, peers = find_plan(module, of_decoder, batch, 2), Counters(CountingPeers(2))
    cut_module(module, replace(plan, random=False), peers.tensor, sequence=sequence, loss=True)
    work = count_work(module, ("layers.0", "layers.1"), of_decoder, batch, None, peers).at(3)
    hidden, block = 3 * 16 * 64 * 4, work.parts[1].tensor
    # Megatron-LM: two all-reduces in a block; with a divided sequence two gathers and two scatters.
    if sequence:
        assert (block.summed, block.gathered, block.times) == (0, 4 * hidden, 4)
    else:
        assert (block.summed, block.gathered, block.times) == (2 * hidden, 0, 4)
    assert work.parts[0].tensor.summed == hidden  # of the divided embedding
    assert work.hidden == hidden


def test_tensor_ranks_divide_work_and_activations() -> None:
    batch = torch.zeros(2, 16, dtype=torch.long)
    works = []
    for tensor in (1, 2):
        module, peers = decoder(2), Counters(CountingPeers(tensor))
        plan = find_plan(module, of_decoder, batch, 2)
        if tensor > 1:
            cut_module(module, replace(plan, random=False), peers.tensor, sequence=True, loss=True)
        works.append(count_work(module, ("layers.0", "layers.1"), of_decoder, batch, None, peers).at(2))
    whole, half = works
    assert half.parts[1].flops == whole.parts[1].flops / 2
    assert half.kept_bytes(range(1, 3), None) < 0.6 * whole.kept_bytes(range(1, 3), None)


def test_experts_have_as_many_tokens_each() -> None:
    found = share(depth=2, make=mixture)
    whole, spread = found.growth.at(3), found.spread.at(3)  # type: ignore[union-attr]
    tokens, chosen, width, inner = 3 * 16, 2, 64, 32
    attention, router = tokens * 2 * 4 * width * width + 3 * 4 * 16 * 16 * width, tokens * 2 * width * 8
    of_experts = tokens * chosen * 2 * 3 * width * inner
    assert whole.parts[1].flops == spread.parts[1].flops == attention + router + of_experts
    there, loads = tokens * chosen * width * 4, 8 * 8
    assert spread.parts[1].expert == Moved(swapped=2 * there + loads, swaps=3)
    assert whole.parts[1].expert == Moved()
    assert found.plan.costs[1] == 2 / 3 * whole.parts[1].flops  # by which stages are cut: of two rows
    # What came lies on the rank beside what it was made of.
    assert 0 < spread.kept_bytes(range(1, 2), None) - whole.kept_bytes(range(1, 2), None) < 0.1 * there


def attention_maps(depth: int) -> nn.Module:
    """Blocks that read something beside the hidden state which the block before them kept as well."""

    class Chained(Block):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            out = super().forward(x) * scale
            return out, scale * scale

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Chained() for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            scale = x.exp()
            for block in self.blocks:
                x, scale = block(x, scale)
            return self.head(x)

    return Model()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_like_blocks_that_do_not_run_count_as_those_that_do(mode: str | None, tensor: int) -> None:
    batch = torch.zeros(2, 16, dtype=torch.long)
    module, names, peers = decoder(7), tuple(f"layers.{i}" for i in range(7)), Counters(CountingPeers(tensor))
    if tensor > 1:
        plan = find_plan(module, of_decoder, batch, tensor)
        cut_module(module, replace(plan, random=False), peers.tensor, sequence=True, loss=True)
    rows = resized(batch, 2)
    skipped = room._skipped(module, names)
    assert skipped
    every = room._run(module, names, of_decoder, rows, peers, {})
    some = room._filled(room._run(module, names, of_decoder, rows, peers, skipped), skipped)
    assert some is not None
    assert (some.parts, some.kept[mode], some.hidden) == (every.parts, every.kept[mode], every.hidden)


def test_blocks_that_share_what_they_keep_all_run() -> None:
    model, names, batch = attention_maps(7), tuple(f"blocks.{i}" for i in range(7)), resized(torch.zeros(5, 3), 2)
    skipped = room._skipped(model, names)
    assert room._filled(room._run(model, names, of_stack, batch, Counters(), skipped), skipped) is None
    found = room._count(model, names, of_stack, batch, Counters())
    assert found == room._run(model, names, of_stack, batch, Counters(), {})


def test_batches_are_resized_by_their_shapes() -> None:
    batch = {"ids": torch.zeros(4, 8, dtype=torch.long), "mask": torch.ones(4, 1, 8, 8), "scale": torch.ones(3), "n": 5}
    made = resized(batch, 2, 16)
    assert (made["ids"].shape, made["mask"].shape, made["scale"].shape, made["n"]) == ((2, 16), (2, 1, 16, 16), (3,), 5)
    assert {x.device.type for x in (made["ids"], made["mask"])} == {"meta"}
    with pytest.raises(PlanError, match="sequence_length 16: the batch has no token ids"):
        resized([torch.zeros(4, 3)], 2, 16)
    with pytest.raises(PlanError, match="no tensor with a batch dimension"):
        resized({"text": "a"}, 2)


def test_a_step_that_fails_is_refused_in_words() -> None:
    def step(model: object, batch: Tensor) -> Tensor:
        raise ValueError("sixteen at most")

    with pytest.raises(PlanError, match="could not be run on fake tensors.*ValueError: sixteen at most"):
        count_work(Stack(), ("blocks.0", "blocks.1"), step, torch.zeros(5, 3))
