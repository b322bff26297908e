"""The reference: one page for each namespace, every public name documented once."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any

import subspace_jax as sj
from docs.docstrings import to_rst

ROOMS = {
    "core": "the mechanism",
    "weights": "stand-in weights that several methods share",
    "optim": "transformations of gradients and updates",
    "merging": "several experts become one model",
    "continual": "streams of tasks",
    "banks": "one batch, many adapters",
    "reports": "what a training did to the weights",
    "modules": "small networks in the blocks of any model",
    "io": "checkpoints, adapter files, PEFT folders",
    "training": "mesh, state, step and loop",
    "sharding": "where adapters and states lie on a mesh",
    "manifolds": "curved sets to keep parameters on",
    "linalg": "numerics that know nothing of weights",
    "metrics": "scores",
    "models": "pretrained models and their loaders",
    "data": "real tasks and users' own rows",
    "errors": "every exception",
}


@dataclasses.dataclass(frozen=True)
class Namespace:
    """A namespace that users write.

    Attributes:
      name: as they write it, "sj.core".
      title: what it has, in a few words.
      module: the module.
      names: its public names, without modules.
    """

    name: str
    title: str
    module: ModuleType
    names: tuple[str, ...]

    @property
    def full(self) -> str:
        """The name by which Python finds it."""
        return self.name.replace("sj", "subspace_jax", 1)

    @property
    def page(self) -> str:
        """The file of its page, without suffix."""
        return self.name.removeprefix("sj.") if self.name != "sj" else "sj"


@cache
def namespaces() -> tuple[Namespace, ...]:
    """Returns every public namespace, the methods' after the others."""
    methods = [
        _namespace(f"sj.methods.{s.slug}", (inspect.getdoc(getattr(sj.methods, s.slug)) or "").splitlines()[0])
        for s in sj.catalogue()
    ]
    return (_namespace("sj", "the public face"), *(_namespace(f"sj.{n}", t) for n, t in ROOMS.items()), *methods)


def _namespace(name: str, title: str) -> Namespace:
    module: Any = sj
    for part in name.split(".")[1:]:
        module = getattr(module, part)
    listed = getattr(module, "__all__", None) or [
        n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and not n.startswith("_")
    ]
    names = (n for n in sorted(listed) if n != "__version__" and not inspect.ismodule(getattr(module, n)))
    return Namespace(name, title, module, tuple(names))


@cache
def homes() -> dict[str, tuple[str, str]]:
    """Returns for every public name, "sj.lora", the namespace that documents it and its name there.

    A name that several namespaces have is documented by the method that it belongs to, else by the first room.
    """
    rooms = [n for n in namespaces() if n.name != "sj"]
    # A method before a room, and `errors` last: it collects what others define.
    rooms.sort(key=lambda n: (not n.name.startswith("sj.methods."), n.name == "sj.errors"))
    first: dict[int, tuple[str, str]] = {}
    for namespace in rooms:
        for name in namespace.names:
            value = getattr(namespace.module, name)
            if _has_identity(value):
                first.setdefault(id(value), (namespace.name, name))
    found = {}
    for namespace in namespaces():
        for name in namespace.names:
            value = getattr(namespace.module, name)
            here = (namespace.name, name)
            found[f"{namespace.name}.{name}"] = first.get(id(value), here) if _has_identity(value) else here
    return found


def _has_identity(value: Any) -> bool:
    return _is_function(value) or _is_class(value)


def _is_function(value: Any) -> bool:
    """Functions, also those that JAX or a cache has wrapped."""
    return inspect.isroutine(value) or (callable(value) and hasattr(value, "__wrapped__"))


def _is_class(value: Any) -> bool:
    """Classes of this library: names for types, such as `Params`, are data."""
    return inspect.isclass(value) and value.__module__.startswith("subspace_jax")


def page(namespace: Namespace) -> str:
    """Returns the page of a namespace in reStructuredText."""
    title = namespace.name
    own = [n for n in namespace.names if homes()[f"{namespace.name}.{n}"][0] == namespace.name]
    parts = [f"{title}\n{'=' * len(title)}", f"{namespace.title[:1].upper()}{namespace.title[1:].rstrip('.')}."]
    parts += [f".. py:module:: {namespace.full}"] if namespace.name != "sj" else []
    rows = "\n".join(f"* - ``{namespace.name}.{n}``\n  - {_first_line(namespace, n)}" for n in namespace.names)
    parts += [f".. list-table::\n   :widths: 35 65\n\n{_indented(rows)}"] if rows else []
    parts += [_directive(namespace, name) for name in own]
    return "\n\n".join(parts) + "\n"


def _first_line(namespace: Namespace, name: str) -> str:
    value = getattr(namespace.module, name)
    said = (inspect.getdoc(value) or "") if _has_identity(value) else _said_of(namespace.module, name)
    text = said.split("\n\n", maxsplit=1)[0]
    return " ".join(" ".join(to_rst(text.split("\n"))).split())


def _directive(namespace: Namespace, name: str) -> str:
    value = getattr(namespace.module, name)
    full = f"{namespace.full}.{name}"
    if _is_class(value):
        return f".. autoclass:: {full}\n   :members:"
    if _is_function(value):
        return f".. autofunction:: {full}"
    text = "\n".join(to_rst(_said_of(namespace.module, name).split("\n")))
    shown = _shown(value)
    return f".. py:data:: {full}\n\n{_indented(text)}\n\n" + (f"   ``{shown}``" if shown else "")


def _shown(value: Any) -> str:
    """A name's value where it is short: the strings of a literal, numbers, the union that it stands for."""
    text = re.sub(r"(typing|collections\.abc|jax\.jaxlib\._jax|subspace_jax[\w.]*)\.", "", repr(value))
    return text if len(text) < 160 and "<" not in text and value is not Any else ""


def _said_of(module: ModuleType, name: str) -> str:
    """The words after a constant's assignment, or the comment before it, in the file that defines it."""
    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            original = next(a.name for a in node.names if name == (a.asname or a.name))
            return _said_of(sys.modules[node.module or ""], original) if node.module in sys.modules else ""
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in {getattr(target, "id", None) for target in targets}:
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return inspect.cleandoc(str(after.value.value))
            before = reversed(inspect.getsource(module).split("\n")[: node.lineno - 1])
            comment = list(itertools.takewhile(lambda line: line.startswith("# "), before))
            return "\n".join(line[2:] for line in reversed(comment))
    return ""


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" if line else "" for line in text.split("\n"))


def pages() -> dict[str, str]:
    """Returns every page of the reference by file name, and its contents."""
    tables = []
    for caption, prefix in (("The library", "sj"), ("Methods", "sj.methods.")):
        listed = [n for n in namespaces() if n.name.startswith("sj.methods.") == (prefix == "sj.methods.")]
        entries = "\n".join(f"{n.name} <{n.page}>" for n in listed)
        tables.append(f".. toctree::\n   :caption: {caption}\n   :maxdepth: 1\n\n{_indented(entries)}")
    head = (
        "Reference\n=========\n\nEvery public name, once. ``sj`` stands for ``subspace_jax``; the mechanism and one or "
        "two names a method are at the top, the rest is in the namespaces."
    )
    return {"index.rst": "\n\n".join([head, *tables]) + "\n", **{f"{n.page}.rst": page(n) for n in namespaces()}}
