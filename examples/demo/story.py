"""The demo's commands: what a person would type, one after another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path("runs/demo")  # as the configs have it
CORPUS, PREPARED, EXPORTED = FOLDER / "corpus", FOLDER / "prepared", FOLDER / "exported"
KEPT = (CORPUS, PREPARED)  # from one demo to the next
FIRST, REST, REFERENCE = "tensor2_pipeline2", "data2_tensor2", "one_process"  # configs, and the folders they write

# "You can" in each language.
PROMPTS = {
    "en": "You can",
    "hi": "आप",
    "mr": "तुम्ही",
    "gu": "તમે",
    "as": "আপুনি",
    "ta": "நீங்கள்",
    "te": "మీరు",
}


@dataclass(frozen=True)
class Step:
    """A command, as words, and what it is for."""

    title: str
    words: list[str]


@dataclass(frozen=True)
class Story:
    """The demo with the configs of a folder.

    Args:
        configs: folder of ``gpt.yaml`` and the layouts' configs.
    """

    configs: Path

    @property
    def gpt(self) -> dict[str, Any]:
        """The run's config."""
        return yaml.safe_load((self.configs / "gpt.yaml").read_text(encoding="utf-8"))

    @property
    def half(self) -> int:
        """The step at which the layout changes."""
        return self.gpt["trainer"]["max_steps"] // 2

    def data(self) -> list[Step]:
        """Text and tokens; both take no time where they are there already."""
        size = self.gpt["model"]["init_args"]["config"]["vocab_size"]
        return [
            Step("Fetch text", ["bharat", "data", "fetch", str(CORPUS)]),
            Step(
                "Train a tokenizer and pack the tokens",
                ["bharat", "data", "prepare", str(CORPUS), str(PREPARED), "--vocab_size", str(size)],
            ),
        ]

    def training(self) -> list[Step]:
        """Half of a run on one layout, the rest on another, and all of it on one process."""
        return [
            Step(
                f"Train {self.half} steps on four ranks: tensor 2 × pipeline 2",
                self._fit(FIRST, "--trainer.max_steps", str(self.half)),
            ),
            Step(
                "The rest of the run on data 2 × tensor 2, from the sharded checkpoint",
                self._fit(REST, "--ckpt_path", str(self.checkpoint(FIRST, self.half))),
            ),
            Step("The same run on one process, to compare with", self._fit(None)),
        ]

    def export(self) -> Step:
        """The trained weights as safetensors."""
        last = self.checkpoint(REST, self.gpt["trainer"]["max_steps"])
        words = ["bharat", "checkpoint", "export", str(last), str(EXPORTED)]
        return Step("Export the weights", [*words, "--prefix", "model.", "--tokenizer", str(PREPARED)])

    def sample(self, languages: list[str]) -> Step:
        """Text from the exported weights."""
        script = self._shown(Path(__file__).parents[1] / "generate.py")
        words = ["python", script, str(EXPORTED), self._shown(self.configs / "gpt.yaml")]
        prompts = [prompt for language, prompt in PROMPTS.items() if language in languages]
        return Step("Let the exported model write", [*words, *prompts])

    def checkpoint(self, run: str, step: int) -> Path:
        """What a run has saved at a step."""
        return FOLDER / run / "checkpoints" / f"step={step}.ckpt"

    def _fit(self, layout: str | None, *more: str) -> list[str]:
        configs = [self.configs / f"{name}.yaml" for name in ("gpt", layout) if name]
        return ["bharat", "fit", *[word for file in configs for word in ("--config", self._shown(file))], *more]

    @staticmethod
    def _shown(file: Path) -> str:
        return os.path.relpath(file)
