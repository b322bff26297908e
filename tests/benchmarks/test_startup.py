"""What `startup` counts and how it judges accuracy: against numpy's SVD, never times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import subspace_jax as sj
from benchmarks._compilations import compilations
from benchmarks._starts import Factors, covariance, excess, factors, gram_start, power_law, stack, start, values
from benchmarks.startup import FULL, GRAM, RANDOMIZED, Config, run, tables
from subspace_jax.core import Statistics

CONFIG = Config(
    shapes=("24x40", "40x24"),
    ranks=(2, 4),
    depth=2,
    rounds=1,
    inputs=16,
    rows=64,
    chunk=16,
    encoder_layers=2,
    encoder_width=48,
)


@pytest.fixture(scope="module")
def results():
    return run(CONFIG, Console(quiet=True))


def of(results, **wanted):
    return [row for row in results["starts"] if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_power_law_has_the_values_it_names(shape):
    made = power_law(np.random.default_rng(0), shape, 0.5)
    assert made.dtype == np.float32
    np.testing.assert_allclose(np.linalg.svd(made, compute_uv=False), np.arange(1, 25) ** -0.5, rtol=1e-4)
    assert not np.allclose(made, power_law(np.random.default_rng(1), shape, 0.5))
    found = np.linalg.eigvalsh(covariance(np.random.default_rng(0), 24))
    np.testing.assert_allclose(found[::-1], 1 / np.arange(1, 25), rtol=1e-4)


def test_an_unknown_spectrum_or_method_is_refused():
    with pytest.raises(SystemExit, match="spectra=flat"):
        stack("flat", (4, 4), 1, 0.5)
    with pytest.raises(SystemExit, match="methods=lora; choose from pissa"):
        run(Config(shapes=("8x8",), methods=("lora",), ranks=(2,)), Console(quiet=True))


def test_excess_is_that_of_numpys_best_part():
    target = np.random.default_rng(0).normal(size=(2, 12, 9)).astype(np.float32)
    u, s, vt = np.linalg.svd(target)
    best = Factors(jnp.asarray(u[..., :3] * s[:, None, :3]), jnp.asarray(vt[:, :3]))
    assert max(abs(v) for v in excess(target, best, s).values()) < 1e-3
    # The second term left out of the second matrix.
    worse = Factors(best.left.at[1, :, 1].set(0), best.right)
    found = excess(target, worse, s)
    rest = np.sum(s[1, 3:] ** 2)
    np.testing.assert_allclose(found["frobenius"], np.sqrt((rest + s[1, 1] ** 2) / rest) - 1, rtol=1e-3)
    np.testing.assert_allclose(found["spectral"], s[1, 1] / s[1, 3] - 1, rtol=1e-3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_gram_start_is_numpys_svd(shape):
    target = stack("power", shape, 2, 0.5)
    found = jax.jit(gram_start(4))(None, jnp.asarray(target), None)
    u, s, vt = np.linalg.svd(target, full_matrices=False)
    np.testing.assert_allclose(found.left @ found.right, (u[..., :4] * s[:, None, :4]) @ vt[:, :4], atol=1e-5)
    np.testing.assert_allclose(values(found), s[:, :4], rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        (sj.pissa(3, svd="exact"), 1.0),
        (sj.pissa(3, alpha=6, svd="exact"), 1.0),
        (sj.svfit(3), 1.0),
        (sj.methods.lora_sb.lora_xs(3, iterations=40), 1.0),
        (sj.lora_sb(3, learning_rate=0.5, alpha=6, update="raw"), -0.5),
    ],
)
def test_every_method_shows_the_part_that_it_found(method, rate):
    target = stack("power", (12, 20), 2, 0.5)
    statistics = Statistics(gradient=jnp.asarray(target))
    found = factors(start(method)(jax.random.key(0), jnp.asarray(target), statistics))
    u, s, vt = np.linalg.svd(target, full_matrices=False)
    expected = rate * (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
    np.testing.assert_allclose(found.left @ found.right, expected, atol=1e-4)


def test_every_way_is_measured_on_every_shape(results):
    for shape in CONFIG.shapes:
        assert [row["rank"] for row in of(results, shape=shape, way=RANDOMIZED, method="pissa")] == [2, 4, 2, 4]
        assert {row["method"] for row in of(results, shape=shape, way=FULL)} == {"pissa", "corda"}
        assert {row["method"] for row in of(results, shape=shape, way=GRAM)} == {"pissa", "lora_sb"}
    assert all(row["ratio"] > 0 for row in results["starts"])
    assert all(len(row["seconds"]) == 1 for row in results["starts"])
    titles = [title for title, _ in tables(results)]
    assert titles[:2] == ["Start of 24x40", "Start of 40x24"]
    assert all(len(row) == len(rows[0]) for _, rows in tables(results) for row in rows)


def test_starts_leave_hardly_more_than_the_best_part(results):
    for row in of(results, way=RANDOMIZED):
        assert -1e-3 < row["excess"]["frobenius"] < 0.02, row
        assert -2e-3 < row["excess"]["spectral"] < 0.1, row


def test_loops_count_their_products(results):
    for iterations in (4, 10):
        (row,) = of(results, shape="24x40", method="lora_xs", way=RANDOMIZED, iterations=iterations)
        columns = 4 + 8
        sketch = 2 * CONFIG.depth * 24 * 40 * columns * (1 + 2 * iterations + 1)
        small = 2 * CONFIG.depth * 24 * columns * columns
        assert row["product_flops"] == sketch + small


def test_ways_to_the_covariance_agree_with_float64(results):
    errors = {row["way"]: row["error"] for row in results["covariances"]}
    assert len(errors) == 5
    assert all(error < 1e-5 for error in errors.values() if error is not None)
    held = {row["way"]: row["held_bytes"] for row in results["covariances"]}
    assert held["Gram, streamed"] < held["QR of all rows"]


def test_a_second_start_compiles_nothing(results):
    rows = results["encoder"]
    assert {row["method"] for row in rows} >= {"pissa", "corda", "lora_sb", "lora_xs"}
    assert {row["method"]: row["compilations"][1] for row in rows} == dict.fromkeys((row["method"] for row in rows), 0)


def test_compilations_are_counted():
    with compilations() as first:
        jax.jit(lambda x: x * 3 + 1)(1.0)
    with compilations() as none:
        pass
    assert len(first) == 1
    assert none == []
