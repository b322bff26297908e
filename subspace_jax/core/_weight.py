"""The stand-in weight: a pytree node that takes an array's place in a parameter tree."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from subspace_jax.core._role import Role
from subspace_jax.core._weight_parts import WeightParts
from subspace_jax.linalg import wide_dtype

if TYPE_CHECKING:
    from subspace_jax.core._operation import Operation

W = TypeVar("W", bound="Weight")


def static(*, remark: bool = False, **options: Any) -> Any:
    """Declares a field of a weight that is metadata: part of the tree's structure, never a traced value.

    Args:
      remark: the field does not change what the weight computes, so weights that differ in it share programs.
      **options: of `dataclasses.field`.
    """
    return dataclasses.field(metadata={"static": True, "remark": remark}, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight(WeightParts, abc.ABC):
    """A small pytree that takes a weight array's place in a tree, and is used wherever the array could be.

    A concrete weight is a frozen keyword-only dataclass with the decorator `register_weight`. Its data fields are
    arrays or weights, its other fields are declared with `static()`; a number given for a data field, such as a
    scale, becomes an array, so that another one is another argument and not another program. The class attribute `axes`
    names the axes of every array field, which slicing, sharding and checkpoints rely on: "array" for the shape of
    the array stood for, else words such as "stack in rank": `stack` are the stacked axes (absent where one array
    serves all layers), `in` and `out` the products of the role's input and output axes. The class attribute
    `spread` names, by field, an axis that is as long as the weight's own and is split over mesh axes that are left
    over; `regenerated` names the data fields that follow from the static ones, which files then leave out; `divisible`
    names the sides, "in" and "out", along which a part of the array is that of parts of the fields; `uses_context`
    says that the weight reads or writes the operation's context, so that a scan over it is one over layers;
    `keeps_state` that what it writes lasts over such a scan from zeros; `stored` that it only stores an array in fewer
    bits: nothing of it learns, and methods that say so stand on it as they would on the array.

    Attributes:
      role: which axes are stacked, contracted and produced.
      dtype: dtype of the array stood for.
      trainable: names of the fields that learn. Every other field is frozen: no gradient reaches it.
      method: the published method that made the weight, for reports.
      links: fields that are stored in another weight, as `(field, path, field there)`; see `resolve_links`. Such a
        field is None here until it is used.
    """

    role: Role = static()
    dtype: np.dtype = static()
    trainable: tuple[str, ...] = static()
    method: str = static(default="", remark=True)
    links: tuple[tuple[str, str, str], ...] = static(default=())

    spread: ClassVar[Mapping[str, int]] = {}
    mergeable: ClassVar[bool] = True
    uses_context: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    stored: ClassVar[bool] = False
    regenerated: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[dict[str, type[Weight]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Checkpoints name a weight by its class, so that no code of the method that made it is needed.
        known = Weight.classes.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__module__}: the weight class name {cls.__name__} is taken by {known.__module__}.")
        Weight.classes[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name in self.data_names():
            if isinstance(value := getattr(self, name), (int, float)) and not isinstance(value, bool):
                # float64 where JAX has it, else float32: never weakly typed, so that every scale is of one type.
                object.__setattr__(self, name, jnp.asarray(value, jnp.result_type(float)))

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(_not_an_array(self, "indexed"))

    def __jax_array__(self) -> jax.Array:
        raise TypeError(_not_an_array(self, "used as an array"))

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array stood for."""

    @property
    def ndim(self) -> int:
        """The number of axes of the array stood for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the array stood for."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int | None:
        """The rank of the trainable part, where that is a notion of this weight."""
        return None

    @property
    def formed(self) -> bool:
        """Whether a model is given the array itself: for vectors, and whatever else costs nothing to form."""
        return False

    @abc.abstractmethod
    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array stood for, computed in float32 and cast once.

        Args:
          dtype: dtype of the result; that of the weight if None.

        Returns:
          An array of `shape`, differentiable in the trainable fields only.
        """

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what an operation of the model gives for input `x` and this weight.

        The base class forms the array. A weight overrides this where its parts give the same result for less.

        Args:
          x: the other operand: activations, or indices of a lookup.
          operation: the product, convolution or lookup that the model applies to the weight.
        """
        return operation.apply(x, self.materialize(operation.dtype))

    def answers(self, operation: Operation) -> bool:
        """Tells whether `contract` answers an operation; else the array is formed, as far as the caller allows it."""
        del operation
        return True

    def leaf_paths(self, path: str) -> tuple[str, ...]:
        """Returns the paths of the leaves that the weight is made of, which are several where a model joins them."""
        return (path,)

    def squared_norms(self) -> jax.Array:
        """Returns the squared Euclidean norm of every output column, `[*stack, out]`, in float32.

        The base class forms the array. A weight overrides this where its parts give the norms for less.
        """
        matrix = self.role.matrix(self.materialize(wide_dtype(self.dtype)))
        return jnp.sum(matrix * matrix, axis=-2)

    def learning_size(self, name: str) -> int | None:
        """Returns how many values of a trainable field learn, or None for all that the field holds.

        A weight overrides this where a field holds padding. It may read arrays, so it cannot be traced.
        """
        del name

    def regenerate(self) -> dict[str, jax.Array]:
        """Returns the fields named in `regenerated`, made of static fields alone, whatever they hold now."""
        return {}

    def with_key(self: W, key: jax.Array) -> W:
        """Returns the weight with randomness for one training step; weights without any return themselves."""
        del key
        return self

    def before_checkpoint(self: W) -> W:
        """Returns the weight as it enters a rematerialized part of a model, with what that need not compute twice."""
        return self

    def sharding(self) -> NamedSharding | None:
        """Returns how the array stood for is laid out, where the mesh has explicit axes."""
        for name, value in self.data_items():
            if isinstance(value, Weight):
                return value.sharding()
            if self.axes[name] == "array" and isinstance(value, jax.Array):
                found = jax.typeof(value).sharding
                return found if found.mesh.explicit_axes else None
        return None

    def observe(self, primitive: str, path: tuple[int, ...]) -> jax.Array | None:
        """Returns the array where the weight only observes how it is used, and may always be formed."""
        del primitive, path

    def observe_row(self) -> None:
        """Notes that one row is read by a traced number, where the weight only observes how it is used."""

    def derived(self: W, function: Callable[[jax.Array], jax.Array]) -> W | None:
        """Returns an observing weight after an operation on shapes only; None for a weight that does not observe."""
        del function
        return None

    def can_split(self, axis: int, *, loop: bool) -> bool:
        """Tells whether an axis runs over whole layers, for a `loop` over them or a slice of one of them."""
        del loop
        return axis in self.role.stack_axes

    # What follows serves the mechanism; concrete weights do not override it.

    @classmethod
    def data_names(cls) -> tuple[str, ...]:
        """Names of the fields that hold arrays or weights."""
        return tuple(f.name for f in dataclasses.fields(cls) if not f.metadata.get("static"))

    @classmethod
    def number_names(cls) -> tuple[str, ...]:
        """Names of the data fields that hold one number, such as a scale."""
        return tuple(f.name for f in dataclasses.fields(cls) if isinstance(f.default, float) and not f.metadata)

    def data_items(self) -> Iterator[tuple[str, Any]]:
        """Yields name and value of every data field that is not empty."""
        for name in self.data_names():
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def map_fields(self: W, function: Callable[[str, Any], Any]) -> W:
        """Returns the weight with `function(name, value)` in place of every data field that is not empty."""
        return dataclasses.replace(self, **{n: function(n, v) for n, v in self.data_items()})

    def with_frozen_stopped(self: W) -> W:
        """Returns the weight with gradients stopped at every frozen field."""

        def stop(name: str, value: Any) -> Any:
            if isinstance(value, Weight):
                return value.with_frozen_stopped()
            return value if name in self.trainable else jax.tree.map(jax.lax.stop_gradient, value)

        return self.map_fields(stop)

    def follow(self, primitive: str, path: tuple[int, ...], operands: Sequence[Any], results: list[Any]) -> list[Any]:
        """Returns an operation's results, observed further by a weight that observes."""
        del primitive, path, operands
        return results


def _not_an_array(weight: Weight, use: str) -> str:
    return (
        f"A stand-in weight ({weight.method or type(weight).__name__} of shape {weight.shape}) was {use} by a model "
        "that does not know it. Run a function of the parameters by sj.with_adapters(fn)(adapted, ...); for an NNX "
        "model that is fn = lambda params, x: nnx.merge(graph, params, rest)(x), never a live module that holds "
        "stand-ins. sj.merge(adapted) gives ordinary arrays to write back."
    )


def is_weight(value: Any) -> bool:
    """Tells whether `value` is a stand-in weight; the `is_leaf` of every tree function over adapted trees.

    Example:
      >>> import jax.numpy as jnp
      >>> is_weight(jnp.zeros(3))
      False
    """
    return isinstance(value, Weight)


def nested_weights(weight: Weight, path: str = "") -> dict[str, Weight]:
    """Returns a weight and every weight inside it, outermost first, by path and the names of fields behind dots.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.dora(sj.lora(2))}, key=jax.random.key(0))
      >>> list(nested_weights(adapted["w"], "w"))
      ['w', 'w.direction']
    """
    inside = ((name, value) for name, value in weight.data_items() if isinstance(value, Weight))
    return {path: weight} | {p: w for name, one in inside for p, w in nested_weights(one, f"{path}.{name}").items()}
