"""What is wrong with data, in words."""


class DataError(ValueError):
    """Texts, a tokenizer or prepared data that cannot be used; the message says what to write instead."""
