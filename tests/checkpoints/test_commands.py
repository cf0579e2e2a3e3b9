"""`bharat checkpoint export`, `convert` and `show`, on a checkpoint that two tensor ranks saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_bharat.checkpoints import CheckpointError, save, weights
from lightning_bharat.checkpoints.folder import size_in_bytes
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.opened import open_any
from lightning_bharat.commands import checkpoint as checkpoint_commands
from lightning_bharat.plan.layout import Layout
from tests.checkpoints.cases import Case
from tests.checkpoints.test_layouts import load_case, save_case
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "last.ckpt"
    run_ranks(save_case, 2, Layout(tensor=2), str(folder))
    return folder


def whole() -> dict[str, torch.Tensor]:
    found = Case(Layout(), seed=1)
    return {"seen": found.module.seen, **found.whole, "head.weight": found.whole["embedding.weight"]}


def test_plain_torch_loads_an_export(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint_commands.export(checkpoint, tmp_path / "out")
    module = Case(Layout(), seed=4).module
    module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))  # strict
    assert all(torch.equal(value, whole()[name]) for name, value in module.state_dict().items())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"exists; write another place, or overwrite=True"):
        checkpoint_commands.export(checkpoint, tmp_path / "out")
    checkpoint_commands.export(checkpoint, tmp_path / "out", overwrite=True)


def test_an_export_in_several_files_of_another_type(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint_commands.export(checkpoint, tmp_path / "out", prefix="blocks.", dtype="bfloat16", max_shard_size="300B")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found: dict[str, torch.Tensor] = {}
    for name in files:
        part = load_file(tmp_path / "out" / name)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 300
        assert all(index["weight_map"][key] == name for key in part)
        found |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert found.keys() == {name.removeprefix("blocks.") for name in whole() if name.startswith("blocks.")}
    for name, value in found.items():
        assert torch.equal(value, whole()[f"blocks.{name}"].bfloat16())


def test_bad_arguments_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"prefix='model.': no weight .* begin with blocks., embedding., head."):
        checkpoint_commands.export(checkpoint, tmp_path / "out", prefix="model.")
    with pytest.raises(CheckpointError, match=r"max_shard_size='big' is not a size"):
        checkpoint_commands.export(checkpoint, tmp_path / "out", max_shard_size="big")
    with pytest.raises(CheckpointError, match=r"holds none of tokenizer.json"):
        checkpoint_commands.export(checkpoint, tmp_path / "out", tokenizer=tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        checkpoint_commands.export(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert size_in_bytes("2GB") == 2 * 10**9


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint_commands.convert(checkpoint, tmp_path / "whole.ckpt")
    plain = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert all(torch.equal(value, whole()[name]) for name, value in plain["state_dict"].items())
    case = Case(Layout(), seed=4)
    case.module.load_state_dict(plain["state_dict"])
    case.optimizer.load_state_dict(plain["optimizer_states"][0])
    expected = Case(Layout(), seed=1).expected()
    assert all(torch.equal(value, expected[key]) for key, value in case.gathered().items())
    checkpoint_commands.convert(tmp_path / "whole.ckpt", tmp_path / "again.ckpt")
    about = json.loads((tmp_path / "again.ckpt" / "MANIFEST.json").read_text())
    assert (about["step"], about["layout"]["tensor"]) == (7, 2)
    for layout in (Layout(), Layout(data=2, tensor=2)):
        again = str(tmp_path / "again.ckpt")
        for found, hyper_parameters, groups in run_ranks(load_case, layout.devices, layout, again):
            assert all(torch.equal(found[key], value) for key, value in expected.items())
            assert hyper_parameters["width"] == 8
            assert [g["lr"] for g in groups] == [0.1, 0.025]


def test_show(checkpoint: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    checkpoint_commands.show(checkpoint, tensors=True)
    text = capsys.readouterr().out
    for line in ("step:         7 (epoch 0)", "saved on:     tensor 2", "Hugging Face: no model", "optimizers:   1"):
        assert line in text
    count = sum(p.numel() for p in Case(Layout(), seed=1).module.state_dict().values()) - 12 * 8
    assert f"weights:      {count:,} in 16 tensors" in text
    assert "  blocks.0.qkv.weight  float32 [24, 8]" in text
    checkpoint_commands.convert(checkpoint, tmp_path / "whole.ckpt")
    checkpoint_commands.show(tmp_path / "whole.ckpt")
    assert f"weights:      {count:,} in 16 tensors" in capsys.readouterr().out


class Holder(nn.Module):
    """A module around a Hugging Face model, and something of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lm = nn.ModuleDict({"inner": model})
        self.probe = nn.Linear(2, 2)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    llama = {**small, "intermediate_size": 24, "num_key_value_heads": 1}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**llama)),
        "tied": LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=16)),
    }


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_hugging_face_loads_an_export(tmp_path: Path, name: str) -> None:
    model = models()[name].eval()
    holder = Holder(model)
    state = weights.as_shares(holder.state_dict(), holder, {}, first_replica=True)
    checkpoint = {"state_dict": state, "global_step": 3}
    save(tmp_path / "last.ckpt", checkpoint, Manifest.of(checkpoint, Layout(), module=holder))
    assert "probe.weight" in open_any(tmp_path / "last.ckpt").weights()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(_tokenizer())
    checkpoint_commands.export(tmp_path / "last.ckpt", tmp_path / "out", tokenizer=tokenizer, max_shard_size="8KB")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == [1, 2]


def _tokenizer() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()
