"""The benchmark of mergers at a small size, and what it holds to be the least."""

import pytest
from rich.console import Console

from benchmarks.mergers import SINGULAR, SOLVE, Config, charts, decompositions, run, tables


def test_decompositions_of_a_kernel():
    assert decompositions("TIES", (8, 12), 3) == []
    assert decompositions("Iso-C", (8, 12), 3) == [(SINGULAR, (8, 12), 1)]
    # Two directions of each of three experts fit into a matrix of rank 8.
    assert decompositions("TSV-M", (8, 12), 3) == [
        (SINGULAR, (8, 12), 3),
        (SINGULAR, (8, 6), 1),
        (SINGULAR, (6, 12), 1),
    ]
    assert decompositions("KnOTS + TIES", (8, 12), 3) == [(SINGULAR, (8, 36), 1)]
    assert decompositions("RegMean", (8, 12), 3) == [(SOLVE, (8, 12), 1)]


@pytest.mark.slow
def test_every_merger_of_one_layer_is_timed():
    found = run(Config(kinds=("lora",), width=8, layers=1, experts=2, rank=2, rounds=1), Console(quiet=True))
    (_, rows), (chart,) = tables(found)[0], charts(found)
    assert len(rows) == 1 + len(found["order"]) > 10
    assert all(float(row[1]) >= 0 and len(row) == len(rows[0]) for row in rows[1:])
    assert set(chart.bars) == set(found["order"])
