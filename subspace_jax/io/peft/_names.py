"""Maps modules and arrays of a parameter tree to their names in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from subspace_jax.core import Role, nearest
from subspace_jax.io._errors import ManifestError, listing

ModuleKind = Literal["dense", "conv", "embedding", "vector", "array"]

_LEAVES: dict[str, dict[str, str]] = {
    "dense": {"kernel": "weight", "bias": "bias"},
    "conv": {"kernel": "weight", "bias": "bias"},
    "embedding": {"embedding": "weight"},
    "vector": {"scale": "weight", "bias": "bias"},
    "array": {},
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class NameRule:
    """Maps the modules of one form to their names in PyTorch.

    A placeholder such as `{layer}` stands for a number in both names. One that only `module` has is a leading axis of
    the arrays: the layers of a scan, say.

    Attributes:
      path: the module in the parameter tree, such as "encoder/layer_{layer}/mlp/fc1".
      module: the same in PyTorch, such as "encoder.layer.{layer}.intermediate.dense".
      kind: "dense", "conv" (window, in, out), "embedding" (rows, features), "vector": norms and other scales, or
        "array" for arrays that have one form in both, such as a class token; `leaves` names them.
      inputs: number of axes of a dense kernel that are contracted, the leading ones.
      leaves: name of each array and of its tensor; by the kind if None.
      shared: whether the model reads the array in other places too. PEFT adapts a module, not an array, so such a
        weight has no form in its files.

    Example:
      >>> NameRule("encoder/layers/fc", "encoder.{layer}.fc").stacked
      ('layer',)
    """

    path: str
    module: str
    kind: ModuleKind = "dense"
    inputs: int = 1
    leaves: tuple[tuple[str, str], ...] | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _LEAVES:
            raise ValueError(f"NameRule {self.path!r}: kind={self.kind!r}; choose from {', '.join(_LEAVES)}.")
        ours, theirs = (_PLACEHOLDER.findall(name) for name in (self.path, self.module))
        if not set(ours) <= set(theirs) or len(set(theirs)) < len(theirs):
            raise ValueError(
                f"NameRule {self.path!r}: placeholders {ours} of the path and {theirs} of {self.module!r}; expected "
                "each once in the module, and those of the path among them."
            )

    @property
    def stacked(self) -> tuple[str, ...]:
        """The placeholders that are leading axes of the arrays."""
        ours = _PLACEHOLDER.findall(self.path)
        return tuple(name for name in _PLACEHOLDER.findall(self.module) if name not in ours)

    @property
    def tensors(self) -> dict[str, str]:
        """The name of each array's tensor."""
        return dict(_LEAVES[self.kind] if self.leaves is None else self.leaves)

    def numbers(self, path: str) -> dict[str, int] | None:
        """Returns the numbers that the placeholders stand for in the path of a module; None for another module."""
        found = _pattern(self.path).fullmatch(path)
        return found and {name: int(text) for name, text in found.groupdict().items()}


@functools.lru_cache(maxsize=1024)
def _pattern(name: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(name)
    # Every second part is the name of a placeholder.
    return re.compile("".join(rf"(?P<{p}>0|[1-9]\d*)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """The place of one leaf of a tree in PyTorch: modules and tensor.

    Attributes:
      path: of the leaf.
      rule: the rule that names it.
      shape: of the leaf, stacked axes first.
      modules: names of the modules that it serves, in the order of the stacked axes.
      tensor: what it is called in each of them.
    """

    path: str
    rule: NameRule
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    tensor: str

    @property
    def depth(self) -> int:
        """The number of stacked axes."""
        return len(self.rule.stacked)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return self.shape[: self.depth]

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of the array of one module."""
        return self.shape[self.depth :]

    @property
    def role(self) -> Role:
        """How the array is read as matrices; a role without matrix axes for vectors."""
        first, last = self.depth, len(self.shape)
        stack = tuple(range(first))
        match self.rule.kind:
            case _ if self.tensor != "weight" or self.rule.kind in ("vector", "array"):
                return Role("other")
            case "conv":
                return Role.conv(last - first, stack_axes=stack)
            case "embedding":
                return Role("embedding", stack, (first,), (first + 1,))
            case _:
                middle = first + self.rule.inputs
                return Role.dense(tuple(range(first, middle)), tuple(range(middle, last)), stack)


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Maps the modules of a parameter tree to their names in PyTorch.

    Attributes:
      rules: the first that fits a module names it.

    Example:
      >>> names = NameMap((NameRule("mlp/fc", "net.linear"),)).inside("backbone", "model")
      >>> names.rules[0].path, names.rules[0].module
      ('backbone/mlp/fc', 'model.net.linear')
    """

    rules: tuple[NameRule, ...]

    def __add__(self, other: NameMap) -> NameMap:
        return NameMap((*self.rules, *other.rules))

    def inside(self, path: str = "", module: str = "") -> NameMap:
        """Returns the map of the same modules where they are part of a larger model.

        Args:
          path: the part of the tree that holds them, such as "backbone".
          module: the module that holds them, such as "bert".
        """

        def one(rule: NameRule) -> NameRule:
            ours, theirs = (f"{path}/" if path else ""), (f"{module}." if module else "")
            return dataclasses.replace(rule, path=ours + rule.path, module=theirs + rule.module)

        return NameMap(tuple(one(rule) for rule in self.rules))

    def places(self, leaves: Mapping[str, Any]) -> dict[str, TensorPlace]:
        """Returns where each leaf is in PyTorch, by path; leaves that no rule names are left out.

        Args:
          leaves: anything with a shape, by path.

        Raises:
          ManifestError: a leaf has not the axes of its rule, or two leaves have one name.
        """
        found = {path: place for path, leaf in leaves.items() if (place := self._place(path, tuple(leaf.shape)))}
        owners: dict[tuple[str, str], str] = {}
        for path, place in found.items():
            for module in place.modules:
                first = owners.setdefault((module, place.tensor), path)
                if first != path:
                    raise ManifestError(
                        f"{path}: the NameMap calls it {module}.{place.tensor}, which is {first} already. Give each "
                        "leaf a name of its own."
                    )
        return found

    def _place(self, path: str, shape: tuple[int, ...]) -> TensorPlace | None:
        parent, _, leaf = path.rpartition("/")
        for rule in self.rules:
            numbers = rule.numbers(parent)
            if numbers is None or leaf not in rule.tensors:
                continue
            tensor, depth = rule.tensors[leaf], len(rule.stacked)
            if len(shape) < depth + _least_axes(rule, tensor):
                raise ManifestError(
                    f"{path}: has shape {shape}, and the NameMap's rule for {rule.module!r} takes {depth} leading axes "
                    f"for {rule.stacked} and at least {_least_axes(rule, tensor)} for a {rule.kind} {tensor}."
                )
            every = itertools.product(*(range(size) for size in shape[:depth]))
            modules = (rule.module.format(**numbers, **dict(zip(rule.stacked, at, strict=True))) for at in every)
            return TensorPlace(path, rule, shape, tuple(modules), tensor)
        return None


def _least_axes(rule: NameRule, tensor: str) -> int:
    if rule.kind == "array":
        return 0
    if tensor != "weight" or rule.kind == "vector":
        return 1
    return {"dense": rule.inputs + 1, "conv": 3, "embedding": 2}[rule.kind]


def require_places(paths: Iterable[str], places: Mapping[str, TensorPlace], names: NameMap) -> None:
    """Raises ManifestError, naming all of them, if a leaf that PEFT shall hold has no name there."""
    known = sorted({f"{rule.path}/{leaf}" for rule in names.rules for leaf in rule.tensors})
    lines = [f"{path!r}; nearest of the map are {nearest(path, known)}" for path in paths if path not in places]
    if lines:
        raise ManifestError(f"the NameMap has no name for{listing(lines)}\nAdd a NameRule, or merge() these weights.")
