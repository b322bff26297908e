"""The page of recorded results is the one that the files give, and its pictures are there."""

import re
import types

import pytest

import benchmarks
from benchmarks import _results
from benchmarks._benchmark import find
from benchmarks._charts import Chart, draw
from experiments import runner


def test_the_page_is_made_of_the_files():
    assert (_results.FOLDER / "README.md").read_text() == _results.page()


def test_every_picture_of_the_page_is_there():
    named = re.findall(r"!\[\w+\]\(([\w.-]+)\)", _results.page())
    assert named
    assert all((_results.FOLDER / name).stat().st_size > 1000 for name in named)


def of_device(device):
    return [name for name in runner.names(benchmarks) if find(name).device == device]


@pytest.mark.parametrize("name", of_device("cpu"))
def test_every_benchmark_is_recorded_on_a_cpu(name):
    assert (_results.FOLDER / f"{name}-cpu.json").exists()


@pytest.mark.parametrize("name", of_device("gpu"))
def test_a_gpus_benchmark_is_recorded_on_one_or_the_docs_say_that_none_was_at_hand(name):
    page = (_results.FOLDER.parents[1] / "docs" / "benchmarks.md").read_text()
    assert f"python -m benchmarks run {name}" in page
    files = {path.name for path in _results.FOLDER.glob(f"{name}-*.json")}
    assert f"{name}-cpu.json" not in files
    assert ("no GPU was at hand" in " ".join(page.split())) == (not files)


def test_a_record_is_named_after_its_device(tmp_path, monkeypatch):
    card = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_results.jax, "devices", lambda: [card])
    monkeypatch.setattr(_results, "write_page", lambda folder: None)
    assert _results.save("gpu", {}, {}, tmp_path) == tmp_path / "gpu-nvidia-h100-80gb-hbm3.json"


def test_bars_of_several_series_with_gaps(tmp_path):
    from PIL import Image

    chart = Chart("title", "axis", {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, reference=1.0, log=True)
    draw([chart, chart], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size[0] > 1000
