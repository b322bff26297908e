"""The methods that commands know by name: what they make of a model's kernels, and at which rate they learn."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

import subspace_jax as sj

from ._backbone import Backbone
from ._errors import UserError

CALIBRATION = 8  # batches that methods see before they start, where they start from data


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


def _dora(rank: int, alpha: float) -> sj.Method:
    return sj.dora(sj.lora(rank, alpha=alpha))


def _lora_sb(rank: int) -> sj.Method:
    return sj.lora_sb(rank, learning_rate=1e-3)


def _matryoshka(rank: int, alpha: float) -> sj.Method:
    return sj.matryoshka(sj.lora(rank, alpha=alpha))


ADAPTERS: Mapping[str, Adapter] = {
    "lora": Adapter("adds a trained low-rank product to every kernel", 1e-3, lambda r, a: sj.lora(r, alpha=a)),
    "qlora": Adapter(
        "LoRA on weights that stay in 4 bits, or in a GGUF file's blocks", 1e-3, lambda r, a: sj.qlora(r, alpha=a)
    ),
    "dora": Adapter("LoRA on the direction of columns whose lengths learn apart", 1e-3, _dora),
    "pissa": Adapter("LoRA that starts from the leading singular vectors", 3e-4, lambda r, a: sj.pissa(r)),
    "matryoshka": Adapter("LoRA that is good at every lower rank too", 1e-3, _matryoshka),
    "oft": Adapter("turns outputs by small orthogonal blocks of the rank's size", 1e-3, lambda r, a: sj.oft(r)),
    "randlora": Adapter("full-rank updates by scaling random bases", 1e-3, lambda r, a: sj.randlora(r)),
    "loldu": Adapter("trains the diagonal of an LDU decomposition", 1e-3, lambda r, a: sj.loldu()),
    "corda": Adapter("LoRA between the directions in which inputs vary", 3e-4, lambda r, a: sj.corda(r)),
    "lora_xs": Adapter("a small core between singular directions", 3e-3, lambda r, a: sj.methods.lora_sb.lora_xs(r)),
    "lora_sb": Adapter("such a core, started from the first gradients", 1e-3, lambda r, a: _lora_sb(r)),
    "soka": Adapter("leading Kronecker terms of the weight", 3e-3, lambda r, a: sj.soka(r)),
    "full": Adapter("trains every weight", 1e-4, lambda r, a: sj.full()),
    "head": Adapter("trains the head alone (classification)", 3e-2, None),
}


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


def adapt_model(
    params: Any,
    rules: Mapping[str, Any],
    seed: int,
    roles: Mapping[str, sj.Role],
    loss: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
) -> Any:
    """Returns the parameters with the method's stand-ins, started from the seed.

    Args:
      params: pretrained parameters.
      rules: from `method_rules`.
      seed: of the start.
      roles: of the parameters' leaves.
      loss: scalar loss of parameters and batch, for methods that start from what the data does to the weights.
      batches: those that such a method sees first.
    """
    stats = None
    if any(method.needs for method in rules.values()):
        seen = list(itertools.islice(batches, CALIBRATION))
        stats = sj.capture(loss, params, seen, rules=dict(rules), roles=roles)
    return sj.adapt(params, dict(rules), key=jax.random.key(1000 + seed), roles=roles, stats=stats)
