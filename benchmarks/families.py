"""Which architectures of Hugging Face's transformers can be cut unchanged, and what is said where one can't.

    python -m benchmarks.families
    python -m benchmarks.families --family bert --layout tensor=2

Each is built from its own configuration class, small, in an ordinary LightningModule, and goes through what ``bharat
verify`` does: three steps on one rank against the same steps on the ranks of a layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bharat.cluster.outcome import RanksFailed
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table
from lightning_bharat.commands.verify import Comparison, compared
from lightning_bharat.commands.verify_ranks import VerifyCLI
from lightning_bharat.commands.why import why
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import FirstOf
from lightning_bharat.strategies.tensor import cut_module

LAYOUTS = ("data=2", "tensor=2", "pipeline=2", "context=2")
WORDS, TIME, ROWS = 96, 16, 4  # of a vocabulary, of a text, of a batch
IMAGE, PATCHES = 16, 4  # pixels each way, and what LLaVA makes of them
IMAGE_WORD = WORDS - 1

Batch = dict[str, Tensor]
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_WORDS = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Grouped products are not there in float64, and a loop over experts has shapes that depend on values.
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "experts_implementation": "batched_mm"}


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        kind: of model, for people.
        model: name of its class in ``transformers``.
        config: what its configuration class is made of.
        inputs: what a batch holds beside its labels.
        double: compared in float64. Not where its own code rounds to float32 on the way.
    """

    kind: str
    model: str
    config: dict[str, Any]
    inputs: tuple[str, ...] = ("input_ids",)
    double: bool = True


def _decoder(model: str, double: bool = True, **config: Any) -> Family:
    return Family("decoder", model, {**_SIZES, **_WORDS, **config}, double=double)


_TEXT_TO_TEXT = ("input_ids", "decoder_input_ids")
_LLAVA = {
    "text_config": {"model_type": "llama", **_SIZES, **_WORDS, "num_key_value_heads": 2},
    "vision_config": {"model_type": "clip_vision_model", **_SIZES, "image_size": IMAGE, "patch_size": 8},
    "image_token_index": IMAGE_WORD,
    "image_seq_length": PATCHES,
}
FAMILIES = {
    "llama": _decoder("LlamaForCausalLM", num_key_value_heads=2),
    "mistral": _decoder("MistralForCausalLM", num_key_value_heads=2, sliding_window=8),
    "qwen3": _decoder("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gemma2": _decoder("Gemma2ForCausalLM", double=False, num_key_value_heads=2, head_dim=8),
    "phi3": _decoder("Phi3ForCausalLM", num_key_value_heads=2),
    "olmo2": _decoder("Olmo2ForCausalLM", num_key_value_heads=2),
    "gpt2": Family(
        "decoder", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, **_WORDS}
    ),
    "gpt_neox": _decoder("GPTNeoXForCausalLM"),
    "opt": _decoder("OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32),
    "bloom": Family("decoder", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 4, "n_head": 4, **_WORDS}),
    "falcon": _decoder("FalconForCausalLM", new_decoder_architecture=False, multi_query=True),
    "mixtral": _decoder("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4, **_EXPERTS),
    "qwen3_moe": _decoder("Qwen3MoeForCausalLM", num_key_value_heads=2, head_dim=8, num_experts=4, **_EXPERTS),
    "deepseek_v3": _decoder(
        "DeepseekV3ForCausalLM",
        double=False,
        **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"first_k_dense_replace": 1, **_EXPERTS},
    ),
    "mamba": Family(
        "state space", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 4, **_WORDS}, double=False
    ),
    "bert": Family("encoder", "BertForMaskedLM", {**_SIZES, **_WORDS, "max_position_embeddings": 32}),
    "modernbert": Family("encoder", "ModernBertForMaskedLM", {**_SIZES, **_WORDS, "max_position_embeddings": 32}),
    "t5": Family(
        "encoder and decoder",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0, **_WORDS},
        _TEXT_TO_TEXT,
    ),
    "vit": Family("vision", "ViTForImageClassification", {**_SIZES, "image_size": IMAGE, "patch_size": 4}, ("image",)),
    "llava": Family("vision and text", "LlavaForConditionalGeneration", _LLAVA, ("input_ids", "image")),
}


class Step(L.LightningModule):
    """What a person writes around a model of ``transformers``.

    Args:
        family: a name of :data:`FAMILIES`.
    """

    def __init__(self, family: str) -> None:
        super().__init__()
        told = FAMILIES[family]
        kind = getattr(transformers, told.model)
        config = kind.config_class(**told.config)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):  # many draw masks in functions, which nothing switches off
                setattr(config, name, 0.0)
        self.model = kind(config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits  # its own loss would be computed in float32
        return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-4)


class Inputs(L.LightningDataModule):
    """Random batches for a family."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = FAMILIES[family]

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self._row(seed) for seed in range(8 * ROWS)], batch_size=ROWS)

    def _row(self, seed: int) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        row = {
            name: torch.randint(3, IMAGE_WORD, (TIME,), generator=draw)
            for name in self.family.inputs
            if name != "image"
        }
        classes, labels = (WORDS, (TIME,)) if row else (2, ())
        if "image" in self.family.inputs:
            if row:
                row["input_ids"][:PATCHES] = IMAGE_WORD
            row["pixel_values"] = torch.randn(3, IMAGE, IMAGE, generator=draw)
        return {**row, "labels": torch.randint(0, classes, labels, generator=draw)}


def verdicts(server: WarmServer, family: str, layouts: Sequence[str]) -> dict[str, str]:
    """By layout ``"equal"``, or what ``bharat verify`` says instead."""
    words = ["--model=benchmarks.families.Step", "--data=benchmarks.families.Inputs"]
    words += [f"--model.family={family}", f"--data.family={family}", f"--double={FAMILIES[family].double}".lower()]
    cli = VerifyCLI(words)
    found = compared(server, cli, [Layout.parse(layout) for layout in layouts])
    try:
        return {layout: _verdict(result) for layout, (_, result) in zip(layouts, found, strict=True)}
    except RanksFailed as error:
        return dict.fromkeys(layouts, f"does not run on one rank: {why(error.outcomes)}")


def cut_share(family: str) -> float:
    """The share of the weights that tensor ranks divide."""
    step = Step(family)
    batch = next(iter(Inputs(family).train_dataloader()))
    plan = find_plan(step, lambda module, batch: module.training_step(batch, 0), batch)
    whole = sum(p.numel() for p in step.parameters())
    cut_module(step, plan, FirstOf(2))
    return 2 * (1 - sum(p.numel() for p in step.parameters()) / whole)


def _verdict(found: Comparison | str) -> str:
    if isinstance(found, str):
        return found
    return "equal" if found.equal else f"NOT EQUAL\n{found}"


def main(given: Sequence[str] | None = None) -> int:
    """Go through the families that are asked for; returns the exit code: 1 if one trains otherwise when it is cut."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.families", description=__doc__, formatter_class=form)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="may be given again (default: all)")
    parser.add_argument("--layout", action="append", help=f"may be given again (default: {' '.join(LAYOUTS)})")
    options = parser.parse_args(given)
    layouts = options.layout or LAYOUTS
    server = WarmServer((*PRELOAD, "lightning_bharat.commands.verify_ranks", "transformers"))
    rows, refused, wrong = [], [], False
    for family in options.family or FAMILIES:
        print(family, file=sys.stderr, flush=True)
        found = verdicts(server, family, layouts)
        share = f"{cut_share(family):.0%}"
        rows.append(
            [family, FAMILIES[family].kind, share, *("equal" if v == "equal" else "refused" for v in found.values())]
        )
        refused += [f"{family}, {layout}: {verdict}" for layout, verdict in found.items() if verdict != "equal"]
        wrong |= any(verdict.startswith("NOT EQUAL") for verdict in found.values())
    print(table(["family", "kind", "weights cut", *layouts], rows), *refused, sep="\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
