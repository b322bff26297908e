import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from . import peft_models as pm  # noqa: E402

SEQUENCES = [
    np.random.default_rng(s).normal(size=(9, pm.INPUTS)).astype(np.float32) * 10.0 ** (s - 1) for s in range(4)
]


def under_peft(model, method, alpha):
    """The layer as PEFT prepares it, one sequence per call as its authors do."""
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        r=pm.RANK,
        lora_alpha=alpha,
        target_modules=["layer"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )

    def run_model():
        for sequence in SEQUENCES:
            model(torch.tensor(sequence)[None])

    preprocess_corda(model, config, run_model)
    return peft.get_peft_model(model, config).base_model.model.layer


@pytest.mark.parametrize("alpha", [4, 10])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("factors", ["projection", "solve"])
def test_factors_and_rewritten_base(method, alpha, factors):
    torch.manual_seed(0)
    model = pm.Linear()
    params = {"w": jnp.asarray(model.layer.weight.detach().numpy().T.copy())}
    fn = lambda p, x: x @ p["w"]
    stats = sj.capture(fn, params, [np.stack(SEQUENCES)], scale_examples="signed_max")
    rules = {"w": sj.corda(pm.RANK, mode=method, alpha=alpha, factors=factors)}
    weight = sj.adapt(params, rules, key=jax.random.key(0), stats=stats)["w"]
    layer = under_peft(model, method, alpha)
    down, up = layer.lora_A["default"].weight.detach().numpy(), layer.lora_B["default"].weight.detach().numpy()
    assert weight.scale == layer.scaling["default"]
    np.testing.assert_allclose((weight.a @ weight.b).T, up @ down, atol=1e-5)
    np.testing.assert_allclose(weight.base.T, layer.base_layer.weight.detach(), atol=1e-5)
    # Singular vectors have free signs; the balance between the factors has not.
    np.testing.assert_allclose(np.abs(weight.a.T), np.abs(down), rtol=1e-3, atol=1e-3 * np.abs(down).max())
    np.testing.assert_allclose(np.abs(weight.b.T), np.abs(up), rtol=1e-3, atol=1e-3 * np.abs(up).max())
    x = torch.randn(7, pm.INPUTS)
    np.testing.assert_allclose(
        sj.with_adapters(fn)({"w": weight}, pm.array(x)), layer(x).detach(), rtol=1e-4, atol=1e-5
    )
