"""A matplotlib figure as a PNG file, and as SVG to put into a page."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save(figure: Figure, file: Path) -> str:
    """Write a PNG to ``file``; returns the same picture as SVG, which does not change from one run to the next."""
    figure.savefig(file, dpi=150)
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bharat"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
