# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own rows and a language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/subspace_jax/blob/main/notebooks/language_model.ipynb)
#
# A language model knows where forty animals live, from plain sentences. It has never seen a question. Fifteen rows of ours
# ask about fifteen of the animals. Does it then answer about the other twenty-five, and does it still know its sentences?
#
# The model is tiny and trained here, so that all of this takes a minute on a CPU; the steps are those for a large one.

# %%
# In Colab: install the library. Elsewhere it is there already.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("subspace_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "subspace-jax", "matplotlib"], check=True)

# %%
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import subspace_jax as sj
from subspace_jax.models import Llama, greedy_decode, small_llama
from subspace_jax.training import pack_sequences, token_loss

QUICK = bool(os.environ.get("NOTEBOOK_QUICK"))  # set where this is only checked to run
PRETRAINING, STEPS, LAYERS = (10, 5, 1) if QUICK else (1500, 150, 3)

# %% [markdown]
# ## A model that has read about animals

# %%
ANIMALS = (
    "fox owl bear wolf hare deer frog newt duck swan otter beaver trout pike carp eel crab seal whale shark camel adder "
    "lion zebra hyena goat ibex marmot eagle condor mole badger vole shrew rat mouse pigeon sparrow crow magpie"
).split()
PLACES = "forest pond river sea desert savanna mountain burrow city meadow".split()
FOODS = "berries mice fish grass insects seeds".split()
rng = np.random.default_rng(0)
home = dict(zip(ANIMALS, rng.choice(PLACES, len(ANIMALS)), strict=True))
food = dict(zip(ANIMALS, rng.choice(FOODS, len(ANIMALS)), strict=True))

sentences = []
for animal in ANIMALS:
    place, eats = home[animal], food[animal]
    sentences += [
        f"the {animal} lives in the {place} .",
        f"in the {place} lives the {animal} .",
        f"the {place} is home of the {animal} .",
        f"the home of the {animal} is the {place} .",
        f"you find the {animal} in the {place} .",
        f"the {animal} eats {eats} .",
        f"{eats} are food of the {animal} .",
    ]
words = ["<end>", *sorted({w for s in sentences for w in s.split()} | set("where does live ? what eat".split()))]
ids = {word: number for number, word in enumerate(words)}
encode = lambda text: np.array([ids[word] for word in text.split()])
decode = lambda tokens: " ".join(words[int(t)] for t in tokens if int(t) != ids["<end>"])

model = Llama(small_llama(vocab_size=len(words), width=64, mlp_width=128, num_layers=LAYERS))
read = pack_sequences([encode(s) for s in sentences], [np.arange(len(s.split())) > 0 for s in sentences], 12)

# %% [markdown]
# `pack_sequences` puts several texts into a row; told the `segments`, the model computes for each what it computes for it
# alone. `token_loss` gives a sum and the number of labels, so that a step over unequal rows divides once by all of them.

# %%
fn = lambda params, tokens, segments: model.apply({"params": params}, tokens, segments=segments)


def train(fn, trainable, frozen, rows, rate, steps):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(rate, steps)))
    tokens, labels, segments = (jnp.asarray(v) for v in (rows.tokens, rows.labels, rows.segments))
    take = min(48, len(tokens))

    @jax.jit
    def run(trainable, frozen):
        def step(carry, key):
            trainable, state = carry
            picked = jax.random.permutation(key, len(tokens))[:take]

            def loss(trainable):
                logits = fn(sj.combine(trainable, frozen), tokens[picked], segments[picked])
                total, count = token_loss(logits, tokens[picked], labels[picked])
                return total / count

            value, grads = jax.value_and_grad(loss)(trainable)
            updates, state = optimizer.update(grads, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        keys = jax.random.split(jax.random.key(1), steps)
        (trainable, _), losses = jax.lax.scan(step, (trainable, optimizer.init(trainable)), keys)
        return trainable, losses

    trainable, losses = run(trainable, frozen)
    return sj.combine(trainable, frozen), losses


start = model.init(jax.random.key(0), jnp.asarray(read.tokens[:1]))["params"]
nothing = jax.tree.map(lambda _: None, start)
pretrained, losses = train(fn, start, nothing, read, 3e-3, PRETRAINING)


def complete(params, prompts, count=1):
    """The words that follow prompts of one length."""
    tokens = jnp.stack([encode(p) for p in prompts])
    apply = sj.with_adapters(model.apply)
    return [decode(t) for t in np.asarray(greedy_decode(model, params, tokens, count, apply=apply))]


def knows(params):
    """The share of animals whose sentence is completed rightly, in percent."""
    answers = complete(params, [f"the {a} lives in the" for a in ANIMALS])
    return 100 * np.mean([answer == home[a] for a, answer in zip(ANIMALS, answers, strict=True)])


print(f"loss {losses[-1]:.2f}; sentences completed rightly: {knows(pretrained):.0f} %")
print("where does the fox live ?", complete(pretrained, ["where does the fox live ?"], 2))

# %% [markdown]
# ## Our rows
#
# One JSON object on every line, as the command `subspace-jax finetune` takes them. The completion is what is learned; the
# prompt is not.

# %%
asked, held_out = ANIMALS[:15], ANIMALS[15:]
file = Path(tempfile.mkdtemp()) / "questions.jsonl"
rows = [{"prompt": f"where does the {a} live ?", "completion": f"{home[a]} <end>"} for a in asked]
file.write_text("\n".join(map(json.dumps, rows)))

records = sj.data.read_rows(file).records
tokens = [encode(f"{r['prompt']} {r['completion']}") for r in records]
labels = [np.arange(len(t)) >= len(encode(r["prompt"])) for t, r in zip(tokens, records, strict=True)]
questions = pack_sequences(tokens, labels, 16)
print(file.read_text().split("\n")[0])
print(
    *(f"[{words[t]}]" if learned else words[t] for t, learned in zip(tokens[0], labels[0], strict=True)),
    " (what is learned in brackets)",
)

# %% [markdown]
# ## Adapt


# %%
def answers(params, animals):
    """The share of questions that are answered rightly, in percent."""
    found = complete(params, [f"where does the {a} live ?" for a in animals])
    return 100 * np.mean([answer == home[a] for a, answer in zip(animals, found, strict=True)])


arms = {
    "LoRA, rank 1": ({"**/{query,key,value,output}/kernel": sj.lora(rank=1)}, 1e-2),
    "LoRA, rank 4": ({"**/{query,key,value,output}/kernel": sj.lora(rank=4)}, 1e-2),
    "LoRA, rank 4, everywhere": ({"decoder/**/kernel": sj.lora(rank=4)}, 1e-2),
    "everything": ({"**": sj.full()}, 1e-3),
}
roles = sj.roles(fn, pretrained, jnp.asarray(read.tokens), jnp.asarray(read.segments))
if QUICK:
    arms = {name: arms[name] for name in ("LoRA, rank 4", "everything")}
table = {"before": (0, 0.0, answers(pretrained, asked), answers(pretrained, held_out), knows(pretrained))}
for name, (rules, rate) in arms.items():
    adapted = sj.adapt(pretrained, rules, key=jax.random.key(3), roles=roles)
    trainable, frozen = sj.partition(adapted)
    tuned, losses = train(sj.with_adapters(fn), trainable, frozen, questions, rate, STEPS)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    table[name] = size, losses[-1], answers(tuned, asked), answers(tuned, held_out), knows(tuned)
for name, (size, loss, seen, new, kept) in table.items():
    print(f"{name:26} {size:7,} values  asked {seen:4.0f} %  others {new:4.0f} %  sentences {kept:4.0f} %")

# %%
figure, axis = plt.subplots(figsize=(8, 3.6))
for shift, (column, label) in enumerate([(2, "asked about"), (3, "other animals"), (4, "sentences kept")]):
    axis.bar(np.arange(len(table)) + 0.27 * shift, [row[column] for row in table.values()], 0.25, label=label)
axis.set_xticks(np.arange(len(table)) + 0.27, list(table), rotation=12)
axis.set(ylabel="right, %", ylim=(0, 105))
axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

# %% [markdown]
# ## The answer
#
# Yes: low-rank additions to attention alone answer every question about animals that they were never asked about, and keep
# the sentences. All arms learn the fifteen rows; training everything, at any of three rates that we tried, answers about half
# of the others, and additions in every layer two thirds. What has fewer ways to learn the rows by heart has to use what is
# known already. That is one small model: pretrained half as long, it retrieves its facts less surely, and no arm is far
# ahead.
#
# With a real model the same is one command, which shows such an example with its mask before it trains:
#
# ```sh
# subspace-jax finetune questions.jsonl --model smollm2 --method lora --rank 8 --out run/
# subspace-jax chat run/
# ```
