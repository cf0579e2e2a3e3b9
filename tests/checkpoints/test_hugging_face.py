"""An unchanged Hugging Face model, trained on four ranks, exported, and loaded by Hugging Face's library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_bharat.commands import checkpoint as commands
from tests.ranks import run_ranks

STEPS = 3


class Language(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        if name == "gpt2":
            config: Any = GPT2Config(vocab_size=32, n_embd=16, n_head=4, n_layer=2, n_positions=16)
            config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
            self.model = GPT2LMHeadModel(config)
        else:
            small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
            self.model = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2))

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def train_dataloader(self) -> DataLoader:
        here = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(rows(), shuffle=False, **here)  # type: ignore[arg-type]
        return DataLoader(rows(), batch_size=4 // here["num_replicas"], sampler=sampler)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def rows() -> Tensor:
    return torch.randint(32, (STEPS * 4, 10), generator=torch.Generator().manual_seed(0))


def fit(name: str, folder: str, tensor: int) -> Tensor:
    """Train, save ``folder``, and return the logits where the model is whole."""
    from lightning_bharat.strategies.hybrid import HybridStrategy

    L.seed_everything(1, verbose=False)
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        strategy=HybridStrategy(tensor_parallel_size=tensor) if ranks > 1 else "auto",
        devices=ranks,
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's own shuffles
    )
    module = Language(name)
    trainer.fit(module)
    trainer.save_checkpoint(folder)
    return module.model.eval()(rows()[:2]).logits.detach() if ranks == 1 else torch.empty(0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trained_on_ranks_and_loaded_by_hugging_face(tmp_path: Path, name: str) -> None:
    expected = run_ranks(fit, 1, name, str(tmp_path / "plain.ckpt"), 1)[0]
    run_ranks(fit, 4, name, str(tmp_path / "last.ckpt"), 2)
    about = json.loads((tmp_path / "last.ckpt" / "MANIFEST.json").read_text())
    assert about["hugging_face"]["prefix"] == "model."
    assert about["layout"] == {"data": 2, "tensor": 2, "pipeline": 1, "context": 1, "expert": 1, "replicate": 1}
    assert about["plan"]["blocks"].startswith("model.")
    commands.export(tmp_path / "last.ckpt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float64"
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[name]
    torch.testing.assert_close(model.eval()(rows()[:2]).logits, expected, rtol=0, atol=1e-8)
