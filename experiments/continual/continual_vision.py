"""Split Fashion-MNIST, class-incremental: two classes at a time, and at test all classes seen so far.

A pretrained ViT-S on images of 56 x 56, with a head for each pair of classes. Training compares the two classes of the
task alone; at test the logits of all heads so far stand side by side and the largest one decides, as in the paper of
CoSO; beside that, the accuracy among the two classes of the task. Logits are 10 times the cosine of features and class
vectors, so that heads which never met can be compared. The methods are those of `continual_text`; joint training
compares all classes.

So that it runs in an hour on one core, the lower seven of nine blocks are frozen and run once for all images, a step
has 8 images and a test split 200 of each pair.

    python -m experiments run continual_vision
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks import frozen_layers, streams

CLASSES = 2  # of a task


@dataclasses.dataclass(frozen=True)
class ContinualVisionConfig(streams.StreamConfig):
    """Settings: those of `StreamConfig`, and these.

    Attributes:
      blocks: of the transformer.
      layers: that learn, counted from the last.
      size: height and width of the images, a multiple of 14.
      train_size: training images of all classes.
      test_size: images of the validation and of the test split, of all classes.
    """

    blocks: int = 9
    layers: int = 2
    size: int = 56
    train_size: int = 6000
    test_size: int = 1000


def load(config: ContinualVisionConfig) -> streams.StreamData:
    """Returns the transformer and the images."""
    from subspace_jax.data import load_image_task
    from subspace_jax.models import load_vit_small

    vit = load_vit_small(config.blocks)
    size = (config.size, config.size)
    task = load_image_task("fashion_mnist", train_size=config.train_size, eval_size=config.test_size, size=size)
    return make_data(vit.module, vit.params, task, config.layers)


def make_data(module: Any, params: Any, images: Any, layers: int) -> streams.StreamData:
    """Returns what runs need of a vision transformer and of images.

    Args:
      module: a `Vit`.
      params: its parameters.
      images: an `ImageTask` with an even number of classes.
      layers: that learn.
    """
    from subspace_jax.models import normalize_images, pool_tokens

    lower, upper, backbone = frozen_layers.cut(module, params, layers)
    tasks = images.num_classes // CLASSES
    classes = [CLASSES] * tasks
    hidden = {
        name: frozen_layers.run_lower(lower, params, np.asarray(normalize_images(part.images)))
        for name, part in images.splits.items()
    }

    def arrays(split: str, task: int) -> dict[str, np.ndarray]:
        labels = images[split].labels
        chosen = labels // CLASSES == task
        return {"hidden": hidden[split][chosen], "labels": labels[chosen] % CLASSES}

    def logits(params: Any, batch: Any) -> jax.Array:
        blank = jnp.zeros((len(batch["hidden"]), *images["train"].images.shape[1:3], 3))
        tokens = frozen_layers.run_upper(upper, params["backbone"], batch["hidden"], blank)
        return streams.head_logits(pool_tokens(tokens, "cls+mean"), params["heads"], classes)

    def start(seed: int) -> Any:
        return {"backbone": backbone, "heads": streams.start_heads(seed, 2 * module.config.width, classes)}

    return streams.StreamData(
        names=tuple(" and ".join(images.label_names[CLASSES * t : CLASSES * (t + 1)]) for t in range(tasks)),
        splits=[{split: arrays(split, t) for split in ("train", "validation", "test")} for t in range(tasks)],
        logits=logits,
        start=start,
        kernels="backbone/encoder/*/attention/*/kernel",
        outputs="backbone/encoder/*/attention/output/kernel",
    )


EXPERIMENT = streams.experiment(
    "continual_vision",
    "Two classes of clothes at a time, told apart from all before: what projected updates keep.",
    ContinualVisionConfig,
    load,
    assets=("vision",),
)
