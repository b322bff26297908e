"""Assembles parameter trees strictly from named tensors; the result of every loader of pretrained weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Role, WeightFileError
from subspace_jax.io import NameMap

from ._bert import Bert
from ._classifiers import BertClassifier, LlamaClassifier, VitClassifier
from ._llama import Llama
from ._vit import Vit


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """What a causal language model's texts begin and end with.

    Attributes:
        end_tokens: ids that end what the model writes; the first is the one that training appends.
        bos_token: id that starts every sequence; None for models that have none.
        chat_template: Jinja source of the model's own template; None for models without one.
        special_tokens: what the template may call `bos_token`, `eos_token` and so on.
    """

    end_tokens: tuple[int, ...]
    bos_token: int | None = None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A module with its pretrained parameters.

    Attributes:
        module: the Linen module.
        params: its parameters, as `module.apply({"params": params}, ...)` takes them.
        config: the module's configuration.
        load_tokenizer: makes the tokenizer; None for models without one.
        names: what the module's parts are called in PyTorch, for `save_peft` and `load_peft`; None where unknown.
        text_format: of a causal language model; None for others.
        source: the GGUF file that it was read from; None for models of other files.
    """

    module: nn.Module
    params: dict[str, Any]
    config: Any
    load_tokenizer: Callable[[], Any] | None = None
    names: NameMap | None = None
    text_format: TextFormat | None = None
    source: Path | None = None


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where a file's tensor goes.

    Attributes:
        shape: that the file must have.
        path: of the leaf in the unrolled parameter tree, `/` between names; None to check and drop.
        convert: from the file's array to the leaf's.
        role: of a matrix that can stay in the file's blocks.
        leaf_shape: of the leaf, where there is a role.
        rows: puts the rows of the file's matrix into the leaf's order, whatever a row holds.
        restore: from the leaf's array to the file's; undoes `convert`.
    """

    shape: tuple[int, ...]
    path: str | None
    convert: Callable[[np.ndarray], np.ndarray] = lambda array: array
    role: Role | None = None
    leaf_shape: tuple[int, ...] = ()
    rows: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
    restore: Callable[[np.ndarray], np.ndarray] = lambda array: array


def assemble_params(
    tensors: Mapping[str, Any],
    rules: Mapping[str, TensorRule],
    source: str,
    *,
    ignorable: Callable[[str], bool] = lambda name: False,
    read: Callable[[Any], np.ndarray] = np.asarray,
    store: Callable[[Any, TensorRule], Any] = lambda tensor, rule: None,
) -> dict[str, Any]:
    """Builds a nested parameter dict, refusing anything missing, left over or misshapen.

    Args:
        tensors: what the file holds, by name; anything with a `shape`.
        rules: what is expected, by name.
        source: what error messages call the file.
        ignorable: tells of an unexpected name whether it may be dropped.
        read: from the file's object to a floating-point array.
        store: makes the leaf of the file's object and its rule without reading it; None of what is to be read.

    Returns:
        Nested dict of numpy arrays, and of what `store` made.

    Raises:
        WeightFileError: names the tensors and what was expected.
    """
    missing = sorted(set(rules) - set(tensors))
    extra = sorted(name for name in set(tensors) - set(rules) if not ignorable(name))
    if missing or extra:
        raise WeightFileError(
            f"{source}: missing tensors {_shown(missing)}, unexpected tensors {_shown(extra)}; expected "
            f"exactly the {len(rules)} tensors of this model: is it the right file, and the right "
            "configuration?"
        )
    params: dict[str, Any] = {}
    for name, rule in rules.items():
        shape = tuple(tensors[name].shape)
        if shape != rule.shape:
            raise WeightFileError(f"{source}: tensor {name!r} has shape {shape}; expected {rule.shape}")
        if rule.path is None:
            continue
        *parents, leaf = rule.path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        stored = store(tensors[name], rule)
        node[leaf] = rule.convert(_read(read(tensors[name]), name, source)) if stored is None else stored
    return params


def _read(array: np.ndarray, name: str, source: str) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        raise WeightFileError(f"{source}: tensor {name!r} has dtype {array.dtype}; expected floating point")
    flat = array.reshape(-1)
    if not all(np.isfinite(flat[start : start + (1 << 22)]).all() for start in range(0, flat.size, 1 << 22)):
        raise WeightFileError(f"{source}: tensor {name!r} holds NaN or infinity; the file is damaged")
    return array


def _shown(names: list[str], limit: int = 5) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + rest


def override_config(config: Any, overrides: Mapping[str, Any], free: tuple[str, ...]) -> Any:
    """Replaces those fields of a pretrained configuration that its weights leave open.

    Args:
        config: what the weights were made for.
        overrides: fields to set.
        free: names of the fields that may be set.

    Returns:
        The new configuration.

    Raises:
        ValueError: a field that the weights decide, or that does not exist.
    """
    fixed = sorted(set(overrides) - set(free))
    if fixed:
        raise ValueError(f"{type(config).__name__}: cannot set {fixed} on pretrained weights; free are {sorted(free)}")
    return dataclasses.replace(config, **overrides)


def checked_depth(wanted: int | None, available: int, what: str) -> int:
    """Returns the number of layers to keep: `wanted`, or all."""
    if wanted is None:
        return available
    if not 1 <= wanted <= available:
        raise ValueError(f"{what}={wanted}; the weights have {available} layers, expected 1 to {available}")
    return wanted


def add_classifier(
    pretrained: PretrainedModel, num_classes: int, key: jax.Array, *, pooling: str | None = None
) -> PretrainedModel:
    """Puts a fresh linear head on a pretrained encoder.

    Args:
        pretrained: a `Bert`, a `Vit` or a `Llama`.
        num_classes: number of logits.
        key: random key of the head's kernel; the key is consumed.
        pooling: see the classifier; its own default if None.

    Returns:
        A `BertClassifier`, `VitClassifier` or `LlamaClassifier` with the given parameters under `backbone`; a head
        over tokens of a `Llama` is dropped.

    Raises:
        TypeError: another module.
        ValueError: an unknown `pooling`, or one for a `Llama`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import PretrainedModel, Vit, add_classifier, small_vit
        >>> config = small_vit()
        >>> images = jnp.zeros((1, 12, 12, 3))
        >>> params = Vit(config).init(jax.random.key(0), images)["params"]
        >>> model = add_classifier(PretrainedModel(Vit(config), params, config), 5, jax.random.key(1))
        >>> model.module.apply({"params": model.params}, images).shape
        (1, 5)
    """
    options: dict[str, Any] = {} if pooling is None else {"pooling": pooling}
    config, backbone = pretrained.config, pretrained.params
    if isinstance(pretrained.module, Bert):
        module = BertClassifier(config, num_classes, **options)
        inputs = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    elif isinstance(pretrained.module, Vit):
        module = VitClassifier(config, num_classes, **options)
        inputs = jax.ShapeDtypeStruct((1, config.patch_size, config.patch_size, 3), jnp.float32)
    elif isinstance(pretrained.module, Llama):
        if pooling is not None:
            raise ValueError(f"add_classifier: pooling={pooling!r}; a Llama is read at its last token, leave it out.")
        module = LlamaClassifier(config, num_classes)
        inputs = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        backbone = {name: node for name, node in backbone.items() if name != "head"}
    else:
        raise TypeError(f"add_classifier: {type(pretrained.module).__name__}; expected a Bert, a Vit or a Llama")
    head = jax.eval_shape(module.init, key, inputs)["params"]["classifier"]
    kernel = nn.initializers.normal(0.02)(key, head["kernel"].shape, head["kernel"].dtype)
    classifier = {"kernel": kernel}
    if "bias" in head:
        classifier["bias"] = jnp.zeros(head["bias"].shape, head["bias"].dtype)
    params = {"backbone": backbone, "classifier": classifier}
    return dataclasses.replace(pretrained, module=module, params=params)


def locate(path: str | Path | None, asset: str, suffix: str) -> Path:
    """Returns the given path, or the file of a carried asset."""
    if path is not None:
        return Path(path)
    from subspace_jax.assets import find_file

    return find_file(asset, suffix)
