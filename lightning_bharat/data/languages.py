"""Languages of India and English: their names, and the letters by which text of theirs is known."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """A language's English name and the first and last code point of its script."""

    name: str
    first: int
    last: int


LANGUAGES = {
    "en": Language("English", 0x0041, 0x007A),
    "hi": Language("Hindi", 0x0900, 0x097F),
    "mr": Language("Marathi", 0x0900, 0x097F),
    "as": Language("Assamese", 0x0980, 0x09FF),
    "bn": Language("Bengali", 0x0980, 0x09FF),
    "pa": Language("Punjabi", 0x0A00, 0x0A7F),
    "gu": Language("Gujarati", 0x0A80, 0x0AFF),
    "or": Language("Odia", 0x0B00, 0x0B7F),
    "ta": Language("Tamil", 0x0B80, 0x0BFF),
    "te": Language("Telugu", 0x0C00, 0x0C7F),
    "kn": Language("Kannada", 0x0C80, 0x0CFF),
    "ml": Language("Malayalam", 0x0D00, 0x0D7F),
}


def is_written_in(text: str, language: str) -> bool:
    """Whether more than half of the letters and vowel signs are of the language's script.

    >>> is_written_in("தமிழ் என்பது ஒரு மொழி", "ta"), is_written_in("Wireless and optical mice", "ta")
    (True, False)
    """
    if text.isascii():  # most strings of a half-translated page: spare counting them
        return language == "en"
    script = LANGUAGES[language]
    letters = [letter for letter in text if unicodedata.category(letter)[0] in "LM"]
    own = sum(script.first <= ord(letter) <= script.last for letter in letters)
    return 2 * own > len(letters)
