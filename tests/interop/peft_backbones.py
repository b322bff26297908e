"""Small Hugging Face models, and the same functions here with the same weights."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax import models
from subspace_jax.io import NameMap, NameRule, bert_names, dinov2_names, llama_names
from subspace_jax.models._minilm import bert_rules
from subspace_jax.models._pretrained import assemble_params

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CLASSES = 3
ROLES = {}


def applied(module):
    return sj.with_adapters(lambda p, *batch: module.apply({"params": p}, *batch))


@functools.cache
def compiled(module):
    return jax.jit(applied(module))


class TorchClassifier(torch.nn.Module):
    """A BERT, the mean of its hidden states over real tokens, and a linear head."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert
        self.classifier = torch.nn.Linear(bert.config.hidden_size, CLASSES)

    def forward(self, tokens, mask):
        hidden = self.bert(tokens, attention_mask=mask).last_hidden_state
        mask = mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


class Bert:
    """The classifier on both sides; `make` builds the PyTorch model anew, with the same weights."""

    names = bert_names().inside("backbone", "bert") + NameMap((NameRule("classifier", "classifier"),))

    def __init__(self, scan_layers=False):
        self.config = models.small_bert(scan_layers=scan_layers)
        theirs = transformers.BertConfig(
            vocab_size=101,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.make_bert = lambda: transformers.BertModel(theirs, add_pooling_layer=False)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 101, (3, 7))
        mask = np.arange(7) < np.array([7, 4, 5])[:, None]
        self.batch = (tokens, mask.astype(np.int64))

    def make(self):
        torch.manual_seed(0)
        return enlarged(TorchClassifier(self.make_bert()))

    def params(self):
        model = self.make()
        state = {n: t.numpy() for n, t in model.bert.state_dict().items() if "position_ids" not in n}
        backbone = assemble_params(state, bert_rules(self.config, self.config.num_layers), "the model")
        if self.config.scan_layers:
            backbone = models.stack_layers(backbone)
        head = {"kernel": model.classifier.weight.detach().numpy().T, "bias": model.classifier.bias.detach().numpy()}
        return jax.tree.map(jnp.array, {"backbone": backbone, "classifier": head})

    @property
    def module(self):
        return models.BertClassifier(self.config, num_classes=CLASSES)

    def logits(self, tree):
        """One operation after the other, which trees of all kinds share, but where a loop would be compiled anew."""
        run = compiled(self.module) if self.config.scan_layers else applied(self.module)
        return run(tree, *self.batch)

    def torch_logits(self, model):
        with torch.no_grad():
            return model(*(torch.tensor(part) for part in self.batch)).numpy()

    def roles(self, params):
        if self.module not in ROLES:
            ROLES[self.module] = sj.roles(applied(self.module), params, *self.batch)
        return ROLES[self.module]


class Dinov2(Bert):
    names = dinov2_names()

    def __init__(self, scan_layers=False):
        self.config = models.small_vit(scan_layers=scan_layers)
        rng = np.random.default_rng(0)
        self.batch = (rng.normal(size=(2, 12, 12, 3)).astype(np.float32),)

    def make(self):
        torch.manual_seed(0)
        config = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=12, patch_size=4
        )
        return enlarged(transformers.Dinov2Model(config))

    def params(self):
        state = {name: tensor.numpy() for name, tensor in self.make().state_dict().items()}
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), *self.batch)["params"]
        given = {"embeddings/cls": "embeddings.cls_token", "embeddings/position": "embeddings.position_embeddings"}
        return from_torch(shapes, state, given)

    @property
    def module(self):
        return models.Vit(self.config)

    def logits(self, tree):
        return compiled(self.module)(tree, *self.batch)

    def torch_logits(self, model):
        with torch.no_grad():
            return model(torch.tensor(self.batch[0].transpose(0, 3, 1, 2))).last_hidden_state.numpy()


class Llama(Bert):
    names = llama_names(tie_embeddings=False)

    def __init__(self, scan_layers=False):
        self.config = models.small_llama(scan_layers=scan_layers, tie_embeddings=False)
        self.batch = (np.random.default_rng(0).integers(0, 101, (2, 6)),)

    def make(self):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        return enlarged(transformers.LlamaForCausalLM(config))

    def params(self):
        state = {name: tensor.numpy() for name, tensor in self.make().state_dict().items()}
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), *self.batch)["params"]
        return from_torch(shapes, state, {})

    @property
    def module(self):
        return models.Llama(self.config)

    def logits(self, tree):
        return compiled(self.module)(tree, *self.batch)

    def torch_logits(self, model):
        with torch.no_grad():
            return model(torch.tensor(self.batch[0])).logits.numpy()


# Written out here, so that a wrong name in the ready maps makes other logits.
_TORCH_PARTS = {
    "attention/query": "{attention}.q_proj",
    "attention/key": "{attention}.k_proj",
    "attention/value": "{attention}.v_proj",
    "attention/output": "{attention}.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_TORCH_TOPS = {
    "embeddings/patch": "embeddings.patch_embeddings.projection",
    "embedding": "model.embed_tokens",
    "head": "lm_head",
}


def from_torch(shapes, state, given):
    """Builds the tree of a Vit or a Llama from PyTorch's arrays, layer by layer."""
    llama = "model.embed_tokens.weight" in state

    def module(path, layer):
        parts = path.split("/")
        if parts[0] in ("encoder", "decoder"):
            inner = "/".join(parts[2:])
            name = _TORCH_PARTS.get(inner, inner.replace("/", "."))
            name = name.format(attention="self_attn" if llama else "attention")
            return f"{'model.layers' if llama else 'encoder.layer'}.{layer}.{name}"
        return _TORCH_TOPS.get(path, "model.norm" if llama else "layernorm")

    def one(path, leaf):
        if path in given:
            return jnp.asarray(state[given[path]])
        parent, _, last = path.rpartition("/")
        parts = parent.split("/")

        def array(layer, shape):
            name = module(parent, layer)
            tensor = state[
                f"{name}.bias"
                if last == "bias"
                else f"{name}.weight"
                if f"{name}.weight" in state
                else f"{name}.lambda1"
            ]
            if last == "kernel":
                tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
            return tensor.reshape(shape)

        if len(parts) > 1 and parts[1] == "layers":
            return jnp.stack([array(i, leaf.shape[1:]) for i in range(leaf.shape[0])])
        layer = parts[1].removeprefix("layer_") if len(parts) > 1 else None
        return jnp.asarray(array(layer, leaf.shape))

    from subspace_jax.core import map_with_paths

    return map_with_paths(one, shapes)


def enlarged(model):
    """Gives a fresh model biases, and weights so large that what attention looks at matters to the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.ndim == 2:
            parameter.data *= 10
    return model.eval()


def array(tensor):
    return jnp.asarray(np.array(tensor.detach().numpy()))


def moved(tree, size=0.1, seed=1):
    """Returns the tree as if trained: every trainable array moved by noise."""
    trainable, frozen = sj.partition(tree)
    rng = np.random.default_rng(seed)
    trainable = jax.tree.map(lambda v: jnp.asarray(np.asarray(v) + size * rng.normal(size=v.shape), v.dtype), trainable)
    return sj.combine(trainable, frozen)


def move_torch(model, size=0.1):
    """The same for what PEFT trains."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    return model.eval()


@contextlib.contextmanager
def quiet():
    """Silences PEFT, but for complaints of keys that it misses or does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing adapter keys|unexpected keys).*")
        yield
