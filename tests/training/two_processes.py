"""One of two processes that train a small BERT data-parallel; a program of its own.

Usage: python two_processes.py PROCESS PORT FOLDER STEPS
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

import subspace_jax as sj
from subspace_jax.models import Bert, small_bert
from subspace_jax.training import fit, init_train_state, initialize_distributed, make_mesh, make_train_step, shard_batch
from tests.quick import compile_quickly
from tests.training.problem import content

ROWS, LENGTH, CLASSES = 8, 12, 3
MODEL = Bert(small_bert(num_layers=1))
KERNEL = "encoder/layer_0/attention/value/kernel"


def make_params():
    """Random parameters, the same in both processes."""
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    encoder = jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]
    return {"bert": encoder, "head": jax.random.normal(jax.random.key(1), (32, CLASSES)) / 6}


def apply(params, tokens):
    states = MODEL.apply({"params": params["bert"]}, tokens)
    return states.mean(axis=1) @ params["head"]


def loss(adapted, batch, key):
    adapted = sj.with_dropout(adapted, key)
    logits = sj.with_adapters(apply)(adapted, batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def batches(start, mesh):
    """This process's half of every batch."""
    mine = slice(jax.process_index(), None, jax.process_count())
    for number in range(start, 1000):
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, 101, (ROWS, LENGTH)).astype(np.int32)
        batch = {"tokens": tokens, "labels": tokens.sum(axis=1) % CLASSES}
        yield shard_batch({name: value[mine] for name, value in batch.items()}, mesh)


def main(process, port, folder, steps):
    initialize_distributed(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=10)
    assert jax.process_count() == 2
    params = make_params()
    rules = {"bert/**/attention/*/kernel": sj.lora(rank=4, dropout=0.1), "head": sj.full()}
    adapted = sj.adapt(params, rules, key=jax.random.key(2))
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 6)))[0].astype(np.float32)
    optimizer = optax.chain(sj.project_orthogonal({f"bert/{KERNEL}": basis}), optax.sgd(0.5, momentum=0.9))
    mesh = make_mesh({"data": -1})
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        placed = jax.tree.map(lambda _: everywhere, adapted)
        state = init_train_state(adapted, optimizer, jax.random.key(3), placed)
        before = np.asarray(state.trainable["bert"]["encoder"]["layer_0"]["attention"]["value"]["kernel"].a)
        with sj.io.Checkpointer(Path(folder) / "run", base=params, max_to_keep=2) as checkpointer:
            state = fit(
                state,
                make_train_step(loss, optimizer),
                lambda start: batches(start, mesh),
                steps=steps,
                checkpointer=checkpointer,
                every=2,
                on_metrics=lambda number, metrics: print(number, float(metrics["loss"]), flush=True),
            )
    after = np.asarray(state.trainable["bert"]["encoder"]["layer_0"]["attention"]["value"]["kernel"].a)
    leak, moved = np.abs(basis.T @ (after - before)).max(), np.abs(after - before).max()
    assert leak < 1e-6, (leak, moved)
    assert moved > 1e-4 or int(state.step) < steps, (leak, moved)
    (Path(folder) / f"final{process}.bin").write_bytes(content(state))
    print("ended", int(state.step), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    compile_quickly()
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
