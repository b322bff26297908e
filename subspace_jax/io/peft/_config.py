"""The settings in `adapter_config.json`: which of them count, and which are refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from subspace_jax.io._errors import AdapterFileError, ManifestError, listing
from subspace_jax.io.peft._starts import CONVERT, STARTS

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
METHODS = ("LORA", "OFT", "RANDLORA")

# The release of PEFT whose form is written; before it, the series of OFT had other terms.
FORMAT_VERSION = "0.18.0"

_MAX_CONFIG = 10_000_000  # bytes
_MAX_PATTERN = 500  # characters

# What follows from the tensors' names, or matters only to a training run or to PEFT's own machinery.
_TOLD = (
    "auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode init_weights "
    "layers_pattern layers_to_transform megatron_core modules_to_save peft_type peft_version qalora_group_size "
    "revision runtime_config target_modules task_type"
)
_UNDERSTOOD = {
    "LORA": "r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_dropout init_lora_weights lora_bias "
    "ensure_weight_tying trainable_token_indices",
    "OFT": "r oft_block_size module_dropout coft eps block_share use_cayley_neumann num_cayley_neumann_terms",
    "RANDLORA": "r randlora_alpha randlora_dropout projection_prng_key save_projection sparse very_sparse",
}
# Recipes for an initialization, which training has replaced, and for a layout over devices.
_PAST = {"LORA": ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_config")}
# Anything but these values makes another function of the same tensors.
_NEUTRAL: dict[str, dict[str, str]] = {
    "LORA": {
        "alora_invocation_tokens": "the adapter acts on part of a sequence",
        "arrow_config": "the adapters of several tasks are mixed",
        "kasa_config": "the base weight is truncated",
        "layer_replication": "layers of the model are repeated",
        "monteclora_config": "the factors are random",
        "target_parameters": "parameters are adapted that are no module's weight",
        "use_bdlora": "the factors are block-diagonal",
        "use_qalora": "inputs are pooled in groups",
        "velora_config": "activations are projected",
    },
}
_STARTS = {True: "", False: "", None: "", "gaussian": "", "orthogonal": "", "eva": "", "mica": ""}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked settings of a config.

    Attributes:
      method: one of METHODS.
      values: the config's own keys.
      ignored: one line for every ignored key that a user should know of.
    """

    method: str
    values: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns a setting that is true or false; raises ManifestError for anything else."""
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise ManifestError(f"the config has {name}={_short(value)}, expected true or false.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a setting that is a finite number; raises ManifestError for anything else."""
        return check_number(self.values.get(name, default), name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a setting that is a whole number from 0; raises ManifestError for anything else."""
        value = self.values.get(name, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise ManifestError(f"the config has {name}={_short(value)}, expected a whole number from 0.")
        return value

    @property
    def start(self) -> str | None:
        """The start that was taken out of the base; None if the base was left alone."""
        value = self.values.get("init_lora_weights")
        return value.lower() if isinstance(value, str) and value.lower() in STARTS else None

    def probability(self, name: str) -> float:
        """Returns a setting that is a probability below 1; raises ManifestError for anything else."""
        value = self.number(name, 0.0)
        if not 0.0 <= value < 1.0:
            raise ManifestError(f"the config has {name}={value}, expected a probability below 1.")
        return value

    def pattern(self, name: str, module: str, default: float) -> float:
        """Returns the value of the first pattern that fits a module's name, as PEFT matches them.

        Args:
          name: "rank_pattern" or "alpha_pattern".
          module: the module's name, without PEFT's prefix.
          default: the value where none fits.

        Raises:
          ManifestError: a pattern is not a regular expression, or could take for ever to match.
        """
        patterns = self.values.get(name) or {}
        if not isinstance(patterns, dict):
            raise ManifestError(f"the config has {name}={_short(patterns)}, expected an object of numbers.")
        for text, value in patterns.items():
            if _compiled(name, text).fullmatch(module):
                return check_number(value, f"{name}[{text!r}]")
        return default


def check_number(value: Any, name: str) -> float:
    """Returns a finite number of a config; raises ManifestError for anything else."""
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ManifestError(f"the config has {name}={_short(value)}, expected a number.")
    return float(value)


def _compiled(name: str, text: str) -> re.Pattern[str]:
    # A repeated group is what a search that never ends is made of.
    if len(text) > _MAX_PATTERN or re.search(r"\)[*+{]", text):
        raise ManifestError(
            f"the config has {name} for {text[:80]!r}; expected at most {_MAX_PATTERN} characters and no repeated "
            "group. Write the modules' names out."
        )
    try:
        return re.compile(rf"(?:.*\.)?(?:{text})$")
    except re.error as error:
        raise ManifestError(f"the config has {name} for {text!r}, which is no regular expression: {error}.") from error


def exact_pattern(module: str) -> str:
    """Returns the pattern that PEFT matches with this module's name and no other."""
    return f"^{re.escape(module)}$"


def read_settings(folder: pathlib.Path) -> Settings:
    """Returns the checked settings of a folder.

    Raises:
      AdapterFileError: the file is missing, no JSON object, of another method, or changes the mathematics in a way
        that is not known here.
    """
    path = folder / CONFIG_NAME
    try:
        data = path.read_bytes() if path.stat().st_size <= _MAX_CONFIG else None
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if data is None:
        raise AdapterFileError(f"{path}: has more than {_MAX_CONFIG} bytes; it is not a config of PEFT.")
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: is no JSON: {str(error)[:100]}.") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path}: is a JSON {type(values).__name__}, expected an object.")
    try:
        return check_settings(values)
    except ManifestError as error:
        raise AdapterFileError(f"{path}: {error}") from error


def check_settings(values: Mapping[str, Any]) -> Settings:
    """Returns the settings of a config; raises ManifestError where they cannot be followed."""
    method = values.get("peft_type")
    if method not in METHODS:
        raise ManifestError(
            f"peft_type={_short(method)} cannot be read; expected one of {', '.join(METHODS)}. Other methods: merge "
            "the adapter in PEFT and convert the whole model."
        )
    neutral, past = _NEUTRAL.get(method, {}), _PAST.get(method, ())
    wrong = [f"{k}={_short(values[k])}: {why}" for k, why in neutral.items() if not _is_nothing(values.get(k))]
    if method == "LORA":
        wrong += _start(values.get("init_lora_weights", True))
    if wrong:
        raise ManifestError(f"the config has {wrong[0]}, which is not known here{listing(wrong[1:])}")
    known = {*_TOLD.split(), *_UNDERSTOOD[method].split(), *neutral, *past}
    ignored = [
        f"{k}={_short(values[k])}, of no effect on trained tensors" for k in past if not _is_nothing(values.get(k))
    ]
    ignored += [f"{k}={_short(values[k])}, not known here" for k in values if k not in known]
    return Settings(method, values, tuple(ignored))


def _start(value: Any) -> list[str]:
    """Refuses an initialization that changed the base weights, which the tensors do not hold."""
    name = value.lower() if isinstance(value, str) else value
    if isinstance(name, bool | str | None) and (name in _STARTS or name in STARTS):
        return []
    return [
        f"init_lora_weights={_short(value)}: the base weights were changed at the start in a way that they do not give "
        f"again. {CONVERT} The start is one"
    ]


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
