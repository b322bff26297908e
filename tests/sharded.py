"""Methods whose parts are as long as the weight, split over 8 host devices and compared with one; a program of its own.

Usage: python sharded.py [METHOD ...]
"""

import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))

import subspace_jax as sj
from benchmarks._collectives import collectives
from subspace_jax.io import restore_checkpoint, save_checkpoint
from subspace_jax.linalg import stack_is_whole
from subspace_jax.methods.continual.osf import _frozen
from tests.eight_devices import check_cases

LAYERS, WIDTH, ROWS = 4, 16, 24
ROLES = {"layers": sj.Role.dense((1,), (2,), (0,)), "head": sj.Role.dense((0,), (1, 2))}
SPECS = {"layers": P(None, "data", "model"), "head": P("model", "data", None)}
LARGE = _frozen.LARGE
TOLERANCE = 1e-4  # of the largest entry of an array, after three steps of Adam


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, an optimizer for it, the fields that every device shall hold an eighth of, and whether it loops."""

    name: str
    method: Callable[[str], sj.Method]
    optimizer: Callable[[object], optax.GradientTransformation]
    eighths: tuple[str, ...]
    loops: bool = False


def osf_adam(frozen):
    return sj.methods.osf.projection(optax.adam(1e-2, eps=1e-3), frozen)


def lift_adam(_):
    return sj.methods.lift.lift_adam(1e-2, eps=1e-3)


def blocks(path):
    return (4, 2) if path == "layers" else (2, 4)


CASES = [
    Case("lift", lambda path: sj.lift(2, filter_rank=4), lift_adam, ("indices", "values")),
    Case("lift_blocks", lambda path: sj.lift(2, filter_rank=4, blocks=blocks(path)), lift_adam, ("indices", "values")),
    Case("osf", lambda path: sj.osf(0.5), osf_adam, ("left", "right", "high_left", "high_right")),
    Case("osf_common", lambda path: sj.osf(4, width="common"), osf_adam, ("left", "right", "high_left", "high_right")),
    Case("osf_in_loops", lambda path: sj.osf(0.5), osf_adam, ("left", "right", "high_left", "high_right"), loops=True),
]


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"layers": (LAYERS, WIDTH, WIDTH), "head": (WIDTH, 4, 6)}
    return {name: jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for name, s in shapes.items()}


def make_model(explicit):
    """A scanned model; with explicit axes it gathers what is split over "data", and names layouts."""

    def product(equation, x, w, spec, kept):
        if not explicit:
            return jnp.einsum(equation, x, w)
        return jnp.einsum(equation, x, jax.sharding.reshard(w, kept), out_sharding=spec)

    def model(params, x):
        def layer(h, w):
            h = jnp.tanh(product("bi,io->bo", h, w, P("data", "model"), P(None, "model")))
            return jax.sharding.reshard(h, P("data", None)) if explicit else h, None

        h = jax.lax.scan(layer, x, params["layers"])[0]
        return product("bi,iho->bho", h, params["head"], P("data", None, None), P(None, None, None))

    return model


def make_step(optimizer, explicit):
    apply = sj.with_adapters(make_model(explicit))

    def step(trainable, frozen, state, x, y):
        def loss(trainable):
            return jnp.mean((apply(sj.combine(trainable, frozen), x) - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def compare(actual, expected, what):
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max(initial=0.0)
        assert error <= TOLERANCE * np.abs(b).max(initial=0.0), f"{what}: {path} differs by {error}"


def held(value):
    return math.prod(value.sharding.shard_shape(value.shape)) / value.size


def check_checkpoint(adapted, state):
    """What was saved from the mesh comes back in the same places and bits."""
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding), state)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "run", 3, adapted, opt_state=state)
        places = jax.tree.map(lambda v: v.sharding, adapted)
        back = restore_checkpoint(Path(folder) / "run", like=like, shardings=places)
    for one, two in zip(
        jax.tree.leaves((back.adapted, back.opt_state)), jax.tree.leaves((adapted, state)), strict=True
    ):
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim), (one.sharding, two.sharding)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def check_gathers(program, case):
    """Projections in a loop gather one layer's factors at a time."""
    gathered = [dims for o, _ in collectives(program.as_text()) for _, dims in o.shapes if o.kind == "all-gather"]
    assert any(len(dims) == 3 and dims[0] == LAYERS for dims in gathered) != case.loops, gathered


def start(case, params):
    rules = {name: case.method(name) for name in params}
    return sj.adapt(params, rules, key=jax.random.key(0), roles=ROLES)


def make_batch():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((ROWS, WIDTH), (ROWS, 4, 6)))


@functools.cache
def on_one_device(case):
    """The adapted tree, what three steps make of it and of the optimizer's state, and their losses."""
    adapted = start(case, make_params())
    trainable, frozen = sj.partition(adapted)
    optimizer = case.optimizer(frozen)
    step = jax.jit(make_step(optimizer, explicit=False))
    expected, losses = (trainable, optimizer.init(trainable)), []
    for _ in range(3):
        *expected, value = step(expected[0], frozen, expected[1], *make_batch())
        losses.append(value)
    return adapted, expected, losses


def check(case, mesh, explicit):
    _frozen.LARGE = 0 if case.loops else LARGE
    params, (x, y) = make_params(), make_batch()
    adapted, expected, losses = on_one_device(case)

    with jax.set_mesh(mesh):
        placed = sj.shardings(adapted, SPECS, mesh)
        whole = jax.device_put(params, {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
        begin = jax.jit(functools.partial(start, case), out_shardings=placed).lower(whole).compile()
        begun = begin(whole)
        if not explicit and case.name.startswith("osf"):
            gathered = [math.prod(d) for o, _ in collectives(begin.as_text()) for _, d in o.shapes]
            assert max(gathered) < LAYERS * WIDTH * WIDTH, "all layers were gathered on every device"
        compare(sj.merge(begun), sj.merge(adapted), "merge at the start")

        spread = jax.device_put(adapted, placed)
        for name, weight in spread.items():
            for field in case.eighths:
                assert held(getattr(weight, field)) == 1 / 8, f"{name}.{field}: {getattr(weight, field).sharding}"
        parts = sj.partition(spread)
        optimizer = case.optimizer(parts[1])
        both = optax.GradientTransformation(lambda t: case.optimizer(t[1]).init(t[0]), optimizer.update)
        where = sj.state_shardings(both, parts, jax.tree.map(lambda v: v.sharding, parts))
        new, state = parts[0], jax.jit(optimizer.init, out_shardings=where)(parts[0])
        large = [v for v in jax.tree.leaves(state) if v.size > 4 * WIDTH]
        assert large
        assert all(held(v) == 1 / 8 for v in large), [v.sharding for v in large]
        kept = jax.tree.map(lambda v: v.sharding, (new, state))
        step = jax.jit(make_step(optimizer, explicit), out_shardings=(*kept, None))
        placed_x, placed_y = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (x, y))
        assert stack_is_whole(getattr(spread["layers"], case.eighths[0]))
        assert not stack_is_whole(placed_x)
        if not explicit and case.name in ("osf", "osf_in_loops"):
            check_gathers(step.lower(new, parts[1], state, placed_x, placed_y).compile(), case)
        for value in losses:
            new, state, found = step(new, parts[1], state, placed_x, placed_y)
            np.testing.assert_allclose(found, value, rtol=TOLERANCE)
        compare(new, expected[0], "parameters")
        compare(state, expected[1], "state")
        trained = sj.combine(new, parts[1])
        compare(sj.merge(trained), sj.merge(sj.combine(expected[0], sj.partition(adapted)[1])), "merged")
        check_checkpoint(trained, state)


if __name__ == "__main__":
    check_cases(CASES, check)
