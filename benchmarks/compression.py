"""What compression saves of a checkpoint: weights and Adam states of a model that was trained, plain zstd beside ours.

    python -m benchmarks.compression [--steps 400]

Trains a small decoder of characters, then packs its state: as it is, by zstd level 1, and as a checkpoint with
``checkpoint_compression="zstd"`` (bytes of one meaning together, then zstd level 1). Prints raw / packed, and MB/s of
one thread for packing and unpacking (the best of three).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import zstandard
from torch.nn.functional import cross_entropy

import lightning_bharat
from lightning_bharat.checkpoints import compressed_file
from lightning_bharat.checkpoints.safetensors_file import Entry
from lightning_bharat.models import GPT, GPTConfig


def trained(steps: int) -> dict[str, list[torch.Tensor]]:
    """The state after ``steps`` steps on this package's own source, in kinds."""
    torch.manual_seed(0)
    sources = sorted(Path(lightning_bharat.__file__).parent.rglob("*.py"))
    text = torch.tensor([min(byte, 127) for path in sources for byte in path.read_bytes()])
    model = GPT(GPTConfig(vocab_size=128, hidden_size=256, num_hidden_layers=4, num_attention_heads=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        begins = torch.randint(len(text) - 129, (8,))
        rows = torch.stack([text[begin : begin + 129] for begin in begins])
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    weights = [p.detach() for p in model.parameters()]
    states = [optimizer.state[p] for p in model.parameters()]
    return {
        "weights, float32": weights,
        "first moments": [state["exp_avg"] for state in states],
        "second moments": [state["exp_avg_sq"] for state in states],
        "weights, bfloat16": [weight.bfloat16() for weight in weights],
    }


def timed(run: Callable[[], object]) -> float:
    """Seconds of the best of three."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def row(kind: str, tensors: list[torch.Tensor], folder: Path) -> str:
    """A row of the table: raw / packed, MB/s of packing and unpacking; by plain zstd and in a checkpoint's form."""
    raw = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    plain, reader, mb = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor(), len(raw) / 1e6
    packed = plain.compress(raw)
    cells = [f"{len(raw) / len(packed):.3f}", f"{mb / timed(lambda: plain.compress(raw)):.0f}"]
    cells.append(f"{mb / timed(lambda: reader.decompress(packed)):.0f}")
    entries = [Entry(str(i), t.dtype, tuple(t.shape), partial(torch.Tensor.clone, t)) for i, t in enumerate(tensors)]
    path = folder / "tensors.zst"
    packing = timed(lambda: compressed_file.write(path, entries))
    _, places = compressed_file.write(path, entries)

    def unpack() -> None:
        for entry in entries:
            starts = [0] * len(entry.shape)
            compressed_file.read(path, places[entry.key], entry.shape, entry.dtype, starts, entry.shape)

    cells += [f"{len(raw) / path.stat().st_size:.3f}", f"{mb / packing:.0f}", f"{mb / timed(unpack):.0f}"]
    return f"| {kind} | {mb:.1f} | {' | '.join(cells)} |"


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training before the state is packed")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    state = trained(steps)
    print(f"after {steps} steps; raw / packed, packing and unpacking in MB/s of one thread")
    print("| | MB | zstd 1 | packing | unpacking | ours | packing | unpacking |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for kind, tensors in state.items():
            print(row(kind, tensors, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
