"""Folders whose weights are in float8: scales of tensors, channels and blocks, and forms that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.core import WeightFileError
from subspace_jax.models import load_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file
pytestmark = pytest.mark.interop

SIZES = {"vocab_size": 99, "hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2}
TOKENS = np.random.default_rng(0).integers(0, 99, (2, 7))
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(**changes):
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | changes}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


FORMS = {
    "tensor": (".weight_scale", None, compressed(strategy="tensor")),
    "channel": (".weight_scale", (1, 10**6), compressed(strategy="channel")),
    "block": (".weight_scale_inv", (128, 128), FP8 | {"weight_block_size": [128, 128]}),
    "small block": (".weight_scale_inv", (64, 32), FP8 | {"weight_block_size": [64, 32]}),
}


def quantize(weight, block):
    """Float8 weights, their scales, and what they mean, block by block in float64."""
    rows, columns = weight.shape if block is None else block
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scales, codes, meant = np.empty(grid), np.empty(weight.shape, jnp.float8_e4m3fn), np.empty(weight.shape)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = np.float32(np.abs(weight[place]).max() / 448)
            codes[place] = (weight[place] / scales[i, j]).astype(jnp.float8_e4m3fn)
            meant[place] = codes[place].astype(np.float64) * scales[i, j]
    return codes, scales.astype(np.float32), meant.astype(np.float32)


def write(folder, form):
    """Saves a Llama in a form of float8; returns the model of what the file means."""
    ending, block, entry = FORMS[form]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor.clone()
            continue
        codes, scales, meant = quantize(tensor.numpy(), block)
        tensors[name] = torch.tensor(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        kept = scales.reshape(()) if block is None else scales
        tensors[f"{name.removesuffix('.weight')}{ending}"] = torch.tensor(kept)
        if block is None:
            tensors[f"{name.removesuffix('.weight')}.input_scale"] = torch.tensor(1.0)
        with torch.no_grad():
            tensor.copy_(torch.tensor(meant))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config=entry)
    return model


def change(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_float8_mean_what_their_scales_say(form, tmp_path):
    model = write(tmp_path, form)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        loaded = load_hf(tmp_path, scan_layers=True)
        found = loaded.module.apply({"params": loaded.params}, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config='gptq'"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (FP8 | {"weight_block_size": [32, 64]}, r"scales of shape \(3, 5\)|each block of 32 x 64"),
        (compressed(num_bits=4), "num_bits=4"),
        (compressed(symmetric=False), "symmetric=False"),
        (compressed() | {"format": "pack-quantized"}, "format='pack-quantized'"),
    ],
)
def test_other_forms_are_refused_by_name(entry, message, tmp_path):
    write(tmp_path, "small block")
    change(tmp_path, quantization_config=entry)
    with pytest.raises(WeightFileError, match=message):
        load_hf(tmp_path)


def test_scales_that_are_missing_stray_or_damaged_are_refused(tmp_path):
    from safetensors.torch import load_file

    write(tmp_path, "channel")
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for changes, message in (
        ({f"{name}.weight_scale": None}, "without a scale beside it"),
        ({f"{name}.weight_scale": whole[f"{name}.weight_scale"] * float("nan")}, "scale of .* holds NaN"),
        ({f"{name}.weight": whole[f"{name}.weight"].view(torch.float8_e5m2)}, "float8_e5m2 and has a scale"),
        ({"model.layers.9.weight_scale": torch.ones(3)}, "of no use"),
    ):
        tensors = {key: value for key, value in (whole | changes).items() if value is not None}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightFileError, match=message):
            load_hf(tmp_path)
