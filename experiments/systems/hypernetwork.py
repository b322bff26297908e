"""A hypernetwork on digits with textured backgrounds: one look at a subject in place of fine-tuning for it.

A noise predictor, an MLP of 64 pixels, 32 Fourier features of time and a class embedding, is trained on the 8x8 digits
with the class as prompt. A subject is a background: four cosine patterns with normal coefficients, on every digit that
it shows. From one image of a subject a small network (64-128-128) writes LoRAs of rank 4 for the three kernels, 4864
numbers; it learns from other images of 200 subjects by the denoising loss, 16 subjects with 4 targets a step, through
`sj.per_row`, and samples with the average of its weights. The test has 20 subjects that it has not seen, with 50
samples each by DDIM in 25 of 100 steps. Three rates are tried for every penalty; the best by the style error of 20
other unseen subjects counts.

Prompt accuracy is by a classifier of digits on any background; the style error is that of the coefficients fitted to
the mean sample, relative to the true ones.

    python -m experiments run hypernetwork

Measured over three seeds at the best rates, prompt accuracy and style error of unseen subjects: the noise predictor
81.9 ± 2.1 % and 1.01 at scale 1; written without a penalty 85.4 ± 1.3 %, 0.18 ± 0.01; with one of 1e-5 85.2 ± 1.1 %,
0.21 ± 0.01, and 1.38 ± 0.11 from another subject's reference. The penalty cuts the squared size of what is written from
3456 to 567. With it, guidance by the base at 0.5 and 1 brings prompt accuracy to 97.2 and 99.3 %, at style errors of
0.24 and 0.28. The rate of 1e-4 was run apart and put into the record.

Claims that this does not show: guidance of the personalized model alone, at a scale of 2, is as good (99.4 %, 0.23),
since backgrounds do not spoil the prompt here; and the penalty does not improve what unseen subjects look like, it
keeps the size small. Stable Diffusion, CLIP's image encoder and the publication's faces and animals were not run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, best_runs, with_spread
from experiments.tasks import digits_task
from experiments.tasks.textured_digits import (
    NULL,
    PATTERNS,
    classify,
    denoise,
    patterns,
    pictures,
    train_base,
    train_classifier,
)
from subspace_jax.methods import hypernetwork

WEIGHTS = ((1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (2.0, 0.0))  # of subject and prompt in guidance


@dataclasses.dataclass(frozen=True)
class HypernetworkConfig:
    """Settings.

    Attributes:
      penalties: on the size of what is written.
      rates: learning rates tried for every penalty.
      base_steps: of the noise predictor.
      steps: of the hypernetwork.
      subjects: for training.
      unseen: for validation, and as many for the test.
      samples: of every unseen subject.
      noise_steps: of the schedule.
      sampler_steps: of DDIM.
      seeds: one noise predictor and one set of subjects each.
    """

    penalties: tuple[float, ...] = (0.0, 1e-5)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    base_steps: int = 6000
    steps: int = 4000
    subjects: int = 200
    unseen: int = 20
    samples: int = 50
    noise_steps: int = 100
    sampler_steps: int = 25
    seeds: tuple[int, ...] = (0, 1, 2)


run_rows = sj.per_row(denoise)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    config: HypernetworkConfig,
    decoder: Any,
    base: Any,
    x: jax.Array,
    y: jax.Array,
    coefficients: jax.Array,
    key: jax.Array,
    rate: jax.Array,
    penalty: jax.Array,
) -> Any:
    """Returns the averaged parameters of a hypernetwork."""
    levels, layout = hypernetwork.cosine_schedule(config.noise_steps), decoder.layout
    first, key = jax.random.split(key)
    params = decoder.init(first, jnp.zeros((1, 1, 64)))["params"]
    adamw = optax.adamw(optax.linear_schedule(0.0, 1.0, 100), weight_decay=0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw, optax.scale(rate))
    rows = jnp.repeat(jnp.arange(16) + 1, 4)

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        who, what, drawn = jax.random.split(key, 3)
        own = coefficients[jax.random.randint(who, (16,), 0, len(coefficients))]
        digits = jax.random.randint(what, (16 * 5,), 0, len(y))
        references = pictures(x[digits[:16]], own)
        targets, c = pictures(x[digits[16:]], jnp.repeat(own, 4, axis=0)), y[digits[16:]]

        def loss(params: Any) -> Any:
            output = decoder.apply({"params": params}, references[:, None])
            return hypernetwork.denoising_loss(
                *(
                    run_rows,
                    base,
                    layout,
                    output,
                    rows,
                    targets,
                    c,
                    jnp.full_like(c, NULL),
                    levels,
                    drawn,
                ),
                penalty=penalty,
            )

        return hypernetwork.train_step(state, loss, optimizer)[0], None

    state = hypernetwork.init_state(params, optimizer)
    return jax.lax.scan(step, state, jax.random.split(key, config.steps))[0].average


@functools.partial(jax.jit, static_argnums=0)
def sample(
    config: HypernetworkConfig,
    base: Any,
    output: jax.Array,
    rows: jax.Array,
    c: jax.Array,
    weights: Any,
    key: jax.Array,
) -> jax.Array:
    """Returns samples `[n, 64]` for slots `[n]` and classes `[n]`, slot 0 being the noise predictor itself."""
    bank = hypernetwork.personalized(base, layout_of(base), output)
    predict = hypernetwork.hybrid_predictor(run_rows, bank, rows, c, c, jnp.full_like(c, NULL), *weights)
    noise = jax.random.normal(key, (len(c), 64))
    return hypernetwork.ddim(
        predict, noise, hypernetwork.cosine_schedule(config.noise_steps), config.sampler_steps, clip=2.0
    )


def layout_of(base: Any) -> hypernetwork.Layout:
    """Returns the layout: rank 4 on the three kernels."""
    return hypernetwork.layout_of(base, "*/kernel", rank=4)


class Scorer:
    """Samples of unseen subjects, and how good they are."""

    def __init__(self, config: HypernetworkConfig, seed: int) -> None:
        digits = digits_task.load_digits()
        self.config, self.x, self.y = config, 2 * digits.x, digits.y
        rng = np.random.default_rng([66, seed])
        total = config.subjects + 2 * config.unseen
        drawn = jnp.asarray(0.6 * rng.normal(size=(total, len(PATTERNS))), jnp.float32)
        self.known = drawn[: config.subjects]
        self.groups = jnp.split(drawn[config.subjects :], 2)
        shown = jnp.asarray(rng.integers(0, len(digits.y_test), (2, config.unseen)))
        self.references = [pictures(2 * digits.x_test[s], g) for s, g in zip(shown, self.groups, strict=True)]
        self.c = jnp.asarray(rng.integers(0, 10, config.unseen * config.samples))
        self.base = train_base(config.base_steps, config.noise_steps, self.x, self.y, jax.random.key(seed))
        self.classifier = train_classifier(self.x, self.y, jax.random.key(seed + 50))

    def score(self, output: jax.Array, weights: tuple[float, float], group: int = 1, own: bool = True) -> Any:
        """Returns prompt accuracy and style error; of the noise predictor itself if not `own`."""
        rows = jnp.repeat(jnp.arange(self.config.unseen) + 1, self.config.samples) * own
        given = tuple(map(jnp.asarray, weights))
        found = sample(self.config, self.base, output, rows, self.c, given, jax.random.key(9))
        accuracy = jnp.mean(classify(self.classifier, found).argmax(-1) == self.c)
        means = found.reshape(self.config.unseen, self.config.samples, -1).mean(1)
        prompts = jax.nn.one_hot(self.c, 10).reshape(self.config.unseen, self.config.samples, 10).mean(1)
        of_class = jnp.stack([self.x[self.y == c].mean(0) for c in range(10)])
        fitted = (means - 0.8 * prompts @ of_class) @ jnp.asarray(np.linalg.pinv(patterns()), jnp.float32)
        errors = jnp.linalg.norm(fitted - self.groups[group], axis=-1) / jnp.linalg.norm(self.groups[group], axis=-1)
        return {"accuracy": float(accuracy), "error": float(jnp.mean(errors))}


def run(config: HypernetworkConfig, context: Context) -> dict[str, Any]:
    """Trains every hypernetwork; those at the best rate of their penalty are scored at several guidance weights."""
    scorers = {seed: Scorer(config, seed) for seed in config.seeds}
    runs, outputs = [], {}
    jobs = [(penalty, rate, seed) for penalty in config.penalties for rate in config.rates for seed in config.seeds]
    for penalty, rate, seed in context.track(jobs, "hypernetwork"):
        scorer = scorers[seed]
        decoder = hypernetwork.PooledDecoder(layout_of(scorer.base))
        arguments = scorer.base, scorer.x, scorer.y, scorer.known, jax.random.key(seed)
        params = train(config, decoder, *arguments, jnp.asarray(rate), jnp.asarray(penalty))
        other, output = (decoder.apply({"params": params}, r[:, None]) for r in scorer.references)
        outputs[f"λ={penalty:g}", rate, seed] = output
        one = {"method": f"λ={penalty:g}", "learning_rate": rate, "seed": seed}
        one["size"] = float(jnp.mean(jnp.sum(jnp.square(output), -1)))
        runs.append({**one, "validation": scorer.score(other, (1.0, 0.0), group=0)["error"]})
    for best in best_runs(runs, "validation", smallest=True).values():
        for r in best:
            output = outputs[r["method"], r["learning_rate"], r["seed"]]
            scores = {f"{p:g}, {b:g}": scorers[r["seed"]].score(output, (p, b)) for p, b in WEIGHTS}
            scores["1, 0, another subject's reference"] = scorers[r["seed"]].score(jnp.roll(output, 1, 0), (1.0, 0.0))
            runs[runs.index(r)]["scores"] = scores  # pyright: ignore[reportArgumentType]
    base = []
    for seed, scorer in scorers.items():
        nothing = jnp.zeros((config.unseen, layout_of(scorer.base).size))
        found = {scale: scorer.score(nothing, (0.0, scale), own=False) for scale in (1.0, 2.0)}
        base += [{"seed": seed, "scale": scale, **score} for scale, score in found.items()]
    return {"runs": runs, "base": base}


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns prompt accuracy and style error by model and guidance, hypernetworks at their best rates."""
    table = [["model", "rate", "weights of subject, prompt", "prompt accuracy %", "style error", "squared size"]]
    for scale in dict.fromkeys(r["scale"] for r in results["base"]):
        found = [r for r in results["base"] if r["scale"] == scale]
        table.append(["noise predictor", "", f"-, {scale:g}", *_both(found), ""])
    for name, best in best_runs(results["runs"], "validation", smallest=True).items():
        for weights in best[0]["scores"]:
            size = with_spread([r["size"] for r in best], 0, 1.0)
            found = [r["scores"][weights] for r in best]
            table.append([name, f"{best[0]['learning_rate']:g}", weights, *_both(found), size])
    return table


def _both(found: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    return with_spread([r["accuracy"] for r in found]), with_spread([r["error"] for r in found], 2, 1.0)


EXPERIMENT = Experiment(
    name="hypernetwork",
    claim="One image of an unseen subject is enough for a hypernetwork to write the LoRA that shows it.",
    config=HypernetworkConfig,
    run=run,
    rows=rows,
    tuning=Tuning("validation", smallest=True),
)
