"""Eight experts of one MiniLM on eight real text tasks, merged by every merger that there is.

The tasks (`experiments/tasks/eight_texts.py`) are film reviews, topics of 20 Newsgroups, topics of Reuters R8, authors
of tweets, spam, twelve languages, and the polarity of tweets and of product reviews. Experts are the first three layers
of MiniLM, as LoRA of rank 8, OFT in blocks of 32 or trained whole, 30 steps of 16 on 512 examples each; heads are
fixed. Strengths, and rates of mergers that learn, are searched by factors of 2 (of 4) on 32 validation examples of each
task, on the first seed, until the best lies inside.

    python -m experiments run eight_experts

Measured over three seeds on 48 test examples of each task: the base reads 68.2 %, experts their own task at 79.2 ± 0.9
% (LoRA), 78.4 ± 3.4 (OFT) and 79.0 ± 1.5 (full). Merged full experts: Iso-C 76.0 ± 0.5 %, TSV-M 75.7 ± 0.5, RegMean,
which alone of these three sees inputs, 73.8 ± 0.3, TIES 71.9 ± 1.6, the average 69.4 ± 0.8, task arithmetic 69.2 ± 0.8.
LoRA: Iso-C 73.5 ± 0.6, RegMean 73.4 ± 1.5, TSV-M 72.8 ± 1.1, the average 72.6 ± 0.5, task arithmetic 71.8 ± 0.2. OFT:
TSV-M 71.0 ± 1.3, Fisher 70.8 ± 2.6, RegMean 70.8 ± 0.9, the average 68.1 ± 1.4. So the best mergers keep seven tenths
of what full experts gained over the base, half of LoRA's gain, a quarter of OFT's.

What did not show: OrthoMerge's mean on the manifold is below the plain average for OFT (66.3 ± 1.6 to 68.1 ± 1.4), and
taking rotations out changes TIES by nothing (LoRA 71.2 to 71.3, full 72.0 to 71.9); it turns the smaller side of each
matrix here, for time's sake. DO-Merging (71.6 ± 1.6) is level with task arithmetic. AdaMerging and Concrete masks, ten
steps on inputs without labels from the strength of task arithmetic, are level with it within two spreads: at the rates
that validation chose they hardly move, and at larger ones they lose. DARE costs up to six points. With so few
validation examples strengths are rough, and none of this was tried with all six layers or longer training.

Time is the least of three seeds. Memory is the most by which the process grew in any, programs that were compiled
meanwhile included; eight experts are 162 MiB, one leaf of all 18 MiB.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, read_json, widened, write_json
from experiments.tasks.eight_texts import TASKS, EightTexts
from experiments.tasks.merger_arms import arms
from experiments.tasks.merging_runs import bracketed, learned, learners, of_strength, slerp_in_pairs
from experiments.tasks.merging_table import rows
from subspace_jax import merging
from subspace_jax.methods.merging.concrete import task_vectors


@dataclasses.dataclass(frozen=True)
class EightExpertsConfig:
    """Settings of the comparison.

    Attributes:
      tasks: names of the tasks.
      layers: of MiniLM, the first ones.
      length: tokens of an example.
      train_size: examples that an expert sees.
      validation_size: examples of each task that choose rates and strengths.
      test_size: examples of each task that are reported.
      shots: examples of each class that the fixed heads are made from.
      rank: of LoRA.
      block_size: of OFT.
      kinds: of experts.
      rates: learning rates from which the search for each kind starts.
      tuned_on: numbers of the tasks whose experts choose the learning rate.
      steps: of an expert's Adam.
      batch_size: examples of a step.
      learned_steps: of mergers that learn from inputs without labels.
      learned_rate: their learning rate, from which the search starts.
      learned_batch: examples of every task that they see at a step.
      statistics: examples of every task for Fisher information and Grams.
      seeds: eight experts of every kind each; strengths are chosen on the first.
    """

    tasks: tuple[str, ...] = TASKS
    layers: int = 3
    length: int = 20
    train_size: int = 512
    validation_size: int = 32
    test_size: int = 48
    shots: int = 8
    rank: int = 8
    block_size: int = 32
    kinds: tuple[str, ...] = ("lora", "oft", "full")
    rates: tuple[float, ...] = (1e-3, 1e-3, 1e-4)
    tuned_on: tuple[int, ...] = (0, 5)
    steps: int = 30
    batch_size: int = 16
    learned_steps: int = 10
    learned_rate: float = 1e-2
    learned_batch: int = 4
    statistics: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


class Kind:
    """Experts of one kind: training, and merging by every arm.

    Args:
      name: "lora", "oft" or "full".
      texts: the tasks.
      config: settings.
    """

    def __init__(self, name: str, texts: EightTexts, config: EightExpertsConfig) -> None:
        self.name, self._texts, self._config = name, texts, config
        rules = {
            "lora": {"**/kernel": sj.lora(config.rank, alpha=2 * config.rank)},
            "oft": {"**/kernel": sj.oft(config.block_size)},
            "full": {"**": sj.full()},
        }
        self._rules: Any = rules[name]

    def tune(self) -> list[dict[str, Any]]:
        """Returns the mean accuracy of some experts on their own tasks at learning rates around the best."""

        def score(rate: float) -> float:
            trees = [sj.merge(self.expert(task, rate, self._config.seeds[0])) for task in self._config.tuned_on]
            found = zip(self._config.tuned_on, trees, strict=True)
            return float(np.mean([self._texts.accuracies(tree, "validation", task)[0] for task, tree in found]))

        start = self._config.rates[self._config.kinds.index(self.name)]
        found = widened((start,), score)
        return [{"method": self.name, "learning_rate": rate, "accuracy": value} for rate, value in found.items()]

    def expert(self, task: int, rate: float, seed: int) -> Any:
        """Returns the tree of one expert."""
        adapted = sj.adapt(self._texts.base, self._rules, key=jax.random.key(100 * seed + task))
        config = self._config
        return self._texts.expert(adapted, self.name, task, rate, seed, config.steps, config.batch_size)

    def merge_all(self, rate: float, seed: int, chosen: Mapping[str, float] | None) -> dict[str, Any]:
        """Trains eight experts and merges them by every arm.

        Args:
          rate: learning rate.
          seed: of the experts.
          chosen: multiple of every arm's usual strength; searched on validation examples if None.
        """
        texts, config = self._texts, self._config
        trees = [self.expert(task, rate, seed) for task in range(len(texts.names))]
        plain = [sj.merge(tree) for tree in trees]
        own = [texts.accuracies(tree, "test", task)[0] for task, tree in enumerate(plain)]
        fishers = [texts.fisher(tree, task, config.statistics) for task, tree in enumerate(plain)]
        grams = [texts.grams(tree, task, config.statistics) for task, tree in enumerate(plain)]
        experts = plain if self.name == "full" else trees  # full ones are ordinary trees, as a checkpoint holds
        base = _scores(texts, texts.base, own)
        single = {"kind": self.name, "seed": seed, "experts": own, "base": base}
        found: dict[str, Any] = {"single": single, "runs": [], "searches": {}}
        every = arms(self.name, fishers, grams, side="auto") | {"average": (None, merging.average)}
        if len(trees) & (len(trees) - 1) == 0:
            every["SLERP in pairs"] = (1.0, slerp_in_pairs)
        for name, arm in every.items():
            self._arm(found, name, seed, chosen, usual=arm[0], at=of_strength(arm, experts, texts.base))
        start = 0.3 * found["chosen"]["task arithmetic"]
        vectors = task_vectors(plain, texts.base)
        for name, learn in self._learners.items():
            at = functools.partial(learned, learn, texts.base, vectors, start, seed, config.learned_rate)
            self._arm(found, name, seed, chosen, usual=config.learned_rate, at=at, factor=4.0)
        return found

    def _arm(
        self,
        found: dict[str, Any],
        name: str,
        seed: int,
        chosen: Mapping[str, float] | None,
        *,
        usual: float | None,
        at: Callable[[float], tuple[Any, float, int | None]],
        factor: float = 2.0,
    ) -> None:
        """Chooses an arm's strength if it is not given, and adds its run."""
        own, texts = found["single"]["experts"], self._texts
        if usual is not None and chosen is None:
            search = bracketed(lambda m: float(np.mean(texts.accuracies(at(m)[0], "validation"))), factor)
            found["searches"][name] = [{"strength": usual * m, "validation": v} for m, v in search.items()]
            multiple = max(search, key=lambda m: search[m])
        else:
            multiple = 1.0 if chosen is None else chosen[name]
        found.setdefault("chosen", {})[name] = multiple
        tree, seconds, added = at(multiple)
        strength = None if usual is None else usual * multiple
        run = {"kind": self.name, "method": name, "seed": seed, "strength": strength, "seconds": seconds}
        found["runs"].append(run | {"peak_bytes": added} | _scores(texts, tree, own))

    @functools.cached_property
    def _learners(self) -> dict[str, Any]:
        return learners(self._texts, self._config.learned_steps, self._config.learned_batch)


def _scores(texts: EightTexts, tree: Any, own: Sequence[float]) -> dict[str, Any]:
    test = texts.accuracies(tree, "test")
    normalized = float(np.mean([t / o for t, o in zip(test, own, strict=True)]))
    return {"tasks": test, "accuracy": float(np.mean(test)), "normalized": normalized}


def run(config: EightExpertsConfig, context: Context) -> dict[str, Any]:
    """Tunes, trains and merges; finished parts are kept."""
    sizes = {"train": config.train_size, "validation": config.validation_size, "test": config.test_size}
    options: Any = {name: getattr(config, name) for name in ("tasks", "layers", "length", "shots")}
    texts = EightTexts(sizes=sizes, **options)
    kinds = {name: Kind(name, texts, config) for name in config.kinds}

    def kept(part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = context.folder / f"part-{part}.json"
        if not (context.resume and path.exists()):
            write_json(path, make())
        return read_json(path)

    def tune(name: str) -> dict[str, Any]:
        return {"tuning": kinds[name].tune()}

    tuning = {name: kept(f"tuning-{name}", functools.partial(tune, name))["tuning"] for name in config.kinds}
    rates = {name: max(found, key=lambda one: one["accuracy"])["learning_rate"] for name, found in tuning.items()}
    parts: dict[tuple[str, int], dict[str, Any]] = {}
    jobs = [(name, seed) for seed in config.seeds for name in config.kinds]
    for name, seed in context.track(jobs, "eight experts"):
        first = parts.get((name, config.seeds[0]), {})
        make = functools.partial(kinds[name].merge_all, rates[name], seed, first.get("chosen"))
        parts[name, seed] = kept(f"{name}-{seed}", make)
    return {
        "tasks": list(config.tasks),
        "tuning": [one for found in tuning.values() for one in found],
        "searches": {name: parts[name, config.seeds[0]]["searches"] for name in config.kinds},
        "singles": [part["single"] for part in parts.values()],
        "runs": [one for part in parts.values() for one in part["runs"]],
    }


EXPERIMENT = Experiment(
    name="eight_experts",
    claim="Eight experts of one MiniLM become one encoder: what every merger keeps of them on eight real text tasks.",
    config=EightExpertsConfig,
    run=run,
    rows=rows,
    assets=("text",),
    tuning=Tuning("accuracy", runs="tuning"),
)
