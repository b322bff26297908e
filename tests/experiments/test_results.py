"""Recorded results are those of today's settings, and every arm's best learning rate lies inside its grid."""

from pathlib import Path

import pytest

from experiments import runner

FOLDER = Path(__file__).parents[2] / "experiments" / "results"
TUNED = [name for name in runner.names() if runner.find(name).tuning is not None]


def test_grids_tell_the_best_rate_and_whether_it_is_at_the_edge():
    runs = [
        {"method": method, "learning_rate": rate, "loss": loss}
        for method, losses in {"a": (3.0, 1.0, 2.0), "b": (1.0, 2.0, float("nan")), "c": (3.0, 2.0, 1.0)}.items()
        for rate, loss in zip((0.1, 0.2, 0.3), losses, strict=True)
    ]
    found = runner.grids(runs, "loss", smallest=True)
    assert [found[m]["best"] for m in "abc"] == [0.2, 0.1, 0.3]
    assert [found[m]["at_edge"] for m in "abc"] == [False, True, True]
    assert [found[m]["best"] for m in "abc"] != [g["best"] for g in runner.grids(runs, "loss").values()]


@pytest.mark.parametrize("name", TUNED)
def test_every_best_rate_lies_inside_its_grid(name):
    result = runner.read_json(FOLDER / f"{name}.json")
    found = runner.find(name).tuning.grids(result)
    assert found == result["grids"], "the result's grids are not those of its runs"
    assert found, "the recorded run chose no rates"
    edges = [f"{arm}: {grid['best']:g} of {grid['rates']}" for arm, grid in found.items() if grid["at_edge"]]
    assert not edges, edges


@pytest.mark.parametrize("name", [n for n in runner.names() if (FOLDER / f"{n}.json").exists()])
def test_recorded_results_have_a_table(name):
    result = runner.read_json(FOLDER / f"{name}.json")
    header, *body = runner.find(name).rows(result)
    assert body
    assert all(len(line) == len(header) for line in body)
