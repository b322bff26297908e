"""The learning rate counts optimizer steps, rises from above zero, and falls to zero or stays."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")

from subspace_jax.cli import FinetuneOptions
from subspace_jax.cli._schedule import make_schedule


def rates(steps, **options):
    schedule = make_schedule(FinetuneOptions(Path("data"), **options), 0.5, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_rise_and_fall():
    found = rates(20, schedule="linear", warmup=0.2)
    np.testing.assert_allclose(found[:4], [0.125, 0.25, 0.375, 0.5])
    np.testing.assert_allclose(found[4:], 0.5 * (1 - np.arange(17) / 16), atol=1e-7)
    cosine = rates(20, schedule="cosine", warmup=0.2)
    np.testing.assert_allclose(cosine[4:], 0.25 * (1 + np.cos(np.pi * np.arange(17) / 16)), atol=1e-7)
    np.testing.assert_allclose(rates(20, schedule="constant", warmup=0.2)[4:], 0.5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_move_in_every_step(steps):
    for warmup in (0.0, 0.1, 0.9):
        assert (rates(steps, warmup=warmup)[:steps] > 0).all()
