"""Image tasks: packaged ones, and any tfds dataset that is prepared."""

import dataclasses
import os
from typing import Any

import numpy as np

from subspace_jax.data._labels import read_labels
from subspace_jax.data._prepare import PACKAGED_IMAGES, open_dataset, packaged_source
from subspace_jax.data._sources import ImageSource
from subspace_jax.data._task import Task, read_rows, require_features

_UINT8_SCALE = 255


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit:
    """One split of an image task.

    Attributes:
        images: uint8 [n, height, width, channels] as stored.
        labels: int32 [n] class indices.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTask(Task[ImageSplit]):
    """An image dataset in memory.

    Attributes:
        name: name of the dataset.
        splits: the splits by name.
        label_names: names of the classes.
        full_scale: stored value of a white pixel.
    """

    label_names: tuple[str, ...] = ()
    full_scale: int = _UINT8_SCALE

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """Returns a split's `images` as stored and its `labels`; `batches` gives images scaled to [0, 1]."""
        chosen = self[split]
        return {"images": chosen.images, "labels": chosen.labels}

    def batches(self, split: str, batch_size: int, **options: Any):
        """Iterates over an epoch of a split, with `images` as float32 in [0, 1].

        Args:
            split: name of the split.
            batch_size: examples in a batch.
            **options: `seed`, `epoch`, `start`, `shuffle` and `drop_remainder`, as in `Task.batches`.

        Returns:
            An iterator over dictionaries of float32 `images` and int32 `labels`.

        Raises:
            ValueError: there is no such split, batch_size or start is out of range, or no batch would be
            full.
        """
        scale = np.float32(1 / self.full_scale)
        batches = super().batches(split, batch_size, **options)
        return ({**batch, "images": batch["images"].astype(np.float32) * scale} for batch in batches)


def load_image_task(
    name: str,
    *,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    image_feature: str = "image",
    label_feature: str = "label",
    size: tuple[int, int] | None = None,
) -> ImageTask:
    """Loads an image dataset into memory: a packaged one, or any that tfds finds prepared.

    A packaged dataset is prepared in the cache when it is first asked for.

    Args:
        name: one of `image_tasks()`, or a tfds name such as `cifar10`.
        train_size: number of training examples to draw; all if None.
        eval_size: number of examples to draw of every other split; all if None or if the split has no more.
        seed: non-negative seed of the draws.
        data_dir: tfds folder; for packaged datasets `tfds` in the cache folder if None.
        image_feature: feature that holds the image.
        label_feature: feature that holds the label.
        size: height and width that all images are resized to; their own if None.

    Returns:
        The task, with the splits of the dataset (`train`, `validation`, `test` for packaged ones).

    Raises:
        AssetMissingError: the package that carries the dataset is not here.
        ImportError: the `tfds` extra is not installed.
        ValueError: the dataset is unknown or not prepared, has no such features, is smaller than asked, or
        its
            images differ in size and `size` is None.
    """
    info, sources = open_dataset(name, data_dir)
    require_features(name, info, (image_feature, label_feature), parameters="image_feature and label_feature")
    images: dict[str, np.ndarray] = {}
    values: dict[str, list[Any]] = {}
    for split, source in sources.items():
        wanted = train_size if split == "train" else eval_size
        examples = list(read_rows(name, split, source, wanted, seed=seed))
        images[split] = _stack(name, [np.asarray(example[image_feature]) for example in examples], size)
        values[split] = [example[label_feature] for example in examples]
    labels, label_names = read_labels(name, info, label_feature, values)
    packaged = packaged_source(name) if info.name == PACKAGED_IMAGES else None
    return ImageTask(
        name=name,
        splits={split: ImageSplit(images[split], array) for split, array in labels.items()},
        label_names=label_names,
        full_scale=packaged.full_scale if isinstance(packaged, ImageSource) else _UINT8_SCALE,
    )


def _stack(name: str, images: list[np.ndarray], size: tuple[int, int] | None) -> np.ndarray:
    kinds = {(image.dtype.name, image.ndim) for image in images}
    if not kinds <= {("uint8", 3)}:
        raise ValueError(f"dataset {name!r}: images must be uint8 [height, width, channels], not {sorted(kinds)}")
    if size is not None:
        images = [_resize(image, size) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"dataset {name!r}: images have {len(shapes)} different shapes, such as "
            f"{sorted(shapes)[:2]}; choose one with size=(height, width)"
        )
    return np.stack(images) if images else np.zeros((0, 0, 0, 0), np.uint8)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    height, width = size
    flat = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(flat).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(height, width, image.shape[-1])
