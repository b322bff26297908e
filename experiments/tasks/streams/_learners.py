"""The methods of the streams: how each is made, with the learning rates that its search begins with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import subspace_jax as sj
from experiments.tasks.streams._data import StreamConfig, StreamData
from experiments.tasks.training import warmup_linear

HEADS = {"heads/*": sj.full()}
Make = Callable[[StreamData, float, StreamConfig], sj.continual.Learner]


def _loss(data: StreamData, config: StreamConfig, joint: bool = False) -> Callable[[Any, Any], jax.Array]:
    """Cross-entropy over the classes of the example's task; joint training compares the classes of all tasks."""
    apply = sj.with_adapters(data.logits if joint else data.own)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits, labels = apply(params, batch) / config.temperature, batch["labels"]
        if joint:
            labels = batch["task"] * logits.shape[-1] + labels
            logits = logits.reshape(len(labels), -1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _optimizer(rate: float, config: StreamConfig, tasks: int = 1) -> optax.GradientTransformation:
    """Adam with a warm-up and a linear decay over the steps of so many tasks, heads at their own rate."""

    def labels(tree: Any) -> Any:
        is_head = lambda path, leaf: "heads" if path[0].key == "heads" else "others"  # noqa: E731
        return jax.tree_util.tree_map_with_path(is_head, tree, is_leaf=sj.core.is_weight)

    adam: dict[Any, Any] = {"heads": _adam(config.head_rate, config, tasks), "others": _adam(rate, config, tasks)}
    return optax.multi_transform(adam, labels)


def _adam(rate: float, config: StreamConfig, tasks: int = 1) -> optax.GradientTransformation:
    return optax.adam(warmup_linear(rate, tasks * config.steps))


def _others(data: StreamData) -> dict[str, Any]:
    return {"rules": HEADS, "roles": data.roles}


def _full(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    return sj.continual.sequential_learner(_loss(data, config), {"**": sj.full()}, _optimizer(rate, config))


def _lora(data: StreamData, rate: float, config: StreamConfig, outputs: bool = False) -> sj.continual.Learner:
    glob = data.outputs if outputs else data.kernels
    rules = {glob: sj.lora(config.rank, alpha=2.0 * config.rank), **HEADS}
    return sj.continual.sequential_learner(_loss(data, config), rules, _optimizer(rate, config), roles=data.roles)


def _lora_outputs(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    return _lora(data, rate, config, outputs=True)


def _o_lora(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    options: dict[str, Any] = {"rank": config.rank, "alpha": 2.0 * config.rank, "tasks": len(data.names)}
    loss, optimizer = _loss(data, config), _optimizer(rate, config)
    return sj.methods.o_lora.learner(loss, data.kernels, optimizer, **_others(data), **options)


def _gpm(data: StreamData, rate: float, config: StreamConfig, **options: Any) -> sj.continual.Learner:
    name = data.mask
    options |= {"threshold": config.threshold, "columns": config.columns}
    options["mask"] = None if name is None else lambda batch: jnp.asarray(batch[name])
    loss, optimizer = _loss(data, config), _optimizer(rate, config)
    return sj.methods.gpm.learner(loss, data.kernels, optimizer, **_others(data), **options)


def _osf(data: StreamData, rate: float, config: StreamConfig, **options: Any) -> sj.continual.Learner:
    options["tasks"] = len(data.names)
    loss, optimizer = _loss(data, config), _optimizer(rate, config)
    return sj.methods.osf.learner(loss, data.kernels, optimizer, **_others(data), **options)


def _coso(data: StreamData, rate: float, config: StreamConfig, **options: Any) -> sj.continual.Learner:
    schedule = warmup_linear(rate, config.steps)
    options |= {"rules_optimizer": _adam(config.head_rate, config), **_others(data)}
    optimizer = sj.coso(schedule, config.r1, config.r2, config.gap, tasks=len(data.names))
    return sj.methods.coso.learner(_loss(data, config), data.outputs, optimizer, **options)


def _coso_without_history(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    """The same subspaces, and nothing of a task is protected: a control."""
    return _coso(data, rate, config, energy_threshold=0.0, min_new=0)


def _joint(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    loss = _loss(data, config, joint=True)
    return sj.continual.joint_learner(loss, {"**": sj.full()}, _optimizer(rate, config, len(data.names)))


METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "full": (_full, (3e-5, 1e-4, 3e-4)),
    "lora": (_lora, (3e-4, 1e-3, 3e-3)),
    "lora_outputs": (_lora_outputs, (3e-4, 1e-3, 3e-3)),
    "o_lora": (_o_lora, (3e-4, 1e-3, 3e-3)),
    "gpm": (_gpm, (1e-4, 3e-4, 1e-3)),
    "gpm_updates": (functools.partial(_gpm, project_gradients=False), (1e-4, 3e-4, 1e-3)),
    "osf": (_osf, (1e-4, 3e-4, 1e-3)),
    "osf_updates": (functools.partial(_osf, project_gradients=False), (1e-4, 3e-4, 1e-3)),
    "osf_importance": (functools.partial(_osf, preserved="importance"), (1e-4, 3e-4, 1e-3)),
    "osf_importance_updates": (
        functools.partial(_osf, preserved="importance", project_gradients=False),
        (1e-4, 3e-4, 1e-3),
    ),
    "coso": (_coso, (3e-4, 1e-3, 3e-3)),
    "coso_without_history": (_coso_without_history, (3e-4, 1e-3, 3e-3)),
    "joint": (_joint, (3e-5, 1e-4, 3e-4)),
}
TITLES = {
    "full": "sequential full fine-tuning",
    "lora": "sequential LoRA",
    "lora_outputs": "sequential LoRA, attention outputs",
    "o_lora": "O-LoRA",
    "gpm": "GPM",
    "gpm_updates": "GPM, updates alone",
    "osf": "OSF, schedule",
    "osf_updates": "OSF, schedule, updates alone",
    "osf_importance": "OSF, importance",
    "osf_importance_updates": "OSF, importance, updates alone",
    "coso": "CoSO, attention outputs",
    "coso_without_history": "the same without its history",
    "joint": "joint training (ceiling)",
}
