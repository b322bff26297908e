"""Every gradient transformation: a new one adds one line to `CASES`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from subspace_jax.core import Role, leaves_with_paths

# Of plain arrays; two axes need none.
ROLES = {
    "stacked": Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,)),
    "conv": Role.conv(),
    "heads": Role.dense(in_axes=(0,), out_axes=(1, 2)),
}
SHAPES = {
    "matrix": (12, 8),
    "stacked": (3, 8, 6),
    "conv": (2, 2, 3, 4),
    "heads": (8, 2, 4),
    "bfloat16": (8, 6),
    "full": (6, 10),
    "low_rank": (8, 10),
    "loca": (8, 6),
    "vector": (8,),
}
# Input sizes of the leaves that a subspace is removed from, or kept in.
SIZES = {"matrix": 12, "stacked": 8, "conv": 12, "heads": 8, "bfloat16": 8, "full": 6, "low_rank": 8}
RANK = 3
METHODS = {"full": sj.full(), "low_rank": sj.lora(4), "loca": sj.loca(5)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A gradient transformation under test.

    Attributes:
      name: name in the test's id.
      make: makes the optimizer of a learning rate, which may be a schedule.
      learns: which part of the leaves with a basis its updates lie in: "everything", "complement" of the basis or the
        "subspace"; None where they lie in no fixed subspace, although the gradient is projected.
      converges: whether that part comes to where its gradient vanishes.
    """

    name: str
    make: Callable[[Any], optax.GradientTransformation]
    learns: Literal["everything", "complement", "subspace"] | None = "everything"
    converges: bool = True


@functools.cache
def bases() -> dict[str, jax.Array]:
    """Orthonormal columns of rank 2 inside arrays of three, by path; of the stack with a rank of its own per layer."""
    rng, found = np.random.default_rng(5), {}
    for path, size in SIZES.items():
        stack = (3,) if path == "stacked" else ()
        columns = np.linalg.qr(rng.normal(size=(*stack, size, RANK)))[0]
        columns[..., -1] = 0.0
        if stack:
            columns[0, :, 1] = 0.0
        found[path] = jnp.asarray(columns, jnp.float32)
    return found


@functools.cache
def split() -> dict[str, Any]:
    """The leaves with a basis that are plain arrays, half of their singular values frozen by OSF."""
    params = {n: v for n, v in make_tree().items() if n in SIZES and n not in METHODS}
    return sj.adapt(params, {"**": sj.osf(0.5)}, key=jax.random.key(0), roles=ROLES)


@functools.cache
def make_tree(seed: int = 0) -> dict[str, Any]:
    """Trainable leaves of every kind: plain arrays, stand-in weights with holes, a hole, a bfloat16 array."""
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    params["bfloat16"] = params["bfloat16"].astype(jnp.bfloat16)
    adapted = sj.adapt({n: params[n] for n in METHODS}, METHODS, key=jax.random.key(seed))
    trainable = sj.partition(adapted)[0]
    if seed:  # targets and gradients: LoRA starts with zeros
        trainable = jax.tree.map(lambda v: jnp.asarray(rng.uniform(1.0, 3.0, v.shape), v.dtype), trainable)
    return params | trainable | {"hole": None}


def matrices(tree: Any) -> dict[str, np.ndarray]:
    """Leaves with a basis as float64 matrices `[*stack, in, out]`, by path."""
    found = {}
    for path, leaf in leaves_with_paths(tree):
        if path in SIZES:
            array = {"full": lambda w: w.value, "low_rank": lambda w: w.a}.get(path, lambda w: w)(leaf)
            array = ROLES[path].matrix(array) if path in ROLES else array
            found[path] = np.asarray(array, np.float64)
    return found


def rest(tree: Any) -> dict[str, np.ndarray]:
    """Arrays without a basis."""
    found = {"vector": tree["vector"], "b": tree["low_rank"].b, "coefficients": tree["loca"].coefficients}
    return {name: np.asarray(v, np.float64) for name, v in found.items()}


def adam(learning_rate):
    """With a short memory, so that it comes to rest within a test."""
    return optax.chain(optax.scale_by_adam(0.5, 0.9), optax.scale_by_learning_rate(learning_rate))


def coordinates(learning_rate, **options):
    return optax.chain(
        sj.optim.in_subspace(optax.scale_by_adam(0.5, 0.9), roles=ROLES, **options),
        optax.scale_by_learning_rate(learning_rate),
    )


def with_rate(transformation, learning_rate):
    return optax.chain(transformation, optax.scale_by_learning_rate(learning_rate))


def projection(**options):
    return sj.project_orthogonal(bases(), roles=ROLES, **options)


def on_manifolds(learning_rate):
    """Two leaves on manifolds, which random ones reach with the first step; the others go to SGD."""
    spaces = {"matrix": sj.manifolds.Stiefel(), "stacked": sj.manifolds.Grassmann()}
    return optax.chain(
        optax.masked(optax.sgd(learning_rate), lambda tree: {name: name not in spaces for name in tree}),
        sj.riemannian(spaces, optax.sgd(learning_rate, 0.5), retraction="qr", tolerance=float("inf")),
    )


CASES = (
    Case("project_before_sgd", lambda rate: optax.chain(projection(), optax.sgd(rate, 0.5)), "complement"),
    Case("project_before_adam", lambda rate: optax.chain(projection(), adam(rate)), None),
    Case("project_after_adam", lambda rate: optax.chain(adam(rate), projection()), "complement", converges=False),
    Case("keep_after_sgd", lambda rate: optax.chain(optax.sgd(rate), projection(mode="keep")), "subspace"),
    Case("sandwich", lambda rate: sj.sandwich(adam(rate), bases(), roles=ROLES), "complement"),
    Case("in_subspace", lambda rate: coordinates(rate, basis=bases()), "subspace"),
    Case("in_subspace_refreshed", lambda rate: coordinates(rate, rank=4, every=5, moments="transport")),
    Case("galore_longer_side", lambda rate: sj.galore(rate, 4, every=7, side="longer", scale=1.0, roles=ROLES)),
    Case(
        "in_complement",
        lambda rate: optax.chain(
            sj.optim.in_complement(optax.scale_by_adam(0.5, 0.9), bases(), roles=ROLES),
            optax.scale_by_learning_rate(rate),
        ),
        "complement",
    ),
    Case("riemannian", on_manifolds, None, converges=False),
    Case(
        "add_lambda_orthogonality",
        lambda rate: optax.chain(
            sj.methods.lambda_orthogonality.add_lambda_orthogonality(0.1, 1.0, roles=ROLES), adam(rate)
        ),
        converges=False,
    ),
    Case("lift_adam", lambda rate: sj.methods.lift.lift_adam(rate)),
    Case("coso", lambda rate: sj.coso(rate, 4, 6, 5, "in", b1=0.5, b2=0.9, roles=ROLES)),
    Case(
        "dct_adam",
        lambda rate: with_rate(sj.methods.dct_lowrank.scale_by_dct_adam(4, b1=0.5, b2=0.9, roles=ROLES), rate),
    ),
    Case(
        "trion",
        lambda rate: with_rate(sj.methods.dct_lowrank.scale_by_trion(4, vector_scale=1.0, roles=ROLES), rate),
        converges=False,
    ),
    Case(
        "osf_dense",
        lambda rate: sj.methods.osf.projection(adam(rate), split(), mode="dense", roles=ROLES),
        None,
        converges=False,
    ),
    Case(
        "alternating",
        lambda rate: sj.methods.loca.alternating(
            adam(rate), optax.adam(1e-3), cutoff_step=10**6, coefficient_steps=2, location_steps=1
        ),
    ),
)


def _functions(make: Callable) -> set[str]:
    """Names that a function's code uses, and those of the helpers of this file that it calls."""
    found = set(make.__code__.co_names)
    for constant in make.__code__.co_consts:
        found |= set(constant.co_names) if hasattr(constant, "co_names") else set()
    helpers = [globals()[n] for n in found if n in globals() and hasattr(globals()[n], "__code__")]
    return found.union(*(_functions(one) for one in helpers))


# Functions of the library that the cases call.
TRANSFORMATIONS = set().union(*(_functions(case.make) for case in CASES))
