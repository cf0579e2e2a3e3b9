"""A small corpus of made-up sentences in several scripts: the same for the same seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

SYLLABLES = {
    "latin": ["ka", "lo", "mi", "ter", "sun", "é", "ing"],
    "devanagari": ["कि", "ता", "ब", "क्ष", "त्रि", "र्म", "ज्ञा", "क्\u200dष"],
    "tamil": ["த", "மி", "ழ்", "மொ", "ழி", "க்கு"],
    "telugu": ["తె", "లు", "గు", "భా", "ష"],
    "gujarati": ["ગુ", "જ", "રા", "તી"],
    "han": ["語", "言", "学", "习"],
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """That many documents of one to four sentences, each in one script."""
    chance = random.Random(seed)

    def word(script: str) -> str:
        return "".join(chance.choices(SYLLABLES[script], k=chance.randint(1, 4)))

    def document() -> str:
        script = chance.choice(list(SYLLABLES))
        lines = (" ".join(word(script) for _ in range(chance.randint(4, 12))) for _ in range(chance.randint(1, 4)))
        return "\n".join(f"{line}. {chance.randint(0, 9999)}" for line in lines)

    return [document() for _ in range(count)]


def write_corpus(file: Path, count: int = 200, seed: int = 0) -> Path:
    """A ``.jsonl`` file of :func:`sentences`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in sentences(count, seed))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
