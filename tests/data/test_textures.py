"""Pasted defects change the picture where their mask is, and nowhere else by much."""

import io

import numpy as np
import pytest
from PIL import Image

from subspace_jax.data import load_texture_task, textures


@pytest.fixture
def photos(lay_carrier):
    rng = np.random.default_rng(0)
    files = {}
    for name in textures():
        stream = io.BytesIO()
        Image.fromarray(rng.integers(60, 190, (512, 512), np.uint8)).save(stream, "png")
        files[f"skimage/data/{name}.png"] = stream.getvalue()
    lay_carrier("scikit-image", files)


def test_every_second_crop_has_a_defect_inside_its_mask(photos):
    task = load_texture_task("brick", shots=3, tests=16, side=96, seed=1)
    assert task.train.shape == (3, 96, 96, 3)
    assert task.test.shape == (16, 96, 96, 3)
    assert task.defects[::2] == ("good",) * 8
    assert set(task.defects[1::2]) == {"patch", "scratch", "blur", "spot"}
    np.testing.assert_array_equal(task.masks.any((1, 2)), task.labels)
    assert (task.masks.mean((1, 2)) < 0.1).all()


def test_left_and_right_halves_do_not_meet_and_the_seed_decides(photos, monkeypatch):
    one, same, other = (load_texture_task("grass", tests=8, side=96, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.test, same.test)
    assert (one.test != other.test).any()
    from subspace_jax.data import _textures

    monkeypatch.setattr(_textures, "_paste", lambda rng, crop, *rest: (crop, np.ones(crop.shape, bool)))
    from subspace_jax.assets import find_file
    from subspace_jax.data import read_image

    photo = read_image(find_file("scikit-image", "data/grass.png"))[..., 0]
    views = np.lib.stride_tricks.sliding_window_view(photo, (1, 96))[:, :, 0]
    task = load_texture_task("grass", tests=4, side=96)
    for crops, columns in ((task.train, range(161)), (task.test, range(256, 417))):
        for crop in crops[..., 0]:
            found = np.argwhere((views == crop[0]).all(-1))
            assert len(found) == 1
            assert found[0, 1] in columns


@pytest.mark.parametrize("options", [{"side": 300}, {"side": 16}, {"shots": 0}, {"tests": 1}])
def test_numbers_out_of_range_are_refused(photos, options):
    with pytest.raises(ValueError, match="expected a side of 32 to 256"):
        load_texture_task("brick", **options)


def test_an_unknown_texture_is_refused():
    with pytest.raises(ValueError, match="brick, grass, gravel"):
        load_texture_task("wood")
