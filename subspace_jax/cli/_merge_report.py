"""What each leaf of a merged model got: from which sources, and how far it moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import subspace_jax as sj

if TYPE_CHECKING:
    from rich.table import Table

LEAVES_SHOWN = 24


def leaf_report(base: Any, trees: Sequence[Any], merged: Any) -> list[dict[str, Any]]:
    r"""Returns a record of each leaf, one leaf of all trees in memory at a time.

    `changed_by` has the places of the sources whose weight is not the base's, and `moved` is
    \(\|W - W_0\|_F / \|W_0\|_F\) of the merged weight.

    Args:
      base: pretrained parameters.
      trees: of the sources, adapted or plain.
      merged: plain parameters.
    """
    sources = [dict(sj.core.leaves_with_paths(tree)) for tree in trees]
    after = dict(sj.core.leaves_with_paths(merged))
    records = []
    for path, leaf in sj.core.leaves_with_paths(base):
        before = np.asarray(leaf, np.float32)
        changed = [i for i, one in enumerate(sources) if not np.array_equal(_formed(one[path]), before)]
        size = float(np.linalg.norm(before))
        change = float(np.linalg.norm(np.asarray(after[path], np.float32) - before))
        moved = change / size if size else change
        records.append({"path": path, "shape": list(before.shape), "changed_by": changed, "moved": moved})
    return records


def _formed(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.materialize() if sj.core.is_weight(leaf) else leaf, np.float32)


def leaf_table(records: Sequence[Mapping[str, Any]], count: int) -> Table:
    """Returns the table of the leaves that moved farthest.

    Args:
      records: what `leaf_report` returned.
      count: of the sources.
    """
    from rich.table import Table

    moved = sorted((r for r in records if r["changed_by"]), key=lambda record: -record["moved"])
    title = f"{len(moved)} of {len(records)} leaves changed"
    table = Table("leaf", "changed by", "moved", title=title, title_justify="left")
    for record in moved[:LEAVES_SHOWN]:
        table.add_row(record["path"], f"{len(record['changed_by'])} of {count}", f"{100 * record['moved']:.2f} %")
    return table
