"""The tensor cut on real ranks, without Lightning: losses, gradients and weights equal one process in float64."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_bharat.plan.exchange import ProcessPeers
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.shards import gather
from lightning_bharat.strategies.tensor import cut_module
from tests.plan.models import MODELS, batch_of, step
from tests.ranks import run_ranks

STEPS = 3


def train(module: nn.Module, batches: list) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=True)
    losses, grads = [], {}
    for batch in batches:
        loss = step(module, batch)
        loss.backward()
        losses.append(loss.item())
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads


def whole_and_cut(name: str, sequence: bool, loss: bool) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    whole = MODELS[name]().double()
    batches = [batch_of(whole, seed) for seed in range(STEPS)]
    module = copy.deepcopy(whole)
    plan = find_plan(module, step, batches[0], dist.get_world_size())
    group = dist.group.WORLD
    slices = cut_module(module, plan, group, sequence, loss)
    assert slices
    losses, grads = train(module, batches)
    expected, expected_grads = train(whole, batches)
    assert losses == pytest.approx(expected, rel=1e-9)
    parameters = dict(module.named_parameters())
    assert list(parameters) == [n for n, _ in whole.named_parameters()]
    for key, value in expected_grads.items():
        found = gather(grads[key], slices.get(key), group)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9 * float(value.abs().max()), msg=key)
        if key not in slices:  # copies on tensor ranks stay the same bits
            peers = ProcessPeers(group).all_gather(parameters[key].detach()[None], 0)
            assert all(torch.equal(peer, peers[0]) for peer in peers), key
    for key, value in whole.named_parameters():
        torch.testing.assert_close(gather(parameters[key], slices.get(key), group), value.detach(), rtol=0, atol=1e-8)
    with torch.no_grad():
        module.eval()
        whole.eval()
        assert step(module, batches[0]).item() == pytest.approx(step(whole, batches[0]).item(), rel=1e-7)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [(False, False), (True, True)], ids=["plain", "sequence+loss"])
def test_two_tensor_ranks_equal_one_process(name: str, options: tuple[bool, bool]) -> None:
    run_ranks(whole_and_cut, 2, name, *options)


def test_four_tensor_ranks_equal_one_process() -> None:
    run_ranks(whole_and_cut, 4, "nano", True, True)


def odd_lengths() -> None:
    """A batch whose length does not divide by the ranks goes the way of whole sequences, and back."""
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    whole = MODELS["llama"]().double()
    module = copy.deepcopy(whole)
    plan = find_plan(module, step, batch_of(whole, 0), 2)
    cut_module(module, plan, dist.group.WORLD, True, True)
    batches = [{k: v[:, :t] for k, v in batch_of(whole, t).items()} for t in (16, 15, 7, 32, 2)]
    assert train(module, batches)[0] == pytest.approx(train(whole, batches)[0], rel=1e-9)


def test_a_sequence_that_does_not_divide_is_left_whole() -> None:
    run_ranks(odd_lengths, 2)


def whole_logits() -> None:
    """Functions that do not know divided logits get whole ones."""
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    whole = MODELS["nano"]().double()
    module = copy.deepcopy(whole)
    batch = batch_of(whole, 0)
    cut_module(module, find_plan(module, step, batch, 2), dist.group.WORLD, True, True)
    logits, expected = module(batch["ids"]), whole(batch["ids"])
    assert logits.shape == expected.shape
    for function in (
        lambda x: x.argmax(-1),
        lambda x: x.softmax(-1),
        lambda x: x[:, -1].topk(3).indices,
        lambda x: x[..., 5],
        lambda x: x.transpose(1, 2),
        lambda x: F.cross_entropy(x.transpose(1, 2), batch["labels"]),
        lambda x: F.cross_entropy(x.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1),
        lambda x: F.cross_entropy(x.view(-1, x.size(-1)), batch["labels"].view(-1), reduction="none"),
        lambda x: F.cross_entropy(x[..., :-1, :].reshape(-1, x.shape[-1]), batch["labels"][:, 1:].reshape(-1)),
        lambda x: F.cross_entropy(30 * torch.tanh(x.float() / 30).flatten(0, 1), batch["labels"].flatten()),
        lambda x: x.logsumexp(-1).mean() + x.mean(),
    ):
        found = function(logits)
        torch.testing.assert_close(torch.as_tensor(found), function(expected), rtol=1e-6, atol=1e-7)


def test_divided_logits_serve_any_function() -> None:
    run_ranks(whole_logits, 2)
