"""Images of every form arrive as they are meant to be seen."""

import numpy as np
import pytest

from subspace_jax.data import DataError, list_images, read_image, square_image

Image = pytest.importorskip("PIL.Image")


def test_a_turn_by_exif_is_made(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    assert found.shape == (3, 2, 3)
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, :, 0], [0, 1, 255])


def test_transparent_places_are_white_in_every_form(tmp_path):
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), [[[10, 20, 30], [255, 255, 255]]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([5, 5, 5, 9, 9, 9])
    palette.save(tmp_path / "p.gif", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "p.gif"), [[[5, 5, 5], [255, 255, 255]]])


def test_cmyk_and_the_first_frame(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = read_image(tmp_path / "a.jpg")[0, 0].astype(int)
    assert red[0] > 200
    assert red[1:].max() < 60
    frames = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "a.webp")[0, 0, 0] == 10


def test_suffixes_in_any_case_hidden_files_passed_over(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.PNG", "inner/a.png", ".hidden.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, format="png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in list_images(tmp_path)] == ["b.PNG", "a.png"]
    with pytest.raises(DataError, match="no such folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        list_images(tmp_path / "empty")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(DataError, match=r"bad\.png"):
        read_image(tmp_path / "bad.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "whole.png")
    raw = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"cut\.png"):
        read_image(tmp_path / "cut.png")


def test_the_square_is_the_middle():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200
    assert (square_image(pixels, 4) == 200).all()
