"""SaRA on small networks: what the smallest weights are worth, and what training them keeps of the source task.

A ReLU network 64-64-64-10 on the 8x8 digits of scikit-learn, trained on 1,200 upright images, is tuned to 300 that are
turned by 90 degrees. A fifth of the entries of its kernels learn: the smallest, the largest, or random ones; LoRA has
a rank of nearly as many values. The smallest ones also with SaRA's second selection halfway, with its nuclear norm on
one matrix drawn a step, and with both. All arms have the same images, steps, cosine schedule and grid of rates, of
which the best by accuracy on turned digits counts; "source" is the accuracy on upright ones that is left.

    python -m experiments run sara

Measured over three seeds, each arm at the best of six rates, in percent:

| arm | values | turned | source kept | still below the threshold | nuclear norm |
| --- | --- | --- | --- | --- | --- |
| smallest | 1,766 | 95.5 ± 0.7 | 57.7 ± 10.9 | 16.5 ± 0.1 | 135 ± 4 |
| smallest, selected anew | 1,766 | 95.4 ± 0.2 | 60.4 ± 10.2 | 11.2 ± 0.7 | 130 ± 4 |
| smallest, nuclear norm | 1,766 | 94.4 ± 1.7 | 71.4 ± 7.2 | 30.7 ± 0.3 | 96 ± 2 |
| SaRA, both | 1,766 | 94.4 ± 1.5 | 72.4 ± 7.5 | 28.7 ± 0.7 | 97 ± 2 |
| largest | 1,766 | 94.8 ± 0.2 | 26.9 ± 4.0 | | |
| random | 1,766 | 95.4 ± 0.6 | 34.5 ± 1.0 | | |
| LoRA | 1,980 | 94.8 ± 0.7 | 18.3 ± 2.2 | | |

So SaRA keeps 45 points more of the source task than the largest entries and 54 more than LoRA, and learns the target
within a spread of them. Setting the smallest fifth of the entries to zero costs nothing (97.6 of 97.7), the largest
tenth half (46.1 ± 11.8). The penalty adds 15 points of what is kept for one of what is learned, by less than two
spreads; the second selection alone changes neither beyond its spread, only how many entries stay small.
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
from experiments.tasks.digits_task import load_digits
from subspace_jax.weights import SparseDelta, flat_entries

sara = sj.methods.sara
LAYERS = ("hidden_0", "hidden_1", "out")
SIZES = (64, 64, 64, 10)
KERNELS = "*/kernel"
ARMS = ("smallest", "smallest, selected anew", "smallest, nuclear norm", "sara", "largest", "random", "lora")


@dataclasses.dataclass(frozen=True)
class SaraConfig:
    """Settings.

    Attributes:
      share: of the entries that learn.
      penalty: \\(\\lambda\\) of the nuclear norm.
      lora_rank: of the baseline.
      pretraining: steps on upright digits.
      steps: optimizer steps on turned ones.
      images: of turned digits.
      rates: learning rates tried for every arm.
      shares: of entries that are set to zero, smallest and largest.
      seeds: one network and one run of every arm per seed.
    """

    share: float = 0.2
    penalty: float = 5e-3
    lora_rank: int = 6
    pretraining: int = 1500
    steps: int = 600
    images: int = 300
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    shares: tuple[float, ...] = (0.1, 0.2)
    seeds: tuple[int, ...] = (0, 1, 2)


def network(params: Any, x: jax.Array) -> jax.Array:
    """Returns logits `[batch, 10]` of images `[batch, 64]`."""
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


apply = sj.with_adapters(network)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


@functools.partial(jax.jit, static_argnames=("make", "steps"))
def train(adapted: Any, rate: jax.Array, key: jax.Array, x: jax.Array, y: jax.Array, make: Any, steps: int) -> Any:
    """Trains in one compiled loop, by the optimizer that `make` makes of the tree and a schedule."""

    def objective(tree: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (64,), 0, len(x))
        return loss(tree, x[rows], y[rows])

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), make(adapted, optax.cosine_decay_schedule(1.0, steps)), optax.scale(rate)
    )
    return sj.training.scan_steps(objective, optimizer, adapted, jax.random.split(key, steps)).adapted


def _adamw(adapted: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    del adapted
    return optax.adamw(schedule, weight_decay=1e-2)


def optimizer_of(config: SaraConfig, name: str, threshold: float) -> Any:
    """What makes an arm's optimizer; SaRA's own with or without its parts."""
    after = config.steps // 2 if name in ("sara", "smallest, selected anew") else None
    penalty = config.penalty if name in ("sara", "smallest, nuclear norm") else 0.0
    if after is None and not penalty:
        return _adamw

    def make(adapted: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
        options = {"reselect_after": after, "penalty": penalty, "min_side": 0, "min_entries": 0}
        return sara.sara_adam(schedule, adapted, threshold=threshold, **options)

    return make


@functools.cache
def pretrained(seed: int, steps: int) -> Any:
    """Returns the parameters of a network trained on 1,200 upright digits."""
    keys = jax.random.split(jax.random.key(seed), 4)
    draw = jax.nn.initializers.he_normal()
    params = {
        name: {"kernel": draw(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}
        for name, key, inputs, outputs in zip(LAYERS, keys, SIZES, SIZES[1:], strict=False)
    }
    digits = load_digits()
    everything = sj.adapt(params, {"**": sj.full()}, key=keys[3])
    return sj.merge(train(everything, 1e-3, keys[3], digits.x[:1200], digits.y[:1200], _adamw, steps))


def entries(scores: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """The positions of the largest scores of all kernels together, by path."""
    count = int(share * sum(v.size for v in scores.values()))
    return {path: np.flatnonzero(mask) for path, mask in sj.weights.largest_of_all(scores, count).items()}


def method_of(config: SaraConfig, name: str, params: Any, seed: int) -> Any:
    """The rules of an arm."""
    if name == "lora":
        return {KERNELS: sj.lora(config.lora_rank)}
    if name not in ("largest", "random"):
        return {KERNELS: sara.sara(sara.threshold_for(params, config.share, select=KERNELS))}
    rng = np.random.default_rng(seed)
    kernels = {f"{layer}/kernel": np.abs(params[layer]["kernel"]) for layer in LAYERS}
    scores = {path: rng.random(v.shape) if name == "random" else v for path, v in kernels.items()}

    def fixed(positions: np.ndarray) -> sj.Method:
        def init(key: jax.Array, array: jax.Array, role: sj.Role, stats: Any) -> SparseDelta:
            indices = jnp.asarray(positions, jnp.int32)
            values = flat_entries(array, role)[indices]
            fields = {"role": role, "dtype": array.dtype, "trainable": ("values",)}
            return SparseDelta(base=array, indices=indices, values=values, **fields)

        return sj.Method(name, init)

    return {path: fixed(found) for path, found in entries(scores, config.share).items()}


def accuracy(params: Any, turns: int) -> float:
    """The share of test digits, turned or not, that are read right."""
    digits = load_digits(turns)
    return float(jnp.mean(apply(params, digits.x_test).argmax(-1) == digits.y_test))


def run(config: SaraConfig, context: Context) -> dict[str, Any]:
    """Sets entries to zero, then tunes every arm at every rate."""
    zeroed, runs = [], []
    for seed in config.seeds:
        params = pretrained(seed, config.pretraining)
        zeroed.append({"kind": "none", "share": 0.0, "seed": seed, "accuracy": accuracy(params, 0)})
        for share in config.shares:
            for kind, sign in (("smallest", -1.0), ("largest", 1.0)):
                scores = {f"{n}/kernel": sign * np.abs(params[n]["kernel"]) for n in LAYERS}
                gone = entries(scores, share)
                cut = sj.core.map_with_paths(
                    lambda p, v, gone=gone: v.ravel().at[gone[p]].set(0.0).reshape(v.shape) if p in gone else v, params
                )
                zeroed.append({"kind": kind, "share": share, "seed": seed, "accuracy": accuracy(cut, 0)})
    for name, seed in context.track([(n, s) for n in ARMS for s in config.seeds], "turned digits"):
        runs += _tune(config, name, seed)
    return {"runs": runs, "zeroed": zeroed}


def _tune(config: SaraConfig, name: str, seed: int) -> list[dict[str, Any]]:
    """One arm and seed at every rate, compiled once."""
    params, turned = pretrained(seed, config.pretraining), load_digits(1)
    threshold = sara.threshold_for(params, config.share, select=KERNELS)
    adapted = sj.adapt(params, method_of(config, name, params, seed), key=jax.random.key(100 + seed))
    make, found = optimizer_of(config, name, threshold), []
    x, y = turned.x[: config.images], turned.y[: config.images]
    for rate in config.rates:
        end = train(adapted, rate, jax.random.key(200 + seed), x, y, make, config.steps)
        merged = sj.merge(end)
        one = {"method": name, "learning_rate": rate, "seed": seed, "adapter_values": sj.summary(adapted).trainable}
        one |= {"accuracy": accuracy(merged, 1), "source": accuracy(merged, 0)}
        if name.startswith("smallest") or name == "sara":
            values = np.concatenate([np.asarray(w.values) for w in _weights(end)])
            one["still_small"] = float(np.mean(np.abs(values) < threshold))
            one["nuclear_norm"] = float(sara.nuclear_norm(end, min_side=0, min_entries=0))
        found.append(one)
    return found


def _weights(tree: Any) -> list[Any]:
    return [w for _, w in sj.core.leaves_with_paths(tree) if isinstance(w, SparseDelta)]


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the arms at their best rates, then the accuracy with entries set to zero."""
    header = ["arm", "values", "learning rate", "turned %", "source kept %", "still small %", "nuclear norm"]
    table = [header]
    for name, best in best_runs(results["runs"], "accuracy").items():
        extra = ["", ""]
        if "nuclear_norm" in best[0]:
            extra = [
                with_spread([r["still_small"] for r in best]),
                with_spread([r["nuclear_norm"] for r in best], 1, 1.0),
            ]
        kept = [with_spread([r[key] for r in best]) for key in ("accuracy", "source")]
        table.append([name, f"{best[0]['adapter_values']:,}", f"{best[0]['learning_rate']:g}", *kept, *extra])
    for kind, share in dict.fromkeys((r["kind"], r["share"]) for r in results["zeroed"]):
        found = [r["accuracy"] for r in results["zeroed"] if (r["kind"], r["share"]) == (kind, share)]
        table.append([f"untuned, {kind} {100 * share:g} % set to zero", "", "", "", with_spread(found), "", ""])
    return table


EXPERIMENT = Experiment(
    name="sara",
    claim="The smallest weights are free to be trained: they cost the source task least for what they learn.",
    config=SaraConfig,
    run=run,
    rows=rows,
    tuning=Tuning(),
)
