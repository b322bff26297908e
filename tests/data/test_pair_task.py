"""Emoji as images with captions: what is read of the packages, and what a task holds of it."""

import io
import json

import numpy as np
import pytest

from subspace_jax.data import load_pair_task
from subspace_jax.data._emoji import CATEGORIES, google

Image = pytest.importorskip("PIL.Image")


def png(color, opaque):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = opaque
    pixels[:8, :, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def carrier(style, count=30):
    entries, files = [], {}
    for i in range(count):
        name = f"{i:04x}"
        entry = {"name": f"THING {i:02d}", "unified": name, "image": f"{name}.png", "category": CATEGORIES[i % 3]}
        entry |= {"subcategory": f"topic-{i % 5}", f"has_img_{style}": i != 7}
        entries.append(entry)
        files[f"package/img/{style}/64/{name}.png"] = png((i, 100, 0 if style == "google" else 200), 255 if i else 128)
    return files | {"package/emoji.json": json.dumps(entries).encode()}


@pytest.fixture
def styles(lay_carrier):
    for style in ("google", "twitter"):
        lay_carrier(f"emoji-{style}", carrier(style))


def test_images_are_on_white_paper(styles):
    first, *others = google()
    assert first.image[0, 0].tolist() == [255, 255, 255]
    # Half of the color (0, 100, 0) and half of white.
    np.testing.assert_allclose(first.image[20, 20], [127, 177, 127], atol=1)
    assert others[0].image[20, 20].tolist() == [1, 100, 0]
    assert (first.text, first.topic, first.group) == ("thing 00", "topic-0", "0000")
    assert len(others) == 28  # one has no image in this style


def test_both_styles_have_the_same_things_in_the_same_splits(styles, tfds):
    tasks = [load_pair_task(f"emoji_{style}") for style in ("google", "twitter")]
    assert sum(len(split) for split in tasks[0].splits.values()) == 29
    for name, split in tasks[0].splits.items():
        other = tasks[1][name]
        assert split.texts == other.texts == tuple(sorted(split.texts))
        np.testing.assert_array_equal(split.topics, other.topics)
        np.testing.assert_array_equal(split.images[..., :2], other.images[..., :2])
        for i, text in enumerate(split.texts):
            number = int(text.split()[1])
            assert tasks[0].category_names[split.categories[i]] == CATEGORIES[number % 3]
            assert tasks[0].topic_names[split.topics[i]] == f"topic-{number % 5}"
            assert number == 0 or split.images[i, 30, 30].tolist() == [number, 100, 0]
    batch = next(iter(tasks[0].batches("train", 4)))
    assert (batch["images"].dtype, batch["images"].max()) == (np.float32, 1.0)
    assert all(text in tasks[0]["train"].texts for text in batch["texts"])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no image-text task is called 'emoji'; there are emoji_google, emoji_twitter"):
        load_pair_task("emoji")


@pytest.mark.carried
def test_the_carried_emoji(need, tfds):
    need("emoji-google")
    task = load_pair_task("emoji_google")
    assert sum(len(split) for split in task.splits.values()) == 1911
    assert (len(task.category_names), len(task.topic_names)) == (10, 99)
    assert "christmas tree" in task["test"].texts
