"""The page of recorded results is the one that the files give, and its pictures are there."""

import re

import pytest

import benchmarks
from benchmarks import _results
from benchmarks._charts import Chart, draw
from experiments import runner


def test_the_page_is_made_of_the_files():
    assert (_results.FOLDER / "README.md").read_text() == _results.page()


def test_every_picture_of_the_page_is_there():
    named = re.findall(r"!\[\w+\]\(([\w.-]+)\)", _results.page())
    assert named
    assert all((_results.FOLDER / name).stat().st_size > 1000 for name in named)


@pytest.mark.parametrize("name", runner.names(benchmarks))
def test_every_benchmark_is_recorded_on_a_cpu(name):
    assert (_results.FOLDER / f"{name}-cpu.json").exists()


def test_bars_of_several_series_with_gaps(tmp_path):
    from PIL import Image

    chart = Chart("title", "axis", {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, reference=1.0, log=True)
    draw([chart, chart], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size[0] > 1000
