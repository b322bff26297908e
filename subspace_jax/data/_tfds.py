"""The one place that imports tensorflow-datasets, late and with a clear error."""

import importlib
import importlib.util
from types import ModuleType

# Builders of an importable package need importlib_resources, which tensorflow-datasets does not declare on
# newer Pythons.
_NEEDED = ("tensorflow_datasets", "array_record", "importlib_resources")


def import_tfds() -> ModuleType:
    """Imports tensorflow-datasets.

    Returns:
        The module. TensorFlow itself is not needed and not loaded.

    Raises:
        ImportError: a package of the `tfds` extra is absent.
    """
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"datasets are read through tensorflow-datasets, and {', '.join(absent)} cannot be imported: "
            "pip install 'subspace-jax[tfds]'"
        )
    return importlib.import_module("tensorflow_datasets")
