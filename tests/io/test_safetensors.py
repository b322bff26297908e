import json
import os
import struct
import tracemalloc

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings

from subspace_jax.io import AdapterFileError, read_safetensors, write_safetensors

TENSORS = {
    "block/kernel/a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "block/kernel/b": np.arange(4).astype(ml_dtypes.bfloat16),
    "count": np.asarray(7, np.int32),
    "nothing": np.zeros((0, 3), np.float16),
}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tensors.safetensors"


def test_the_format_s_own_library_reads_what_is_written(path):
    write_safetensors(path, TENSORS, {"note": "ü"})
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"note": "ü"}
        assert set(file.keys()) == set(TENSORS)
        for name in file.keys():  # noqa: SIM118  (no mapping)
            found = file.get_tensor(name)
            assert found.dtype == TENSORS[name].dtype
            assert found.shape == TENSORS[name].shape
            assert found.tobytes() == TENSORS[name].tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        *(
            "bool",
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "uint32",
            "int64",
            "uint64",
            "float16",
            "float32",
            "float64",
        ),
        "bfloat16",
        "complex64",
    ],
)
def test_what_the_format_s_own_library_writes_is_read(path, dtype):
    array = np.random.default_rng(0).integers(0, 2, (3, 2)).astype(dtype)
    try:
        safetensors.numpy.save_file({"x": array, "y": array[:0]}, path)
    except safetensors.SafetensorError:
        pytest.skip(f"this version of safetensors does not know {dtype}")
    tensors, metadata = read_safetensors(path)
    assert metadata == {}
    assert tensors["x"].dtype == array.dtype
    assert tensors["x"].tobytes() == array.tobytes()
    assert tensors["y"].shape == (0, 2)


def test_memory_order_does_not_matter(path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(path, {"t": array.T, "s": array[:, ::2]}, {})
    tensors, _ = read_safetensors(path)
    np.testing.assert_array_equal(tensors["t"], array.T)
    np.testing.assert_array_equal(tensors["s"], array[:, ::2])


BAD = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "huge header": (raw({}, length=2**63), "claims a header"),
    "header beyond the file": (raw({"x": entry()}, bytes(8), length=500), "claims a header"),
    "header above the limit": (raw({}, length=100_000_001), "claims a header"),
    "no json": (raw(b"{nope"), "no JSON"),
    "no utf-8": (raw(b'{"\xff": 1}'), "no JSON"),
    "deep json": (raw(b"[" * 200_000), "no JSON"),
    "long number": (raw(b'{"x": ' + b"9" * 10_000 + b"}"), "no JSON"),
    "a list": (raw([]), "expected an object"),
    "twice": (raw(b'{"x": 1, "x": 2}'), "'x' twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "unknown dtype": (raw({"x": entry("F128")}, bytes(8)), "'x': dtype 'F128'"),
    "no shape": (raw({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "'x'"),
    "more fields": (raw({"x": {**entry(), "exec": "rm"}}, bytes(8)), "'x'"),
    "negative shape": (raw({"x": entry(shape=(-2,))}, bytes(8)), "'x': shape"),
    "boolean shape": (raw({"x": entry(shape=(True, 2))}, bytes(8)), "'x': shape"),
    "float shape": (raw({"x": entry(shape=(2.0,))}, bytes(8)), "'x': shape"),
    "many axes": (raw({"x": entry(shape=(1,) * 40 + (2,))}, bytes(8)), "'x': shape"),
    "wrong size": (raw({"x": entry(shape=(3,))}, bytes(8)), "'x': F32 .* takes 12 bytes"),
    "huge shape": (raw({"x": entry(shape=(2**40, 2**40))}, bytes(8)), "'x': F32"),
    "huge offsets": (raw({"x": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)), "'x' ends at byte"),
    "overflowing shape": (raw({"x": entry(shape=(2**61, 8), offsets=(0, 0))}), "'x': F32"),
    "wide empty shape": (raw({"x": entry(shape=(0, 2**63), offsets=(0, 0))}), "'x': shape"),
    "reversed offsets": (raw({"x": entry(offsets=(8, 0))}, bytes(8)), "'x': F32"),
    "overlap": (raw({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)), "'y' .*overlaps"),
    "shared": (raw({"x": entry(), "y": entry()}, bytes(8)), "overlaps"),
    "hole": (raw({"x": entry(offsets=(8, 16))}, bytes(16)), "'x' .*hole"),
    "trailing": (raw({"x": entry()}, bytes(9)), "1 bytes at the end"),
    "truncated data": (raw({"x": entry()}, bytes(7)), "'x' .*truncated"),
}
NAMES = ["", "../x", "a/../b", "..", "/etc/passwd", "a\\b", "C:/x", "a\x00b", "a\nb", "~/x", "./x", "x" * 5000]


@pytest.mark.parametrize("case", BAD)
def test_refuses(path, case):
    content, words = BAD[case]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError, match=words) as caught:
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_refuses_a_header_above_the_limit_that_the_file_could_hold(path):
    path.write_bytes(raw(b"{}", length=100_000_001))
    os.truncate(path, 100_000_100)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError, match="claims a header"):
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", NAMES)
def test_refuses_unsafe_names_both_ways(path, name):
    path.write_bytes(raw({name: entry()}, bytes(8)))
    with pytest.raises(AdapterFileError, match="name"):
        read_safetensors(path)
    other = path.with_name("written")
    with pytest.raises(AdapterFileError, match="name"):
        write_safetensors(other, {name: np.ones(2, np.float32)}, {})
    assert not other.exists()


@pytest.mark.parametrize("name", ["a..b", "model.layers.0.q_proj.lora_A.weight", "ü/x y", "a:b", "..a", "a~"])
def test_keeps_ordinary_names(path, name):
    write_safetensors(path, {name: np.ones(2, np.float32)}, {})
    assert list(read_safetensors(path)[0]) == [name]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(AdapterFileError, match="No such file"):
        read_safetensors(tmp_path / "none")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_safetensors(tmp_path)
    with pytest.raises(AdapterFileError, match="no file name"):
        read_safetensors("a\x00b")
    with pytest.raises(AdapterFileError, match="folder does not exist"):
        write_safetensors(tmp_path / "none" / "x", {}, {})
    with pytest.raises(AdapterFileError, match="'x': dtype complex128"):
        write_safetensors(tmp_path / "x", {"x": np.ones(1, complex)}, {})
    assert os.listdir(tmp_path) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path, data):
    source = tmp_path / "source"
    write_safetensors(source, TENSORS, {"note": "x"})
    content = bytearray(source.read_bytes())
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), "edit the header"):
        header = json.loads(content[8 : 8 + length])
        name = data.draw(st.sampled_from(sorted(header)))
        if data.draw(st.booleans(), "one field"):
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(
                json_values
            )
        else:
            header[data.draw(st.just(name) | st.text(max_size=10))] = data.draw(json_values)
        content = bytearray(raw(header, bytes(content[8 + length :])))
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    target = tmp_path / "target"
    target.write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    message = str(target)
    tracemalloc.start()
    try:
        tensors, _ = read_safetensors(target)
        assert sum(t.nbytes for t in tensors.values()) <= len(content)
    except AdapterFileError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(target) in message
    assert peak < 5_000_000
    assert sorted(os.listdir(tmp_path)) == before
    assert target.read_bytes() == content
