"""The demo's outcome as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lightning-bharat: make demo</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; }
td { padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; }
li { margin: 0.4rem 0; }
</style>
</head>
<body>
<h1>One run, two layouts, the curve of one process</h1>
$picture
<table>
$numbers
</table>
<h2>What the exported model writes</h2>
<ul>
$samples
</ul>
<h2>The commands</h2>
<pre>$commands</pre>
</body>
</html>
""")


def page(picture: str, numbers: Sequence[tuple[str, str]], samples: Sequence[str], commands: Sequence[str]) -> str:
    """The page.

    Args:
        picture: SVG.
        numbers: what each says, and its value.
        samples: texts of the model.
        commands: as they were run.
    """
    return _PAGE.substitute(
        picture=picture,
        numbers="\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in numbers),
        samples="\n".join(f"<li>{escape(sample)}</li>" for sample in samples),
        commands=escape("\n".join(commands)),
    )
