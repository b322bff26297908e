"""LeMON in small: a network pretrained on several equations, tuned on 20 trajectories of new ones, fully or by LoRA.

Pretraining sees 1200 trajectories in all, of one family (heat) or of five (heat, advection, linear reaction-diffusion,
dispersion, waves), solved exactly by their modes, with 2 % noise; a network of width 64 gets the first 8 of 16 frames
and the equation as tokens, and predicts the others. New are advection-diffusion, solved exactly, and viscous Burgers
in the trajectories that `neuraloperator` carries: another solver, another domain, brought to the same units by its
tokens. Every start is tuned by 100 full-batch steps at its best rate of one grid for full tuning and one for LoRA.

    python -m experiments run lemon

Measured over three seeds, mean relative error on 200 noise-free trajectories, full tuning and LoRA of rank 8 (61,712
of 387,024 values): advection-diffusion 44.6 ± 2.9 and 43.3 ± 3.1 % from a random start, 49.1 ± 1.2 and 35.0 ± 2.0 from
heat alone, 25.4 ± 0.8 and 26.2 ± 1.6 from five families; Burgers 20.3 ± 1.5 and 21.3 ± 3.5, 14.0 ± 1.6 and 13.9 ± 1.7,
12.8 ± 2.3 and 12.7 ± 2.4. So five families halve the error where one of them is half of the new equation, and LoRA is
level with full tuning from there. On Burgers five and one are level within their spreads.

Not shown: prediction without tuning. Before it, errors on advection-diffusion are above 100 % from every start, and on
Burgers 28 % from heat and 44 % from five. Smaller than in the publication by three orders: 600 steps, width 64.
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
from subspace_jax.methods import lemon

POINTS, FRAMES, SEEN, LENGTH = 16, 16, 8, 24
OLD = {
    "heat": lemon.linear_family("heat", c=0.02),
    "advection": lemon.linear_family("advection", beta=0.5),
    "reaction-diffusion": dataclasses.replace(
        lemon.families()["diffusion_reaction_linear"], centers={"nu": 0.01, "rho": 0.3}
    ),
    "dispersion": lemon.linear_family("dispersion", a=0.01),
    "wave": lemon.linear_family("wave", c=0.5),
}
NEW = lemon.linear_family("advection_diffusion", beta=0.5, c=0.02)
MODEL = lemon.Lemon(lemon.LemonConfig(points=POINTS, width=64, ffn=256, heads=4, layers=(1, 1, 2, 2)))


@dataclasses.dataclass(frozen=True)
class LemonConfig:
    """Settings.

    Attributes:
      families: how many each start is pretrained on; 0 for a random one.
      samples: of pretraining, in all.
      steps: of pretraining.
      batch_size: of pretraining.
      learning_rate: its peak in pretraining.
      tuning_samples: of a new family.
      tuning_steps: full-batch ones.
      rank: of LoRA.
      full_rates: learning rates of full tuning.
      lora_rates: learning rates of LoRA.
      seeds: of networks and data.
    """

    families: tuple[int, ...] = (0, 1, 5)
    samples: int = 1200
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-3
    tuning_samples: int = 20
    tuning_steps: int = 100
    rank: int = 8
    full_rates: tuple[float, ...] = (2e-4, 6e-4, 2e-3, 6e-3)
    lora_rates: tuple[float, ...] = (1e-3, 3e-3, 8e-3, 2e-2, 5e-2)
    seeds: tuple[int, ...] = (0, 1, 2)


def _sines(rng: np.random.Generator, count: int) -> np.ndarray:
    """Modes 1 to 3 with random heights and phases, scaled to a maximum of 1."""
    heights, phases = rng.uniform(0.2, 1, (count, 3, 1)), rng.uniform(0, 2 * np.pi, (count, 3, 1))
    u = (heights * np.sin(np.pi * np.arange(1, 4)[:, None] * lemon.grid(POINTS) + phases)).sum(1)
    return u / np.abs(u).max(1, keepdims=True)


def _batch(u: np.ndarray, expressions: Sequence[Any]) -> lemon.Batch:
    """Cuts trajectories `[n, frames, points]` into what is seen and what is asked for."""
    tokens, mask = lemon.encode_equations(expressions, LENGTH)
    times = np.broadcast_to(np.arange(FRAMES, dtype=np.float32) * 2 / FRAMES, u.shape[:2])
    parts = (u[:, :SEEN], times[:, :SEEN], u[:, SEEN:], times[:, SEEN:], tokens, mask)
    return lemon.Batch(*map(jnp.asarray, parts))


def _drawn(family: lemon.Family, count: int, seed: int, noise: float) -> lemon.Batch:
    found = lemon.draw_trajectories(
        family, seed, operators=count, states=1, points=POINTS, frames=FRAMES, initial=_sines
    )
    u = found.u[..., 0]
    return _batch(lemon.add_noise(u, seed + 1, noise) if noise else u, found.expressions)


def _burgers(count: int, seed: int, noise: float, split: str) -> lemon.Batch:
    """Packaged trajectories of u_t = -u u_x + 0.01 u_xx on [0, 1], with x and t twice as long, as the others have."""
    u = sj.data.load_operator_task("burgers")[split].outputs[:, :FRAMES]
    u = u[np.random.default_rng(seed).permutation(len(u))[:count]]
    equation = lemon.families()["viscous_burgers_flux"].tree({"k": 2.0, "viscosity": 0.04}, 1.0)
    return _batch(lemon.add_noise(u, seed, noise) if noise else u, [equation] * len(u))


def _loss(trainable: Any, frozen: Any, batch: lemon.Batch) -> jax.Array:
    return lemon.lemon_loss(APPLY, sj.combine(trainable, frozen), batch)


APPLY = sj.with_adapters(MODEL.apply)


def pretrained(config: LemonConfig, count: int, seed: int) -> Any:
    """Returns a start: random parameters, trained on the first `count` families."""
    data = [
        _drawn(family, config.samples // max(count, 1), 1000 * seed + 10 * i, 0.02)
        for i, family in enumerate(list(OLD.values())[: max(count, 1)])
    ]
    data = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *data)
    inputs = (data.inputs[:1], data.input_times[:1], data.target_times[:1], data.tokens[:1], data.mask[:1])
    params = jax.jit(MODEL.init)(jax.random.key(seed), *inputs)["params"]
    if not count:
        return params
    nothing = jax.tree.map(lambda _: None, params)
    key = jax.random.key(50 + seed)
    return lemon.train(_loss, params, nothing, data, config.steps, config.batch_size, key, config.learning_rate)[0]


def run(config: LemonConfig, context: Context) -> dict[str, Any]:
    """Pretrains every start, then tunes it on both new families."""
    runs = []
    for count, seed in context.track([(c, s) for c in config.families for s in config.seeds], "starts"):
        start = pretrained(config, count, seed)
        few = config.tuning_samples
        new = {
            "advection-diffusion": (_drawn(NEW, few, 7000 + seed, 0.02), _drawn(NEW, 200, 8000 + seed, 0.0)),
            "Burgers": (_burgers(few, seed, 0.02, "train"), _burgers(200, 0, 0.0, "test")),
        }
        for name, (support, test) in new.items():
            before = lemon.relative_errors(lemon.predict(MODEL.apply, start, test), test.targets).mean()
            for kind, rates in (("full", config.full_rates), ("LoRA", config.lora_rates)):
                for rate in rates:
                    error, size = _tuned(config, start, support, test, kind, rate, seed)
                    arm = {"new": name, "families": count, "kind": kind, "seed": seed, "learning_rate": rate}
                    label = f"{name}, {count} families, {kind}"
                    runs.append({**arm, "method": label, "error": error, "before": float(before), "values": size})
    return {"runs": runs}


def _tuned(
    config: LemonConfig, start: Any, support: lemon.Batch, test: lemon.Batch, kind: str, rate: float, seed: int
) -> tuple[float, int]:
    rules = lemon.lora_rules(config.rank, 1.0) if kind == "LoRA" else {"**": sj.full()}
    adapted = sj.adapt(start, rules, key=jax.random.key(300 + seed))
    trainable, frozen = sj.partition(adapted)
    key = jax.random.key(400 + seed)
    trained, _ = lemon.train(_loss, trainable, frozen, support, config.tuning_steps, None, key, rate)
    found = _predict(sj.combine(trained, frozen), test)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    return float(lemon.relative_errors(found, test.targets).mean()), size


@jax.jit
def _predict(params: Any, batch: lemon.Batch) -> jax.Array:
    return lemon.predict(APPLY, params, batch)


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns a line for every start: its error on both new families by both ways of tuning, at the best rates."""
    best = best_runs(results["runs"], "error", smallest=True)
    news = list(dict.fromkeys(r["new"] for r in results["runs"]))
    table = [["pretrained on", *(f"{n}: {k} %" for n in news for k in ("before", "full", "LoRA"))]]
    for count in dict.fromkeys(r["families"] for r in results["runs"]):
        cells = []
        for name in news:
            full, low = (best[f"{name}, {count} families, {kind}"] for kind in ("full", "LoRA"))
            cells += [with_spread([r["before"] for r in full])]
            cells += [with_spread([r["error"] for r in arm]) for arm in (full, low)]
        table.append([{0: "nothing", 1: "1 family"}.get(count, f"{count} families"), *cells])
    return table


EXPERIMENT = Experiment(
    name="lemon",
    claim="Pretrained on five equations a network predicts a new one with their terms better from 20 samples.",
    config=LemonConfig,
    run=run,
    rows=rows,
    assets=("neuraloperator",),
    tuning=Tuning("error", smallest=True),
)
