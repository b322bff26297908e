"""Fine-tuning a pretrained MiniLM on one real text task: what several experiments share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context
from experiments.tasks.training import Trained, Trainer, warmup_linear

KERNELS = "backbone/encoder/**/kernel"
# Held-out texts that are judged at once.
JUDGED = 64


class TextJob:
    """One task with its model: everything that runs of different methods and seeds share.

    Args:
      name: one of `subspace_jax.data.text_tasks()` with class labels.
      steps: optimizer steps of a run.
      batch_size: examples of a step.
      max_length: tokens of an example.
      train_size: training examples that a run may see.
      test_size: examples of the test split.
    """

    def __init__(
        self, name: str, *, steps: int, batch_size: int, max_length: int, train_size: int, test_size: int
    ) -> None:
        from subspace_jax.data import load_text_task
        from subspace_jax.models import add_classifier, load_minilm

        self.name, self.steps, self.batch_size = name, steps, batch_size
        minilm = load_minilm()
        self._add_head = lambda seed: add_classifier(minilm, self.task.num_classes, jax.random.key(seed))
        self.task = load_text_task(
            name,
            tokenizer=minilm.load_tokenizer(),
            max_length=max_length,
            train_size=train_size,
            eval_size=test_size,
        )
        module = self._add_head(0).module
        self.model = lambda params, batch: module.apply({"params": params}, batch["tokens"], batch["mask"])
        self.apply = sj.with_adapters(self.model)
        self.logits = jax.jit(self.apply)
        self._trainers: dict[tuple[str, float], Trainer] = {}

    def start(self, seed: int) -> Any:
        """Returns pretrained parameters with a fresh head."""
        return self._add_head(seed).params

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Returns the mean cross-entropy."""
        logits = self.apply(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def batches(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields the training batches of a run: epochs of the seed's order, until the steps are done."""
        left, epoch = self.steps, 0
        while left > 0:
            for batch in self.task.batches("train", self.batch_size, seed=seed, epoch=epoch):
                if left == 0:
                    return
                left -= 1
                yield {k: batch[k] for k in ("tokens", "mask", "labels")}
            epoch += 1

    def held_out(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        """Yields a split once, short texts first, each batch as long as its longest text: two thirds of the work."""
        everything = self.task.arrays(split)
        arrays = {k: everything[k] for k in ("tokens", "mask", "labels")}
        lengths = arrays["mask"].sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), JUDGED):
            chosen = order[start : start + JUDGED]
            # In eights, so that few lengths are compiled.
            length = min(arrays["mask"].shape[1], -(-int(lengths[chosen].max()) // 8) * 8)
            yield {k: v[chosen][:, :length] if v.ndim == 2 else v[chosen] for k, v in arrays.items()}

    def trainer(self, method: str, learning_rate: float) -> Trainer:
        """Returns the trainer of a method, compiled for its first seed and kept for the others.

        Args:
          method: names the structure of what is trained.
          learning_rate: peak of the schedule.
        """
        if (method, learning_rate) not in self._trainers:
            schedule = warmup_linear(learning_rate, self.steps)
            self._trainers[method, learning_rate] = Trainer(self.loss, optax.adamw(schedule, weight_decay=0.0))
        return self._trainers[method, learning_rate]

    def train(self, trainer: Trainer, adapted: Any, seed: int, title: str, context: Context) -> Trained:
        """Trains while a bar shows loss and step time; returns the end."""
        with context.progress() as progress:
            bar = progress.add_task(title, total=self.steps, note="compiling")

            def on_step(loss: float, seconds: float) -> None:
                progress.update(bar, advance=1, note=f"loss {loss:.2f} {1000 * seconds:.0f} ms")

            return trainer.run(adapted, self.batches(seed), on_step)
