import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import Bert, BertConfig, small_bert
from tests.models.model_helpers import random_params, run, tiny
from tests.tolerances import tolerance


def torch_layer(torch, params, norm_first, scales=(1.0, 1.0), norms=("attention_norm", "mlp_norm")):
    """PyTorch's own encoder layer with the weights of one of ours; the oracle of BERT and ViT."""
    width = 32
    layer = torch.nn.TransformerEncoderLayer(
        width,
        4,
        64,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-12,
        batch_first=True,
        norm_first=norm_first,
    )

    def tensor(array):
        return torch.tensor(np.array(array))

    attention, mlp = params["attention"], params["mlp"]
    parts = [attention[name] for name in ("query", "key", "value")]
    weights = {
        "self_attn.in_proj_weight": np.concatenate([np.reshape(p["kernel"], (width, width)).T for p in parts]),
        "self_attn.in_proj_bias": np.concatenate([np.reshape(p["bias"], width) for p in parts]),
        "self_attn.out_proj.weight": np.reshape(attention["output"]["kernel"] * scales[0], (width, width)).T,
        "self_attn.out_proj.bias": attention["output"]["bias"] * scales[0],
        "linear1.weight": mlp["fc1"]["kernel"].T,
        "linear1.bias": mlp["fc1"]["bias"],
        "linear2.weight": (mlp["fc2"]["kernel"] * scales[1]).T,
        "linear2.bias": mlp["fc2"]["bias"] * scales[1],
    }
    for index, name in enumerate(norms, 1):
        weights[f"norm{index}.weight"] = params[name]["scale"]
        weights[f"norm{index}.bias"] = params[name]["bias"]
    layer.load_state_dict({name: tensor(value) for name, value in weights.items()}, strict=True)
    return layer


@pytest.mark.interop
def test_hidden_states_equal_pytorch():
    torch = pytest.importorskip("torch")
    model, tokens = tiny("bert")
    params = random_params(model, tokens)
    mask = np.arange(7)[None] < np.array([[7], [4]])
    types = np.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    embeddings = params["embeddings"]
    x = np.asarray(embeddings["word"]["embedding"])[np.asarray(tokens)]
    x = (
        x
        + np.asarray(embeddings["position"]["embedding"])[:7]
        + np.asarray(embeddings["token_type"]["embedding"])[types]
    )
    norm = [torch.tensor(np.array(embeddings["norm"][name])) for name in ("scale", "bias")]
    h = torch.nn.functional.layer_norm(torch.tensor(x), (32,), *norm, eps=1e-12)
    for i in range(2):
        layer = torch_layer(torch, params["encoder"][f"layer_{i}"], norm_first=False)
        h = layer(h, src_key_padding_mask=torch.tensor(~mask))
    found = np.asarray(run(model, params, tokens, jnp.asarray(mask), jnp.asarray(types)))
    np.testing.assert_allclose(found[mask], h.detach().numpy()[mask], atol=1e-5)


def test_padding_does_not_influence_real_tokens():
    model, tokens = tiny("bert", scan_layers=True)
    params = random_params(model, tokens)
    mask = jnp.arange(7)[None] < jnp.array([[5], [3]])
    changed = jnp.where(mask, tokens, (tokens + 13) % 101)
    first, second = (run(model, params, t, mask) for t in (tokens, changed))
    np.testing.assert_allclose(first[mask], second[mask], atol=tolerance(size=4))
    cut = run(model, params, tokens[:, :5])
    np.testing.assert_allclose(first[0, :5], cut[0], atol=1e-5)
    unmasked = run(model, params, tokens)
    assert np.abs(unmasked[0, 0] - first[0, 0]).max() > 1e-3


def test_a_row_of_padding_alone_stays_finite():
    model, tokens = tiny("bert")
    params = random_params(model, tokens)
    assert np.isfinite(run(model, params, tokens, jnp.zeros((2, 7), bool))).all()


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_follows_its_random_stream(scan):
    model, tokens = tiny("bert", dropout=0.3, scan_layers=scan)
    params = random_params(model, tokens)

    @jax.jit
    def noisy(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, tokens, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(noisy(1), noisy(1))
    assert np.abs(noisy(1) - noisy(2)).max() > 1e-2
    quiet = run(tiny("bert", scan_layers=scan)[0], params, tokens)
    np.testing.assert_allclose(run(model, params, tokens), quiet, atol=tolerance(size=4))


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="length <= 32"):
        Bert(small_bert()).init(jax.random.key(0), jnp.zeros((1, 33), jnp.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 30}, "num_heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": 3.0}, "vocab_size"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**fields)
