"""What a packed language model makes of a text, in a process of its own: perplexity, and how it counts on.

python -m benchmarks._packed_text FILE
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from subspace_jax.models import Llama, gguf_tokenizer, greedy_decode, load_gguf
from subspace_jax.training import token_loss

PROMPT = "one, two, three, four,"
PARAGRAPH = (
    "The river begins as a small spring high in the mountains. In its upper valley it is narrow and fast, and the "
    "water is cold even in summer. Farther down, where the land is flat, it becomes wide and slow. Farmers have used "
    "its water for their fields for hundreds of years, and most of the towns in the region were built on its banks."
)


def main(file: str) -> None:
    """Prints one line of JSON."""
    model = load_gguf(file, packed=True, scan_layers=True)
    tokenizer = gguf_tokenizer(file)
    assert isinstance(model.module, Llama)
    tokens = jnp.asarray([tokenizer.encode(PARAGRAPH).ids])
    logits = jax.jit(sj.with_adapters(model.module.apply))({"params": model.params}, tokens)
    total, count = token_loss(logits, tokens, tokens >= 0)
    following = greedy_decode(model.module, model.params, [tokenizer.encode(PROMPT).ids], 1)
    found = {
        "perplexity": float(jnp.exp(total / count)),
        "tokens": int(tokens.size),
        "prompt": PROMPT,
        "continuation": tokenizer.decode(np.asarray(following)[0].tolist()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
