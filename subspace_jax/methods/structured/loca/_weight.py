"""A frozen array plus a few terms of a two-dimensional cosine transform, at places that learn as well."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp

from subspace_jax.core import Convolution, Dot, Operation, Scalar, Weight, register_weight, static
from subspace_jax.linalg import cosine_transform, cosine_vectors, inverse_cosine_transform, transform_share, wide_dtype
from subspace_jax.weights import drop_inputs, step_keys

Evaluation = Literal["auto", "default", "sparse", "fast", "factored"]

# What an entry costs a fast transform, per binary digit of the number of entries, in multiplications of a matrix
# product of the same time; measured on a CPU between 128 and 1024 rows.
FFT_COST = 150


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSpectrum(Weight):
    r"""A frozen array plus a cosine spectrum of few coefficients: \(W + \alpha\,C^T S\,C\), with cosine bases \(C\).

    Coefficient \(a_j\) is added to \(S\) at the cell \(l_j = \mathrm{round}(u_j (d - 1))\) of its location \(u_j\).
    Locations get the central difference of the loss over neighboring cells, \(\frac{1}{2} a_j (Z_{l+1} - Z_{l-1})\)
    with \(Z = C\,\alpha G\,C^T\), clipped to \([-1, 1]\), times \(d - 1\). A weight used in several places of a model
    has the difference of each place clipped on its own.

    No cosine basis is stored: the `coefficients` columns that are needed come from their formula, which costs little
    beside any product with them.

    Attributes:
      base: \(W\), of the weight's shape.
      coefficients: \(a\), `[*stack, n]`.
      locations: \(u\), `[*stack, 2, n]` from 0 to 1, rows and columns; None once they are fixed.
      positions: \(l\), `[*stack, 2, n]` int32, in place of `locations` that are fixed.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      scale: \(\alpha\).
      highest: locations end here; what lies beyond gets no gradient.
      evaluation: "factored" multiplies with the few columns needed and forms nothing; "sparse" forms the sum as a
        product of those columns, "default" by two dense products, "fast" by fast Fourier transforms; "auto" takes
        what costs fewest operations for the input at hand, and nothing factored in bfloat16.
      dropout: probability of dropping an input of the cosine terms.
    """

    base: jax.Array
    coefficients: jax.Array
    locations: jax.Array | None = None
    positions: jax.Array | None = None
    dropout_key: jax.Array | None = None
    scale: Scalar = 1.0
    highest: float = static(default=0.999)
    evaluation: Evaluation = static(default="auto")
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "coefficients": "stack coefficient",
        "locations": "stack coordinate coefficient",
        "positions": "stack coordinate coefficient",
        "dropout_key": "stack",
        "scale": "",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    def cells(self) -> jax.Array:
        """Returns the place of every coefficient in the spectrum, `[*stack, 2, n]` int32."""
        if self.locations is None:
            if self.positions is None:
                raise ValueError("CosineSpectrum: both locations and positions are None; one of them is needed.")
            return self.positions
        sizes = self.role.sizes(self.shape)
        found = [cell(self.locations[..., i, :], size, self.highest) for i, size in enumerate(sizes)]
        return jnp.stack(found, axis=-2)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with the cosine terms added, in float32."""
        one = self.with_frozen_stopped()
        total = one.base.astype(wide_dtype(one.dtype)) + one.change()
        return total.astype(self.dtype if dtype is None else dtype)

    def change(self) -> jax.Array:
        r"""Returns \(\alpha\,C^T S\,C\) in the shape of the weight, in float32."""
        way = self._cheapest({k: v for k, v in self._forming_costs().items() if self.evaluation in (k, "auto")})
        if way == "sparse":
            left, right = self._columns()
            formed = jnp.matmul(left * self.coefficients[..., None, :], right, precision=jax.lax.Precision.HIGHEST)
        else:
            formed = self._transformed(fft=way == "fast")
        return self.role.unmatrix(self.scale.astype(formed.dtype) * formed, self.shape).astype(wide_dtype(self.dtype))

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the sum, or on its parts where that is cheaper or an input is dropped."""
        dropped = drop_inputs(x, operation, self.dropout_key, self.dropout)
        if self._is_factored(x, operation):
            left, right = self._columns()
            return operation.apply(x, self.base) + operation.product(
                dropped, (left, self.coefficients, right), self.scale
            )
        if dropped is x:
            return operation.apply(x, self.materialize(operation.dtype))
        return operation.apply(x, self.base) + operation.apply(dropped, self.change().astype(operation.dtype))

    def with_key(self, key: jax.Array) -> CosineSpectrum:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.coefficients.shape[:-1]))

    def _columns(self) -> tuple[jax.Array, jax.Array]:
        """The cosine vectors at the coefficients' cells, `[*stack, in, n]` and `[*stack, n, out]`."""
        inputs, outputs = self.role.sizes(self.shape)
        if self.locations is None:
            rows, columns = (self.cells()[..., i, :] for i in (0, 1))
            left, right = cosine_vectors(rows, inputs), cosine_vectors(columns, outputs)
        else:
            rows, columns = (self.locations[..., i, :] for i in (0, 1))
            left = cast(jax.Array, located_vectors(rows, inputs, self.highest))
            right = cast(jax.Array, located_vectors(columns, outputs, self.highest))
        return jnp.swapaxes(left, -1, -2), right

    def _transformed(self, fft: bool) -> jax.Array:
        """The inverse transform of the dense spectrum, `[*stack, in, out]`."""
        sizes = self.role.sizes(self.shape)
        if self.locations is None:
            function = functools.partial(_inverse_of_sparse, sizes=sizes, fft=fft)
            places = self.cells()
        else:
            function = lambda a, u: located_sum(a, u, sizes, self.highest, fft)  # noqa: E731
            places = self.locations
        for _ in range(self.coefficients.ndim - 1):
            function = jax.vmap(function)
        return function(self.coefficients, places)

    def _is_factored(self, x: jax.Array, operation: Operation) -> bool:
        """Compares multiplications, forward and backward, for `x` of this size, frozen base left out."""
        if self.evaluation != "auto":
            return self.evaluation == "factored"
        # Cosines rounded to fewer digits lose a hundredth of the change; a convolution has many rows.
        if operation.dtype in (jnp.bfloat16, jnp.float16) or isinstance(operation, Convolution):
            return False
        if not isinstance(operation, Dot):
            return True
        inputs, outputs = self.role.sizes(self.shape)
        rows = (
            x.size
            // math.prod(self.role.stack_shape(self.shape))
            // (inputs if operation.contracts_inputs else outputs)
        )
        factored = 3 * rows * self.coefficients.shape[-1] * (inputs + outputs)
        return factored < inputs * outputs * (rows + min(self._forming_costs().values()))

    def _forming_costs(self) -> dict[str, float]:
        """Multiplications per entry of the weight, forward and backward, of each way to form it."""
        inputs, outputs = self.role.sizes(self.shape)
        return {
            "sparse": 3 * self.coefficients.shape[-1],
            "default": 2 * (inputs * transform_share(inputs) + outputs * transform_share(outputs)),
            "fast": 2 * FFT_COST * math.log2(max(inputs * outputs, 2)),
        }

    def _cheapest(self, costs: Mapping[str, float]) -> str:
        return min(costs, key=costs.__getitem__) if costs else "sparse"


def cell(location: jax.Array, size: int, highest: float) -> jax.Array:
    """Rounds a location from 0 to 1 to the index of one of `size` cells, half to even.

    Args:
      location: `[...]`.
      size: number of cells.
      highest: larger locations count as this.
    """
    return jnp.round(jnp.clip(location, 0.0, highest) * (size - 1)).astype(jnp.int32)


def _through_rounding(difference: jax.Array, location: jax.Array, size: int, highest: float) -> jax.Array:
    """The gradient of a location from the central difference of the loss over its neighboring cells."""
    inside = (location >= 0.0) & (location <= highest)
    return jnp.where(inside, jnp.clip(difference, -1.0, 1.0) * (size - 1), 0.0).astype(location.dtype)


def _neighbors(cells: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(cells + 1, size - 1), jnp.maximum(cells - 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def located_vectors(location: jax.Array, size: int, highest: float) -> jax.Array:
    """Returns the cosine vectors at the cells of locations, which get the central difference as their gradient.

    Args:
      location: `[..., n]`.
      size: length of a vector.
      highest: larger locations count as this.

    Returns:
      `[..., n, size]`.
    """
    return cosine_vectors(cell(location, size, highest), size, location.dtype)


def _located_vectors_forward(location: jax.Array, size: int, highest: float):
    return located_vectors(location, size, highest), location


def _located_vectors_backward(size: int, highest: float, location: jax.Array, cotangent: jax.Array):
    above, below = _neighbors(cell(location, size, highest), size)
    step = cosine_vectors(above, size, location.dtype) - cosine_vectors(below, size, location.dtype)
    return (_through_rounding(0.5 * jnp.sum(cotangent * step, axis=-1), location, size, highest),)


located_vectors.defvjp(_located_vectors_forward, _located_vectors_backward)


def _inverse_of_sparse(coefficients: jax.Array, cells: jax.Array, sizes: tuple[int, int], fft: bool) -> jax.Array:
    spectrum = jnp.zeros(sizes, coefficients.dtype).at[cells[0], cells[1]].add(coefficients)
    return inverse_cosine_transform(spectrum, fft=fft)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def located_sum(
    coefficients: jax.Array, locations: jax.Array, sizes: tuple[int, int], highest: float, fft: bool
) -> jax.Array:
    """Returns the inverse transform of a spectrum of located coefficients, `[in, out]`.

    One dense transform of the cotangent gives the gradients of coefficients and locations together.

    Args:
      coefficients: `[n]`; those in one cell add up.
      locations: `[2, n]`.
      sizes: of the result.
      highest: larger locations count as this.
      fft: by fast Fourier transforms; else by products.
    """
    cells = jnp.stack([cell(u, size, highest) for u, size in zip(locations, sizes, strict=True)])
    return _inverse_of_sparse(coefficients, cells, sizes, fft)


def _located_sum_forward(
    coefficients: jax.Array, locations: jax.Array, sizes: tuple[int, int], highest: float, fft: bool
):
    return located_sum(coefficients, locations, sizes, highest, fft), (coefficients, locations)


def _located_sum_backward(
    sizes: tuple[int, int], highest: float, fft: bool, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
):
    coefficients, locations = saved
    spectrum = cosine_transform(cotangent, fft=fft)
    rows, columns = (cell(u, size, highest) for u, size in zip(locations, sizes, strict=True))
    (above_row, below_row), (above_column, below_column) = (
        _neighbors(at, size) for at, size in zip((rows, columns), sizes, strict=True)
    )
    steps = (
        spectrum[above_row, columns] - spectrum[below_row, columns],
        spectrum[rows, above_column] - spectrum[rows, below_column],
    )
    moved = [
        _through_rounding(0.5 * coefficients * step, u, size, highest)
        for step, u, size in zip(steps, locations, sizes, strict=True)
    ]
    return spectrum[rows, columns], jnp.stack(moved)


located_sum.defvjp(_located_sum_forward, _located_sum_backward)
