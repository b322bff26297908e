"""Writers of tiny GGUF files of decoders, quantized or not."""

import numpy as np

from tests.models.model_helpers import gguf_bytes

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}
_SIZES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}


def quantized(rng, kind, shape):
    """Arbitrary blocks of small numbers for a matrix."""
    raw = rng.integers(0, 256, (int(np.prod(shape)) // 32, _SIZES[kind]), dtype=np.uint8)
    for place in (0, 2) if kind.endswith("1") else (0,):
        raw[:, place : place + 2] = (rng.normal(size=(len(raw), 1)) * 0.01).astype("<f2").view(np.uint8)
    return raw.reshape(-1)


def decoder_tensors(
    rng, architecture, *, kinds, layers=2, width=64, heads=2, kv_heads=1, hidden=64, vocab=48, tied=True
):
    """Name, shape, kind and bytes of the tensors of a tiny decoder.

    Args:
        kinds: of the matrices, taken in turn.
    """
    size = width // heads
    found = {}
    turn = 0

    def matrix(name, rows, columns):
        nonlocal turn
        kind, turn = kinds[turn % len(kinds)], turn + 1
        if kind == "F32":
            raw = (rng.normal(size=(rows, columns)) * 0.1).astype("<f4").view(np.uint8).reshape(-1)
        else:
            raw = quantized(rng, kind, (rows, columns))
        found[name] = ((rows, columns), kind, raw)

    def vector(name, count):
        found[name] = ((count,), "F32", (1.0 + 0.1 * rng.normal(size=count)).astype("<f4").view(np.uint8))

    matrix("token_embd.weight", vocab, width)
    if not tied:
        matrix("output.weight", vocab, width)
    vector("output_norm.weight", width)
    for layer in range(layers):
        at = f"blk.{layer}."
        for name, count in (("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)):
            matrix(f"{at}{name}.weight", count * size, width)
            if architecture == "qwen2":
                vector(f"{at}{name}.bias", count * size)
        matrix(f"{at}attn_output.weight", width, heads * size)
        matrix(f"{at}ffn_gate.weight", hidden, width)
        matrix(f"{at}ffn_up.weight", hidden, width)
        matrix(f"{at}ffn_down.weight", width, hidden)
        norms = ["attn_norm", "ffn_norm"]
        if architecture == "gemma3":
            norms += ["post_attention_norm", "post_ffw_norm"]
        for name in norms:
            vector(f"{at}{name}.weight", width)
        if architecture in ("gemma3", "qwen3"):
            vector(f"{at}attn_q_norm.weight", size)
            vector(f"{at}attn_k_norm.weight", size)
    return found


def write_decoder(path, architecture, *, seed=0, layers=2, width=64, heads=2, kv_heads=1, metadata=None, **options):
    """Writes a file of an architecture; returns its path."""
    rng = np.random.default_rng(seed)
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads}
    tensors = decoder_tensors(rng, architecture, **sizes, **options)
    entries = {
        "general.architecture": architecture,
        f"{architecture}.embedding_length": width,
        f"{architecture}.block_count": layers,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.feed_forward_length": options.get("hidden", 64),
        f"{architecture}.context_length": 64,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{architecture}.rope.freq_base": 10000.0,
    }
    if architecture in ("qwen3", "gemma3"):
        entries[f"{architecture}.attention.key_length"] = width // heads
    if architecture == "gemma3":
        entries["gemma3.attention.sliding_window"] = 3
    stored = {name: (shape, NUMBERS[kind], raw.tobytes()) for name, (shape, kind, raw) in tensors.items()}
    path.write_bytes(gguf_bytes(entries | (metadata or {}), stored))
    return path


def write_packed(path, seed=0, **options):
    """A tiny Llama whose matrices are of several kinds, those of one place too."""
    kinds = ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q8_0", "Q4_0", "Q5_0")
    return write_decoder(path, "llama", seed=seed, kinds=kinds, **options)
