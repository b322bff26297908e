"""What starting PiSSA, CorDA, LoRA-SB, LoRA-XS and SVFit costs: full, randomized and Gram decompositions."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from benchmarks._covariances import covariances
from benchmarks._measure import cost
from benchmarks._start_encoder import start_encoder
from benchmarks._starts import (
    LEARNING_RATE,
    Factors,
    counted_products,
    covariance,
    excess,
    factors,
    gram_start,
    stack,
    start,
    values,
)
from experiments.runner import human_bytes
from subspace_jax.core import Statistics

FULL, GRAM, RANDOMIZED = "full SVD", "eigh of the Gram", "randomized"

# Power iterations of LoRA-SB and LoRA-XS by default.
OWN_ITERATIONS = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      shapes: of the matrices, inputs x outputs.
      depth: matrices of a stack.
      ranks: of PiSSA; the other methods have the largest.
      iterations: power iterations; LoRA-SB and LoRA-XS run with their default as well.
      oversample: extra columns of PiSSA and CorDA; others keep their default.
      decay: exponent of the power law of the singular values.
      spectra: of the matrices that PiSSA decomposes.
      methods: which to start.
      rounds: timed randomized starts after one that is not; what decomposes in full runs once.
      inputs: width of the activations whose covariance is found.
      rows: number of those activations.
      chunk: rows that are in memory at a time where they are streamed.
      encoder_layers: of the encoder that is adapted kernel by kernel.
      encoder_width: its width; the MLP is four times as wide.
    """

    shapes: tuple[str, ...] = ("4096x4096", "4096x11008")
    depth: int = 1
    ranks: tuple[int, ...] = (16, 128)
    iterations: int = 4
    oversample: int = 8
    decay: float = 0.5
    spectra: tuple[str, ...] = ("power", "gaussian")
    methods: tuple[str, ...] = ("pissa", "corda", "lora_sb", "lora_xs", "svfit")
    rounds: int = 2
    inputs: int = 2048
    rows: int = 8192
    chunk: int = 2048
    encoder_layers: int = 6
    encoder_width: int = 384


def run(config: Config, console: Console) -> dict[str, Any]:
    """Starts every method on every matrix, then compares ways to a covariance, then adapts a small encoder."""
    starts = []
    for text in config.shapes:
        shape = tuple(int(n) for n in text.split("x"))
        starts += _starts(config, shape, console)
    found = covariances(config.inputs, config.rows, config.chunk, console)
    encoder = start_encoder(config.encoder_layers, config.encoder_width, console)
    return {"starts": starts, "covariances": found, "encoder": encoder, "notes": _notes(config)}


class _Job(NamedTuple):
    """One start: what is given to it, what it approximates, and how.

    Attributes:
      method: name of the method.
      spectrum: of the matrix that is adapted.
      matrices: it, `[depth, in, out]`.
      statistics: what the method needs beside it.
      target: what is decomposed, `[depth, in, out]` on the host.
      weighted: the covariance that the factors are weighted with to approximate the target, for CorDA.
    """

    method: str
    spectrum: str
    matrices: Any
    statistics: Any
    target: np.ndarray
    weighted: Any = None


def _starts(config: Config, shape: tuple[int, ...], console: Console) -> list[dict[str, Any]]:
    """Every start on stacks of one shape."""
    rows: list[dict[str, Any]] = []
    known = _Known({}, {})
    for spectrum in config.spectra:
        matrices = stack(spectrum, shape, config.depth, config.decay)
        for job in _jobs(config, spectrum, matrices):
            rows += _references(config, job, known, console)
            rows += _randomized(config, job, known, console)
    return rows


class _Known(NamedTuple):
    """What full decompositions of one shape have shown.

    Attributes:
      seconds: of the full SVD, by the method that it starts.
      values: the largest singular values, by method and spectrum.
    """

    seconds: dict[str, float]
    values: dict[tuple[str, str], np.ndarray]

    def ratio(self, job: _Job, seconds: Sequence[float]) -> float | None:
        """A time by that of the full SVD; only CorDA decomposes anything but a matrix of this shape alone."""
        full = self.seconds.get("corda" if job.method == "corda" else "pissa")
        return None if full is None else statistics.median(seconds) / full

    def excess(self, job: _Job, found: Factors) -> dict[str, float] | None:
        """By how much more a low-rank part leaves than the best one; LoRA-XS and SVFit approximate what PiSSA does."""
        best = self.values.get((job.method, job.spectrum), self.values.get(("pissa", job.spectrum)))
        if job.weighted is not None:
            found = found._replace(left=job.weighted @ found.left)
        return None if best is None or best.shape[-1] <= found.right.shape[-2] else excess(job.target, found, best)


def _references(config: Config, job: _Job, known: _Known, console: Console) -> list[dict[str, Any]]:
    """Full decompositions of a job, for one more value than the largest rank: the first one that is left out."""
    rank = min(max(config.ranks) + 1, *job.target.shape[1:])
    exact = (FULL, start(_method(config, job.method, rank, svd="exact")))
    gram = (GRAM, gram_start(rank))
    ways = {
        ("pissa", "power"): [exact, gram],
        ("pissa", "gaussian"): [gram],
        ("corda", "power"): [exact],
        ("lora_sb", "power"): [gram],
    }
    rows = []
    for way, program in ways.get((job.method, job.spectrum), []):
        row, made = _measured(job, way, program, console, rounds=0)
        if way == FULL:
            known.seconds[job.method] = row["seconds"][0]
        known.values.setdefault((job.method, job.spectrum), values(factors(made), job.weighted))
        rows.append(row | {"rank": None, "iterations": None, "ratio": known.ratio(job, row["seconds"]), "excess": None})
    return rows


def _randomized(config: Config, job: _Job, known: _Known, console: Console) -> list[dict[str, Any]]:
    """The starts as users have them; of methods with more power iterations than PiSSA's also with as many as it has."""
    ranks = config.ranks if job.method == "pissa" else (max(config.ranks),)
    iterations = (config.iterations, OWN_ITERATIONS) if job.method in ("lora_sb", "lora_xs") else (config.iterations,)
    rows = []
    for rank, power in itertools.product(ranks, iterations):
        program = start(_method(config, job.method, rank, iterations=power))
        row, made = _measured(job, RANDOMIZED, program, console, rounds=config.rounds)
        ratio = known.ratio(job, row["seconds"])
        found = {"rank": rank, "iterations": power, "ratio": ratio, "excess": known.excess(job, factors(made))}
        rows.append(row | found)
    return rows


def _jobs(config: Config, spectrum: str, matrices: np.ndarray) -> Iterator[_Job]:
    """Yields what is started on matrices of one spectrum; on the flat one PiSSA alone."""
    for method in config.methods:
        if method == "pissa" or spectrum == "power":
            yield _job(method, spectrum, matrices)


def _job(method: str, spectrum: str, matrices: np.ndarray) -> _Job:
    kernel = jnp.asarray(matrices)
    if method == "lora_sb":
        return _Job(method, spectrum, kernel, Statistics(gradient=kernel), -LEARNING_RATE * np.sign(matrices))
    if method != "corda":
        return _Job(method, spectrum, kernel, None, matrices)
    gram = jnp.broadcast_to(
        covariance(np.random.default_rng(1), matrices.shape[1]), (len(matrices), *2 * matrices.shape[1:2])
    )
    damped = sj.methods.corda.damped_covariance(gram).covariance
    return _Job(method, spectrum, kernel, Statistics(gram=gram), np.asarray(damped @ kernel), damped)


def _method(
    config: Config, name: str, rank: int, *, svd: Any = "randomized", iterations: int = OWN_ITERATIONS
) -> sj.Method:
    options: dict[str, Any] = {"svd": svd, "iterations": iterations, "oversample": config.oversample}
    known: dict[str, Callable[[], sj.Method]] = {
        "pissa": lambda: sj.pissa(rank, **options),
        "corda": lambda: sj.corda(rank, **options),
        "lora_sb": lambda: sj.lora_sb(rank, learning_rate=LEARNING_RATE, iterations=iterations),
        "lora_xs": lambda: sj.methods.lora_sb.lora_xs(rank, iterations=iterations),
        "svfit": lambda: sj.svfit(rank, svd=svd),
    }
    if name not in known:
        raise SystemExit(f"startup: methods={name}; choose from {', '.join(known)}.")
    return known[name]()


def _measured(
    job: _Job, way: str, program: Callable[..., Any], console: Console, *, rounds: int
) -> tuple[dict[str, Any], Any]:
    """Compiles a start and runs it; with `rounds=0` once, without warming up."""
    given = jnp.asarray(job.target) if way == GRAM else job.matrices
    arguments = (jax.random.key(0), given, job.statistics)
    found, compiled = cost(program, arguments)
    seconds, made = [], None
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        made = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - begun)
    shape = "x".join(str(n) for n in job.target.shape[1:])
    console.print(f"  {shape} {job.spectrum} {job.method}, {way}: {seconds[-1]:.1f} s")
    row = {
        "shape": shape,
        "spectrum": job.spectrum,
        "method": job.method,
        "way": way,
        "seconds": seconds[1:] or seconds,
        "product_flops": counted_products(compiled.as_text() or ""),
        **{name: getattr(found, name) for name in ("temporary_bytes", "argument_bytes", "compile_seconds")},
    }
    return row, made


def _notes(config: Config) -> list[str]:
    return [
        f"A start is `sj.adapt` of a stack of {config.depth}, compiled as one program beforehand; compiling is apart. "
        "Full decompositions ran once, the others are medians. `of full` divides by the full SVD of a matrix of the "
        "same shape: CorDA by its own start, which multiplies and damps the covariance as well, the others by PiSSA's. "
        "GFLOP are those of matrix products; the compiler does not count factorizations. Temporaries include "
        "outputs and leave out what LAPACK takes for itself.",
        "Excess says by how much the remainder is larger than that of the best part of this rank, in Frobenius and in "
        "spectral norm; below 0 is rounding. The power law has singular values 1 / i^"
        f"{config.decay}; a Gaussian matrix has a flat spectrum, the hardest. LoRA-SB decomposes the signs of the "
        f"matrix, as if it were a gradient. Powers are power iterations, {OWN_ITERATIONS} by default for LoRA-XS and "
        "LoRA-SB. The eigenvectors of the Gram matrix are there to compare; the library has no such way.",
        "Of a randomized start of CorDA most is what the full one does as well: the product with the covariance, and "
        "the Cholesky factor, the inverse and the product that test it.",
        f"Activations: {config.rows} rows of {config.inputs}. Their Gram matrix needs a chunk of {config.chunk} rows "
        "at a time, QR and SVD all rows; errors are relative to a Gram matrix in float64.",
        "The encoder's kernels are adapted as a user does it, one by one without jit; again means another call with "
        "a new method object in the same process.",
    ]


def tables(results: Mapping[str, Any]) -> Sequence[tuple[str, Rows]]:
    """One table of starts for each shape, one of covariances, one of the encoder."""
    shapes = dict.fromkeys(row["shape"] for row in results["starts"])
    found = [(f"Start of {shape}", _start_rows(results["starts"], shape)) for shape in shapes]
    rows = [["way to the covariance", "s", "held", "error"]]
    for row in results["covariances"]:
        held = "-" if row["held_bytes"] is None else human_bytes(row["held_bytes"])
        rows.append([row["way"], f"{row['seconds']:.2f}", held, "-" if row["error"] is None else f"{row['error']:.1e}"])
    encoder = [["method", "kernels", "first call s", "compilations", "again s", "compilations"]]
    for row in results["encoder"]:
        first, again = ([f"{s:.2f}", str(n)] for s, n in zip(row["seconds"], row["compilations"], strict=True))
        encoder.append([row["method"], str(row["kernels"]), *first, *again])
    return [*found, ("Covariance of activations", rows), ("adapt on a small encoder, kernel by kernel", encoder)]


def _start_rows(starts: Sequence[Mapping[str, Any]], shape: str) -> Rows:
    rows = [
        ["matrix", "method", "decomposition", "rank", "s", "of full", "GFLOP", "temporaries", "compile s", "excess"]
    ]
    for row in starts:
        if row["shape"] != shape:
            continue
        powers, errors = row["iterations"], row["excess"]
        rows.append(
            [
                row["spectrum"],
                row["method"],
                row["way"] if powers is None else f"{row['way']}, {powers} powers",
                str(row["rank"] or "any"),
                f"{statistics.median(row['seconds']):.2f}",
                "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
                f"{row['product_flops'] / 1e9:.0f}",
                human_bytes(row["temporary_bytes"]),
                f"{row['compile_seconds']:.1f}",
                "-" if errors is None else " / ".join(f"{100 * errors[n]:.1f} %" for n in ("frobenius", "spectral")),
            ]
        )
    return rows


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Time of randomized starts of the largest rank by that of full ones, and both on an encoder."""
    bars: dict[str, dict[str, float]] = {}
    for row in results["starts"]:
        if row["way"] == RANDOMIZED and row["ratio"] is not None:
            name = f"{row['method']}, {row['spectrum']}, rank {row['rank']}, {row['iterations']} powers"
            bars.setdefault(name, {})[row["shape"]] = row["ratio"]
    encoder = {row["method"]: {"first": row["seconds"][0], "again": row["seconds"][1]} for row in results["encoder"]}
    return [
        Chart("randomized start", "time relative to a full SVD", bars, reference=0.05, log=True),
        Chart("adapt on a small encoder", "seconds", encoder),
    ]


BENCHMARK = Benchmark(
    name="startup",
    claim="What starting PiSSA, CorDA, LoRA-SB, LoRA-XS and SVFit costs: decompositions, and Gram matrices.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
