"""The training loop that experiments share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks.training import Trainer, evaluate, warmup_linear
from tests.tolerances import tolerance


def problem():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "bias": jnp.zeros(4)}
    x = rng.normal(size=(64, 6)).astype(np.float32)
    y = (x @ rng.normal(size=(6, 4))).argmax(-1)
    return params, [{"x": x, "labels": y}] * 30


def model(params, batch):
    return batch["x"] @ params["kernel"] + params["bias"]


def loss(params, batch):
    logits = sj.with_adapters(model)(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def test_training_moves_only_what_learns_and_compiles_once():
    params, batches = problem()
    adapted = sj.adapt(params, {"kernel": sj.lora(rank=2)}, key=jax.random.key(0))
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    trainer = Trainer(counted, optax.adam(1e-2))
    first = trainer.run(adapted, batches)
    second = trainer.run(adapted, batches)
    assert len(traces) == 1
    assert first.losses == second.losses
    assert first.losses[-1] < first.losses[0]
    np.testing.assert_array_equal(first.adapted["kernel"].base, params["kernel"])
    np.testing.assert_array_equal(first.adapted["bias"], params["bias"])
    # Two float32 moments of a (6, 2) and b (2, 4), and an int32 count.
    assert first.state_bytes == 2 * 4 * (12 + 8) + 4


def test_schedule_warms_up_and_ends_at_zero():
    schedule = warmup_linear(1.0, 100)
    np.testing.assert_allclose(
        [schedule(0), schedule(6), schedule(53), schedule(100)], [0, 1, 0.5, 0], atol=tolerance(size=4)
    )


def test_evaluate_counts_the_short_last_batch_once():
    batches = [
        {"x": np.eye(3, dtype=np.float32), "labels": np.array([0, 1, 2])},
        {"x": np.eye(3, dtype=np.float32)[:1], "labels": np.array([2])},
    ]
    shapes = set()

    def logits(params, batch):
        shapes.add(batch["x"].shape)
        return batch["x"] * params

    accuracy, outputs = evaluate(logits, 1.0, batches)
    assert (accuracy, outputs.shape, len(shapes)) == (0.75, (4, 3), 1)
