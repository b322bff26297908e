"""GGUF files that are written, and files of decoders found by their names."""

import numpy as np
import pytest

from subspace_jax.core import WeightFileError
from subspace_jax.models import has_blocks, load, load_gguf, read_gguf, write_gguf
from tests.models.gguf_models import write_packed
from tests.models.test_gguf import GOOD, METADATA, parse


def test_a_written_file_is_read_again(tmp_path, rng):
    packed = parse(GOOD).tensors["q4"]
    metadata = {
        **METADATA,
        "large": 2**40,
        "negative": -5,
        "exact": 0.1,
        "types": np.array([1, -3], np.int32),
        "flags": np.array([True, False]),
        "general.alignment": 64,
    }
    half = rng.normal(size=(3, 5)).astype(np.float16)
    tensors = {"w": half, "q": packed, "v": np.arange(7, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    file = read_gguf(tmp_path / "m.gguf")
    assert list(file.metadata) == list(metadata)
    for key, value in metadata.items():
        found = file.metadata[key]
        assert np.array_equal(found, value), key
        assert type(found) is type(value), key
    assert {name: (t.kind, t.shape) for name, t in file.tensors.items()} == {
        "w": ("F16", (3, 5)),
        "q": ("Q4_1", (2, 64)),
        "v": ("F32", (7,)),
    }
    np.testing.assert_array_equal(file.tensors["w"].dequantize(), half.astype(np.float32))
    np.testing.assert_array_equal(file.tensors["q"].raw, packed.raw)
    file.release()
    np.testing.assert_array_equal(file.tensors["v"].dequantize(), np.arange(7))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, {"w": np.ones(3)}, r"'w' is float64\[3\]"),
        ({}, {"w": np.ones(())}, "'w' is float64"),
        ({"k": None}, {}, "'k' is a NoneType"),
        ({"k": [1, 2]}, {}, "'k' is a list"),
    ],
)
def test_what_the_format_has_no_type_for_is_refused(metadata, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "m.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())


def test_a_file_is_loaded_by_its_name(tmp_path):
    file = write_packed(tmp_path / "m.gguf")
    assert load(f"gguf:{file}", scan_layers=True).config == load_gguf(file, scan_layers=True).config
    assert has_blocks(f"gguf:{file}")
    assert not has_blocks("minilm")
    damaged = bytearray(file.read_bytes())
    place = file.read_bytes().rindex(load_gguf(file, packed=True).params["embedding"]["embedding"].blocks[0].tobytes())
    damaged[place : place + 2] = np.array([np.inf], "<f2").tobytes()
    file.write_bytes(bytes(damaged))
    for packed in (False, True):
        with pytest.raises(WeightFileError, match=r"token_embd\.weight.*NaN or infinity"):
            load_gguf(file, packed=packed)
