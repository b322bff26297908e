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
from subspace_jax.core import Role, leaves_with_paths, map_with_paths

# Of plain arrays; two axes need none. `bfloat16` is a stack of one, which products over mesh axes meet as well.
ROLES = {
    "stacked": Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,)),
    "bfloat16": Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,)),
    "conv": Role.conv(),
}
SHAPES = {
    "matrix": (12, 8),
    "stacked": (3, 8, 6),
    "conv": (2, 2, 3, 4),
    "bfloat16": (1, 8, 6),
    "full": (6, 10),
    "low_rank": (8, 10),
    "twin": (8, 10),
    "loca": (8, 6),
    "core": (8, 6),
    "rotated": (8, 6),
    "vector": (8,),
}
# Input sizes of the leaves that a subspace is removed from, or kept in.
SIZES = {"matrix": 12, "stacked": 8, "conv": 12, "bfloat16": 8, "full": 6, "low_rank": 8}
RANK = 3
PAIRS = ("low_rank", "twin")
METHODS = {
    "full": sj.full(),
    "low_rank": sj.lora(4),
    "twin": sj.lora(4),
    "loca": sj.loca(5),
    "core": sj.methods.lora_sb.lora_xs(2),
    "rotated": sj.oft(4),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A gradient transformation under test.

    Attributes:
      name: name in the test's id.
      make: makes the optimizer of a learning rate, which may be a schedule.
      learns: which part of the leaves with a basis its updates lie in: "everything", "complement" of the basis or the
        "subspace"; None where they lie in no fixed subspace, although the gradient is projected.
      converges: whether that part comes to where its gradient vanishes.
      leaves: names of the leaves that it runs on; few, as they are compiled many times.
      absent: the leaf that has no gradient where one has none.
      variant: of a function that another case tests on a mesh.
    """

    name: str
    make: Callable[[Any], optax.GradientTransformation]
    learns: Literal["everything", "complement", "subspace"] | None = "everything"
    converges: bool = True
    leaves: tuple[str, ...] = (*SIZES, "vector")
    absent: str = "stacked"
    variant: bool = False


def concrete(build):
    """Makes something once, with arrays that have values also where a program is traced."""

    @functools.cache
    def built(*args):
        with jax.ensure_compile_time_eval():
            return build(*args)

    return built


@concrete
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


@concrete
def adapted(seed: int = 0) -> dict[str, Any]:
    """Every leaf that is a stand-in weight, frozen parts included."""
    rng = np.random.default_rng(seed)
    params = {n: jnp.asarray(rng.normal(size=SHAPES[n]), jnp.float32) for n in METHODS}
    return sj.adapt(params, METHODS, key=jax.random.key(seed))


@concrete
def split() -> dict[str, Any]:
    """The leaves with a basis that are plain arrays, half of their singular values frozen by OSF."""
    params = {n: v for n, v in make_tree().items() if n in SIZES and n not in METHODS}
    return sj.adapt(params, {"**": sj.osf(0.5)}, key=jax.random.key(0), roles=ROLES)


@concrete
def make_tree(seed: int = 0, names: tuple[str, ...] = Case.leaves) -> dict[str, Any]:
    """Trainable leaves: plain arrays, stand-in weights with holes, a bfloat16 array; and a hole."""
    rng = np.random.default_rng(seed)
    found = {name: jnp.asarray(rng.normal(size=SHAPES[name]), jnp.float32) for name in SHAPES if name not in METHODS}
    if seed == 0:  # points of manifolds
        found |= {name: jnp.asarray(np.linalg.qr(found[name])[0], jnp.float32) for name in ("matrix", "stacked")}
    found["bfloat16"] = found["bfloat16"].astype(jnp.bfloat16)
    trainable = sj.partition(adapted(seed))[0]
    if seed:  # targets and gradients: LoRA starts with zeros
        trainable = jax.tree.map(lambda v: jnp.asarray(rng.uniform(1.0, 3.0, v.shape), v.dtype), trainable)
        signs = lambda v: jnp.asarray(rng.choice([-1.0, 1.0], v.shape), v.dtype)  # all positive is nearly of rank one
        trainable |= {name: jax.tree.map(lambda v: v * signs(v), trainable[name]) for name in PAIRS}
    found |= trainable
    return {name: found[name] for name in names} | {"hole": None}


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
    found = {
        "vector": lambda w: w,
        "b": lambda w: w.b,
        "loca": lambda w: w.coefficients,
        "core": lambda w: w.core,
    }
    places = {"b": "low_rank"}
    return {
        name: np.asarray(get(tree[places.get(name, name)]), np.float64)
        for name, get in found.items()
        if places.get(name, name) in tree
    }


def adam(learning_rate):
    """With a short memory, so that it comes to rest within a test."""
    direction = sj.optim.rest_without_gradient(optax.scale_by_adam(0.5, 0.9))
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def momentum(learning_rate):
    return sj.optim.rest_without_gradient(optax.sgd(learning_rate, 0.5))


def coordinates(learning_rate, **options):
    direction = sj.optim.in_subspace(optax.scale_by_adam(0.5, 0.9), roles=ROLES, **options)
    return sj.optim.with_rate(direction, learning_rate)


def projection(**options):
    return sj.project_orthogonal(bases(), roles=ROLES, **options)


def removal(inner, **options):
    """With removers of both forms."""
    removers = {path: sj.linalg.make_remover(basis) for path, basis in bases().items()}
    removers["conv"] = sj.linalg.make_remover(bases()["conv"], 2)
    return sj.optim.remove_subspaces(inner, removers, roles=ROLES, **options)


def with_manifolds(optimizer, learning_rate):
    """Two leaves are on manifolds; the others go to SGD."""
    others = lambda tree: map_with_paths(lambda path, _: path not in ("matrix", "stacked"), tree)
    return optax.chain(sj.optim.rest_without_gradient(optax.masked(optax.sgd(learning_rate), others)), optimizer)


def on_manifolds(learning_rate):
    spaces = {"matrix": sj.manifolds.Stiefel(), "stacked": sj.manifolds.Grassmann()}
    return with_manifolds(sj.riemannian(spaces, optax.sgd(learning_rate, 0.5), retraction="qr"), learning_rate)


def on_grassmannian(learning_rate):
    optimizer = sj.methods.gcr.grassmann_sgd(learning_rate, 0.5, paths=("matrix", "stacked"))
    return with_manifolds(optimizer, learning_rate)


def signs():
    """Signs of matrices, the plainest optimizer that treats them as one thing."""
    step = lambda gradient, parts, at: (jnp.sign(gradient), parts)
    return sj.optim.scale_matrices(lambda zeros, path: {}, step, largest=100, b1=0.9, b2=0.95, eps=1e-8, roles=ROLES)


CASES = (
    Case("project_before_sgd", lambda rate: optax.chain(projection(), momentum(rate)), "complement", variant=True),
    Case("project_before_adam", lambda rate: optax.chain(projection(), adam(rate)), None, variant=True),
    Case("project_after_adam", lambda rate: optax.chain(adam(rate), projection()), "complement", converges=False),
    Case(
        "keep_after_sgd",
        lambda rate: optax.chain(optax.sgd(rate), projection(mode="keep")),
        "subspace",
        variant=True,
    ),
    Case("sandwich", lambda rate: sj.sandwich(adam(rate), bases(), roles=ROLES), "complement"),
    Case("remove_subspaces", lambda rate: removal(adam(rate)), "complement"),
    Case(
        "remove_subspaces_from_updates",
        lambda rate: removal(adam(rate), project_gradients=False),
        "complement",
        converges=False,
        variant=True,
    ),
    Case("in_subspace", lambda rate: coordinates(rate, basis=bases()), "subspace"),
    Case("in_subspace_refreshed", lambda rate: coordinates(rate, rank=4, every=5, moments="transport")),
    Case("galore_longer_side", lambda rate: sj.galore(rate, 4, every=7, side="longer", scale=1.0, roles=ROLES)),
    Case(
        "in_complement",
        lambda rate: sj.optim.with_rate(
            sj.optim.in_complement(optax.scale_by_adam(0.5, 0.9), bases(), roles=ROLES), rate
        ),
        "complement",
        variant=True,
    ),
    Case("riemannian", on_manifolds, None, converges=False),
    Case("grassmann_sgd", on_grassmannian, None, converges=False, leaves=("matrix", "stacked", "full", "vector")),
    Case(
        "add_lambda_orthogonality",
        lambda rate: optax.chain(
            sj.methods.lambda_orthogonality.add_lambda_orthogonality(0.1, 1.0, roles=ROLES), adam(rate)
        ),
        converges=False,
        leaves=("conv", "bfloat16", "full", "low_rank", "vector"),  # at an orthogonal matrix its direction is rounding
        absent="full",
    ),
    Case(
        "add_orthogonality",
        lambda rate: optax.chain(sj.methods.orthogonal_conv.add_orthogonality(0.1, {"conv": 1}), adam(rate)),
        converges=False,
        leaves=("conv", "full", "vector"),
        absent="full",
    ),
    Case("lift_adam", lambda rate: sj.methods.lift.lift_adam(rate)),
    Case(
        "sara_adam",
        lambda rate: sj.methods.sara.sara_adam(
            rate, adapted(), threshold=1.0, reselect_after=3, b1=0.5, b2=0.9, weight_decay=0.0
        ),
        leaves=("matrix", "full", "low_rank", "vector"),
        absent="matrix",
    ),
    Case("with_importance", lambda rate: sj.methods.snella.with_importance(adam(rate)), variant=True),
    Case("coso", lambda rate: sj.coso(rate, 4, 6, 5, "in", b1=0.5, b2=0.9, roles=ROLES)),
    Case("dct_adam", lambda rate: sj.dct_adam(rate, 4, b1=0.5, b2=0.9, transform="fft", roles=ROLES)),
    Case("trion", lambda rate: sj.trion(rate, 4, vector_scale=1.0, roles=ROLES), converges=False),
    Case(
        "root",
        lambda rate: sj.methods.root.root(rate, momentum=0.5, weight_decay=0.0, roles=ROLES),
        None,
        converges=False,
    ),
    Case(
        "spectral_frank_wolfe",
        lambda rate: optax.chain(
            sj.methods.frank_wolfe_dictionary.scale_by_spectral_frank_wolfe(roles=ROLES),
            optax.scale_by_learning_rate(rate),
        ),
        None,
        converges=False,
    ),
    Case(
        "spectral_frank_wolfe_with_its_rate",
        lambda rate: sj.methods.frank_wolfe_dictionary.spectral_frank_wolfe(rate, 2.0),
        None,
        converges=False,
        leaves=("matrix", "vector"),
        absent="matrix",
        variant=True,
    ),
    Case("aro", lambda rate: sj.methods.aro.aro(rate, beta=0.5, weight_decay=0.0, roles=ROLES), None, converges=False),
    Case(
        "clip_and_orthogonalize",
        lambda rate: optax.chain(
            sj.methods.root.clip_by_quantile(roles=ROLES), sj.methods.root.orthogonalize(roles=ROLES), momentum(rate)
        ),
        None,
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
        leaves=("matrix", "full", "loca", "vector"),
        absent="matrix",
    ),
    Case(
        "lora_pro", lambda rate: sj.lora_pro(rate, adapted=adapted()), None, False, (*PAIRS, "matrix", "vector"), "twin"
    ),
    Case(
        "lora_pro_adam",
        lambda rate: sj.methods.lora_pro.lora_pro_adam(rate, adapted=adapted()),
        None,
        False,
        (*PAIRS, "matrix", "vector"),
        "twin",
    ),
    Case(
        "scale_by_lora_sb",
        lambda rate: optax.chain(sj.methods.lora_sb.scale_by_lora_sb(adapted()), adam(rate)),
        leaves=("core", "full", "vector"),
        absent="full",
    ),
    Case(
        "coft_projection",
        lambda rate: optax.chain(adam(rate), sj.methods.oft.coft_projection(1e-2)),
        converges=False,
        leaves=("rotated", "full", "vector"),
        absent="full",
    ),
)

# Aliases with a learning rate and decay, and what they are made of.
ALIASES = (
    (
        lambda rate, decay: sj.coso(rate, 2, 3, tasks=2, weight_decay=decay),
        lambda: sj.scale_by_coso(2, 3, tasks=2),
    ),
    (
        lambda rate, decay: sj.dct_adam(rate, 2, weight_decay=decay),
        lambda: sj.methods.dct_lowrank.scale_by_dct_adam(2),
    ),
    (lambda rate, decay: sj.methods.root.root(rate, weight_decay=decay), lambda: sj.methods.root.scale_by_root()),
    (lambda rate, decay: sj.methods.aro.aro(rate, weight_decay=decay), lambda: sj.methods.aro.scale_by_aro()),
    (
        lambda rate, decay: sj.optim.with_rate(signs(), rate, decay),
        lambda: signs(),
    ),
    (lambda rate, decay: sj.trion(rate, 2, weight_decay=decay), lambda: sj.methods.dct_lowrank.scale_by_trion(2)),
    (
        lambda rate, decay: sj.lora_pro(rate, weight_decay=decay, adapted=adapted()),
        lambda: sj.methods.lora_pro.scale_by_lora_pro(adapted=adapted()),
    ),
    (
        lambda rate, decay: sj.methods.lora_pro.lora_pro_adam(rate, weight_decay=decay, adapted=adapted()),
        lambda: sj.methods.lora_pro.scale_by_lora_pro_adam(adapted=adapted()),
    ),
    (
        lambda rate, decay: sj.methods.lift.lift_adam(rate, weight_decay=decay),
        lambda: sj.methods.lift.scale_by_lift_adam(),
    ),
    (
        lambda rate, decay: sj.methods.sara.sara_adam(
            rate, adapted(), threshold=1.0, reselect_after=None, weight_decay=decay
        ),
        lambda: sj.methods.sara.scale_by_sara(adapted(), threshold=1.0, reselect_after=None),
    ),
    (
        lambda rate, decay: sj.galore(rate, 2, scale=1.0, weight_decay=decay, eps=1e-8),
        lambda: sj.optim.in_subspace(optax.scale_by_adam(), rank=2),
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
TRANSFORMATIONS = set().union(
    *(_functions(case.make) for case in CASES), *(_functions(one) for pair in ALIASES for one in pair)
)
