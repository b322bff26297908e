"""Composable fine-tuning on real languages: a task learned in English, used in others with vectors added up.

The messages are those of Django's interface, in English, German and French; the task is whether the administration or
the core shows a message, which translates with it. Half of the English originals are for training, and no translation
of one is tested on. The encoder is the first layer of MiniLM with the word pieces that occur. Its
vocabulary is English: foreign words come in pieces of two or three letters, so what a language can learn here is which
pieces go together, and what crosses over is names, loan words and word stems. That is far from multilingual BERT.

As published: a language's vector by masked tokens, phase one dense, the largest changes of all arrays together chosen,
everything put back, phase two on these entries alone, with 0.1 of the mean distance; a task's vector likewise, from the
model with the English vector added. Norms are frozen; the decoder's table is an untied copy.

"composed" is the base with both vectors, of task and target language; "full differences" adds what dense fine-tuning
changed; "sequential" tunes everything on the language, then on the task; "English kept" has the English vector in place
of the target's, and "task alone" none. All arms have the same data, steps and grid of rates, one for both phases; the
best by area under the ROC curve in the target languages counts. The threshold itself does not cross over: foreign
words push all messages to one side, so accuracies are below the share of the larger class, and are recorded beside.

    python -m experiments run composable_sft_languages

Measured over three seeds and two languages each, each arm at the best of five rates, in percent:

| arm | area under ROC | accuracy |
| --- | --- | --- |
| composed, tickets | 69.2 ± 0.9 | 46.0 ± 2.2 |
| composed, full differences | 69.7 ± 3.2 | 56.9 ± 9.0 |
| sequential fine-tuning | 67.5 ± 1.7 | 44.2 ± 0.7 |
| English kept | 69.7 ± 1.0 | 46.5 ± 2.0 |
| task alone | 69.4 ± 1.8 | 47.5 ± 3.6 |
| the task in English, unseen messages | 95.7 ± 0.8 | 89.0 ± 2.5 |
| the larger class | | 60.2 ± 1.6 |

The claim does not reproduce at this scale: a task learned in English orders unseen German and French messages better
than chance (69 of 100 pairs), and a language's vector adds nothing to that, sparse or dense, within the spread.
Composing does no harm either, and sequential fine-tuning is not ahead of it. What is missing is what the paper starts
from, a model that knows the languages: thirty steps on some two hundred messages of an encoder with English word pieces
teach which pieces follow each other, and not what they mean. Also tried: rates from 1e-4 to 3e-3 with accuracy as the
criterion, which found 52.8 ± 7.7 for composed tickets, 52.7 ± 7.3 for the task alone and 56.9 ± 9.0 for full
differences. The known structure on which vectors do add up is in `composable_sft`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, best_runs, with_spread
from experiments.tasks.django_languages import Languages, load_languages
from experiments.tasks.language_vectors import HEADS, MASKABLE, maskable_arrays, predict, template, train, with_support

sft = sj.methods.composable_sft


@dataclasses.dataclass(frozen=True)
class LanguagesConfig:
    """Settings.

    Attributes:
      targets: locales beside English.
      layers: of the encoder.
      share: of the maskable scalars that a vector holds.
      steps: optimizer steps of each phase.
      batch: messages of a step.
      rates: learning rates tried for every arm.
      seeds: one split of the messages and run of every arm per seed.
    """

    targets: tuple[str, ...] = ("de", "fr")
    layers: int = 1
    share: float = 0.05
    steps: int = 30
    batch: int = 16
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Job:
    """One seed at one rate: trains every vector and difference once."""

    config: LanguagesConfig
    languages: Languages
    seed: int
    rate: float

    @property
    def base(self) -> Any:
        """The pretrained encoder with new heads."""
        table = self.languages.params["embeddings"]["word"]["embedding"]
        width = table.shape[1]
        kernel = jax.random.normal(jax.random.key(self.seed), (width, 2)) / np.sqrt(width)
        return {
            "encoder": self.languages.params,
            "table": table,
            "decoder": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)},
            "out": {"kernel": kernel, "bias": jnp.zeros(2)},
        }

    @property
    def count(self) -> int:
        """The number of entries of a vector."""
        return int(self.config.share * sum(np.size(v) for v in maskable_arrays(self.base)))

    def fit(self, tree: Any, start: Any, code: str, kind: str, salt: int) -> Any:
        """Trains what learns on the training half of a language's messages."""
        held, config = self.languages.messages[code], self.config
        rows = held.train & ((held.labels >= 0) if kind == "task" else True)
        data = tuple(self._even(v[rows]) for v in (held.tokens, held.mask, held.labels))
        key, sizes = jax.random.key(1000 * self.seed + salt), {"steps": config.steps, "batch": config.batch}
        module, masked = self.languages.module, self.languages.masked
        return train(tree, data, start, self.rate, key, module=module, masked=masked, kind=kind, **sizes)

    def _even(self, values: np.ndarray) -> np.ndarray:
        """As many rows for every language, so that one program serves all: the first ones again behind the last."""
        return np.resize(values, (512, *values.shape[1:]))

    def dense(self, start: Any, code: str, kind: str, salt: int) -> Any:
        """Phase one, which is full fine-tuning too: plain arrays."""
        tree = sj.adapt(start, {MASKABLE: sj.full(), HEADS[kind]: sj.full()}, key=jax.random.key(salt))
        return sj.merge(self.fit(tree, start, code, kind, salt))

    def vector(self, start: Any, changed: Any, code: str, kind: str, salt: int) -> Any:
        """Phase two, on the entries that changed most in phase one."""
        chosen = sft.select_changed(start, changed, self.count, maskable=MASKABLE)
        tree = with_support(template(self.base, kind), start, chosen, self.count)
        return sft.vector_of(self.fit(tree, start, code, kind, salt + 500))

    def score(self, params: Any, code: str) -> tuple[float, float]:
        """Area under the ROC curve, and accuracy, on unseen messages."""
        held = self.languages.messages[code]
        rows = np.flatnonzero(~held.train & (held.labels >= 0))
        again = np.resize(rows, 256)  # one program for every language
        logits = predict(self.languages.module, params, held.tokens[again], held.mask[again])
        scores, labels = np.asarray(logits[:, 1] - logits[:, 0])[: len(rows)], held.labels[rows]
        return sj.metrics.auroc(scores, labels), float(np.mean((scores > 0) == labels))


def run_one(job: Job) -> dict[str, list[tuple[float, float]]]:
    """Scores of every arm, one for each target language, and in English."""
    base, found = job.base, {}
    english_dense = job.dense(base, "en", "language", 1)
    english = job.vector(base, english_dense, "en", "language", 1)
    start = {**sft.compose(base, dataclasses.replace(english, head={}))}
    task_dense = job.dense(start, "en", "task", 2)
    task = job.vector(start, task_dense, "en", "task", 2)
    found["English itself"] = [job.score(sft.compose(base, task, english), "en")]
    for number, code in enumerate(job.config.targets):
        dense = job.dense(base, code, "language", 10 + number)
        vector = job.vector(base, dense, code, "language", 10 + number)
        arms = {
            "composed: tickets": sft.compose(base, task, vector),
            "composed: full differences": _sum(base, task_dense, start, dense),
            "sequential": job.dense({**dense, "out": base["out"]}, "en", "task", 40 + number),
            "English kept": sft.compose(base, task, english),
            "task alone": sft.compose(base, task),
        }
        for name, params in arms.items():
            found.setdefault(name, []).append(job.score(params, code))
    return found


def _sum(base: Any, task: Any, start: Any, language: Any) -> Any:
    """The base with what full fine-tuning changed for task and language, and the task's head."""
    encoder = jax.tree.map(
        lambda b, t, s, v: b + (t - s) + (v - b),
        base["encoder"],
        task["encoder"],
        start["encoder"],
        language["encoder"],
    )
    return {**task, "encoder": encoder}


def run(config: LanguagesConfig, context: Context) -> dict[str, Any]:
    """Trains every arm at every rate."""
    runs, majority = [], []
    for seed, rate in context.track([(s, r) for s in config.seeds for r in config.rates], "languages"):
        languages = load_languages(("en", *config.targets), config.layers, seed)
        for name, values in run_one(Job(config, languages, seed, rate)).items():
            means = np.mean(values, axis=0)
            one = {"method": name, "learning_rate": rate, "seed": seed, "by_language": values}
            runs.append(one | {"auroc": float(means[0]), "accuracy": float(means[1])})
    for seed in config.seeds:
        for code in config.targets:
            held = load_languages(("en", *config.targets), config.layers, seed).messages[code]
            share = float(np.mean(held.labels[~held.train & (held.labels >= 0)]))
            majority.append({"seed": seed, "accuracy": max(share, 1.0 - share)})
    return {"runs": runs, "majority": majority}


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns every arm at its best rate."""
    table = [["arm", "learning rate", "area under ROC %", "accuracy %"]]
    for name, best in sorted(best_runs(results["runs"], "auroc").items()):
        figures = (with_spread([r[key] for r in best]) for key in ("auroc", "accuracy"))
        table.append([name, f"{best[0]['learning_rate']:g}", *figures])
    table.append(["the larger class", "", "", with_spread([r["accuracy"] for r in results["majority"]])])
    return table


EXPERIMENT = Experiment(
    name="composable_sft_languages",
    claim="A task's vector from English does no better in another language with that language's vector added.",
    config=LanguagesConfig,
    run=run,
    rows=rows,
    assets=("django", "minilm"),
    tuning=Tuning(key="auroc"),
)
