"""PEFT's `lora_bias`: a bias after the second factor, which adds to the module's own."""

from __future__ import annotations

import numpy as np

from subspace_jax.io._errors import ManifestError
from subspace_jax.io.peft._layout import unstack, whole_to_torch
from subspace_jax.io.peft._lora import module_scale
from subspace_jax.io.peft._reading import Reading


def add_lora_biases(reading: Reading) -> None:
    """Adds the biases of the second factors, times the scale, to the modules' own, which the file then holds whole.

    Raises:
      ManifestError: a module has no bias in the tree.
    """
    for module, own in reading.found.adapters.items():
        if "bias" not in own:
            continue
        if (module, "bias") not in reading.index:
            raise ManifestError(
                f"lora_bias=True: module {module!r} has no bias in the tree, to which that of its adapter could be "
                "added. Give the layer one."
            )
        place, position = reading.index[module, "bias"]
        bias = reading.found.whole.get((module, "bias"))
        if bias is None:
            bias = whole_to_torch(unstack(reading.base.leaves[place.path], place, place.path)[position], place)
        added = module_scale(reading.settings, module, own["a"].shape[0]) * np.asarray(own["bias"], np.float32)
        reading.found.whole[module, "bias"] = np.asarray(bias, np.float32) + added
