"""Writes and reads PEFT's adapter folders."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from subspace_jax.core import Full, StructureError, Weight, is_weight, leaves_with_paths, map_with_paths, resolve_links
from subspace_jax.io._atomic import replacing
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import AdapterFileError, ManifestError, listing
from subspace_jax.io._safetensors import read_safetensors, write_safetensors
from subspace_jax.io.peft._bias import add_lora_biases
from subspace_jax.io.peft._config import CONFIG_NAME, FORMAT_VERSION, TENSORS_NAME, Settings, read_settings
from subspace_jax.io.peft._dora import is_low_rank
from subspace_jax.io.peft._full import pack_full, unpack_full
from subspace_jax.io.peft._lora import pack_lora, unpack_lora
from subspace_jax.io.peft._names import NameMap, TensorPlace, require_places
from subspace_jax.io.peft._oft import pack_oft, unpack_oft
from subspace_jax.io.peft._randlora import pack_randlora, unpack_randlora
from subspace_jax.io.peft._reading import Reading
from subspace_jax.io.peft._rows import unpack_rows
from subspace_jax.io.peft._tensors import index_places, sort_tensors
from subspace_jax.methods.structured.oft import Rotated
from subspace_jax.methods.structured.randlora import RandomBases

_PACK = {"LORA": pack_lora, "OFT": pack_oft, "RANDLORA": pack_randlora}
_UNPACK = {"LORA": unpack_lora, "OFT": unpack_oft, "RANDLORA": unpack_randlora}


def save_peft(
    folder: str | os.PathLike[str],
    adapted: Any,
    base_params: Any,
    names: NameMap,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes the adapters of a tree as a folder that PyTorch's PEFT loads.

    LoRA (rank-stabilized or not), DoRA, OFT, and RandLoRA with PEFT's pairing are written as they are; PiSSA and CorDA
    as the LoRA of twice the rank that does the same to the untouched weights. Arrays under `full()` are
    `modules_to_save`, or `bias` in adapted modules. The folder appears whole or not at all.

    Args:
      folder: where; its parent must exist.
      adapted: a tree with stand-in weights, trained or not.
      base_params: the parameters that `adapt` was given, which are those that PEFT puts the adapters on.
      names: what the modules are called in PyTorch, such as `bert_names()`.
      base_model: name of the model for PEFT's config.
      task_type: PEFT's name of the task, such as "CAUSAL_LM".
      overwrite: replace a folder that holds nothing but the two files of an adapter.

    Returns:
      The path of the folder.

    Raises:
      AdapterFileError: something in the tree has no equal in PEFT, has no name, or differs from `base_params`; or the
        folder cannot be written. Nothing was written then.

    Example:
      >>> import pathlib, tempfile, jax, jax.numpy as jnp, subspace_jax as sj
      >>> from subspace_jax.io import NameMap, NameRule
      >>> params = {"head": {"kernel": jnp.ones((6, 4))}}
      >>> adapted = sj.adapt(params, {"head/kernel": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> names = NameMap((NameRule("head", "model.head"),))
      >>> folder = save_peft(pathlib.Path(tempfile.mkdtemp(), "adapter"), adapted, params, names)
      >>> sorted(file.name for file in folder.iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
      >>> bool((load_peft(folder, params, names)["head"]["kernel"].a == adapted["head"]["kernel"].a).all())
      True
    """
    folder = pathlib.Path(folder)
    try:
        tensors, config = _pack(resolve_links(adapted), base_params, names)
    except (ManifestError, StructureError) as error:
        raise AdapterFileError(f"{folder}: nothing was written: {error}") from error
    config |= {"base_model_name_or_path": base_model, "task_type": task_type, "inference_mode": True}
    config |= {"fan_in_fan_out": False, "peft_version": FORMAT_VERSION}
    named = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with _replacing_folder(folder, overwrite) as temporary:
        write_safetensors(temporary / TENSORS_NAME, named, {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        with replacing(temporary / CONFIG_NAME) as file:
            file.write_text(text + "\n", encoding="utf-8")
    return folder


def load_peft(folder: str | os.PathLike[str], base_params: Any, names: NameMap) -> Any:
    """Loads the adapters of PEFT's folder onto the parameters of their model.

    Args:
      folder: one that PEFT's `save_pretrained`, or `save_peft`, has written.
      base_params: the parameters of the model that the adapters were trained on.
      names: what the modules are called in PyTorch, such as `bert_names()`.

    Returns:
      A tree of the structure of `base_params` with stand-in weights: LoRA, DoRA, OFT, RandLoRA, `SparseDelta` for
      replaced rows of an embedding, and `full()` for modules that PEFT saved whole and for trained biases, to which
      those of `lora_bias` are added. Layers of a stack that the file leaves out (`layers_to_transform`) get factors of
      zero, which never learn, with LoRA and RandLoRA; with DoRA and OFT such a file is refused. Starts that the base
      gives again (`init_lora_weights` "pissa" and "olora") are taken out of it, as PEFT does when it loads them.

    Raises:
      AdapterFileError: a file is missing, damaged or hostile, a tensor has no place in the tree, is missing or is
        misshapen, or the config asks for mathematics that is not known here.

    Warns:
      UserWarning: the config has keys that are not known here, or that tell of a start only; they are named.
    """
    folder = pathlib.Path(folder)
    settings = read_settings(folder)
    tensors_path = folder / TENSORS_NAME
    if not tensors_path.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder}: holds adapter_model.bin, a pickle, which can run any program and is never read. Write it again "
            "in PEFT with save_pretrained(folder, safe_serialization=True)."
        )
    tensors, _ = read_safetensors(tensors_path)
    try:
        weights = _unpack(settings, tensors, base_params, names)
    except ManifestError as error:
        raise AdapterFileError(f"{folder}: {error}") from error
    if settings.ignored:
        warnings.warn(f"{folder / CONFIG_NAME}: passed over{listing(settings.ignored)}", stacklevel=2)
    return map_with_paths(lambda path, leaf: weights.get(path, leaf), base_params)


def _pack(adapted: Any, base_params: Any, names: NameMap) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    leaves, base = dict(leaves_with_paths(adapted)), BaseArrays(base_params)
    if leaves.keys() != base.leaves.keys():
        different = sorted(leaves.keys() ^ base.leaves.keys())
        raise ManifestError(
            f"the adapted tree and base_params are not of one tree; only one of them has{listing(map(repr, different))}"
        )
    method = _method(leaves)
    _check_frozen(leaves, base)
    places = names.places(leaves)
    require_places((path for path, leaf in leaves.items() if _learns(leaf)), places, names)
    adapters = {path: leaf for path, leaf in leaves.items() if _learns(leaf) and not isinstance(leaf, Full)}
    tensors, config = _PACK[method](adapters, places, base)
    modules = {module for path in adapters for module in places[path].modules}
    others, full_config = pack_full(leaves, places, modules, method)
    known = {module for place in places.values() for module in place.modules}
    return tensors | others, config | full_config | {"target_modules": _targets(modules, known)}


def _learns(leaf: Any) -> bool:
    """Whether a leaf is more than an array, or what only stores one."""
    return is_weight(leaf) and not leaf.stored


def _method(leaves: Mapping[str, Any]) -> str:
    """PEFT's name of the one method of all adapters in a tree."""
    found: dict[str, str] = {}
    for path, leaf in leaves.items():
        if not _learns(leaf) or isinstance(leaf, Full):
            continue
        if is_low_rank(leaf):
            method = "LORA"
        elif isinstance(leaf, Rotated | RandomBases):
            method = "OFT" if isinstance(leaf, Rotated) else "RANDLORA"
        else:
            raise ManifestError(
                f"{path}: is a {type(leaf).__name__} made by {leaf.method!r}, which has no form in PEFT's files. Use "
                "save_adapter, or merge() it."
            )
        found.setdefault(method, path)
    if len(found) != 1:
        what = " and ".join(f"{method} at {path}" for method, path in found.items()) or "no adapter at all"
        raise ManifestError(f"the tree has {what}; PEFT's folder holds adapters of one method.")
    return next(iter(found))


def _check_frozen(leaves: Mapping[str, Any], base: BaseArrays) -> None:
    """Refuses a tree whose plain arrays have moved, since PEFT's folder would not tell."""
    wrong = []
    for path, leaf in leaves.items():
        if is_weight(leaf):
            wrong += _misfit(path, leaf, base.leaves[path])
        elif not hasattr(leaf, "dtype") or not base.holds(path, leaf):
            wrong.append(f"{path!r} is no stand-in weight and differs from base_params")
    if wrong:
        raise ManifestError(f"the tree is not base_params with adapters:{listing(wrong)}\nTrain such arrays by full().")


def _misfit(path: str, weight: Weight, original: Any) -> list[str]:
    try:
        have = tuple(weight.shape)
    except AttributeError:
        return [f"{path!r} is but a part of a {type(weight).__name__}; combine() the two trees of partition() first"]
    want = tuple(original.shape)
    return [] if have == want else [f"{path!r} stands for {list(have)}, and base_params has {list(want)}"]


def _targets(modules: set[str], known: set[str]) -> list[str] | str:
    """PEFT's `target_modules` of exactly these: their names, or an expression where a name is the end of another."""
    if any(other.endswith(f".{module}") for module in modules for other in known - modules):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(modules)


def _unpack(
    settings: Settings, tensors: Mapping[str, np.ndarray], base_params: Any, names: NameMap
) -> dict[str, Weight]:
    base = BaseArrays(base_params)
    places: dict[str, TensorPlace] = names.places(base.leaves)
    index = index_places(places.values())
    try:
        found = sort_tensors(tensors, settings.method, index)
    except ManifestError as error:
        if settings.flag("ensure_weight_tying"):
            tied = "ensure_weight_tying=True, by which PEFT stores the adapters of tied modules twice; untie them"
            raise ManifestError(f"the config has {tied}, if it is of these that {error}") from error
        raise
    if not found.adapters and not found.whole and not found.rows:
        raise ManifestError("the file holds no adapter.")
    reading = Reading(settings, found, index, base)
    parts = [_UNPACK[settings.method](reading), unpack_rows(reading)]
    add_lora_biases(reading)
    parts.append(unpack_full(reading))
    weights = {path: weight for part in parts for path, weight in part.items()}
    if len(weights) < sum(map(len, parts)):
        twice = next(path for path in weights if sum(path in part for part in parts) > 1)
        raise ManifestError(f"{twice}: the file adapts it in two ways at once, of which one array has no form here.")
    return weights


@contextlib.contextmanager
def _replacing_folder(folder: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Gives a temporary folder, and on success puts it in place of `folder`."""
    _check_folder(folder, overwrite)
    token = secrets.token_hex(8)
    temporary, old = (folder.with_name(f".{folder.name}.{token}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise AdapterFileError(f"{folder}: cannot be written: {error}") from error
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_folder(folder: pathlib.Path, overwrite: bool) -> None:
    if not folder.absolute().parent.is_dir():
        raise AdapterFileError(f"{folder}: its parent folder does not exist; create it first.")
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterFileError(f"{folder}: is no folder; nothing was written.")
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in (CONFIG_NAME, TENSORS_NAME))
    if foreign:
        raise AdapterFileError(f"{folder}: holds {foreign[0]!r} too, so it is not replaced. Choose another folder.")
    if any(folder.iterdir()) and not overwrite:
        raise AdapterFileError(f"{folder}: holds an adapter. Pass overwrite=True to replace it.")
