"""Where each data rank's loaders stand: Lightning keeps rank 0's position alone, and data ranks read other samples."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_bharat.checkpoints.told import Told
from lightning_bharat.plan.layout import Layout

POSITIONS = "lightning_bharat_loaders"


def with_positions(checkpoint: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Lightning's dict with the states of all data ranks' loaders, where they differ."""

    def together(of_ranks: list[Any]) -> list[Any] | None:
        of_data = [of_ranks[layout.rank(data=i)] for i in range(layout.data)] if len(of_ranks) > 1 else of_ranks
        return None if all(_equal(state, of_data[0]) for state in of_data) else of_data

    return {**checkpoint, POSITIONS: Told(_states(checkpoint), together)}


def take_position(checkpoint: dict[str, Any], layout: Layout, rank: int) -> None:
    """Put the states of this data rank's loaders where Lightning reads them.

    With another number of data ranks than the checkpoint's there is no state of one's own: rank 0's stays, and a
    warning says so. (Loaders whose state is about all ranks' samples together, as ``TokenDataModule``'s, have no such
    limit.)
    """
    of_data = checkpoint.pop(POSITIONS, None)
    if of_data is None:
        return
    if len(of_data) == layout.data:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = of_data[layout.coordinates(rank)["data"]]
    elif rank == 0:
        warnings.warn(
            f"The checkpoint has a state of the training loaders for each of its {len(of_data)} data ranks, and there "
            f"are {layout.data} now: every rank's loaders continue from the first one's. Samples may repeat or be left "
            f"out; keep data_parallel_size={len(of_data)}, or use a loader whose state does not depend on the rank",
            stacklevel=2,
        )


def _states(checkpoint: dict[str, Any]) -> Any:
    return checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader")


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # tensors or arrays of several elements are not compared as one
        return False
