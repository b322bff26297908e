"""OSF on a stream of tasks: what is learned orthogonal to the large singular directions does not forget.

The stream of `latent_tasks`: 5 tasks, Adam, 400 steps each. Before every task but the first, which is free and the
same for all, OSF freezes the share (t - 1) / 5 of the kernel's singular triples. "updates only" leaves out the
projection of gradients, "gradients only" the one after Adam, "no projection" both; "frozen kernel" trains heads only.
Every method has the same eight rates.

    python -m experiments run osf

Measured over four seeds at the best rate of each, final accuracy and backward transfer: full fine-tuning 76.4 ± 1.0 and
-7.1 ± 1.5 %, OSF 78.0 ± 0.8 and -1.2 ± 0.5, updates only 78.6 ± 0.6 and -1.1 ± 1.0, gradients only 77.4 ± 0.7 and
-2.3 ± 0.6, no projection 76.3 ± 1.4 and -6.9 ± 1.0, frozen kernel 66.2 ± 0.4 and 0. So the projection takes forgetting
to a sixth; what the projection after Adam adds to that of gradients is within two spreads, although only with it the
constraint holds; and where it is there, that of gradients adds nothing to it. The small initial kernel is necessary:
where large singular directions are those of the initialization they hold no knowledge.
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
from experiments.runner import Context, Experiment, Tuning
from experiments.tasks import latent_tasks


@dataclasses.dataclass(frozen=True)
class OsfConfig:
    """Settings.

    Attributes:
      tasks: in the stream.
      steps: optimizer steps of each task.
      batch_size: examples of a step.
      rates: learning rates of Adam, tried for every method.
      kernel_std: of the kernel's initial entries; it has to be small, so that large singular values are knowledge.
      seeds: one stream, network and run of every method per seed.
    """

    tasks: int = 5
    steps: int = 400
    batch_size: int = 64
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    kernel_std: float = 0.02
    seeds: tuple[int, ...] = (0, 1, 2, 3)


METHODS = {
    "full": {},
    "osf": {"project_gradients": True, "project_params": True},
    "osf, updates only": {"project_gradients": False, "project_params": True},
    "osf, gradients only": {"project_gradients": True, "project_params": False},
    "osf, no projection": {"project_gradients": False, "project_params": False},
    "frozen kernel": {},
}


def run(config: OsfConfig, context: Context) -> dict[str, Any]:
    """Runs every method with every rate; all seeds at once."""
    stream = latent_tasks.make_stream(config.seeds, config.tasks, shared_std=1.5)
    jobs = [(name, rate) for rate in config.rates for name in METHODS]
    runs = []
    for name, rate in context.track(jobs, "streams of tasks"):
        matrices = follow(config, stream, name, rate)
        runs += latent_tasks.records(name, rate, config.seeds, matrices)
    return {"runs": runs}


def follow(config: OsfConfig, stream: latent_tasks.Stream, name: str, rate: float) -> np.ndarray:
    """Trains on one task after the other; accuracy matrices `[tasks, seeds, tasks]`."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
    kernel = config.kernel_std * jax.vmap(lambda k: jax.random.normal(k, (64, 64)))(keys)
    heads, rows = [], []
    for task in range(config.tasks):
        # The first task is free for all of them, and leaves one kernel.
        arm = "full" if task == 0 else name
        share = sj.methods.osf.schedule(task + 1, config.tasks)
        rules = {"kernel": None} if arm == "frozen kernel" else {"kernel": sj.full()}
        if arm.startswith("osf"):
            rules = {"kernel": sj.osf(share, width="common")}
        params = {"kernel": kernel, "head": 0.01 * jnp.ones((len(config.seeds), 128, 4))}
        adapted = jax.vmap(lambda p, rules=rules: sj.adapt(p, rules | {"head": sj.full()}, key=jax.random.key(0)))(
            params
        )
        steps = jax.vmap(lambda k, task=task: jax.random.fold_in(k, task))(keys)
        data = stream.x[:, task], stream.y[:, task], stream.features
        trained = train(adapted, steps, data, arm, rate, config.steps, config.batch_size)
        merged = jax.vmap(sj.merge)(trained)
        kernel = merged["kernel"]
        heads.append(merged["head"])
        rows.append(latent_tasks.accuracies(kernel, heads, stream))
    return np.stack(rows)


@functools.partial(jax.jit, static_argnames=("arm", "rate", "steps", "batch_size"))
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None, None, None))
def train(adapted: Any, key: jax.Array, data: Any, arm: str, rate: float, steps: int, batch_size: int) -> Any:
    """Trains the kernel and the head of one task; one compiled program for all tasks and seeds."""
    x, y, features = data
    optimizer = optax.adam(rate)
    if arm.startswith("osf"):
        optimizer = sj.methods.osf.projection(optimizer, sj.partition(adapted)[1], **METHODS[arm])

    def loss(adapted: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (batch_size,), 0, len(x))
        logits = latent_tasks.apply(adapted, features, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    return sj.training.scan_steps(loss, optimizer, adapted, jax.random.split(key, steps)).adapted


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns accuracy and forgetting of each method at its best rate."""
    return latent_tasks.table(results)


EXPERIMENT = Experiment(
    name="osf",
    claim="Training only what is orthogonal to a weight's large singular directions halves forgetting at least.",
    config=OsfConfig,
    run=run,
    rows=rows,
    tuning=Tuning(),
)
