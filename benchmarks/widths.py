"""Whether the learning rate that suits a narrow decoder suits wide ones: under muP, and without it.

    python -m benchmarks.widths [--widths 32 64 128] [--steps 40]

Decoders of each width learn a random chain of tokens, by each of a row of rates. Lost is what a width's loss is above
its own best with the rate that is best for the narrowest. All is determined by the seeds; seconds are not reported.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig, GPTModule

VOCABULARY, ROWS, TIME, HEAD = 64, 8, 32, 16
RATES = [2.0**-e for e in range(11, 2, -1)]
AIM = 0.02  # nats that may be lost at the largest width under muP

Losses = Mapping[int, Sequence[float]]  # by width, one a rate


class Chain:
    """Tokens that depend on the one before: some 3.5 likely ones each (entropy 1.27 nats of 4.16)."""

    def __init__(self, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._next = (3 * torch.randn(VOCABULARY, VOCABULARY, generator=self._draw)).softmax(-1)

    def batch(self) -> dict[str, Tensor]:
        """New sequences."""
        tokens = [torch.randint(VOCABULARY, (ROWS,), generator=self._draw)]
        for _ in range(TIME):
            tokens.append(torch.multinomial(self._next[tokens[-1]], 1, generator=self._draw)[:, 0])
        whole = torch.stack(tokens, 1)
        return {"input_ids": whole[:, :-1], "labels": whole[:, 1:].contiguous()}


def final_loss(width: int, rate: float, mup_base_width: int | None, steps: int, seed: int) -> float:
    """The mean loss of the last fifth of ``steps``, each on sequences that it has not seen; infinite if it blew up."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": width // HEAD, "head_dim": HEAD}
    config = GPTConfig(
        VOCABULARY,
        width,
        3 * width,
        num_hidden_layers=2,
        mup_base_width=mup_base_width,
        initializer_range=0.08,
        **heads,
    )
    module, chain, losses = GPTModule(config, rate), Chain(seed), []
    optimizer = module.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module._loss(chain.batch())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    mean = sum(losses[-steps // 5 :]) / len(losses[-steps // 5 :])
    return mean if math.isfinite(mean) else math.inf


def sweep(widths: Sequence[int], mup: bool, steps: int, seeds: int) -> Losses:
    """By width the losses of all rates, over ``seeds``."""
    base = min(widths) if mup else None
    return {
        width: [sum(final_loss(width, rate, base, steps, s) for s in range(seeds)) / seeds for rate in RATES]
        for width in widths
    }


def lost(losses: Losses) -> dict[int, float]:
    """By width, what is lost by the rate that is best for the narrowest."""
    narrow = losses[min(losses)]
    best = narrow.index(min(narrow))
    return {width: each[best] - min(each) for width, each in losses.items()}


def report(name: str, losses: Losses) -> str:
    """A row a width; the best rate's loss in brackets."""
    rows = []
    for width, each in losses.items():
        cells = [f"[{loss:.3f}]" if loss == min(each) else f"{loss:.3f}" for loss in each]
        rows.append([str(width), *cells, f"{lost(losses)[width]:.3f}"])
    return table([name, *[f"2^{math.log2(rate):.0f}" for rate in RATES], "lost"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when more is lost at the largest width under muP than :data:`AIM`, or than without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help=f"multiples of {HEAD}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for name in ("muP", "usual"):
        found[name] = sweep(given.widths, name == "muP", given.steps, given.seeds)
        print(report(name, found[name]), flush=True)
    widest = max(given.widths)
    ends = {name: lost(losses)[widest] for name, losses in found.items()}
    print(json.dumps({"benchmark": "widths", "lost": ends, "losses": found}))
    return int(ends["muP"] > AIM or ends["muP"] > ends["usual"])


if __name__ == "__main__":
    sys.exit(main())
