"""`subspace-jax cluster` on features and on images: labels, the picture, and what it refuses."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from subspace_jax import cli, metrics
from subspace_jax.cli import cluster
from subspace_jax.cli._vision import VisionBackbone
from subspace_jax.models import PretrainedModel, Vit, small_vit


def run(data, out, *options):
    cli.main(["cluster", str(data), "--out", str(out), *map(str, options)])


@pytest.fixture
def lines(tmp_path):
    """Thirty points of three planes in twelve dimensions, shuffled, far from the origin."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    y = rng.permutation(np.repeat(np.arange(3), 20))
    x = np.stack([rng.normal(size=2) @ basis[2 * k : 2 * k + 2] for k in y])
    x = x - x.mean(0) + 5.0
    np.save(tmp_path / "features.npy", x)
    return tmp_path / "features.npy", y


def test_features_are_clustered_and_the_order_of_rows_is_kept(lines, tmp_path, capsys):
    data, y = lines
    run(data, tmp_path / "out", "--clusters", 3, "--kept", 3, "--widths", 8)
    rows = list(csv.DictReader((tmp_path / "out/clusters.csv").open()))
    assert [r["sample"] for r in rows] == [str(i) for i in range(60)]
    labels = np.array([int(r["cluster"]) for r in rows])
    assert metrics.clustering_accuracy(y, labels) > 0.9
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert sum(summary["sizes"]) == summary["samples"] == 60
    assert summary["affinity_inside_clusters"] > 0.8
    assert Image.open(tmp_path / "out/affinity.png").size == (720, 720)
    assert np.load(tmp_path / "out/latent.npy").shape == (60, 8)
    captured = capsys.readouterr()
    assert "3 clusters of" in captured.out
    assert "self-expression:" in captured.err


def test_images_are_clustered_by_what_they_show(tmp_path, monkeypatch):
    config = small_vit(final_norm=False)
    params = jax.jit(Vit(config).init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    monkeypatch.setattr(
        cluster,
        "load_vision_backbone",
        lambda weights: VisionBackbone("tiny", PretrainedModel(Vit(config), params, config)),
    )
    rng, kinds = np.random.default_rng(1), []
    (tmp_path / "photos").mkdir()
    for i in range(20):
        stripes = 127 + 100 * np.sin(np.arange(16) * (0.5 if i % 2 else 2.5) + rng.uniform(0, 6))
        image = np.broadcast_to(stripes, (16, 16)) + rng.normal(0, 5, (16, 16))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(tmp_path / f"photos/{i:02}.png")
        kinds.append(i % 2)
    run(tmp_path / "photos", tmp_path / "out", "--clusters", 2, "--size", 16, "--batch", 3, "--kept", 4, "--widths", 8)
    rows = list(csv.DictReader((tmp_path / "out/clusters.csv").open()))
    assert [r["sample"] for r in rows] == [f"{i:02}.png" for i in range(20)]
    assert metrics.clustering_accuracy(kinds, [int(r["cluster"]) for r in rows]) >= 0.8
    assert np.load(tmp_path / "out/features.npy").shape == (20, 32)


def test_mistakes_are_one_message_and_nothing_is_written(lines, tmp_path, capsys):
    data, out = lines[0], tmp_path / "out"
    np.save(tmp_path / "flat.npy", np.zeros(5))
    bad = np.load(data)
    bad[7, 3] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_text("no image")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")
    for message, source, options in (
        ("--clusters 1: expected", data, ("--clusters", 1)),
        ("holds 60 samples; expected more than --clusters 60", data, ("--clusters", 60)),
        ("--kept 0", data, ("--clusters", 3, "--kept", 0)),
        ("--widths 8 0", data, ("--clusters", 3, "--widths", 8, 0)),
        ("expected numbers of shape (samples, features)", tmp_path / "flat.npy", ("--clusters", 3)),
        ("row 7", tmp_path / "bad.npy", ("--clusters", 3)),
        ("is no readable array", tmp_path / "text.npy", ("--clusters", 3)),
        ("is no folder and no .npy file", tmp_path / "absent", ("--clusters", 3)),
        ("holds 1 samples", tmp_path / "pictures", ("--clusters", 2)),
    ):
        with pytest.raises(SystemExit) as ended:
            run(source, out, *options)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.startswith("subspace-jax cluster: ")
    with pytest.raises(SystemExit):
        run(data, full, "--clusters", 3)
    assert "is not empty" in capsys.readouterr().err
    assert not out.exists()
