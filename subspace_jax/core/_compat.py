"""The one place that reads jaxpr parameters whose form differs between JAX versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Literal, Var

Atom = Var | Literal


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr with its constants, in the same form for closed and open ones of every version."""

    eqns: Sequence[Any]
    constvars: Sequence[Var]
    consts: Sequence[Any]
    invars: Sequence[Var]
    outvars: Sequence[Atom]


def program(jaxpr: Any, consts: Sequence[Any] | None = None) -> Program:
    """Returns the parts of a jaxpr, closed or open."""
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    constvars = tuple(opened.constvars)
    if consts is None:
        consts = tuple(getattr(jaxpr, "consts", ())) if constvars else ()
    return Program(opened.eqns, constvars, consts, tuple(opened.invars), tuple(opened.outvars))


def bind(eqn: Any, values: Sequence[Any], **changes: Any) -> list[Any]:
    """Runs one equation on ordinary values, with its own custom rules kept and some parameters changed."""
    parameters = eqn.primitive.get_bind_params(eqn.params | changes)
    functions: Sequence[Any] = ()
    if isinstance(parameters, tuple):  # before 0.10 functions came apart from the parameters
        functions, parameters = parameters
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *values, **parameters)
    return list(out) if eqn.primitive.multiple_results else [out]


def scope(eqn: Any) -> AbstractContextManager[Any]:
    """Returns the context of an equation's own names, so that profiles still show the model's modules."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else nullcontext()


def scan_groups(parameters: dict[str, Any], operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Splits the operands of a scan into constants, initial carry and scanned inputs."""
    if "num_consts" in parameters:
        first = parameters["num_consts"]
        second = first + parameters["num_carry"]
        return list(operands[:first]), list(operands[first:second]), list(operands[second:])
    groups = parameters["ft_in"].update(list(range(len(operands)))).unpack()
    consts, carry, scanned = ([operands[i] for i in group] for group in groups)
    return consts, carry, scanned


def is_literal(atom: Any) -> bool:
    """Tells whether an operand is a constant written into the program."""
    return isinstance(atom, Literal)


def is_tracer(value: Any) -> bool:
    """Tells whether a value is abstract, so that nothing can be decided by its entries."""
    return isinstance(value, Tracer)
