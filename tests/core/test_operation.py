"""Random products, lookups and chains of factors against numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import subspace_jax as sj
from subspace_jax.core import MaterializeError, dense
from subspace_jax.weights import LowRank
from tests.tolerances import tolerance

from .helpers import close, normal


@st.composite
def products(draw):
    """A random `dot_general` of a weight, which of its axes are inputs, outputs and stacked, and how it is seen."""
    ndim = draw(st.integers(2, 4))
    kinds = draw(st.lists(st.sampled_from(["contract", "batch", "free"]), min_size=ndim, max_size=ndim))
    groups = draw(
        st.lists(st.sampled_from(["stack", "in", "out"]), min_size=ndim, max_size=ndim).filter(
            lambda g: {"in", "out"} <= set(g)
        )
    )
    sizes = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    permutation = draw(st.permutations(range(ndim)))
    # Axes of x: those that meet the weight, in any order, and free ones in between.
    met = [i for i, kind in enumerate(kinds) if kind != "free"]
    x_axes = draw(st.permutations([*met, *[None] * draw(st.integers(0, 2))]))
    order = {
        name: draw(st.permutations([i for i, g in enumerate(groups) if g == name])) for name in ("stack", "in", "out")
    }
    pairs = {kind: draw(st.permutations([i for i in met if kinds[i] == kind])) for kind in ("contract", "batch")}
    return sizes, order, permutation, x_axes, pairs, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(products(), st.integers(0, 3))
def test_low_rank_product_equals_dense_product(case, seed):
    sizes, order, permutation, x_axes, pairs, weight_first = case
    role = sj.Role.dense(tuple(order["in"]), tuple(order["out"]), tuple(order["stack"]))
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)
    stack = [sizes[i] for i in order["stack"]]
    inputs, outputs = (int(np.prod([sizes[i] for i in order[name]])) for name in ("in", "out"))
    base, a, b = draw(*sizes), draw(*stack, inputs, 2), draw(*stack, 2, outputs)
    weight = LowRank(base=base, a=a, b=b, scale=0.5, role=role, dtype=np.dtype("float32"), trainable=("a", "b"))
    x = draw(*(4 if i is None else sizes[i] for i in x_axes))
    seen = [permutation.index(i) for i in range(len(sizes))]
    sides = [([seen[i] for i in pairs[k]], [x_axes.index(i) for i in pairs[k]]) for k in ("contract", "batch")]

    def fn(w):
        w = jnp.transpose(w, permutation)
        if weight_first:
            return lax.dot_general(w, x, (sides[0], sides[1]))
        return lax.dot_general(x, w, (sides[0][::-1], sides[1][::-1]))

    # Small integers: float32 sums are exact, so is the comparison. The reference is an einsum on numpy's own array.
    axes = [*order["stack"], *order["in"], *order["out"]]
    full = base + (0.5 * (a @ b)).reshape([sizes[i] for i in axes]).transpose(np.argsort(axes))
    w_names = [chr(97 + i) for i in range(len(sizes))]
    x_names = [chr(110 + j) if i is None else chr(97 + i) for j, i in enumerate(x_axes)]
    batch = [chr(97 + i) for i in pairs["batch"]]
    taken = {chr(97 + i) for i in (*pairs["batch"], *pairs["contract"])}
    w_free = [chr(97 + i) for i in permutation if chr(97 + i) not in taken]
    x_free = [n for n in x_names if n not in taken]
    out = [*batch, *w_free, *x_free] if weight_first else [*batch, *x_free, *w_free]
    expected = np.einsum(f"{''.join(w_names)},{''.join(x_names)}->{''.join(out)}", full, x)
    found = jax.jit(sj.with_adapters(fn))(weight)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance(), atol=tolerance(size=4))


CHAINS = {
    "two": ((6, 2), (2, 4)),
    "three": ((6, 2), (2, 3), (3, 4)),
    "diagonal between": ((6, 3), (3,), (3, 4)),
    "diagonal first": ((6,), (6, 3), (3, 4)),
    "diagonal last": ((6, 3), (3, 4), (4,)),
    "diagonals everywhere": ((6,), (6, 3), (3,), (3, 4), (4,)),
}
X = normal(0, 5, 6)
USES = {
    "product": (lambda w: X @ w, 6, 4, ()),
    "tied": (lambda w: X @ w.T, 4, 6, ()),
    "weight first": (lambda w: w.T @ X.T, 6, 4, ()),
    "lookup": (lambda w: jnp.take(w, np.array([[0, 5], [1, 5]]), axis=0), 6, 4, ()),
    "lookup of columns": (lambda w: jnp.take(w, np.array([[0, 3], [1, 3]]), axis=1), 6, 4, ()),
    "experts": (lambda w: jnp.einsum("bed,edf->bef", np.stack([X, X], 1), w), 6, 4, (2,)),
    "experts by index": (lambda w: w[np.array([1, 0, 1])], 6, 4, (2,)),
}


class Chain(LowRank):
    """Only factors: what `Operation.product` gives for them."""

    def contract(self, x, use):
        return use.product(x, self.factors, 1.5)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("chain", CHAINS)
def test_chain_of_factors(chain, use):
    fn, inputs, outputs, stack = USES[use]
    sizes = {6: inputs, 4: outputs, 2: 2, 3: 3}
    factors = [normal(i, *stack, *(sizes[n] for n in shape)) for i, shape in enumerate(CHAINS[chain])]
    matrices = [f[..., None] * np.eye(f.shape[-1]) if f.ndim == len(stack) + 1 else f for f in factors]
    full = 1.5 * np.asarray(list(itertools.accumulate(matrices, np.matmul))[-1], np.float64)
    role = sj.Role.dense((len(stack),), (len(stack) + 1,), tuple(range(len(stack))))
    shape = (*stack, inputs, outputs)
    close(1.5 * np.asarray(dense([jnp.asarray(f) for f in factors], role, shape)), full)

    weight = Chain(
        base=np.zeros(shape, np.float32),
        a=factors[0],
        b=factors[-1],
        role=role,
        dtype=np.dtype("float32"),
        trainable=("a",),
    )
    object.__setattr__(weight, "factors", factors)
    close(run(fn, weight), fn(jnp.asarray(full, jnp.float32)))


def run(fn, weight):
    """One use of a weight that JAX does not know as a pytree."""
    from subspace_jax.core._compat import program
    from subspace_jax.core._interpret import Interpreter
    from subspace_jax.core._weight_view import WeightView

    closed = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(weight.shape, weight.dtype))
    return Interpreter().run(program(closed), [WeightView.of(weight, "w")])[0]


@pytest.mark.parametrize("use", [*USES])
def test_scaled_outputs(use):
    fn, inputs, outputs, stack = USES[use]
    role = sj.Role.dense((len(stack),), (len(stack) + 1,), tuple(range(len(stack))))
    base, vector = normal(1, *stack, inputs, outputs), normal(2, *stack, outputs)

    class ScaledOutputs(LowRank):
        def contract(self, x, use):
            return use.scale_outputs(x, vector, lambda x: use.apply(x, self.base))

    weight = ScaledOutputs(
        base=base, a=base[..., :1], b=base[..., :1, :], role=role, dtype=np.dtype("float32"), trainable=()
    )
    close(run(fn, weight), fn(jnp.asarray(base * vector[..., None, :])))


def test_scaling_outputs_that_are_contracted_in_part_is_refused():
    adapted = sj.adapt(
        {"w": normal(0, 6, 2, 4)},
        {"w": sj.dora(sj.lora(2))},
        key=jax.random.key(0),
        roles={"w": sj.Role.dense((0,), (1, 2))},
    )
    with pytest.raises(MaterializeError, match=r"\(6, 2, 4\).*without magnitudes"):
        sj.with_adapters(lambda p: jnp.einsum("dk,dhk->dh", np.ones((6, 4), np.float32), p["w"]))(adapted)


def test_scale_multiplies_the_smallest_intermediate():
    """The scale meets an array of rank size, never the output."""
    weight = LowRank(
        base=normal(0, 6, 40),
        a=normal(1, 6, 2),
        b=normal(2, 2, 40),
        scale=0.7,
        role=sj.Role.dense(),
        dtype=np.dtype("float32"),
        trainable=("a", "b"),
    )
    jaxpr = jax.make_jaxpr(sj.with_adapters(lambda w, x: x @ w))(weight, X)
    assert [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "mul"] == [(5, 2)]


WIDE = normal(3, 50, 40)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w: normal(0, 5, 50) @ w,
        lambda w: normal(0, 5, 40) @ w.T,
        lambda w: jnp.take(w, np.arange(5), axis=0),
        lambda w: jnp.take(w, np.arange(5), axis=1),
        lambda w: jnp.einsum("bd,df->fb", normal(0, 5, 50), w),
    ],
    ids=["product", "tied", "lookup", "lookup of columns", "transposed result"],
)
def test_nothing_larger_than_input_and_output_is_made(fn):
    weight = LowRank(
        base=WIDE,
        a=normal(1, 50, 2),
        b=normal(2, 2, 40),
        role=sj.Role.dense(),
        dtype=np.dtype("float32"),
        trainable=("a", "b"),
    )
    made = [
        e.outvars[0].aval.size
        for e in jax.make_jaxpr(sj.with_adapters(fn))(weight).eqns
        if e.primitive.name in ("dot_general", "gather", "mul", "add", "transpose")
    ]
    assert made
    assert sum(n > 5 * 50 for n in made) == sum(n == WIDE.size for n in made)  # the base itself, seen transposed
    assert sum(n == WIDE.size for n in made) <= 1


def test_operand_order_of_the_model_is_kept():
    """No transposes of activations appear where the model has none."""
    weight = LowRank(
        base=normal(0, 6, 4),
        a=normal(1, 6, 2),
        b=normal(2, 2, 4),
        role=sj.Role.dense(),
        dtype=np.dtype("float32"),
        trainable=("a", "b"),
    )
    for fn in (
        lambda w, x: x @ w,
        lambda w, x: jnp.einsum("df,bd->fb", w, x),
        lambda w, x: jnp.einsum("bsd,df->bsf", x[None], w),
    ):
        names = [e.primitive.name for e in jax.make_jaxpr(sj.with_adapters(fn))(weight, X).eqns]
        plain = [e.primitive.name for e in jax.make_jaxpr(fn)(jnp.ones((6, 4)), X).eqns]
        assert names.count("transpose") == plain.count("transpose")


def test_lookup_casts_rows_not_the_table():
    table = np.ones((1000, 4), np.float32)
    weight = LowRank(
        base=table,
        a=normal(0, 1000, 2),
        b=normal(1, 2, 4),
        role=sj.Role.embedding(),
        dtype=np.dtype("float32"),
        trainable=("a", "b"),
    )
    fn = lambda w: jnp.take(w.astype(jnp.bfloat16), np.array([1, 2]), axis=0)
    casts = [
        e.outvars[0].aval.shape
        for e in jax.make_jaxpr(sj.with_adapters(fn))(weight).eqns
        if e.primitive.name == "convert_element_type"
    ]
    assert (1000, 4) not in casts
    assert sj.with_adapters(fn)(weight).dtype == jnp.bfloat16
