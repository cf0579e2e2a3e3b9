"""Text from exported weights, with a key-value cache.

bharat checkpoint export CHECKPOINT exported --prefix model. --tokenizer prepared
python examples/generate.py exported examples/gpt.yaml "You can" "Press the"
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lightning_bharat.models import GPT, GPTConfig


def load(folder: Path, config: Path) -> tuple[GPT, Tokenizer]:
    """The model whose weights lie in ``folder`` and whose sizes are in ``config``, and its tokenizer."""
    sizes = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]["config"]
    model = GPT(GPTConfig(**sizes))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    """Continue each prompt."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of exported weights and a tokenizer")
    parser.add_argument("config", type=Path, help="the run's config, for the sizes of the model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=32, help="that are added to each prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model, tokenizer = load(options.folder, options.config)
    generator = torch.Generator().manual_seed(options.seed)
    for prompt in options.prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        text = model.generate(ids, options.tokens, options.temperature, options.top_k, generator=generator)
        print(f"- {tokenizer.decode(text[0].tolist())!s}".replace("\n", " "))


if __name__ == "__main__":
    main()
