"""Fine-tuning a pretrained MiniLM on one real text task: what several experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context
from experiments.tasks.training import Trained, Trainer, evaluate, warmup_linear

KERNELS = "backbone/encoder/**/kernel"


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
        """Yields a split once, in order."""
        for batch in self.task.batches(split, 64, shuffle=False, drop_remainder=False):
            yield {k: batch[k] for k in ("tokens", "mask", "labels")}

    def trainer(
        self,
        method: str,
        learning_rate: float,
        optimizer: Callable[[optax.Schedule], optax.GradientTransformation] | None = None,
    ) -> Trainer:
        """Returns the trainer of a method, compiled for its first seed and kept for the others.

        Args:
          method: names the structure of what is trained.
          learning_rate: peak of the schedule.
          optimizer: makes an optimizer of a schedule; AdamW without decay if None.
        """
        if (method, learning_rate) not in self._trainers:
            schedule = warmup_linear(learning_rate, self.steps)
            made = optax.adamw(schedule, weight_decay=0.0) if optimizer is None else optimizer(schedule)
            self._trainers[method, learning_rate] = Trainer(self.loss, made)
        return self._trainers[method, learning_rate]

    def train(
        self, trainer: Trainer, adapted: Any, seed: int, title: str, context: Context
    ) -> tuple[Trained, float, np.ndarray]:
        """Trains while a bar shows loss and step time; returns the end, test accuracy and test logits."""
        with context.progress() as progress:
            bar = progress.add_task(title, total=self.steps, note="compiling")

            def on_step(loss: float, seconds: float) -> None:
                progress.update(bar, advance=1, note=f"loss {loss:.2f} {1000 * seconds:.0f} ms")

            trained = trainer.run(adapted, self.batches(seed), on_step)
            accuracy, logits = evaluate(self.logits, trained.adapted, self.held_out("test"))
            progress.update(bar, note=f"test {100 * accuracy:.1f}%")
        return trained, accuracy, logits
