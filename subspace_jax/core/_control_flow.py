"""Calls, branches and loops, written out again with stand-ins as pytree operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from subspace_jax.core import _compat
from subspace_jax.core._context import Context, unseen_state, zeros_of
from subspace_jax.core._errors import MaterializeError
from subspace_jax.core._interpret import Interpreter, rule
from subspace_jax.core._weight import nested_weights
from subspace_jax.core._weight_view import WeightView

# Calls whose body means the same inline.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
_CHECKPOINTS = ("checkpoint", "remat", "remat2")
# Calls with derivative rules of their own, which are written for arrays.
_CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
}


def _body(eqn: Any) -> _compat.Program:
    name = eqn.primitive.name
    return _compat.program(eqn.params[(_INLINED | _CUSTOM).get(name, "jaxpr")])


@rule(*_INLINED)
def _call(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return interpreter.run(_body(eqn), operands)


@rule(*_CUSTOM)
def _custom_call(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Keeps the rule by running the call whole, on formed weights: its body may have other derivatives."""
    return interpreter.run(_body(eqn), operands) if interpreter.custom_rules == "inline" else None


@rule(*_CHECKPOINTS)
def _checkpoint(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    body, outside = _body(eqn), interpreter.context

    def run(state: Any, *values: Any) -> Any:
        context = outside.of(state)
        out = interpreter.within(context).run(body, values)
        return out, context.state, context.reports

    operands = [
        dataclasses.replace(v, weight=v.weight.before_checkpoint()) if isinstance(v, WeightView) else v
        for v in operands
    ]
    kept = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    out, state, reports = jax.checkpoint(run, **kept)(outside.state, *operands)
    outside.state = state
    outside.add_reports(reports)
    return out


@rule("cond")
def _cond(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    index, *values = operands
    programs = [_compat.program(branch) for branch in eqn.params["branches"]]
    outside = interpreter.context
    absent: dict[str, list[Any]] = {}

    def branch(number: int, program: _compat.Program):
        def run(*values: Any) -> Any:
            # Branches must agree in type, so a weight that one of them returns is formed there.
            context = outside.inner()
            inner = interpreter.at(number).within(context)
            out = [inner.form(v, "cond") for v in inner.run(program, values)]
            return out, outside.lasting(context), zeros_of(absent) | context.reports

        return run

    branches = [branch(i, p) for i, p in enumerate(programs)]
    if outside.collect:
        # What is not run reports zeros, so each branch has to know what the others report.
        absent.update({p: v for run in branches for p, v in jax.eval_shape(run, *values)[2].items()})
    out, state, reports = lax.switch(index, branches, *values)
    outside.state = state
    outside.add_reports(reports)
    return out


def passed_through(program: _compat.Program) -> dict[int, int]:
    """Maps each output that is an input, unchanged, to that input; calls are looked into."""
    source = {v: i for i, v in enumerate(program.invars)}
    for eqn in program.eqns:
        if eqn.primitive.name in _INLINED or eqn.primitive.name in _CHECKPOINTS:
            for out, inner in passed_through(_body(eqn)).items():
                atom = eqn.invars[inner]
                if not _compat.is_literal(atom) and atom in source:
                    source[eqn.outvars[out]] = source[atom]
    found = ((i, v) for i, v in enumerate(program.outvars) if not _compat.is_literal(v))
    return {i: source[v] for i, v in found if v in source}


@rule("scan")
def _scan(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    body = _compat.program(eqn.params["jaxpr"])
    consts, carry, scanned = _compat.scan_groups(eqn.params, operands)
    forwards = passed_through(body)
    constant = _constant_carry(interpreter, carry, len(consts), forwards)
    kept_carry = [i for i in range(len(carry)) if i not in constant]

    mapped, rebuilds = [], []
    for value in scanned:
        if isinstance(value, WeightView) and not value.is_stacked(0, loop=True):
            value = interpreter.form(value, "scan over an axis that is not stacked")
        split, rebuild = value.split_stack() if isinstance(value, WeightView) else (value, lambda v: v)
        mapped.append(split)
        rebuilds.append(rebuild)
    # A stacked output that is a scanned input again needs no restacking.
    first_scanned = len(consts) + len(carry)
    restacked = {
        i: scanned[forwards[i] - first_scanned]
        for i in range(len(carry), len(body.outvars))
        if forwards.get(i, -1) >= first_scanned and isinstance(scanned[forwards[i] - first_scanned], WeightView)
    }

    outside = interpreter.context
    # Over layers the state goes on from one to the next; over time or parts of a batch each step starts from outside.
    layers = [w for v in scanned if isinstance(v, WeightView) for w in nested_weights(v.weight).values()]
    over_layers = any(w.uses_context for w in layers)

    def layer_of(context: Context, state: list[Any], slices: list[Any]) -> list[Any]:
        inside = _merge_carry(constant, kept_carry, state, len(carry))
        layer = [rebuild(one) for rebuild, one in zip(rebuilds, slices, strict=True)]
        return interpreter.within(context).run(body, [*consts, *inside, *layer])

    if any(w.keeps_state for w in layers):
        outside.state = {**outside.state, **unseen_state(outside, layer_of, [carry[i] for i in kept_carry], mapped)}
    shared = outside.state if over_layers else {}

    def step(carried: tuple[list[Any], Any], slices: list[Any]) -> Any:
        state, shared = carried
        context = outside.of({**outside.state, **shared})
        out = layer_of(context, state, slices)
        new_state = [interpreter.form(out[i], "scan carry") for i in kept_carry]
        stacked = [
            interpreter.form(v, "scan output") for i, v in enumerate(out) if i >= len(carry) and i not in restacked
        ]
        lasting = outside.lasting(context) if over_layers else {}
        return (new_state, lasting), (stacked, context.reports)

    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    first = ([carry[i] for i in kept_carry], shared)
    (final, shared), (stacked, reports) = lax.scan(step, first, mapped, **options)
    outside.state = {**outside.state, **shared}
    outside.add_reports(reports)
    rest = iter(stacked)
    outputs = [restacked[i] if i in restacked else next(rest) for i in range(len(carry), len(body.outvars))]
    return [*_merge_carry(constant, kept_carry, final, len(carry)), *outputs]


def _constant_carry(
    interpreter: Interpreter, carry: list[Any], first: int, forwards: dict[int, int]
) -> dict[int, WeightView]:
    """Carried weights that every iteration passes on unchanged; forms the others in place."""
    constant: dict[int, WeightView] = {}
    for i, value in enumerate(carry):
        if isinstance(value, WeightView):
            if forwards.get(i) == first + i:
                constant[i] = value
            else:
                carry[i] = interpreter.form(value, "a loop that changes it")
    return constant


def _merge_carry(constant: dict[int, Any], kept: Sequence[int], state: Sequence[Any], count: int) -> list[Any]:
    values = {**constant, **dict(zip(kept, state, strict=True))}
    return [values[i] for i in range(count)]


@rule("while")
def _while(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    p = eqn.params
    test, body = _compat.program(p["cond_jaxpr"]), _compat.program(p["body_jaxpr"])
    first = p["cond_nconsts"]
    second = first + p["body_nconsts"]
    test_consts, body_consts, carry = operands[:first], operands[first:second], operands[second:]
    constant = _constant_carry(interpreter, carry, len(body_consts), passed_through(body))
    kept = [i for i in range(len(carry)) if i not in constant]

    def keep_going(state: list[Any]) -> Any:
        inside = _merge_carry(constant, kept, state, len(carry))
        inner = interpreter.at(0).within(interpreter.context.inner())
        return inner.run(test, [*test_consts, *inside])[0]

    def step(state: list[Any]) -> list[Any]:
        inside = _merge_carry(constant, kept, state, len(carry))
        context = interpreter.context.inner()
        inner = interpreter.at(1).within(context)
        out = inner.run(body, [*body_consts, *inside])
        if context.reports:
            raise MaterializeError(
                f"{next(iter(context.reports))}: reports values inside a while_loop, whose number of steps is not "
                "known, so they cannot be collected. Use scan or fori_loop with a fixed number, or collect=False."
            )
        return [inner.form(out[i], "while carry") for i in kept]

    final = lax.while_loop(keep_going, step, [carry[i] for i in kept])
    return _merge_carry(constant, kept, final, len(carry))


@rule("shard_map")
def _shard_map(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    p = eqn.params
    body = _compat.program(p["jaxpr"])
    in_specs = tuple(
        v.partition_specs(spec, exact=True) if isinstance(v, WeightView) else spec
        for v, spec in zip(operands, p["in_specs"], strict=True)
    )
    if p["mesh"].explicit_axes:  # parts that lie otherwise than the whole
        operands = [
            jax.tree.map(jax.sharding.reshard, v, specs) if isinstance(v, WeightView) else v
            for v, specs in zip(operands, in_specs, strict=True)
        ]

    def run(*values: Any) -> list[Any]:
        context = Context({}, {}, interpreter.context.collect)
        inner = interpreter.within(context)
        out = [inner.form(v, "shard_map output") for v in inner.run(body, values)]
        if context.reports:
            raise MaterializeError(
                f"{next(iter(context.reports))}: reports values inside a shard_map, where each device has its own, so "
                "they cannot be collected. Use collect=False, or leave the placement to the compiler."
            )
        return out

    mapped = jax.shard_map(
        run,
        mesh=p["mesh"],
        in_specs=in_specs,
        out_specs=list(p["out_specs"]),
        axis_names=set(p["manual_axes"] if "manual_axes" in p else p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return mapped(*operands)
