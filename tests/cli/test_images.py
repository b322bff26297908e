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


def listed(folder, names=("image", "label"), suffix="jsonl"):
    """A table of the images, beside their folder."""
    rows = [
        {names[0]: str(file.relative_to(folder.parent)), names[1]: file.parent.name, "text": f"photo {file.name}"}
        for file in sorted(folder.rglob("*.*"))
    ]
    path = folder.parent / f"list.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    return path


OPTIONS = ("--model", "tiny-vit", "--batch", 8, "--rank", 2, "--learning-rate", 0.02, "--image-size", 12)


@pytest.mark.parametrize(
    ("suffix", "names"), [("jsonl", ("image", "label")), ("csv", ("photo", "kind"))], ids=["jsonl", "csv"]
)
def test_a_list_of_images_is_learned_and_evaluated(suffix, names, flowers, shell, tmp_path):
    table = listed(flowers, names, suffix)
    renamed = () if names[0] == "image" else ("--columns", "image=photo", "label=kind")
    done = shell("finetune", table, *OPTIONS, "--epochs", 4, "--out", tmp_path / "run", *renamed)
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (data["classes"], data["rows"], data["ignored_columns"]) == (["blue", "red"], 20, ["text"])
    first = 1 if suffix == "jsonl" else 2
    assert sorted(data["train_numbers"] + data["validation_numbers"]) == list(range(first, first + 20))
    done = shell("evaluate", tmp_path / "run", table, "--out", tmp_path / "all")
    assert done.code == 0, done.err
    by_list = json.loads((tmp_path / "all" / "metrics.json").read_text())
    done = shell("evaluate", tmp_path / "run", flowers, "--out", tmp_path / "folder")
    assert done.code == 0, done.err
    by_folder = json.loads((tmp_path / "folder" / "metrics.json").read_text())
    assert by_list["accuracy"] == by_folder["accuracy"] == 1.0
    np.testing.assert_allclose(by_list["loss"], by_folder["loss"], rtol=1e-5)


def test_a_list_for_validation_is_kept_apart(flowers, shell, tmp_path):
    lines = listed(flowers).read_text().splitlines(keepends=True)
    held = flowers.parent / "held.jsonl"
    held.write_text("".join(lines[::5]))
    rest = flowers.parent / "rest.jsonl"
    rest.write_text("".join(line for i, line in enumerate(lines) if i % 5))
    done = shell("finetune", rest, *OPTIONS, "--steps", 1, "--validation", held, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (len(data["train_numbers"]), data["validation_numbers"]) == (16, [1, 2, 3, 4])


def test_mistakes_in_a_list_are_named_by_their_lines(flowers, shell, tmp_path):
    table = listed(flowers)
    lines = table.read_text().splitlines()
    (flowers.parent / "bad.png").write_text("no image")

    def refused(*changed, model="tiny-vit"):
        table.write_text("\n".join([*lines, *changed]))
        done = shell("finetune", table, *OPTIONS, "--model", model, "--out", tmp_path / "run")
        assert done.code == 2
        assert not (tmp_path / "run").exists()
        return done.err

    found = refused('{"image": "gone.png", "label": "red"}', '{"image": "bad.png", "label": "red"}')
    assert "line 21" in found
    assert "no such file" in found
    assert "line 22" in found
    assert "lack 'image' and 'label'" in refused('{"image": "data/red/0.jpg"}')
    assert "'image' is empty" in refused('{"image": "", "label": "red"}')
    assert "labels of several types" in refused('{"image": "data/red/0.jpg", "label": 3}')
    lines = [line.replace('"text"', '"note"') for line in lines]
    assert "a list of images trains an image encoder" in refused(model="tiny-bert")
