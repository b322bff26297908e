"""Film reviews on MiniLM and clothes on ViT-S; what they knew is judged by a linear probe of another task."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from experiments.tasks.league._job import Batch, Job, linear_probe, whole


class _Classes(Job):
    """A backbone with a linear head, and a fixed linear head of another task on the pretrained features."""

    scope = "backbone/encoder/**"
    head = MappingProxyType({"classifier/*": sj.full()})
    inputs: tuple[str, ...]

    def _finish(self, add_head: Any, other: dict[str, Batch], classes: int, other_classes: int) -> None:
        """Makes the model with its head, and the probe of the other task."""
        self._add_head = lambda seed: add_head(classes, seed)
        self._module = add_head(classes, 0).module
        self._other = add_head(other_classes, 0).module
        params = add_head(1, 0).params
        width = params["classifier"]["kernel"].shape[0]
        reader = add_head(width, 0).module  # an identity for a head gives the features
        identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
        features = jax.jit(lambda batch: self._call(reader, {**params, "classifier": identity}, batch))
        seen, known = other["train"], other["test"]
        parts = [
            np.asarray(features({k: v[i : i + 64] for k, v in seen.items()})) for i in range(0, len(seen["labels"]), 64)
        ]
        self._probe = linear_probe(np.concatenate(parts), np.asarray(seen["labels"]), other_classes)
        self.data = {**self.data, "known": known}

    def _call(self, module: Any, params: Any, batch: Batch) -> jax.Array:
        return module.apply({"params": params}, *(batch[name] for name in self.inputs))

    def start(self, seed: int) -> Any:
        """Returns pretrained parameters with a fresh head."""
        return self._add_head(seed).params

    def model(self, params: Any, batch: Batch) -> jax.Array:
        """Returns logits `[batch, classes]`."""
        return self._call(self._module, params, batch)

    def targets(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns all logits with the labels, each of weight one."""
        return logits, batch["labels"], jnp.ones(logits.shape[:1])

    def known_hits(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Judges the probe on the features that are left."""
        logits = self._call(self._other, {**params, "classifier": self._probe}, batch)
        return (logits.argmax(-1) == batch["labels"]).sum(), jnp.asarray(len(logits))


class TextClasses(_Classes):
    """Film reviews, good or bad, on MiniLM; it knew what news are about.

    Args:
      steps: optimizer steps of a run.
      batch_size: examples of a step.
      length: tokens of an example.
      train_size: training examples.
      test_size: examples of the validation and of the test split, each.
      layers: of the model; fewer are for tests.
    """

    name, known = "text", "topics of news (linear probe of Reuters R8)"
    kernels = "backbone/encoder/**/kernel"
    outputs, downs = "backbone/encoder/**/attention/output/kernel", "backbone/encoder/**/fc2/kernel"
    inputs = ("tokens", "mask")

    def __init__(
        self, *, steps: int, batch_size: int, length: int, train_size: int, test_size: int, layers: int | None = None
    ) -> None:
        from subspace_jax.data import load_text_task
        from subspace_jax.models import add_classifier, load_minilm

        self.steps, self.batch_size = steps, batch_size
        minilm = load_minilm() if layers is None else load_minilm(num_layers=layers)
        self.heads = minilm.config.num_heads
        sizes = {"train_size": train_size, "eval_size": whole(test_size), "max_length": length}
        tokenizer = minilm.load_tokenizer()
        task = load_text_task("rotten_tomatoes", tokenizer=tokenizer, **sizes)
        news = load_text_task("reuters_r8", tokenizer=tokenizer, **{**sizes, "train_size": max(train_size, 512)})
        self.data = {split: _named(task, split, self.inputs) for split in ("train", "validation", "test")}
        other = {split: _named(news, split, self.inputs) for split in ("train", "test")}

        def add_head(classes: int, seed: int) -> Any:
            return add_classifier(minilm, classes, jax.random.key(seed))

        self._finish(add_head, other, task.num_classes, news.num_classes)


class VisionClasses(_Classes):
    """Clothes of Fashion-MNIST on ViT-S/14 at 56 x 56 pixels; it knew handwritten digits apart.

    Args:
      steps: optimizer steps of a run.
      batch_size: examples of a step.
      train_size: training examples.
      test_size: examples of the validation and of the test split, each.
      layers: of the model; fewer are for tests.
    """

    name, known = "vision", "handwritten digits (linear probe of MNIST)"
    kernels = "backbone/encoder/**/kernel"
    scope = "backbone/encoder/**/{kernel,bias,norm1/scale,norm2/scale}"  # factors of branches have no shift
    outputs, downs = "backbone/encoder/**/attention/output/kernel", "backbone/encoder/**/fc2/kernel"
    inputs = ("images",)

    def __init__(
        self, *, steps: int, batch_size: int, train_size: int, test_size: int, layers: int | None = None
    ) -> None:
        from subspace_jax.data import load_image_task
        from subspace_jax.models import add_classifier, load_vit_small

        self.steps, self.batch_size = steps, batch_size
        vit = load_vit_small(9 if layers is None else layers)
        self.heads = vit.config.num_heads
        sizes = {"train_size": train_size, "eval_size": whole(test_size), "size": (56, 56)}
        task = load_image_task("fashion_mnist", **sizes)
        digits = load_image_task("mnist_5k", **{**sizes, "train_size": max(train_size, 512)})
        self.data = {split: _images(task, split) for split in ("train", "validation", "test")}
        other = {split: _images(digits, split) for split in ("train", "test")}

        def add_head(classes: int, seed: int) -> Any:
            return add_classifier(vit, classes, jax.random.key(seed))

        self._finish(add_head, other, task.num_classes, digits.num_classes)


def _named(task: Any, split: str, names: tuple[str, ...]) -> Batch:
    arrays = task.arrays(split)
    count = len(arrays["labels"]) if split == "train" else whole(len(arrays["labels"]))
    return {name: arrays[name][:count] for name in (*names, "labels")}


def _images(task: Any, split: str) -> Batch:
    """Images of three channels, normalized."""
    from subspace_jax.models import normalize_images

    found = _named(task, split, ("images",))
    scaled = np.repeat(found["images"].astype(np.float32) / task.full_scale, 3, axis=-1)
    return {**found, "images": np.asarray(normalize_images(scaled))}
