r"""The league table: every way of fine-tuning on three real tasks, with what it makes the model forget.

- text: film reviews, good or bad, on MiniLM. Before, a linear probe told the topics of Reuters' news.
- vision: clothes of Fashion-MNIST on ViT-S/14 at 56 x 56 pixels. Before, a linear probe told handwritten digits.
- causal: the next token of Django's messages in twelve languages on SmolLM2. Before, it knew English film reviews.

Every method sees the same examples in the same order, starts from the same head, takes the same number of steps under
the same schedule, and trains about as many values as LoRA of rank 4 on all kernels of the backbone where its
mathematics allows. Its learning rate is the best on the validation split with a seed of its own, on a grid 1, 3, 10,
30, ... that grows until the best lies inside. "Forgotten" is what the pretrained model knew and the tuned one does not:
points of accuracy lost on a task that it was not tuned for, with the probe as it was (next token of English for the
language model). What is judged has been saved, loaded and merged.

Operations are the compiler's count for a step; memory is what the compiled step holds at most, model included; time is
the median ratio to LoRA's step, taken in turns; "start" is what `adapt` takes, statistics of the data included.

    python -m experiments fetch text vision causal-lm django
    python -m experiments run league --resume
    python -m experiments report

A whole run takes hours on two cores; it is kept run by run, and goes on where it was stopped, on another machine from
what is recorded here: text on two threads, vision and causal on one core each, all beside other work. On messages SNELL
and SNELLA, which form all weights, take five and nine times as long a step as LoRA.

Text, over three seeds, in percent: the head alone has 74.0 ± 0.7, full fine-tuning 79.1 ± 0.2. LIFT (79.5 ± 0.7),
RandLoRA (79.5 ± 0.6), DoRA (78.8 ± 0.9), Block-LoRA, LoCA, SPT, LoRA (78.4 ± 1.1), PEGO, SaRA, OFT, Comp-LoRA and QLoRA
(78.1 ± 0.6) cannot be told apart from it or from each other; Orthogonal Adaptation, SNELLA and S2FT come close. PiSSA,
SVFit, Trion, GaLore, DCT-Adam, LoRA-XS, LoRA-Pro and SNELL gain 2 points over the head, LoRA-SB and CorDA none in so
few steps. A search for a rate can stop too early where every run is near chance: Trion's began anew at 0.01.

What they forget differs by far more: SSF loses 90 of the points that the probe of news had, full fine-tuning 73 ± 25,
SVFit 22 ± 6, CorDA 14 ± 7, LoRA-XS 12 ± 5, SoKA 11 ± 7, LoRA-SB 8 ± 5, LIFT and PiSSA 4; LoRA, DoRA, QLoRA, Comp-LoRA,
SPT, RandLoRA, S2FT, SNELL and SNELLA at most one.

Vision is too short a run to show what fine-tuning can do: the head learns at the rate of the arm, and in 40 steps of 16
images it learns little at rates that suit a backbone. The head alone, at a rate of 0.1, has 67.2 ± 1.2, full
fine-tuning 59.7 ± 3.4, LoRA 66.4 ± 2.1, DoRA 67.2 ± 2.4. Ahead of the head are SNELL (71.9 ± 1.7) and SNELLA (70.6 ±
1.0), both at large rates, RandLoRA (70.3 ± 0.3), SVFit (70.0 ± 0.6), LoCA (69.7 ± 1.2) and LIFT (69.5 ± 0.5); S2FT
and SaRA within their spreads.
All of them bend the features to an unready head and lose 47 (SNELLA) to 79 of the 92 points that the probe of digits
had. With a rate of its own for the head this would be another table.

Causal: before, SmolLM2 tells 14.6 % of the messages' tokens and 22.1 % of English ones. Full fine-tuning and LoRA reach
21.8 (± 0.4 and ± 1.5), SoKA 21.6 ± 0.3, OFT 21.2, RandLoRA and Matryoshka 21.1; SNELLA, SPT, PiSSA, DoRA, Block-LoRA,
LIFT, SaRA, Comp-LoRA, DCT-Adam and PEGO lie between 20.5 and 20.9, SNELL, SVFit and GaLore at 20.1, Composable SFT at
19.8, nearly all within LoRA's spread. SPT finds every kernel sensitive enough for a module, and is LoRA here. Trion
reaches 19.1, LoRA-SB, CorDA, Flora and LoRA-Pro gain a little more than half as much as LoRA (18.6 to 18.8). QLoRA ends
at 17.8 ± 0.7 because it begins at 11.5: four bits a weight cost this small model 3 points of the messages and 2.3 of
English. In 30 steps little is forgotten: 2.8 points of English by SoKA, 2.7 by SaRA, 2.5 by PiSSA and LoRA-SB, 1.6 by
LoRA, 0.7 by DoRA, 0.4 by full fine-tuning and SNELL, 0.2 by SNELLA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runner import Context, Experiment, Tuning, best_runs, read_json
from experiments.tasks.league import ARMS, CausalJob, Job, TextClasses, VisionClasses, plot, rows
from experiments.tasks.league._run import Entrant, unpack

RECORD = Path(__file__).parent / "results" / "league.json"


@dataclasses.dataclass(frozen=True)
class LeagueConfig:
    """Settings.

    Attributes:
      tasks: of text, vision and causal.
      methods: arms to run; all of them if empty.
      seeds: one run of every method per seed; the seed draws the head, the order and the adapter.
      tuning_seed: of the runs by which learning rates are chosen.
      text_steps: optimizer steps of a run on text, of 16 examples of 32 tokens.
      vision_steps: those on images, of 16 examples.
      causal_steps: those on messages, of 6 messages of 16 tokens.
      test_size: examples of the validation and of the test split on text.
      vision_test_size: those on images.
      causal_test_size: messages of those splits.
      rounds: steps by which time is measured, in turns with LoRA's.
      layers: of every model; all if None, fewer for tests.
    """

    tasks: tuple[str, ...] = ("text", "vision", "causal")
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    text_steps: int = 100
    vision_steps: int = 40
    causal_steps: int = 30
    test_size: int = 992
    vision_test_size: int = 480
    causal_test_size: int = 96
    rounds: int = 5
    layers: int | None = None


def jobs(config: LeagueConfig) -> dict[str, Any]:
    """Returns makers of the tasks."""
    return {
        "text": lambda: TextClasses(
            steps=config.text_steps,
            batch_size=16,
            length=32,
            train_size=2000,
            test_size=config.test_size,
            layers=config.layers,
        ),
        "vision": lambda: VisionClasses(
            steps=config.vision_steps,
            batch_size=16,
            train_size=1000,
            test_size=config.vision_test_size,
            layers=config.layers,
        ),
        "causal": lambda: CausalJob(
            steps=config.causal_steps,
            batch_size=6,
            length=16,
            train_size=2000,
            test_size=config.causal_test_size,
            layers=config.layers,
        ),
    }


def run(config: LeagueConfig, context: Context) -> dict[str, Any]:
    """Runs every arm on every task; with `--resume`, what is on disk or in the record is not run again."""
    chosen = config.methods or tuple(ARMS)
    for given, known, key in ((chosen, ARMS, "methods"), (config.tasks, jobs(config), "tasks")):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"{key}={','.join(unknown)}: choose from {', '.join(known)}.")
    (context.folder / "cells").mkdir(exist_ok=True)
    if context.resume and RECORD.exists():
        record = read_json(RECORD)
        unpack(record, context.folder, _same_steps(config, record["config"]))
    results: dict[str, Any] = {"cells": [], "costs": [], "tuning": [], "before": {}}
    for task in config.tasks:
        job = jobs(config)[task]()
        results["before"][task] = {"retained": job.retained(job.start(0)), "known": job.known}
        baseline = Entrant("lora", job, context)
        for name in chosen:
            if _applies(name, job):
                _race(config, name, job, baseline, context, results)
    return results


def _applies(name: str, job: Job) -> bool:
    """Tells whether an arm has something to train: a language model's head is tied to its embedding, for instance."""
    return bool({"head only": job.head, "ssf": job.scope}.get(name, True))


def _same_steps(config: LeagueConfig, recorded: Mapping[str, Any]) -> dict[str, int]:
    """Steps of the tasks whose settings are those of the record."""
    mine = dataclasses.asdict(config)
    keys = {
        "text": ("text_steps", "test_size", "layers"),
        "vision": ("vision_steps", "vision_test_size", "layers"),
        "causal": ("causal_steps", "causal_test_size", "layers"),
    }
    same = {task: all(mine[k] == recorded.get(k) for k in names) for task, names in keys.items()}
    return {task: mine[f"{task}_steps"] for task, equal in same.items() if equal}


def _race(
    config: LeagueConfig, name: str, job: Job, baseline: Entrant, context: Context, results: dict[str, Any]
) -> None:
    """Tunes, runs and measures one arm on one task."""
    entrant = Entrant(name, job, context)
    tuning = entrant.tune(config.tuning_seed)
    rate = best_runs(tuning, "accuracy")[name][0]["learning_rate"]
    results["tuning"] += [{**one, "arm": f"{job.name}, {name}"} for one in tuning]
    results["cells"] += [entrant.cell(rate, seed) for seed in config.seeds]
    results["costs"].append(entrant.costs(baseline, config.rounds))


EXPERIMENT = Experiment(
    name="league",
    claim="Every way of fine-tuning on three real tasks: accuracy, what is forgotten, and what it costs.",
    config=LeagueConfig,
    run=run,
    rows=rows,
    plot=plot,
    assets=("text", "vision", "causal-lm", "django"),
    tuning=Tuning(arm="arm", runs="tuning"),
)
