"""Training steps of a Llama by PyTorch PEFT, in a process of its own: prints a row of JSON for each.

python -m benchmarks._gpu_peft TASK
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks._gpu_rows import (
    BLOCK_SIZE,
    COMPILE,
    LEARNING_RATE,
    PLUS,
    SHAPES,
    AbsentError,
    Task,
    print_rows,
    timed,
    timing,
)

NEEDS = ("torch", "transformers", "peft")

# Configurations on all kernels of the layers, by PEFT's names; None trains everything.
METHODS: Mapping[str, Callable[[Any, int, dict[str, Any]], Any] | None] = {
    "full": None,
    "lora": lambda peft, rank, on: peft.LoraConfig(r=rank, lora_alpha=rank, **on),
    "dora": lambda peft, rank, on: peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **on),
    "randlora": lambda peft, rank, on: peft.RandLoraConfig(r=rank, **on),
    "oft": lambda peft, _, on: peft.OFTConfig(oft_block_size=BLOCK_SIZE, **on),
}


def make(variant: str, task: Task, device: str) -> Any:
    """Returns a Llama of the task's shape with random weights in bfloat16, adapted and ready to train."""
    import peft
    import torch
    import transformers

    shape = SHAPES[task.shape]
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp_width,
    }
    options: dict[str, Any] = {"tie_word_embeddings": True, "attn_implementation": "sdpa", "use_cache": False}
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options))
    model = model.to(torch.bfloat16)
    if shape.remat:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kind, *behind = variant.split(PLUS)
    method = METHODS[kind]
    if method is not None:
        found = method(peft, task.rank, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"})
        # In float32, which is the default, products with the adapters would be in float32, too, and slower.
        model = peft.get_peft_model(model, found, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    return torch.compile(model) if COMPILE in behind else model


def measure(variant: str, task: Task) -> dict[str, Any]:
    """Times one variant's step."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise AbsentError(f"not installed: {', '.join(missing)}")
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and task.shape != "tiny":
        raise AbsentError("PyTorch sees no GPU")
    if not on_gpu and COMPILE in variant:
        raise AbsentError("compiled on a GPU alone")
    device, shape = "cuda" if on_gpu else "cpu", SHAPES[task.shape]
    model = make(variant, task, device)
    tokens = torch.randint(0, shape.vocabulary, (shape.batch, shape.length), device=device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, fused=on_gpu)
    losses: list[Any] = []
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def once() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    times = timed(once, torch.cuda.synchronize if on_gpu else lambda: None, task.seconds)
    found = {
        **timing(times, tokens.numel()),
        "trainable_values": sum(p.numel() for p in learned),
        "losses": [float(losses[0]), float(losses[-1])],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {"torch": torch.__version__},
    }
    if on_gpu:
        found["bytes"] = torch.cuda.max_memory_allocated()
        found["versions"]["cuda"] = torch.version.cuda
    return found


def main(text: str) -> None:
    """Measures a task."""
    task = Task.read(text)
    print_rows(task, lambda variant: measure(variant, task))


if __name__ == "__main__":
    main(sys.argv[1])
