"""Eight real text tasks read by one MiniLM, each through a fixed head of its own, and the training of experts on them.

Heads are linear probes of the pretrained features, from a few examples of each class: what class names are to an
image-text model. They stay as they are, so experts differ in the encoder alone, and that is what is merged. Embeddings
stay as they are, too. All tasks have arrays of one shape; logits of classes that a task lacks are minus infinity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks.training import warmup_linear

# Film reviews of another source, a second cut of Reuters and ratings of the same texts would be no tasks of their own.
TASKS = (
    *("rotten_tomatoes", "newsgroups20", "reuters_r8", "tweet_author"),
    *("spam_assassin", "languages_latin12", "vader_tweets", "vader_products"),
)

# Examples that go through the encoder at once when models are judged.
JUDGED = 64

Arrays = dict[str, jax.Array]


class EightTexts:
    """The tasks, their heads and the encoder.

    Args:
      layers: of MiniLM, the first ones.
      length: tokens of an example.
      sizes: examples by split, of each task; those of "validation" and "test" are judged 64 at a time at most.
      shots: examples of each class that heads are made from, those of the training split.
      tasks: names of the tasks.

    Attributes:
      base: the pretrained encoder's parameters, without embeddings.
      data: by split, `tokens`, `mask` `[tasks, n, length]` and `labels` `[tasks, n]`.
      heads: `kernel` `[tasks, width, classes]`, `bias` `[tasks, classes]`.
    """

    def __init__(
        self, *, layers: int, length: int, sizes: dict[str, int], shots: int, tasks: tuple[str, ...] = TASKS
    ) -> None:
        from subspace_jax.data import load_text_task
        from subspace_jax.models import load_minilm, mean_pool

        minilm = load_minilm(num_layers=layers)
        tokenizer: Any = minilm.load_tokenizer
        embeddings, self.base = minilm.params["embeddings"], minilm.params["encoder"]
        held_out = max(size for split, size in sizes.items() if split != "train")

        def features(encoder: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            params = {"embeddings": embeddings, "encoder": encoder}
            hidden: Any = minilm.module.apply({"params": params}, tokens, mask)
            return mean_pool(hidden, mask)

        self.features: Callable[[Any, jax.Array, jax.Array], jax.Array] = features
        found = [
            load_text_task(
                name,
                tokenizer=tokenizer(),
                max_length=length,
                train_size=sizes["train"],
                eval_size=held_out,
            )
            for name in tasks
        ]
        self.names, self.classes = tasks, [task.num_classes for task in found]
        self.data: dict[str, Arrays] = {
            split: {
                name: jnp.asarray(np.stack([task.arrays(split)[name][:size] for task in found]))
                for name in ("tokens", "mask", "labels")
            }
            for split, size in sizes.items()
        }
        self.heads = self._probes(shots)
        self._fits: dict[str, Any] = {}

    def logits(self, encoder: Any, task: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the logits of a task's examples; `task` may be traced."""
        head = jax.tree.map(lambda v: v[task], self.heads)
        return self.features(encoder, tokens, mask) @ head["kernel"] + head["bias"]

    def loss(self, encoder: Any, task: Any, batch: Arrays) -> jax.Array:
        """Returns the mean cross-entropy of a task's examples; the encoder may have stand-in weights."""
        logits = sj.with_adapters(self.logits)(encoder, task, batch["tokens"], batch["mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def expert(self, adapted: Any, kind: str, task: int, rate: float, seed: int, steps: int, batch_size: int) -> Any:
        """Trains what learns of an encoder on one task; a program a kind serves all tasks, rates and seeds."""

        def fit(adapted: Any, task: jax.Array, rate: jax.Array, rows: jax.Array) -> Any:
            shape = warmup_linear(1.0, steps)

            def objective(adapted: Any, rows: jax.Array) -> jax.Array:
                return self.loss(adapted, task, {name: v[task, rows] for name, v in self.data["train"].items()})

            optimizer = optax.adam(lambda count: rate * shape(count))
            return sj.training.scan_steps(objective, optimizer, adapted, rows).adapted

        compiled = self._fits.setdefault(kind, jax.jit(fit))
        rng, count = np.random.default_rng([seed, task]), self.data["train"]["labels"].shape[1]
        epochs = -(-steps * batch_size // count)
        rows = np.concatenate([rng.permutation(count) for _ in range(epochs)])[: steps * batch_size]
        return compiled(adapted, jnp.int32(task), jnp.float32(rate), jnp.asarray(rows.reshape(steps, batch_size)))

    def accuracies(self, encoder: Any, split: str, task: int | None = None) -> list[float]:
        """Returns the share of a split that plain parameters read right, for every task or a list of one."""
        chosen = slice(None) if task is None else slice(task, task + 1)
        found = self._accuracies(encoder, *jax.tree.map(lambda v: v[chosen], (self.data[split], self.heads)))
        return [round(float(share), 4) for share in found]

    @functools.cached_property
    def _accuracies(self) -> Callable[[Any, Arrays, Arrays], jax.Array]:
        def score(encoder: Any, data: Arrays, heads: Arrays) -> jax.Array:
            tasks, count, length = data["tokens"].shape
            chunk = next(size for size in range(JUDGED, 0, -1) if tasks * count % size == 0)
            chunked = [data[name].reshape(-1, chunk, length) for name in ("tokens", "mask")]
            found = jax.lax.map(lambda one: self.features(encoder, *one), tuple(chunked))
            logits = jnp.einsum("tnd,tdc->tnc", found.reshape(tasks, count, -1), heads["kernel"])
            logits = logits + heads["bias"][:, None]
            return jnp.mean(logits.argmax(-1) == data["labels"], axis=1)

        return jax.jit(score)

    def fisher(self, encoder: Any, task: int, count: int) -> dict[str, jax.Array]:
        """Returns the mean squared gradients of single training examples, by path; plain parameters."""
        found = self._fisher(encoder, jnp.int32(task), count)
        return dict(sj.core.leaves_with_paths(found))

    @functools.cached_property
    def _fisher(self) -> Any:
        def squares(encoder: Any, task: jax.Array, count: int) -> Any:
            def add(total: Any, row: jax.Array) -> tuple[Any, None]:
                one = {name: v[task, row][None] for name, v in self.data["train"].items()}
                gradient = jax.grad(self.loss)(encoder, task, one)
                return jax.tree.map(lambda t, g: t + g * g / count, total, gradient), None

            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, encoder), jnp.arange(count))[0]

        return jax.jit(squares, static_argnums=2)

    def grams(self, encoder: Any, task: int, count: int) -> dict[str, Any]:
        """Returns the Gram matrices of the inputs of every kernel, on training examples."""
        arrays = {name: self.data["train"][name][task, :count] for name in ("tokens", "mask")}
        batches = [{k: v[i : i + 32] for k, v in arrays.items()} for i in range(0, count, 32)]
        found = sj.capture(self._capture, encoder, batches, select="**/kernel")
        return {path: one.gram for path, one in found.items()}

    @functools.cached_property
    def _capture(self) -> Callable[[Any, Arrays], jax.Array]:
        """One function object, so that capturing compiles once."""
        return lambda encoder, batch: self.features(encoder, batch["tokens"], batch["mask"])

    def _probes(self, shots: int) -> Arrays:
        """A linear head a task, by logistic regression on centered features of one common scale."""
        from sklearn.linear_model import LogisticRegression

        train, heads = self.data["train"], []
        features = jax.jit(self.features)
        for task, classes in enumerate(self.classes):
            labels = np.asarray(train["labels"][task])
            rows = np.concatenate([np.flatnonzero(labels == c)[:shots] for c in range(classes)])
            if len(np.unique(labels[rows])) != classes:
                raise ValueError(f"{self.names[task]}: a class is missing among {len(labels)} training examples.")
            x = np.concatenate(
                [
                    np.asarray(features(self.base, train["tokens"][task, r], train["mask"][task, r]))
                    for r in _parts(rows)
                ]
            )[: len(rows)]
            # One scale for all features: some are constant up to rounding, and would be blown up.
            mean, scale = x.mean(axis=0), x.std(axis=0).mean()
            fitted = LogisticRegression(C=0.1, max_iter=1000).fit((x - mean) / scale, labels[rows])
            heads.append(_padded(_of_all_classes(fitted), mean, scale, max(self.classes)))
        return {name: jnp.asarray(np.stack([head[name] for head in heads])) for name in ("kernel", "bias")}


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    """Rows in parts of 64, the last filled up, so that one program serves."""
    filled = np.concatenate([rows, np.repeat(rows[:1], -len(rows) % 64)])
    return np.split(filled, len(filled) // 64)


def _of_all_classes(fitted: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights and intercepts of all classes; where there are two, only those of the second are fitted."""
    if len(fitted.classes_) > 2:
        return fitted.coef_, fitted.intercept_
    signs = np.array([-0.5, 0.5])
    return signs[:, None] * fitted.coef_, signs * fitted.intercept_


def _padded(of: tuple[np.ndarray, np.ndarray], mean: np.ndarray, scale: float, classes: int) -> dict[str, np.ndarray]:
    """A head on the features as they are, with biases of minus infinity for classes that the task lacks."""
    kernel = of[0].T / scale
    bias = of[1] - mean @ kernel
    missing = classes - len(bias)
    return {
        "kernel": np.pad(kernel, ((0, 0), (0, missing))).astype(np.float32),
        "bias": np.pad(bias, (0, missing), constant_values=-np.inf).astype(np.float32),
    }
