"""`subspace-jax anomaly` on small images in a folder: fits, scores, measures, resumes, and refuses what is wrong."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from subspace_jax import assets, cli
from subspace_jax.cli import _anomaly_model, _anomaly_score, anomaly
from subspace_jax.cli._folders import Unfinished
from subspace_jax.cli._vision import VisionBackbone, in_equal_batches
from subspace_jax.models import PretrainedModel, Vit, small_vit

SIDE = 32


@pytest.fixture(scope="module")
def tiny():
    config = small_vit(final_norm=False)
    images = np.zeros((1, SIDE, SIDE, 3), np.float32)
    params = jax.jit(Vit(config).init)(jax.random.key(0), images)["params"]
    return VisionBackbone("tiny", PretrainedModel(Vit(config), params, config))


@pytest.fixture
def backbone(tiny, monkeypatch):
    """A small random transformer of patches of 4 in place of ViT-S/14."""
    monkeypatch.setattr(anomaly, "load_vision_backbone", lambda weights: tiny)
    return tiny


def picture(rng, defect=False):
    """Stripes of random phase; a defect is a square of noise."""
    grid = np.arange(SIDE) * 0.6 + rng.uniform(0, 6)
    image = np.broadcast_to(127 + 80 * np.sin(grid), (SIDE, SIDE)) + rng.normal(0, 2, (SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    if defect:
        y, x = rng.integers(4, 20, 2)
        image[y : y + 8, x : x + 8] = rng.uniform(0, 255, (8, 8))
        mask[y : y + 8, x : x + 8] = 255
    return np.clip(image, 0, 255).astype(np.uint8), mask


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    """Six normal images, eight test images with a defect in every second one, in the layout of MVTec AD."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("mvtec") / "stripes"
    for i in range(6):
        save(root / f"train/good/{i}.png", picture(rng)[0])
    for i in range(8):
        image, mask = picture(rng, i % 2)
        save(root / f"test/{'hole' if i % 2 else 'good'}/{i}.png", image)
        if i % 2:
            save(root / f"ground_truth/hole/{i}_mask.png", mask)
    return root


def run(*arguments):
    cli.main(["anomaly", *map(str, arguments)])


def fit(folder, out, *options):
    run("fit", folder, "--out", out, "--size", SIDE, "--rotations", 2, "--batch", 2, *options)


@pytest.fixture(scope="module")
def model(tiny, category, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anomaly, "load_vision_backbone", lambda weights: tiny)
        fit(category, out)
    return out


def test_a_category_is_fitted_scored_and_measured(backbone, category, model, tmp_path, capsys):
    notes = json.loads((model / "model.json").read_text())
    assert sorted(p.name for p in model.iterdir()) == ["model.json", "model.safetensors"]
    assert notes["normal_images"] == len(notes["normal_scores"]) == 6
    assert notes["patches"] == 6 * 3 * 64
    assert notes["threshold"] >= max(notes["normal_scores"])
    out = tmp_path / "scores"
    run("score", category, "--model", model, "--maps", out, "--batch", 3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["measures"]["normal"] == summary["measures"]["anomalous"] == 4
    assert summary["measures"]["image_auroc"] == 1.0
    assert summary["measures"]["pixel_auroc"] > 0.9
    assert summary["measures"]["image_auroc_by_defect"] == {"hole": 1.0}
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [r["image"] for r in rows] == [f"good/{i}.png" for i in (0, 2, 4, 6)] + [
        f"hole/{i}.png" for i in (1, 3, 5, 7)
    ]
    assert all(r["anomalous"] == str(float(r["score"]) > notes["threshold"]).lower() for r in rows)
    maps = sorted(p.relative_to(out / "maps").as_posix() for p in (out / "maps").rglob("*.png"))
    assert maps == sorted(f"{r['image']}.png" for r in rows)
    assert np.asarray(Image.open(out / "maps/hole/1.png.png")).shape == (SIDE, 2 * SIDE, 3)
    assert not [p for p in out.iterdir() if "unfinished" in p.name or "partial" in p.name]
    assert "image auroc: 1.000" in capsys.readouterr().out


def test_any_folder_is_scored_without_labels(backbone, category, model, tmp_path):
    photos = tmp_path / "photos"
    gray, color = picture(np.random.default_rng(5))[0], np.random.default_rng(6).integers(0, 255, (20, 50, 4), np.uint8)
    save(photos / "a.png", gray)
    save(photos / "deep" / "b.png", color)  # transparent, and of another shape
    run("score", photos, "--model", model, "--maps", tmp_path / "out")
    assert [r["image"] for r in csv.DictReader((tmp_path / "out/scores.csv").open())] == ["a.png", "deep/b.png"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert "measures" not in summary
    assert summary["anomalous_images"] == 1
    assert np.asarray(Image.open(tmp_path / "out/maps/deep/b.png.png")).shape == (20, 100, 3)


def test_an_interrupted_fit_goes_on_to_the_same_model(backbone, category, model, tmp_path, monkeypatch, capsys):
    out, saved = tmp_path / "m", Unfinished.save

    def interrupted(self, done, arrays):
        saved(self, done, arrays)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(category, out)
    monkeypatch.setattr(Unfinished, "save", saved)
    refused(capsys, "holds an unfinished run; add --resume", lambda: fit(category, out))
    refused(capsys, "unfinished run there has other tau", lambda: fit(category, out, "--resume", "--tau", 0.9))
    fit(category, out, "--resume")
    for name in ("model.json", "model.safetensors"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_one_image_has_a_threshold_of_its_halves(backbone, category, tmp_path):
    save(tmp_path / "one/a.png", picture(np.random.default_rng(7))[0])
    fit(tmp_path / "one", tmp_path / "m")
    notes = json.loads((tmp_path / "m/model.json").read_text())
    assert len(notes["normal_scores"]) == 2
    assert notes["threshold"] >= max(notes["normal_scores"]) > 0


def refused(capsys, message, call):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ")
    assert err.startswith("subspace-jax anomaly: ")
    assert "Traceback" not in err


def test_mistakes_are_one_message_and_nothing_is_written(backbone, category, model, tmp_path, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    for message, options in {
        "--size 30: expected a multiple of the patch of 4 pixels; use 28 or 32": ("--size", 30),
        "--tau 2.0: expected": ("--tau", 2),
        "--layers 7: expected numbers from 0 to 2": ("--layers", 7),
        "--rotations -1": ("--rotations", -1),
        "no unfinished run to resume": ("--resume", "--out", model),
    }.items():
        refused(capsys, message, lambda options=options: fit(category, out, *options))
    refused(capsys, "holds no image", lambda: fit(empty, out))
    refused(capsys, "is no folder", lambda: fit(tmp_path / "absent", out))
    refused(capsys, "give one", lambda: fit(category.parent, out))
    refused(capsys, "is not empty; give another", lambda: fit(category, model))
    refused(capsys, "holds no model.json", lambda: run("score", category, "--model", empty, "--maps", out))
    refused(capsys, "--texture wood", lambda: run("demo", "--out", out, "--texture", "wood"))
    assert not out.exists()


def test_files_that_are_no_images_are_listed(backbone, tmp_path, capsys):
    save(tmp_path / "in/good.png", picture(np.random.default_rng(8))[0])
    (tmp_path / "in/bad.png").write_text("text")
    half = (tmp_path / "in/good.png").read_bytes()[:200]
    (tmp_path / "in/half.png").write_bytes(half)
    refused(capsys, "2 of 3 files are no images", lambda: fit(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_masks_that_are_no_images_are_refused_before_anything_is_scored(backbone, category, model, tmp_path, capsys):
    shutil.copytree(category, tmp_path / "stripes")
    (tmp_path / "stripes/ground_truth/hole/3_mask.png").write_text("text")
    call = lambda: run("score", tmp_path / "stripes", "--model", model, "--maps", tmp_path / "out")
    refused(capsys, "1 masks are no images", call)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_scoring_goes_on_to_the_same_scores(backbone, category, model, tmp_path, monkeypatch):
    monkeypatch.setattr(_anomaly_score, "SECONDS", -1.0)
    saved = Unfinished.save

    def interrupted(self, done, arrays):
        saved(self, done, arrays)
        if done == 6:
            raise KeyboardInterrupt

    call = lambda name, *more: run("score", category, "--model", model, "--maps", tmp_path / name, "--batch", 3, *more)
    monkeypatch.setattr(Unfinished, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("out")
    monkeypatch.setattr(Unfinished, "save", saved)
    call("out", "--resume")
    call("whole")
    for name in ("scores.csv", "summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_model_or_other_weights_are_refused(backbone, category, model, tmp_path, capsys):
    for name, change in {"x": {"format": "other"}, "y": {"threshold": None}, "z": {"backbone": "another"}}.items():
        folder = tmp_path / name
        folder.mkdir()
        notes = {**json.loads((model / "model.json").read_text()), **change}
        (folder / "model.json").write_text(json.dumps(notes))
        (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    call = lambda name: lambda: run("score", category, "--model", tmp_path / name, "--maps", tmp_path / "out")
    refused(capsys, "is a 'other'", call("x"))
    refused(capsys, "is damaged", call("y"))
    refused(capsys, "was fitted with another", call("z"))
    (tmp_path / "z/model.safetensors").write_bytes(b"no")
    refused(capsys, "is damaged", call("z"))
    assert not (tmp_path / "out").exists()


def test_threshold_is_above_all_normal_scores():
    assert _anomaly_model.threshold([1.0, 2.0, 3.0], 3.0) == pytest.approx(5.0)
    assert _anomaly_model.threshold([1.0, 1.0, 1.0, 9.0], 0.0) == 9.0


def test_batches_are_filled_up():
    parts = [np.full((n, 1), n) for n in (3, 1, 4)]
    found = list(in_equal_batches(parts, 3))
    assert [(len(batch), valid) for batch, valid in found] == [(3, 3), (3, 3), (3, 2)]
    assert [int(v) for batch, valid in found for v in batch[:valid, 0]] == [3, 3, 3, 1, 4, 4, 4, 4]


@pytest.mark.carried
def test_demo_finds_pasted_defects_in_a_real_texture(tmp_path, capsys):
    for name in assets.GROUPS["textures"]:
        if not assets.is_available(name):
            pytest.skip(f"{name} is not here: python -m experiments fetch {name}")
    run("demo", "--out", tmp_path / "demo", "--size", 112)
    measures = json.loads((tmp_path / "demo/results/summary.json").read_text())["measures"]
    assert measures["pixel_auroc"] > 0.7
    assert "pasted defects" in capsys.readouterr().out
