"""Tables and numbers for people who read a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each: the first to the left, the others to the right.

    >>> print(table(["layout", "bytes"], [["data=2", "12 kB"], ["tensor=2", "8 kB"]]))
    layout    bytes
    data=2    12 kB
    tensor=2   8 kB
    """
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(line.rstrip() for line in lines)


def size(bytes: float) -> str:
    """A number of bytes in a unit of three digits, in steps of 1024.

    >>> size(1536), size(12), size(0), size(3 * 2**40)
    ('1.50 KiB', '12 B', '0 B', '3.00 TiB')
    """
    unit = 0
    while bytes >= 1024 and unit < 5:
        bytes, unit = bytes / 1024, unit + 1
    digits = 0 if unit == 0 else 2 if bytes < 10 else 1 if bytes < 100 else 0
    return f"{bytes:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[unit]}"
