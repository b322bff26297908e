"""A folder of images with a folder for each class becomes a classifier; what cannot be used is named."""

import json

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture
def flowers(tmp_path):
    """Ten red and ten blue images of several forms."""
    random = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 60, (14, 20, 3)).astype(np.uint8)
            pixels[..., channel] += 190
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.{'PNG' if i % 2 else 'jpg'}")
    return tmp_path / "data"


def test_a_folder_of_classes_is_learned_and_evaluated(flowers, shell, tmp_path):
    options = ("--batch", 8, "--rank", 2, "--epochs", 4, "--learning-rate", 0.02, "--image-size", 12)
    done = shell("finetune", flowers, "--model", "tiny-vit", "--out", tmp_path / "run", *options)
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["classes"] == ["blue", "red"]
    assert len(data["validation_numbers"]) == 2
    assert {name.split("/")[0] for name in data["validation_numbers"]} == {"red", "blue"}
    done = shell("evaluate", tmp_path / "run", flowers, "--out", tmp_path / "all")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["accuracy"] == 1.0


def test_mistakes_in_a_folder_are_named(flowers, shell, tmp_path):
    common = ("finetune", flowers, "--model", "tiny-vit", "--out", tmp_path / "run", "--image-size", 12)
    (flowers / "red" / "bad.png").write_text("no image")
    assert "bad.png" in shell(*common).err
    (flowers / "red" / "bad.png").unlink()
    Image.new("RGB", (4, 4)).save(flowers / "stray.png")
    assert "outside the folders of classes" in shell(*common).err
    (flowers / "stray.png").unlink()
    assert "multiple of the model's patches of 4" in shell(*common[:-1], 13).err
    assert "minilm" not in shell("finetune", flowers, "--model", "tiny-bert", "--out", tmp_path / "run").out
    assert not (tmp_path / "run").exists()
