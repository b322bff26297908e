"""Evaluates a model's program while stand-in weights flow through it as values."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from subspace_jax.core import _compat
from subspace_jax.core._context import Context
from subspace_jax.core._errors import MaterializeError
from subspace_jax.core._selectors import Selector
from subspace_jax.core._weight_view import WeightView

OnMaterialize = Literal["error", "warn", "allow"]
MaterializeRules = OnMaterialize | Mapping[Any, OnMaterialize] | Sequence[tuple[Selector, OnMaterialize]]
CustomRules = Literal["keep", "inline"]
Rule = Callable[["Interpreter", Any, list[Any]], "list[Any] | None"]

# Primitive name -> rule. A rule returns the equation's results, or None where it cannot do without the array.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """One evaluation of a program.

    Attributes:
      on_materialize: what to do where the full array would have to be formed: for all, or by path of the leaf; where
        a path is not named, to refuse.
      custom_rules: whether a function with derivative rules of its own keeps them, or its body is differentiated.
      path: identity of the place in the program, outermost equation first.
      context: the state that stand-ins share, and what they report.
    """

    on_materialize: OnMaterialize | Mapping[str, OnMaterialize] = "error"
    custom_rules: CustomRules = "keep"
    path: tuple[int, ...] = ()
    context: Context = dataclasses.field(default_factory=Context)

    def within(self, context: Context) -> Interpreter:
        """Returns the interpreter of a body with a context of its own."""
        return dataclasses.replace(self, context=context)

    def at(self, *index: int) -> Interpreter:
        """Returns the interpreter one place further in."""
        return dataclasses.replace(self, path=self.path + index)

    def run(self, program: _compat.Program, values: Sequence[Any]) -> list[Any]:
        """Evaluates a program on arrays and stand-ins.

        Args:
          program: the program.
          values: one value per input of the program.

        Returns:
          One value per output; a stand-in where the program passes a weight through.
        """
        environment: dict[Any, Any] = {}
        environment.update(zip(program.constvars, program.consts, strict=True))
        environment.update(zip(program.invars, values, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if _compat.is_literal(atom) else environment[atom]

        for index, eqn in enumerate(program.eqns):
            operands = [read(a) for a in eqn.invars]
            with _compat.scope(eqn):
                if any(isinstance(v, WeightView) for v in operands):
                    results = self.at(index).equation(eqn, operands)
                else:
                    results = _compat.bind(eqn, operands)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in program.outvars]

    def equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """Evaluates one equation that a stand-in enters."""
        found = RULES.get(eqn.primitive.name)
        with eqn.ctx.manager:
            results = found(self, eqn, operands) if found is not None else None
        if results is None:
            name = eqn.primitive.name
            results = _compat.bind(eqn, [self.form(v, name) for v in operands])
            weight = next(v.weight for v in operands if isinstance(v, WeightView))
            results = weight.follow(name, self.path, operands, results)
        return results

    def form(self, value: Any, primitive: str) -> Any:
        """Returns an ordinary array for any value, as far as the caller allows it."""
        if not isinstance(value, WeightView):
            return value
        observed = value.weight.observe(primitive, self.path)
        if observed is not None:
            return jnp.transpose(observed.astype(value.dtype), value.permutation)
        message, chosen = _refusal(value, primitive), self._policies(value)
        if "error" in chosen:
            raise MaterializeError(message)
        if "warn" in chosen:
            warnings.warn(message, stacklevel=2)
        return value.array()

    def _policies(self, value: WeightView) -> set[OnMaterialize]:
        """What was asked for the leaves that a weight is made of."""
        if isinstance(self.on_materialize, str):
            return {self.on_materialize}
        return {self.on_materialize.get(path, "error") for path in value.weight.leaf_paths(value.path)}


def _refusal(value: WeightView, primitive: str) -> str:
    """Says which weight would have to be formed, for what, and what helps."""
    weight, role = value.weight, value.weight.role
    path = ",".join(weight.leaf_paths(value.path))
    path = f"{{{path}}}" if "," in path else path
    message = (
        f"{value.path}: the model uses this {type(weight).__name__} of shape {weight.shape} in {primitive!r}, for "
        f"which the full array must be formed (role {role.kind!r}: stack={role.stack_axes} in={role.in_axes} "
        f"out={role.out_axes}). "
    )
    if "custom" in primitive:
        message += (
            'It has a derivative rule of its own, which holds for the array alone. Pass custom_rules="inline" to '
            "with_adapters to differentiate its body instead, if that is meant to be the same. "
        )
    return message + (
        'Leave this leaf out of the pattern, or pass on_materialize="allow" to with_adapters if forming it at every '
        f'step is acceptable; {{{path!r}: "allow"}} for this leaf alone.'
    )
