"""GaLore against itself on the transposed weight; what it shares with `in_subspace` is tested there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError
from tests.tolerances import tolerance


@pytest.mark.parametrize("moments", ["carry", "transport"])
@pytest.mark.parametrize("decomposition", ["exact", "randomized"])
def test_a_weight_and_its_transpose_train_alike(moments, decomposition):
    """Signs are those of the basis, whichever side it lies in: carried moments meet the same flips."""
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(9, 6)).astype(np.float32) for _ in range(12)]
    found = []
    for turn in (lambda g: g, np.transpose):
        optimizer = sj.galore(1.0, 3, every=2, moments=moments, decomposition=decomposition)
        state, made = optimizer.init({"w": jnp.asarray(turn(gradients[0]))}), []
        update = jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update({"w": turn(gradient)}, state)
            made.append(turn(np.asarray(updates["w"])))
        found.append(made)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance(size=4))


def test_decay_is_decoupled_and_in_full_space():
    params, gradient = {"w": jnp.full((6, 4), 2.0)}, {"w": jnp.eye(6, 4)}
    plain, decayed = (sj.galore(0.5, 2, weight_decay=decay) for decay in (0.0, 0.1))
    one, other = (o.update(gradient, o.init(params), params)[0]["w"] for o in (plain, decayed))
    np.testing.assert_allclose(other - one, -0.5 * 0.1 * 2.0, rtol=1e-5)


def test_is_adam_in_the_leading_subspace_times_the_scale():
    rng = np.random.default_rng(1)
    gradient = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    optimizer = sj.galore(1.0, 2, scale=0.25)
    updates, _ = optimizer.update({"w": gradient}, optimizer.init({"w": gradient}))
    u = np.linalg.svd(np.asarray(gradient, np.float64))[0][:, :2]
    low = u.T @ np.asarray(gradient, np.float64)
    np.testing.assert_allclose(updates["w"], -0.25 * u @ (low / (np.abs(low) + 1e-6)), rtol=0, atol=1e-4)


def test_bad_options_are_refused():
    with pytest.raises(RankError, match="rank"):
        sj.galore(1.0, 0)
    with pytest.raises(ValueError, match="side='left'"):
        sj.galore(1.0, 2, side="left")
    with pytest.raises(TypeError, match="residuals"):
        sj.galore(1.0, 2, residuals="discard")
    assert isinstance(sj.galore(1.0, 2), optax.GradientTransformationExtraArgs)
