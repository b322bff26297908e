"""Folders of images: found, read in color at one size, and refused by name where they are damaged."""

import numpy as np
import pytest
from PIL import Image

from subspace_jax.data import load_image_folder, read_image, unreadable


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_images_are_found_in_subfolders_and_read_in_order(tmp_path):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (6, 4, 3), np.uint8) for name in ("b.png", "a/x.bmp", "c.TIFF")}
    for name, image in images.items():
        save(tmp_path / name, image)
    save(tmp_path / ".hidden/z.png", images["b.png"])
    (tmp_path / "notes.txt").write_text("no image")
    folder = load_image_folder(tmp_path)
    assert folder.names == ("a/x.bmp", "b.png", "c.TIFF")
    batches = list(folder.batches(2))
    assert [b.shape for b in batches] == [(2, 6, 4, 3), (1, 6, 4, 3)]
    np.testing.assert_array_equal(np.concatenate(batches), [images[n] for n in folder.names])
    np.testing.assert_array_equal(next(folder.batches(2, start=1)), [images["b.png"], images["c.TIFF"]])


def test_every_mode_becomes_color(tmp_path):
    gray = np.array([[0, 200]], np.uint8)
    save(tmp_path / "gray.png", gray)
    save(tmp_path / "deep.png", (gray.astype(np.uint16) * 257))
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1] = (10, 20, 30, 255)
    save(tmp_path / "clear.png", clear)
    for name in ("gray.png", "deep.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat(gray[..., None], 3, -1))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), [[[255, 255, 255], [10, 20, 30]]])


def test_a_camera_that_lay_on_its_side_is_turned(tmp_path):
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 0] = 255
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise to see it upright
    save(tmp_path / "a.png", image, exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(image, -1))


def test_resizing_averages_and_keeps_constants(tmp_path):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (8, 16, 3), np.uint8)
    save(tmp_path / "a.png", image)
    small = load_image_folder(tmp_path, (4, 4))
    assert next(small.batches(1)).shape == (1, 4, 4, 3)
    assert abs(next(small.batches(1)).mean() - image.mean()) < 4
    save(tmp_path / "a.png", np.full((8, 16, 3), 77, np.uint8))
    assert (next(small.batches(1)) == 77).all()


def test_what_is_no_image_is_named(tmp_path):
    save(tmp_path / "good.png", np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "bad.png").write_text("text")
    (line,) = unreadable(load_image_folder(tmp_path).paths)
    assert line.startswith(f"{tmp_path / 'bad.png'}: cannot be read as an image")
    with pytest.raises(ValueError, match=r"bad\.png: cannot be read"):
        read_image(tmp_path / "bad.png")


def test_impossible_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        load_image_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no image"):
        load_image_folder(tmp_path)
    save(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    save(tmp_path / "b.png", np.zeros((3, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="give a size"):
        next(load_image_folder(tmp_path).batches(2))


def test_palettes_cmyk_and_first_frames(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette = palette.convert("P")
    palette.putpalette([5, 5, 5, 9, 9, 9])
    palette.save(tmp_path / "p.gif", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "p.gif"), [[[5, 5, 5], [255, 255, 255]]])
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = read_image(tmp_path / "a.jpg")[0, 0].astype(int)
    assert red[0] > 200
    assert red[1:].max() < 60
    frames = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "a.webp")[0, 0, 0] == 10


def test_a_dark_image_of_sixteen_bits_stays_dark(tmp_path):
    Image.fromarray(np.array([[0, 200]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").max() == 1


def test_a_cut_file_is_named(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "whole.png")
    raw = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"cut\.png"):
        read_image(tmp_path / "cut.png")
