"""The layout of MVTec AD, which the test makes: what is found, labels and masks, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from subspace_jax.data import anomaly_categories, is_anomaly_folder, load_anomaly_folder


def save(path, value=0, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((side, side), np.uint8)
    array[: value and 2, :3] = 255
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path):
    for name in ("000", "001", "002"):
        save(tmp_path / f"cable/train/good/{name}.png")
    for name in ("good/000", "good/001", "bent/000", "cut/000"):
        save(tmp_path / f"cable/test/{name}.png")
    save(tmp_path / "cable/ground_truth/bent/000_mask.png", 1)
    save(tmp_path / "cable/ground_truth/cut/000.bmp", 1)  # as some converted sets name them
    save(tmp_path / "other/a.png")
    return tmp_path


def test_categories_are_found(root):
    assert anomaly_categories(root) == ("cable",)
    assert is_anomaly_folder(root / "cable")
    assert not is_anomaly_folder(root)
    assert anomaly_categories(root / "absent") == ()


@pytest.mark.parametrize("inside", [False, True])
def test_a_category_has_labels_and_masks(root, inside):
    category = load_anomaly_folder(root / "cable") if inside else load_anomaly_folder(root, "cable", size=(4, 6))
    assert category.name == "cable"
    assert len(category.train) == 3
    assert category.defects == ("bent", "cut", "good", "good")
    np.testing.assert_array_equal(category.labels, [True, True, False, False])
    assert next(category.test.batches(4)).shape == ((4, 8, 8, 3) if inside else (4, 4, 6, 3))
    masks = category.read_masks((8, 8))
    expected = np.zeros((8, 8), bool)
    expected[:2, :3] = True
    np.testing.assert_array_equal(masks, [expected, expected, np.zeros((8, 8)), np.zeros((8, 8))])
    assert category.read_masks((4, 4))[0].sum() == 2  # rows 0 of 0, 2, 4, 6; columns 0 and 2 of the three


def test_masks_are_optional_but_whole(root):
    (root / "cable/ground_truth/cut/000.bmp").unlink()
    with pytest.raises(ValueError, match=r"1 test images have no mask.*cut/000_mask\.png"):
        load_anomaly_folder(root, "cable")
    (root / "cable/ground_truth/bent/000_mask.png").unlink()
    for folder in ("bent", "cut", ""):
        (root / "cable/ground_truth" / folder).rmdir()
    category = load_anomaly_folder(root, "cable")
    assert not category.has_masks
    with pytest.raises(ValueError, match="no folder `ground_truth`"):
        category.read_masks((8, 8))


def test_another_layout_is_refused(root):
    with pytest.raises(ValueError, match=r"expected a folder with `train/good`.*categories cable"):
        load_anomaly_folder(root, "cabel")
    save(root / "cable/test/loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no folder"):
        load_anomaly_folder(root, "cable")
