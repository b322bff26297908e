"""The methods that commands know by name: what they make of a model's kernels, and at which rate they learn."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax

import subspace_jax as sj

from ._backbone import Backbone
from ._errors import UserError


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One way of fine-tuning.

    Attributes:
      summary: one line for `subspace-jax list`.
      rate: peak learning rate where the user names none, as the experiments' comparison found it.
      make: from rank and alpha to the method; None trains the head alone.
    """

    summary: str
    rate: float
    make: Callable[[int, float], sj.Method] | None


ADAPTERS: Mapping[str, Adapter] = {
    "lora": Adapter("adds a trained low-rank product to every kernel", 1e-3, lambda r, a: sj.lora(r, alpha=a)),
    "dora": Adapter("LoRA on the direction of columns whose lengths learn apart", 1e-3, lambda r, a: _dora(r, a)),
    "pissa": Adapter("LoRA that starts from the leading singular vectors", 3e-4, lambda r, a: sj.pissa(r)),
    "matryoshka": Adapter("LoRA that is good at every lower rank too", 1e-3, lambda r, a: _matryoshka(r, a)),
    "oft": Adapter("turns outputs by small orthogonal blocks of the rank's size", 1e-3, lambda r, a: sj.oft(r)),
    "randlora": Adapter("full-rank updates by scaling random bases", 1e-3, lambda r, a: sj.randlora(r)),
    "loldu": Adapter("trains the diagonal of an LDU decomposition", 1e-3, lambda r, a: sj.loldu()),
    "full": Adapter("trains every weight", 1e-4, lambda r, a: sj.full()),
    "head": Adapter("trains the head alone (classification)", 3e-2, None),
}


def _dora(rank: int, alpha: float) -> sj.Method:
    return sj.dora(sj.lora(rank, alpha=alpha))


def _matryoshka(rank: int, alpha: float) -> sj.Method:
    return sj.matryoshka(sj.lora(rank, alpha=alpha))


def find_adapter(name: str) -> Adapter:
    """Returns a method by its name.

    Raises:
      UserError: there is none; the message has the nearest.
    """
    if name not in ADAPTERS:
        near = difflib.get_close_matches(name, ADAPTERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"--method {name}: there is no such method{hint} Known are {', '.join(ADAPTERS)}.")
    return ADAPTERS[name]


def method_rules(
    name: str, rank: int, alpha: float | None, backbone: Backbone, *, classifies: bool, target: str | None = None
) -> dict[str, Any]:
    """Returns the rules that `adapt` takes: the method on the tower's kernels, and the head as it is.

    Args:
      name: of the method.
      rank: of low-rank adapters.
      alpha: of their scale; twice the rank if None.
      backbone: the model.
      classifies: whether a fresh head learns with it.
      target: pattern of leaves in place of the tower's kernels.

    Raises:
      UserError: no such method, or one that would learn nothing.
    """
    adapter = find_adapter(name)
    head = {"classifier/*": sj.full()} if classifies else {}
    if adapter.make is None:
        if not classifies:
            raise UserError(f"--method {name}: a language model has no head to train; choose an adapter.")
        return head
    if name == "full" and target is None:
        return {"**": sj.full()}
    tower = "decoder" if backbone.kind == "language model" else "encoder"
    pattern = target or f"{'backbone/' if classifies else ''}{tower}/**/kernel"
    return head | {pattern: adapter.make(rank, 2.0 * rank if alpha is None else alpha)}


def adapt_model(params: Any, rules: Mapping[str, Any], seed: int, roles: Mapping[str, sj.Role]) -> Any:
    """Returns the parameters with the method's stand-ins, started from the seed."""
    return sj.adapt(params, dict(rules), key=jax.random.key(1000 + seed), roles=roles)
