"""The page of a method, one form for all, from its registration, its docstrings and its recorded result."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import experiments
import subspace_jax as sj
from docs.docstrings import description, example, to_markdown
from docs.results import experiment_table
from experiments import runner
from experiments.runner import markdown_table

ROOT = Path(__file__).parents[1]

KINDS = {
    "weight": "stand-in weight",
    "transformation": "gradient transformation",
    "learner": "learner of streams",
    "merger": "merger",
    "penalty": "penalty",
    "module": "module of activations",
    "analysis": "analysis",
    "system": "system",
}

# Experiments whose recorded run has a picture, and what it shows.
PICTURES = {
    "quickstart": ("quickstart.png", "The quickstart: accuracy, and what each method costs."),
    "coso": ("continual-vision.png", "Two classes of clothes at a time: accuracy after every task, for each learner."),
    "osf": ("continual-vision.png", "Two classes of clothes at a time: accuracy after every task, for each learner."),
    "projected_gradients": ("continual-text.png", "Five text tasks: accuracy after every task, for each learner."),
}

_FAILED = re.compile(
    r"(Claims that (did not reproduce|this does not show)|Not reproduced|Not shown|The claim does not)\b"
)
_IN_PASSING = re.compile(r"(does|do|did)\s+not\s+(even\s+)?(reproduce|show)|Weaker\s+than\s+published|no\s+gain")


def title(source: sj.core.Source) -> str:
    """Returns the first line of a method's home, its name and what it does."""
    return (inspect.getdoc(_home(source)) or "").splitlines()[0].rstrip(".")


def summary(source: sj.core.Source) -> str:
    """Returns what a method does in one line: the first line of its home, without the method's name."""
    text = inspect.getdoc(_home(source)) or ""
    line = text.split("\n\n", maxsplit=1)[0].replace("\n", " ")
    return line.split(": ", maxsplit=1)[-1]


def functions(source: sj.core.Source) -> list[str]:
    """Returns a method's functions as a user writes them: those at the top of the library by their short name."""
    found = [short_name(source, n) for n in source.public if inspect.isroutine(getattr(_home(source), n))]
    return sorted([*found, *(f"sj.{name}" for name in source.uses)], key=lambda name: (name.count("."), name))


def main_functions(source: sj.core.Source) -> list[str]:
    """Returns the public names that a reader starts with: those at the top of the library and the method's own."""
    home = _home(source)
    known = [n for n in source.public if inspect.isfunction(getattr(home, n))]
    main = [n for n in known if hasattr(sj, n) or n in (source.slug, "learner", "penalty")]
    return sorted(main or known[:3], key=lambda n: (n != source.slug, not hasattr(sj, n)))


def short_name(source: sj.core.Source, name: str) -> str:
    """Returns a public name of a method as a user writes it."""
    value = getattr(_home(source), name)
    return f"sj.{name}" if getattr(sj, name, None) is value else f"sj.methods.{source.slug}.{name}"


def method_page(source: sj.core.Source) -> str:
    """Returns the page of a method: what it does, when to use it, how to call it, and what was measured."""
    kinds = " and a ".join(KINDS[kind] for kind in source.kinds)
    article = "An" if kinds.startswith("a") else "A"
    parts = [
        f"# {title(source)}",
        f"{source.citation}.",
        f"{article} {kinds} of the family {source.family.replace('_', ' ')}.",
    ]
    parts += [*_what_it_does(source), *_when(source), *_code(source), *_measured(source)]
    differs = source.differs or "None in the formulas that we know of."
    parts += ["## Differences from the publication", f"{differs} Its experiments were not repeated at its sizes."]
    return "\n\n".join([*parts, *_names(source), *_files(source)]) + "\n"


def _home(source: sj.core.Source) -> ModuleType:
    return getattr(sj.methods, source.slug)


def _what_it_does(source: sj.core.Source) -> list[str]:
    parts = ["## What it does"]
    for name in main_functions(source):
        parts += [f"### `{short_name(source, name)}`", to_markdown(description(getattr(_home(source), name)))]
    return parts


def _when(source: sj.core.Source) -> list[str]:
    rows = [["use it for", "look elsewhere when"], [source.use_for, source.not_for]]
    return ["## When to use it", markdown_table(rows)]


def _code(source: sj.core.Source) -> list[str]:
    programs = [_program(source, name) for name in main_functions(source)[:2]]
    blocks = [f"```python\n{program}\n```" for program in programs if program]
    return ["## Code", "These run as they are, after `pip install subspace-jax`.", *blocks] if blocks else []


def _program(source: sj.core.Source, name: str) -> str:
    """The example of a docstring, with an import of what it calls by a bare name."""
    program = example(getattr(_home(source), name))
    used = [
        n for n in source.public if re.search(rf"(?<![\w.]){n}\b(?!\s*=)", program) and f"import {n}" not in program
    ]
    bare = [n for n in used if not re.search(rf"import .*\b{n}\b|^{n}\b.*= |, {n} = ", program, flags=re.MULTILINE)]
    return (
        f"from subspace_jax.methods.{source.slug} import {', '.join(bare)}\n{program}" if bare and program else program
    )


def _measured(source: sj.core.Source) -> list[str]:
    experiment = runner.find(source.experiment)
    text = inspect.getdoc(runner.find_module(source.experiment, experiments, "experiment")) or ""
    paragraphs = [p for p in re.split(r"\n{2,}", text) if p.strip() and not p.startswith("Source")]
    failed = [p for p in paragraphs if _FAILED.match(p)]
    picture = []
    if source.experiment in PICTURES:
        file, words = PICTURES[source.experiment]
        picture = [f"![{words}](../{file})"]
    told = "\n\n".join(p for p in paragraphs if p not in failed)
    failed = failed or [s for s in re.split(r"(?<=\.)\s+(?=[A-Z])", told) if _IN_PASSING.search(s)]
    failed = failed or ["None of the claims that were tried. What was not tried is not claimed."]
    parts = ["## What we measured", f"**{experiment.claim}**", *picture, experiment_table(source.experiment)]
    parts += ["### How, and what came out", to_markdown(told)]
    return [*parts, "### What did not reproduce", to_markdown("\n\n".join(failed))]


def _names(source: sj.core.Source) -> list[str]:
    home, rows = _home(source), [["name", "what it is"]]
    for name in sorted(source.public, key=lambda name: not hasattr(sj, name)):
        line = (inspect.getdoc(getattr(home, name)) or "").split("\n\n", maxsplit=1)[0].replace("\n", " ")
        is_documented = callable(getattr(home, name)) and inspect.getmodule(getattr(home, name)) is not None
        text = to_markdown(line).replace("|", "\\|") if is_documented else "a constant or a name for types"
        rows.append([f"`{short_name(source, name)}`", text])
    return ["## All names", markdown_table(rows), "Arguments, results and errors are in the docstrings: `help(...)`."]


def _files(source: sj.core.Source) -> list[str]:
    path = Path(*source.module.split("."))
    module = path.with_suffix(".py")
    home = [module] if (ROOT / module).exists() else [path / f.name for f in sorted((ROOT / path).glob("*.py"))]
    tests = sorted((ROOT / "tests" / "methods" / source.family).glob(f"test_{source.slug}*.py"))
    experiment = runner.modules()[source.experiment].replace(".", "/") + ".py"
    listed = [*map(str, home), *(str(t.relative_to(ROOT)) for t in tests), experiment]
    return ["## Files", "\n".join(f"- [{name}](../../{name})" for name in listed)]
