"""The loop: resumes where it stopped, in the same bits, after an end, a signal or an error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.io import CheckpointError
from subspace_jax.training import fit, init_train_state, make_train_step

from .problem import OPTIMIZER, batches, content, loss, make_adapted, make_params

STEPS = 6
STEP = make_train_step(loss, OPTIMIZER, accumulate=2)


def start(rules=None):
    adapted = make_adapted() if rules is None else make_adapted(rules)
    return init_train_state(adapted, OPTIMIZER, jax.random.key(1))


@pytest.fixture(scope="module")
def whole():
    return content(fit(start(), STEP, batches, steps=STEPS))


@pytest.mark.parametrize(
    "options", [{}, {"base": make_params()}, {"background": True}], ids=["whole", "base left out", "in the background"]
)
def test_a_run_in_parts_ends_in_the_same_bits(tmp_path, whole, options):
    seen, asked = [], []

    def asking(number):
        asked.append(number)
        return batches(number)

    for steps in (3, 4, STEPS, STEPS):
        with sj.io.Checkpointer(tmp_path, **options) as checkpointer:
            state = fit(
                start(),
                STEP,
                asking,
                steps=steps,
                checkpointer=checkpointer,
                every=2,
                on_metrics=lambda n, m: seen.append(n),
            )
            saved = checkpointer.all_steps()
    assert content(state) == whole
    assert seen == [1, 2, 3, 4, 5, 6]
    assert asked == [0, 3, 4]
    assert saved == [2, 3, 4, 6]


def test_what_learns_alone_may_be_saved(tmp_path, whole):
    for steps in (3, STEPS):
        with sj.io.Checkpointer(tmp_path) as checkpointer:
            state = fit(start(), STEP, batches, steps=steps, checkpointer=checkpointer, save_frozen=False)
            held = checkpointer.abstract().adapted
    assert content(state) == whole
    assert held["in"].base is None
    assert held["in"].a.shape == (16, 2)


def test_a_signal_stops_after_the_step_and_the_run_goes_on_in_the_same_bits(tmp_path, whole):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1", "2", "3", "stopped", "3"]
    with sj.io.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == [3]
        assert content(fit(start(), STEP, batches, steps=STEPS, checkpointer=checkpointer)) == whole


def signalled(folder):
    """A run that is told to stop during its third step."""

    def report(number, metrics):
        print(number)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with sj.io.Checkpointer(folder, background=True) as checkpointer:
        state = fit(start(), STEP, batches, steps=STEPS, checkpointer=checkpointer, on_metrics=report)
    assert signal.getsignal(signal.SIGTERM) == handler
    print("stopped", state.step)


def test_batches_that_end_early_are_an_error_and_nothing_is_lost(tmp_path):
    def few(number):
        return [batch for batch, _ in zip(batches(number), range(4 - number), strict=False)]

    with sj.io.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="the batches ended after step 4 of 6"):
            fit(start(), STEP, few, steps=STEPS, checkpointer=checkpointer)
        assert checkpointer.all_steps() == [4]


def test_another_run_is_refused(tmp_path):
    with sj.io.Checkpointer(tmp_path) as checkpointer:
        fit(start(), STEP, batches, steps=1, checkpointer=checkpointer)
        other = {"in": sj.lora(3), "out": sj.pissa(2), "bias": sj.full()}
        with pytest.raises(StructureError, match=r"in/a: fit: the checkpoint in .* has float32\[16, 2\].*\[16, 3\]"):
            fit(start(other), STEP, batches, steps=2, checkpointer=checkpointer)
        changed = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1), compute_dtype=jnp.bfloat16)
        with pytest.raises(StructureError, match=r"in/base: .*float32\[16, 32\].*bfloat16\[16, 32\]"):
            fit(changed, STEP, batches, steps=2, checkpointer=checkpointer)
        sgd = init_train_state(make_adapted(), optax.sgd(0.1), jax.random.key(1))
        with pytest.raises(CheckpointError, match="optimizer"):
            fit(sgd, STEP, batches, steps=2, checkpointer=checkpointer)
        assert checkpointer.all_steps() == [1]
    with pytest.raises(ValueError, match="every=0"):
        fit(start(), STEP, batches, steps=1, every=0)


if __name__ == "__main__":
    signalled(sys.argv[1])
