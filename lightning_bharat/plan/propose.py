"""Proposals of tensor cuts: which linears feed which, what may be fused in them, which settings a rank must divide.

Nothing here is certain: :mod:`lightning_bharat.plan.prove` decides.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import Tensor, nn

from lightning_bharat.plan.alone import Alone
from lightning_bharat.plan.answers import Answers
from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.model_plan import Column, Cut
from lightning_bharat.plan.observe import Attention, Call, Observation
from lightning_bharat.plan.slicing import features, is_cuttable

# Hugging Face's strings (transformers, `base_model_tp_plan`) and what they say of a module.
STYLES = {
    **dict.fromkeys(("colwise", "packed_colwise", "colwise_rep", "colwise_gather_output"), "column"),
    **dict.fromkeys(("rowwise", "rowwise_rep", "packed_rowwise", "rowwise_split_input", "embedding_rowwise"), "row"),
    **dict.fromkeys(("replicated_with_grad_allreduce", "sequence_parallel", "all_reduce"), "whole"),
}


@dataclass(frozen=True)
class Candidate:
    """Linears whose outputs alone reach the inputs of ``rows``, in the order in which they run."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    weight: int  # number of parameters in them


def named_styles(module: nn.Module, given: dict[str, str] | None) -> dict[str, str]:
    """Module name -> "column", "row" or "whole", from the user's dict or else from Hugging Face's own plan.

    Raises:
        PlanError: the user's dict names a module that does not exist, or a string that is not known.
    """
    names = [name for name, _ in module.named_modules() if name]
    plan = given if given is not None else _own_plan(module)
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        matching = [name for name in names if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name)]
        if given is not None and not matching:
            raise PlanError(f"plan={{{pattern!r}: {style!r}}}: no module has this name; {_nearest(pattern, names)}")
        if given is not None and style not in STYLES:
            raise PlanError(f"plan={{{pattern!r}: {style!r}}}: write one of {', '.join(sorted(STYLES))}")
        found.update(dict.fromkeys(matching, STYLES.get(style, "whole")))
    return found


def _own_plan(module: nn.Module) -> dict[str, str]:
    for name, child in module.named_modules():
        plan = getattr(child, "_tp_plan", None)
        if isinstance(plan, dict) and plan:
            return {f"{name}.{pattern}".lstrip("."): style for pattern, style in plan.items()}
    return {}


def _nearest(pattern: str, names: list[str]) -> str:
    general = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})
    close = difflib.get_close_matches(pattern, general, 3, 0.3)
    return f"nearest: {', '.join(close or general[:3])}"


def candidates(seen: Observation, kind: str, styles: dict[str, str]) -> list[Candidate]:
    """Sets of linears in a block of this kind that may be cut together, of most weight in all.

    ``styles`` keeps to what a plan names, for blocks in which it names anything.
    """
    prefix = seen.names[seen.kinds.index(kind)]
    block = seen.shell.get_submodule(prefix)
    allowed = {n.removeprefix(f"{prefix}."): s for n, s in styles.items() if n.startswith(f"{prefix}.")}
    feeds = _feeds(seen, block, seen.calls[kind], allowed)
    found: dict[tuple[str, ...], list[str]] = {}
    for row, columns in feeds.items():
        found.setdefault(columns, []).append(row)
    weigh = {name: sum(p.numel() for p in block.get_submodule(name).parameters()) for name in feeds}
    whole = [
        Candidate(columns, tuple(rows), sum(weigh.get(n, 0) for n in rows) + sum(_size(block, n) for n in columns))
        for columns, rows in found.items()
    ]
    return _heaviest(whole)


def _size(block: nn.Module, name: str) -> int:
    return sum(p.numel() for p in block.get_submodule(name).parameters())


def _feeds(seen: Observation, block: nn.Module, call: Call, allowed: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Row -> the linears that its input is made of, if it is made of linears alone."""
    produced: dict[Any, str] = {}
    inputs: list[tuple[str, Any]] = []
    handles = []
    for name, module in block.named_modules():
        if is_cuttable(module):

            def note(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                inputs.append((name, args[0].grad_fn))
                produced[out.grad_fn] = name

            handles.append(module.register_forward_hook(note))
    with seen.mode, Answers(), Alone():
        call = call.copied(_as_leaf)
        args, kwargs = call.args, call.kwargs
        block(*args, **kwargs)
    hidden = args[seen.hidden] if isinstance(seen.hidden, int) else kwargs.get(seen.hidden or "")
    for handle in handles:
        handle.remove()
    feeds: dict[str, tuple[str, ...]] = {}
    order = list(dict.fromkeys(name for name, _ in inputs))
    for name, start in inputs:
        reached = _reached(start, produced, hidden)
        allowed_row = allowed.get(name, "row" if not allowed else "whole") == "row"
        allowed_columns = all(allowed.get(c, "column" if not allowed else "whole") == "column" for c in reached or ())
        if reached and allowed_row and allowed_columns:
            feeds[name] = tuple(n for n in order if n in reached)
    return feeds


def _as_leaf(x: Tensor) -> Tensor:
    """A fresh leaf that requires a gradient, so that what a linear reads can be traced to it."""
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _reached(start: Any, produced: dict[Any, str], hidden: Tensor | None) -> set[str] | None:
    """Linears on the way back from ``start``; ``None`` if the hidden state is reached as well."""
    reached, queue, visited = set[str](), [start], set()
    while queue:
        node = queue.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in produced:
            reached.add(produced[node])
        elif getattr(node, "variable", None) is hidden and hidden is not None:
            return None
        else:
            queue += [following for following, _ in node.next_functions]
    return reached


def _heaviest(found: list[Candidate]) -> list[Candidate]:
    """The candidates that share no module and weigh most together."""
    uses = [{*c.columns, *c.rows} for c in found]
    later = [set().union(*uses[i:]) for i in range(len(found) + 1)]
    best: dict[tuple[int, frozenset[str]], tuple[int, tuple[int, ...]]] = {}

    def choose(i: int, used: frozenset[str]) -> tuple[int, tuple[int, ...]]:
        if i == len(found):
            return 0, ()
        key = (i, used & frozenset(later[i]))
        if key not in best:
            best[key] = choose(i + 1, key[1])
            if not uses[i] & key[1]:
                weight, taken = choose(i + 1, key[1] | frozenset(uses[i]))
                best[key] = max(best[key], (weight + found[i].weight, (i, *taken)))
        return best[key]

    return [found[i] for i in choose(0, frozenset())[1]]


def variants(block: nn.Module, candidate: Candidate, attention: Attention | None, ranks: int) -> Iterator[Cut]:
    """Ways in which a candidate may be laid out, the simplest first: what is fused, which settings are divided."""
    width = features(block.get_submodule(candidate.rows[0]))[0]
    heads = attention is not None and width == attention.heads * attention.size
    sizes = {name: features(block.get_submodule(name))[1] for name in candidate.columns}
    biggest = max(sizes.values())
    for parts in _fusions(biggest, attention if heads else None):
        columns = tuple(Column(n, parts if size == biggest else (size,)) for n, size in sizes.items())
        units = attention.kv_heads if heads and attention else gcd(width, *(p for c in columns for p in c.parts))
        step = ranks if units % ranks == 0 else _smallest_factor(units)
        if step == 1 or any(p % step for c in columns for p in c.parts):
            continue
        related = {biggest, width, *parts, *((attention.heads, attention.kv_heads) if heads and attention else ())}
        related |= {sum(parts), units}
        for attributes in _settings(block, candidate, related, step):
            yield Cut("heads" if heads else "channels", units, columns, candidate.rows, attributes)


def _fusions(size: int, attention: Attention | None) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(size,)]
    if attention:
        query, key = attention.heads * attention.size, attention.kv_heads * attention.size
        found += [(query, key, key)] * (query + 2 * key == size)
    found += [(size // n,) * n for n in (3, 2) if size % n == 0]
    return list(dict.fromkeys(found))


def _settings(block: nn.Module, candidate: Candidate, related: set[int], ranks: int) -> Iterator[tuple[str, ...]]:
    """Sets of whole numbers near the cut that a rank may have to divide, the smallest sets first."""
    near = {_parent(name) for name in (*candidate.columns, *candidate.rows)}
    near |= {_parent(name) for name in near} | {""}
    found = []
    for name, module in block.named_modules():
        if name in near or (_parent(name) in near and not is_cuttable(module)):
            found += [
                f"{name}.{key}".lstrip(".")
                for key, value in vars(module).items()
                if key not in ("in_features", "out_features", "nx", "nf") and _divisible(value, related, ranks)
            ]
    for size in range(4):
        yield from itertools.combinations(found[:8], size)


def _divisible(value: Any, related: set[int], ranks: int) -> bool:
    numbers = value if isinstance(value, (tuple, list)) and value else (value,)
    return all(type(n) is int and n in related and n > 1 and n % ranks == 0 for n in numbers)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _smallest_factor(number: int) -> int:
    return next((n for n in range(2, number + 1) if number % n == 0), 1)
