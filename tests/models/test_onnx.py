import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subspace_jax.models import read_onnx
from subspace_jax.models._onnx import parse_onnx
from tests.models.model_helpers import onnx_bytes, onnx_tensor, proto_bytes, proto_number

ARRAY = np.arange(6, dtype="<f4").reshape(2, 3)
GOOD = onnx_bytes(
    [onnx_tensor("w", ARRAY), onnx_tensor("shape", np.array([3, 4], "<i8"), kind=7)],
    [("/layer/MatMul", "MatMul", ("x", "w"))],
)


def parse(data):
    return parse_onnx(np.frombuffer(data, np.uint8), "file.onnx")


def test_tensors_and_nodes_come_back(tmp_path):
    (tmp_path / "m.onnx").write_bytes(GOOD)
    graph = read_onnx(tmp_path / "m.onnx")
    np.testing.assert_array_equal(graph.initializers["w"], ARRAY)
    assert graph.initializers["shape"].tolist() == [3, 4]
    (node,) = graph.nodes
    assert (node.name, node.operator, node.inputs) == ("/layer/MatMul", "MatMul", ("x", "w"))


@pytest.mark.interop
def test_a_file_by_the_onnx_package_is_read(rng):
    onnx = pytest.importorskip("onnx")
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": np.float32(2.0).reshape(()),
        "c": np.ones((2, 0)),
    }
    node = onnx.helper.make_node("MatMul", ["x", "a"], ["y"], name="n")
    graph = onnx.helper.make_graph(
        [node], "g", [], [], [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    )
    found = parse(onnx.helper.make_model(graph).SerializeToString())
    assert set(found.initializers) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.initializers[name], array)
        assert found.initializers[name].dtype == array.dtype


def test_every_truncation_is_refused():
    for size in range(len(GOOD)):
        with pytest.raises(ValueError, match=r"file\.onnx"):
            parse(GOOD[:size])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (onnx_tensor("w", ARRAY, dims=(2, 4)), r"'w'.*needs 32 bytes, holds 24"),
        (onnx_tensor("w", ARRAY, dims=(2**63, 2**63)), "'w'"),
        (onnx_tensor("w", ARRAY, dims=(2**64 - 1, 3)), "'w'"),
        (onnx_tensor("w", ARRAY[:0], dims=(0, 2**63)), "impossible shape"),
        (onnx_tensor("w", ARRAY, dims=(1,) * 40), "axes"),
        (onnx_tensor("w", ARRAY, kind=8), "data type 8"),
        (onnx_tensor("w", ARRAY, extra=proto_number(14, 1)), "raw data inside"),
        (
            proto_number(1, 2) + proto_number(2, 1) + proto_bytes(8, b"w") + proto_bytes(4, b"\0" * 8),
            "raw data",
        ),
        (proto_bytes(8, b"\xff\xfe"), "UTF-8"),
        (proto_number(8, 3), "number stands"),
        (proto_bytes(2, b"\1"), "bytes stand"),
    ],
)
def test_hostile_tensors_are_refused(tensor, message):
    with pytest.raises(ValueError, match=message):
        parse(onnx_bytes([tensor]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a model at all",
        b"\x3b",
        b"\x80" * 20,
        proto_bytes(7, b"") * 2,
        onnx_bytes([onnx_tensor("w", ARRAY)] * 2),
        proto_bytes(7, b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        proto_number(7, 1),
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError, match=r"file\.onnx"):
        parse(data)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_onnx(tmp_path / "m.onnx")


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
        parse(bytes(data[: max(size, 1)]))
    except ValueError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000
