"""What a LoRA step holds in memory: a language model in the blocks of its file, beside its float32 weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from experiments.runner import human_bytes
from subspace_jax.assets import GROUPS, AssetMissingError
from subspace_jax.models import GgufTensor, gemma3_file, write_gguf
from subspace_jax.weights import BLOCK_KINDS

ARMS = ("packed", "float32")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      model: `gemma3-270m`, the optional asset of this name; `random`, a file of random blocks; or a GGUF file.
      tokens: of the step.
      rank: of the adapters on all kernels of the layers.
      chunk: tokens whose logits are in memory at a time.
      steps: optimizer steps of each process.
      layers: of the random model.
      width: of the random model.
      vocabulary: of the random model.
    """

    model: str = "gemma3-270m"
    tokens: int = 64
    rank: int = 8
    chunk: int = 16
    steps: int = 3
    layers: int = 4
    width: int = 256
    vocabulary: int = 65536


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs each arm twice in processes of their own: once compiling, once with what the first has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        file = _file(config, Path(folder))
        found: dict[str, dict[str, Any]] = {}
        for arm in ARMS:
            for name in ("compiling", "compiled"):
                console.print(f"{arm}, {name}")
                found.setdefault(arm, {})[name] = _step(config, file, arm, Path(folder) / f"cache-{arm}")
        text = None if config.model == "random" else _process("benchmarks._packed_text", str(file))
    packed, dense = (found[arm] for arm in ARMS)
    ratios = {name: packed[name]["peak_bytes"] / dense[name]["peak_bytes"] for name in packed}
    notes = [
        f"{config.tokens} tokens, rank {config.rank} on all kernels of the layers, Adam, layers scanned and "
        f"rematerialized, logits of {config.chunk} tokens at a time. Bytes are the largest resident memory of a "
        "process above that after its imports, loading of the file among it; `compiling` is a first run, `compiled` "
        "one that finds the program in JAX's persistent cache, so that memory of the compiler is left out.",
    ]
    if text is not None:
        notes.append(
            f"Perplexity of a paragraph of {text['tokens']} tokens with packed blocks: {text['perplexity']:.2f}; it "
            f"continues {text['prompt']!r} by {text['continuation']!r}."
        )
    return {"measured": found, "ratios": ratios, "text": text, "notes": notes}


def _step(config: Config, file: Path, arm: str, cache: Path) -> dict[str, Any]:
    numbers = map(str, (config.steps, config.tokens, config.rank, config.chunk))
    return _process("benchmarks._packed_step", str(file), arm, *numbers, str(cache))


def _process(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def _file(config: Config, folder: Path) -> Path:
    if config.model == "random":
        return write_random(folder / "random.gguf", config)
    if config.model != "gemma3-270m":
        return Path(config.model)
    try:
        return gemma3_file()
    except AssetMissingError as error:
        raise SystemExit(
            f"packed_memory: {error} Fetch {', '.join(GROUPS['gemma3-270m'])} by name, or measure a file of random "
            "blocks by --set model=random."
        ) from error


def write_random(path: Path, config: Config) -> Path:
    """Writes a Llama of random blocks: a table in Q8_0, kernels in Q4_K and Q6_K; returns the path."""
    rng = np.random.default_rng(0)
    width, hidden = config.width, 4 * config.width
    tensors: dict[str, Any] = {"output_norm.weight": np.ones(width, np.float32)}

    def matrix(name: str, rows: int, columns: int, kind: str) -> None:
        block = BLOCK_KINDS[kind]
        raw = rng.integers(0, 256, (rows * columns // block.values, block.size), dtype=np.uint8)
        for place in block.scales:
            raw[:, place : place + 2] = np.array([1e-3], "<f2").view(np.uint8)
        tensors[name] = GgufTensor(name, (rows, columns), kind, raw.reshape(-1))

    matrix("token_embd.weight", config.vocabulary, width, "Q8_0")
    for layer in range(config.layers):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(width, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", width, width, "Q4_K")
        for name, rows, columns in (
            ("ffn_gate", hidden, width),
            ("ffn_up", hidden, width),
            ("ffn_down", width, hidden),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, columns, ("Q4_K", "Q6_K")[layer % 2])
    heads = max(1, width // 64)
    numbers = {
        "embedding_length": width,
        "block_count": config.layers,
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
        "feed_forward_length": hidden,
        "context_length": max(512, config.tokens),
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    write_gguf(path, {"general.architecture": "llama", **{f"llama.{k}": v for k, v in numbers.items()}}, tensors)
    return path


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Bytes and seconds of every arm."""
    rows = [["weights", "parameters", "peak, compiled", "peak, compiling", "a step", "losses"]]
    for arm, found in results["measured"].items():
        one, first = found["compiled"], found["compiling"]
        losses = ", ".join(f"{value:.3f}" for value in one["losses"])
        sizes = (human_bytes(v) for v in (one["parameter_bytes"], one["peak_bytes"], first["peak_bytes"]))
        rows.append([arm, *sizes, f"{one['step_seconds']:.1f} s", losses])
    ratios = (f"{results['ratios'][name]:.2f}" for name in ("compiled", "compiling"))
    rows.append(["packed / float32", "", *ratios, "", ""])
    return [("A LoRA step", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Peaks by arm."""
    bars = {arm: {"MiB": found["compiled"]["peak_bytes"] / 2**20} for arm, found in results["measured"].items()}
    return [Chart("A LoRA step on 64 tokens", "MiB at the peak, above the imports", bars)]


BENCHMARK = Benchmark(
    name="packed_memory",
    claim="Peak memory of a LoRA step on a model whose weights stay in the blocks of a GGUF file, and in float32.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
