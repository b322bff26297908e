import collections
import io
import pickle
import zipfile

import numpy as np
import pytest

from subspace_jax.data import _pde


def save(path, data, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("root/data.pkl", data)
        for key, raw in storages.items():
            archive.writestr(f"root/data/{key}", raw)
    return path


@pytest.mark.interop
def test_tensors_equal_what_pytorch_saved(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {
        "plain": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "bits": base > 5,
        "ints": torch.tensor([[-3, 4]]),
        "half": base.half(),
        "double": base.double() / 3,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    torch.save(saved, tmp_path / "x.pt")
    read = _pde.read_tensors(tmp_path / "x.pt")
    assert set(read) == set(saved)
    for name, tensor in saved.items():
        np.testing.assert_array_equal(read[name], tensor.numpy(), err_msg=name)
        assert read[name].dtype == tensor.numpy().dtype


class Named:
    """Pickles as a call of any importable function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [print, open, eval, getattr, collections.Counter, np.zeros])
def test_any_other_name_is_refused_before_it_is_called(tmp_path, function):
    marker = tmp_path / "marker"
    arguments = (str(marker), "w") if function is open else ("1",)
    path = save(tmp_path / "x.pt", pickle.dumps({"x": Named(function, *arguments)}), {})
    with pytest.raises(ValueError, match=r"x\.pt: .*refused .*only dense tensors"):
        _pde.read_tensors(path)
    assert not marker.exists()


def tensor_file(path, offset, size, stride, *, kind="FloatStorage", key="0"):
    buffer = io.BytesIO()
    # The protocol-0 text form lets a global be written that is not importable here.
    buffer.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    buffer.write(f"S'storage'\nctorch\n{kind}\nS'{key}'\nS'cpu'\nI6\ntQI{offset}\n(".encode())
    buffer.write("".join(f"I{n}\n" for n in size).encode() + b"t(")
    buffer.write("".join(f"I{n}\n" for n in stride).encode() + b"ttR.")
    return save(path, buffer.getvalue(), {"0": np.arange(6, dtype=np.float32).tobytes()})


def test_strides_and_offset(tmp_path):
    read = _pde.read_tensors(tensor_file(tmp_path / "x.pt", 1, (2, 2), (1, 3)))
    np.testing.assert_array_equal(read, [[1, 4], [2, 5]])


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)),
        (5, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (3, 2), (3, 1)),
        (0, (2,), (1, 1)),
    ],
)
def test_view_outside_its_storage_is_refused(tmp_path, offset, size, stride):
    with pytest.raises(ValueError, match=r"x\.pt"):
        _pde.read_tensors(tensor_file(tmp_path / "x.pt", offset, size, stride))


def test_foreign_storages_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="refused"):
        _pde.read_tensors(tensor_file(tmp_path / "x.pt", 0, (2,), (1,), kind="QInt8Storage"))
    with pytest.raises(ValueError, match="refused the stored object"):
        _pde.read_tensors(tensor_file(tmp_path / "x.pt", 0, (2,), (1,), key="../../secret"))
    (tmp_path / "y.pt").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"y\.pt"):
        _pde.read_tensors(tmp_path / "y.pt")


@pytest.mark.carried
def test_published_shapes(need):
    need("neuraloperator")
    darcy = list(_pde.darcy16())
    assert [sum(r.split == split for r in darcy) for split in ("train", "test")] == [1_000, 50]
    outputs = np.stack([r.output for r in darcy if r.split == "train"])
    assert outputs.shape == (1_000, 16, 16)
    assert (round(float(outputs.min()), 2), round(float(outputs.max()), 2)) == (-0.43, 2.06)
    assert set(np.unique(np.stack([r.input for r in darcy]))) == {0.0, 1.0}
    assert [r.output.shape for r in _pde.darcy32()] == [(32, 32)] * 50
    burgers = list(_pde.burgers())
    assert len(burgers) == 1_200
    assert burgers[0].input.shape == (16,)
    # The solution begins with the initial condition.
    np.testing.assert_allclose(np.stack([r.output[0] for r in burgers]), np.stack([r.input for r in burgers]))
