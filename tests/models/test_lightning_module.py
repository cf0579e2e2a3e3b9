"""The LightningModule on one process: it learns, decays what it should, and starts from given weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import lightning_bharat
from lightning_bharat.checkpoints import CheckpointError
from lightning_bharat.models import GPTConfig, GPTModule, WarmupCosine
from lightning_bharat.plan.find import find_plan
from tests.ranks import run_ranks

SMALL = GPTConfig(vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TIED = GPTConfig(**{**vars(SMALL), "tie_word_embeddings": True})


def batch(time: int = 12) -> dict[str, torch.Tensor]:
    tokens = torch.randint(SMALL.vocab_size, (4, time + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}


def trainer(folder: Path, steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
    )


def loader(times: int) -> DataLoader:
    rows = [{name: tensor[i] for name, tensor in batch().items()} for i in range(4)]
    return DataLoader(rows * times, batch_size=4)


def weights_of(module: GPTModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: GPTModule, expected: dict[str, torch.Tensor]) -> None:
    assert module.state_dict().keys() == expected.keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("config", [SMALL, TIED])
def test_a_loss_in_chunks_is_the_loss(config: GPTConfig) -> None:
    found = []
    for chunked in (False, True):
        L.seed_everything(0, verbose=False)
        module = GPTModule(config, chunked_loss=chunked).double()
        loss = module._loss(batch())
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_it_learns_one_batch_by_heart_and_its_checkpoint_is_safe_to_load(tmp_path: Path) -> None:
    L.seed_everything(0)
    module = GPTModule(SMALL, learning_rate=3e-3, lr_scheduler=partial(WarmupCosine, warmup_steps=5, total_steps=120))
    fit = trainer(tmp_path, 120)
    fit.fit(module, loader(120), loader(1))
    assert fit.callback_metrics["train_loss"] < 0.1
    assert fit.callback_metrics["val_loss"] < 0.1
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-4)  # a tenth, reached step by step
    fit.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert_same(GPTModule.load_from_checkpoint(tmp_path / "model.ckpt"), weights_of(module))


def test_labels_of_minus_100_do_not_count_and_prediction_gives_their_likelihoods() -> None:
    module, data = GPTModule(SMALL), batch()
    data["labels"][:, 6:] = -100
    scores = module.predict_step(data, 0)
    logits = module(data["input_ids"])[:, :6]
    expected = logits.log_softmax(-1).gather(-1, data["labels"][:, :6, None])[..., 0]
    torch.testing.assert_close(scores[:, :6], expected)
    assert (scores[:, 6:] == 0).all()
    torch.testing.assert_close(module._loss(data), -expected.mean())


@pytest.mark.parametrize("config", [SMALL, TIED])
def test_matrices_decay_and_embeddings_and_norms_do_not(config: GPTConfig) -> None:
    module = GPTModule(config, weight_decay=0.3)
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, rest = module.configure_optimizers().param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *(("lm_head",) if config is SMALL else ()),
    }
    assert {names[id(p)].split(".")[-2] for p in rest["params"]} == {
        *("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    }


def test_frozen_weights_are_not_trained_and_a_pattern_without_any_is_refused() -> None:
    module = GPTModule(SMALL, freeze=["model.embed_tokens.*", "model.layers.0.*"])
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert {name for name, p in module.named_parameters() if id(p) not in trained} == {
        name for name, _ in module.named_parameters() if name.startswith(("model.embed_tokens.", "model.layers.0."))
    }
    with pytest.raises(ValueError, match=r"freeze='layers.*' fits no parameter; names are like model.embed_tokens"):
        GPTModule(SMALL, freeze=["layers.*"])


@pytest.mark.parametrize("form", ["file", "folder", "ckpt", "Hugging Face", "tied Hugging Face"])
def test_it_starts_from_given_weights(form: str, tmp_path: Path) -> None:
    config = TIED if "tied" in form else SMALL
    given = GPTModule(config)
    path = tmp_path
    if form == "file":
        path = tmp_path / "gpt.safetensors"
        save_file(given.model.state_dict(), path)
    elif form == "folder":
        state = given.model.state_dict()
        save_file({n: t for n, t in state.items() if n.startswith("layers.")}, tmp_path / "a-1-of-2.safetensors")
        save_file({n: t for n, t in state.items() if not n.startswith("layers.")}, tmp_path / "a-2-of-2.safetensors")
    elif form == "ckpt":
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": given.state_dict()}, path)
    else:
        save_as_llama(given, tmp_path)
    assert_same(GPTModule(config, weights=path), weights_of(given))


def save_as_llama(given: GPTModule, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {name: value for name, value in vars(given.config).items() if value is not None}
    theirs = LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": given.config.inner_size}))
    theirs.load_state_dict({n.replace("model.lm_head", "lm_head"): t for n, t in given.state_dict().items()})
    theirs.save_pretrained(folder)


def test_weights_of_another_model_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    state = GPTModule(SMALL).model.state_dict()
    state["layers.2.mlp.up_proj.weight"] = state.pop("layers.1.mlp.up_proj.weight").clone()
    state["norm.weight"] = torch.ones(32)
    save_file(state, tmp_path / "gpt.safetensors")
    with pytest.raises(CheckpointError) as refused:
        GPTModule(SMALL, weights=tmp_path / "gpt.safetensors")
    text = str(refused.value)
    assert f"weights='{tmp_path}/gpt.safetensors'" in text
    assert "it lacks model.layers.1.mlp.up_proj.weight" in text
    assert "it has model.layers.2.mlp.up_proj.weight" in text
    assert "model.norm.weight is [32] in the checkpoint and [48] here" in text


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("gone.safetensors", "does not exist"),
        ("torn.safetensors", "can't be read"),
        ("empty", "a folder without .safetensors files"),
        ("gone.ckpt", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            GPTModule(SMALL, weights=tmp_path / name)


def test_a_lazy_module_is_built_where_the_strategy_asks(tmp_path: Path) -> None:
    given = GPTModule(SMALL)
    save_file(given.model.state_dict(), tmp_path / "gpt.safetensors")
    module = GPTModule(SMALL, lazy=True, weights=tmp_path / "gpt.safetensors")
    assert not list(module.parameters())
    trainer(tmp_path, 1).validate(module, loader(1), verbose=False)
    assert_same(module, weights_of(given))


def test_a_strategy_that_does_not_ask_for_the_weights_is_refused(tmp_path: Path) -> None:
    module = GPTModule(SMALL, lazy=True, weights=tmp_path / "gpt.safetensors")
    with torch.device("meta"):
        module.configure_model()
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module.model.to_empty(device="cpu")  # as such a strategy does
    with pytest.raises(ValueError, match=r"weights='.*' were not read: .* SingleDeviceStrategy .* Write lazy=False"):
        trainer(tmp_path, 1).fit(module, loader(1))


def loss_on_ranks(path: Path, **sizes: int) -> float:
    """First loss of a module built on meta by the strategy, with weights that lie at ``path``."""
    strategy = lightning_bharat.HybridStrategy(**sizes)
    module = GPTModule(GPTConfig(**{**vars(SMALL), "vocab_size": 64}), lazy=True, weights=path)
    fit = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        precision="64-true",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
    )
    batches = [{name: tensor[:1].repeat(4, 1) for name, tensor in batch().items()}] * 2  # the same for each rank
    fit.fit(module, DataLoader(batches, batch_size=None))
    assert "weights: read from" in strategy.explain()
    return float(fit.callback_metrics["train_loss"])


@pytest.mark.parametrize("sizes", [{"data_parallel_size": 2}, {"data_parallel_size": 1, "tensor_parallel_size": 2}])
def test_each_rank_reads_its_part_of_weights_of_hugging_face(sizes: dict[str, int], tmp_path: Path) -> None:
    given = GPTModule(GPTConfig(**{**vars(SMALL), "vocab_size": 64}))
    save_as_llama(given, tmp_path)
    data = {name: tensor[:1].repeat(4, 1) for name, tensor in batch().items()}
    expected = given.double()._loss(data).item()
    for loss in run_ranks(partial(loss_on_ranks, **sizes), 2, tmp_path):
        assert loss == pytest.approx(expected, rel=1e-12)


def test_its_heads_channels_and_vocabulary_are_found_and_proven_to_be_cuttable() -> None:
    even = GPTConfig(**{**vars(SMALL), "vocab_size": 64})
    plan = find_plan(GPTModule(even), lambda module, b: module._loss(b), batch(), ranks=2)
    (kind,) = set(plan.kinds)
    assert {(cut.unit, *(c.module for c in cut.columns), *cut.rows) for cut in plan.cuts[kind]} == {
        ("heads", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ("channels", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }
    assert plan.outside and not plan.sequence and not plan.loss, str(plan)


def test_a_config_gives_sizes_and_a_schedule_by_class_path() -> None:
    words = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61}
    schedule = {
        "class_path": "lightning_bharat.models.WarmupCosine",
        "init_args": {"warmup_steps": 2, "total_steps": 10},
    }
    given = {"model": {"config": words, "lr_scheduler": schedule}, "trainer": {"logger": False, "accelerator": "cpu"}}
    module = LightningCLI(GPTModule, args=given, run=False, save_config_callback=None).model
    assert module.config == GPTConfig(**words)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert (type(schedule), schedule.warmup_steps, schedule.total_steps) == (WarmupCosine, 2, 10)
