"""PEFT loads what is written here, and what it writes is loaded here: equal logits, both ways, in both layouts."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.io import AdapterFileError, load_peft, read_safetensors, save_peft

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from . import peft_backbones as pb  # noqa: E402
from .peft_backbones import peft  # noqa: E402

KERNELS = "**/{encoder,decoder}/**/kernel"


def written(side, tree, params, folder):
    """Logits of the tree here and, through the files, in PEFT; and of the base model."""
    save_peft(folder, tree, params, side.names)
    with pb.quiet():
        loaded = peft.PeftModel.from_pretrained(side.make(), folder).eval()
    return np.asarray(side.logits(tree)), side.torch_logits(loaded), side.torch_logits(side.make())


def assert_close(found, expected, base):
    """Equal to 1e-5 of the largest logit, and the adapter did something that is far above that."""
    largest = max(1.0, np.abs(expected).max())
    assert np.abs(expected - base).max() > 1e-2 * largest
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


def adapted(side, params, rules, **options):
    return pb.moved(sj.adapt(params, rules, key=jax.random.key(0), roles=side.roles(params), **options))


STACKED = ("lora", "dora(pissa)", "ranks", "oft", "randlora")
OURS = {
    "lora": {KERNELS: sj.lora(4, alpha=7)},
    "rslora": {KERNELS: sj.lora(4, alpha=7, rank_stabilized=True)},
    "dora": {KERNELS: sj.dora(sj.lora(4, alpha=6))},
    "dora(rslora)": {"**/query/kernel": sj.dora(sj.lora(4, rank_stabilized=True))},
    "pissa": {KERNELS: sj.pissa(4, alpha=6, svd="exact")},
    "dora(pissa)": {KERNELS: sj.dora(sj.pissa(4, svd="exact"))},
    "matryoshka": {KERNELS: sj.matryoshka(sj.lora(8))},
    "ranks": {
        "**/query/kernel": sj.lora(2, alpha=3),
        "**/value/kernel": sj.lora(5, alpha=3),
        "**/mlp/**/kernel": sj.lora(2),
    },
    "oft": {KERNELS: sj.oft(8)},
    "oft series": {KERNELS: sj.oft(8, terms=5)},
    "oft shared": {KERNELS: sj.oft(8, share_blocks=True, terms=4)},
    "randlora": {"**/{query,fc1,fc2}/kernel": sj.randlora(5, pairing="peft")},
    "randlora of one shape": {"**/query/kernel": sj.randlora(4, pairing="peft", scaling="peft", basis="sparse")},
    "oft sizes": {"**/query/kernel": sj.oft(32), "**/fc2/kernel": sj.oft(64)},
}


def same_again(folder, side, params, tree):
    """The folder gives back the weights of the tree."""
    again = sj.merge(load_peft(folder, params, side.names))
    for one, other in zip(jax.tree.leaves(sj.merge(tree)), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "scan_layers"), [*((n, False) for n in OURS), *((n, True) for n in STACKED)])
def test_peft_loads_what_is_written(name, scan_layers, tmp_path):
    side = pb.Bert(scan_layers)
    params = side.params()
    tree = adapted(side, params, OURS[name])
    ours, theirs, base = written(side, tree, params, tmp_path / "adapter")
    assert_close(theirs, ours, base)
    same_again(tmp_path / "adapter", side, params, tree)


@pytest.mark.parametrize(("kind", "scan_layers"), [("lora", True), ("oft", False)])
def test_peft_loads_heads_norms_tables_and_biases(kind, scan_layers, tmp_path):
    side = pb.Bert(scan_layers)
    params = side.params()
    rules = {
        "classifier/*": sj.full(),
        "**/{attention_norm,norm}/*": sj.full(),
        "**/query/bias": sj.full(),
        "**/position/embedding": sj.full(),
        "**/query/kernel": sj.lora(4) if kind == "lora" else sj.oft(8),
    }
    if kind == "lora":
        rules["**/word/embedding"] = sj.lora(3)
    tree = adapted(side, params, rules)
    ours, theirs, base = written(side, tree, params, tmp_path / "adapter")
    assert_close(theirs, ours, base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["bias"] == f"{kind}_only"
    assert "classifier" in config["modules_to_save"]


@pytest.mark.parametrize("backbone", ["Dinov2", "Llama"])
@pytest.mark.parametrize(("name", "scan_layers"), [("dora", False), ("lora", True), ("oft", False)])
def test_ready_maps(backbone, name, scan_layers, tmp_path):
    side = getattr(pb, backbone)(scan_layers)
    params = side.params()
    np.testing.assert_allclose(side.logits(params), side.torch_logits(side.make()), rtol=0, atol=1e-4)
    rules = dict(OURS[name])
    if name != "oft":
        rules |= (
            {"embeddings/patch/kernel": rules[KERNELS]} if backbone == "Dinov2" else {"head/kernel": rules[KERNELS]}
        )
    norms = "**/{layer_scale1,norm2}/*" if backbone == "Dinov2" else "**/mlp_norm/*"
    tree = adapted(side, params, {**rules, norms: sj.full()})
    ours, theirs, base = written(side, tree, params, tmp_path / "adapter")
    assert_close(theirs, ours, base)


def test_corda(tmp_path):
    side = pb.Bert()
    params = side.params()
    stats = sj.capture(lambda p, batch: side.logits(p), params, [np.zeros(1)])
    tree = adapted(side, params, {KERNELS: sj.corda(4)}, stats=stats)
    ours, theirs, base = written(side, tree, params, tmp_path / "adapter")
    assert_close(theirs, ours, base)


Q = ["query", "value"]
TOKENS = [60, 3, 17, *range(80, 101)]
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=Q),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=Q, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=[*Q, "dense"], use_dora=True),
    "orthogonal": lambda: peft.LoraConfig(r=4, target_modules=Q, init_lora_weights="orthogonal"),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=[*Q, "dense"],
        rank_pattern={"self.query": 2, r".*\.output\.dense": 6},
        alpha_pattern={"^bert.encoder.layer.[01].attention.self.query": 3, "dense": 5},
    ),
    "biases": lambda: peft.LoraConfig(r=4, target_modules=Q, bias="all"),
    "lora biases": lambda: peft.LoraConfig(r=4, target_modules=Q, bias="lora_only"),
    "saved": lambda: peft.LoraConfig(r=4, target_modules=Q, modules_to_save=["LayerNorm", "classifier"]),
    "task": lambda: peft.LoraConfig(r=4, target_modules=Q, modules_to_save=["position_embeddings"]),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["word_embeddings", "query"]),
    "embedding dora": lambda: peft.LoraConfig(r=4, target_modules=["word_embeddings"], use_dora=True),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=Q),
    "oft exact": lambda: peft.OFTConfig(oft_block_size=8, target_modules=Q, use_cayley_neumann=False),
    "oft three terms": lambda: peft.OFTConfig(oft_block_size=8, target_modules=Q, num_cayley_neumann_terms=3),
    "oft count": lambda: peft.OFTConfig(r=5, oft_block_size=0, target_modules=[*Q, "dense"]),
    "oft moved size": lambda: peft.OFTConfig(oft_block_size=7, target_modules=[*Q, "dense"]),
    "oft shared": lambda: peft.OFTConfig(oft_block_size=8, target_modules=Q, block_share=True, bias="oft_only"),
    "randlora": lambda: peft.RandLoraConfig(r=5, randlora_alpha=50, target_modules=[*Q, "dense"]),
    "randlora biases": lambda: peft.RandLoraConfig(r=4, target_modules=Q, very_sparse=True, bias="randlora_only"),
    "layers": lambda: peft.LoraConfig(r=4, target_modules=[*Q, "dense"], layers_to_transform=[1]),
    "layers randlora": lambda: peft.RandLoraConfig(r=5, randlora_alpha=50, target_modules=Q, layers_to_transform=[0]),
    "lora bias": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=Q, lora_bias=True),
    "lora bias trained": lambda: peft.LoraConfig(r=4, target_modules=Q, lora_bias=True, bias="lora_only"),
    "pissa": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*Q, "dense"], init_lora_weights="pissa"),
    "pissa dora": lambda: peft.LoraConfig(r=4, target_modules=Q, init_lora_weights="pissa", use_dora=True),
    "olora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*Q, "dense"], init_lora_weights="olora"),
    "tokens": lambda: peft.LoraConfig(
        r=4, target_modules=Q, trainable_token_indices={"word_embeddings": TOKENS}, ensure_weight_tying=True
    ),
    "coft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=Q, coft=True, eps=0.5),
}


STACKED_THEIRS = (
    *("dora", "biases", "saved", "oft shared", "randlora"),
    *("layers", "layers randlora", "lora bias", "pissa dora", "olora", "tokens"),
)


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [*((n, False) for n in THEIRS), *((n, True) for n in STACKED_THEIRS)],
)
def test_what_peft_writes_is_loaded(name, scan_layers, tmp_path):
    side = pb.Bert(scan_layers)
    with pb.quiet():
        model = pb.move_torch(peft.get_peft_model(side.make(), THEIRS[name]()))
        model.save_pretrained(tmp_path)
    tree = load_peft(tmp_path, side.params(), side.names)
    assert_close(side.logits(tree), side.torch_logits(model), side.torch_logits(side.make()))


@pytest.mark.parametrize("rslora", [False, True])
def test_converted_pissa(rslora, tmp_path):
    side = pb.Bert()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=Q,
        init_lora_weights="pissa",
        use_rslora=rslora,
        rank_pattern={} if rslora else {"value": 3},
    )
    with pb.quiet():
        model = peft.get_peft_model(side.make(), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        pb.move_torch(model)
        model.save_pretrained(tmp_path / "raw")
        expected = side.torch_logits(model)
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    tree = load_peft(tmp_path / "plain", side.params(), side.names)
    assert_close(side.logits(tree), expected, side.torch_logits(side.make()))
    raw = load_peft(tmp_path / "raw", side.params(), side.names)
    assert_close(side.logits(raw), expected, side.torch_logits(side.make()))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_out_of_the_base_are_written_as_plain_lora(start, tmp_path):
    side = pb.Bert(scan_layers=True)
    params = side.params()
    with pb.quiet():
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=Q, init_lora_weights=start)
        model = pb.move_torch(peft.get_peft_model(side.make(), config))
        model.save_pretrained(tmp_path / "theirs")
    tree = load_peft(tmp_path / "theirs", params, side.names)
    ours, theirs, base = written(side, tree, params, tmp_path / "ours")
    assert_close(theirs, side.torch_logits(model), base)
    assert_close(ours, theirs, base)


def test_rows_of_a_table_that_is_the_head_too(tmp_path):
    class Tied(pb.Llama):
        names = pb.llama_names()

        def __init__(self):
            super().__init__()
            self.config = dataclasses.replace(self.config, tie_embeddings=True)

        def make(self):
            torch.manual_seed(0)
            config = super().make().config
            config.tie_word_embeddings = True
            return pb.enlarged(pb.transformers.LlamaForCausalLM(config))

    side = Tied()
    rows = sorted({int(t) for t in side.batch[0].reshape(-1)})[::-2]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows)
    with pb.quiet():
        model = pb.move_torch(peft.get_peft_model(side.make(), config))
        model.save_pretrained(tmp_path)
    params = side.params()
    tree = load_peft(tmp_path, params, side.names)
    assert tree["embedding"]["embedding"].values.shape == (len(rows) * 32,)
    assert_close(side.logits(tree), side.torch_logits(model), side.torch_logits(side.make()))


def test_randlora_without_its_bases(tmp_path):
    side = pb.Bert()
    with pb.quiet():
        config = peft.RandLoraConfig(r=4, target_modules=Q, save_projection=False)
        peft.get_peft_model(side.make(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"has not both random bases.*save_projection=True"):
        load_peft(tmp_path, side.params(), side.names)


def test_same_tensors_as_peft_itself(tmp_path):
    """Names, shapes and dtypes of the file, and the keys of the config, are those of PEFT."""
    side = pb.Bert()
    params = side.params()
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=Q, use_dora=True, modules_to_save=["classifier"])
    with pb.quiet():
        peft.get_peft_model(side.make(), config).save_pretrained(tmp_path / "theirs")
    rules = {"**/{query,value}/kernel": sj.dora(sj.lora(4)), "classifier/*": sj.full()}
    save_peft(tmp_path / "ours", adapted(side, params, rules), params, side.names)
    theirs, ours = (read_safetensors(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {n: (t.shape, t.dtype) for n, t in ours[0].items()} == {n: (t.shape, t.dtype) for n, t in theirs[0].items()}
    assert ours[1] == theirs[1]
    keys = [json.loads((tmp_path / side / "adapter_config.json").read_text()).keys() for side in ("ours", "theirs")]
    assert keys[0] <= keys[1]


def test_what_peft_resaves_is_loaded(tmp_path):
    side = pb.Bert()
    params = side.params()
    tree = adapted(side, params, {**OURS["ranks"], "classifier/*": sj.full()})
    save_peft(tmp_path / "ours", tree, params, side.names)
    with pb.quiet():
        peft.PeftModel.from_pretrained(side.make(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same_again(tmp_path / "theirs", side, params, tree)


def test_a_name_that_ends_another(tmp_path):
    """PEFT takes a name for every module that ends with it; only the one that was adapted may change."""
    from subspace_jax.io import NameMap, NameRule

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(6, 5, bias=False)
            self.tail = torch.nn.ModuleDict({"head": torch.nn.Linear(5, 4, bias=False)})

        def forward(self, x):
            return self.tail["head"](self.head(x))

    torch.manual_seed(0)
    model = Two()
    params = {
        "one": {"kernel": pb.array(model.head.weight).T},
        "two": {"kernel": pb.array(model.tail["head"].weight).T},
    }
    names = NameMap((NameRule("one", "head"), NameRule("two", "tail.head")))
    tree = pb.moved(sj.adapt(params, {"one/kernel": sj.lora(2)}, key=jax.random.key(0)))
    save_peft(tmp_path / "adapter", tree, params, names)
    with pb.quiet():
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not any("tail" in name for name, _ in loaded.named_parameters() if "lora" in name)


@pytest.mark.carried
def test_minilm(tmp_path):
    """The pretrained model itself, both ways."""
    from subspace_jax import models
    from subspace_jax.models._pretrained import locate

    path = locate(None, "minilm", "model/model.safetensors")
    minilm = models.load_minilm(path)
    from safetensors.torch import load_file

    config = pb.transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )

    pretrained = pb.transformers.BertModel(config, add_pooling_layer=False).eval()
    pretrained.load_state_dict(load_file(path), strict=False)

    def make():
        """A copy, as PEFT changes the model that it is given; a new one would draw all weights before it loads them."""
        return copy.deepcopy(pretrained)

    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(1000, 20000, (2, 12)), (np.arange(12) < np.array([12, 8])[:, None]).astype(np.int64)

    def ours(tree):
        return np.asarray(pb.compiled(minilm.module)(tree, tokens, mask))[mask > 0]

    def theirs(model):
        with torch.no_grad():
            hidden = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state
        return hidden.numpy()[mask > 0]

    names = pb.bert_names()
    base = theirs(make())
    for method, kernels in (
        (sj.dora(sj.lora(8)), "encoder/**/kernel"),
        (sj.pissa(8), "encoder/layer_[01]/**/query/kernel"),
        (sj.oft(32), "encoder/**/{query,fc2}/kernel"),
    ):
        tree = pb.moved(sj.adapt(minilm.params, {kernels: method}, key=jax.random.key(0)), 0.02)
        save_peft(tmp_path / method.name, tree, minilm.params, names)
        with pb.quiet():
            loaded = peft.PeftModel.from_pretrained(make(), tmp_path / method.name).eval()
        assert_close(theirs(loaded), ours(tree), base)
    for config_ in (
        peft.LoraConfig(r=8, target_modules=["query", "value"], use_rslora=True),
        peft.OFTConfig(target_modules=["query", "value"]),
    ):
        with pb.quiet():
            model = pb.move_torch(peft.get_peft_model(make(), config_), 0.02)
            model.save_pretrained(tmp_path / "theirs")
        assert_close(ours(load_peft(tmp_path / "theirs", minilm.params, names)), theirs(model), base)
