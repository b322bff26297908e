"""Chat templates: what is rendered, which part is the assistant's, and which tokens are labels."""

import numpy as np
import pytest

from subspace_jax.models import TEMPLATES, CausalEncoder, ChatTemplate, TemplateError

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "tool", "content": "d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f g"},
]
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<s>{% generation %}{{ m['content'] }}<end>"
    "{% endgeneration %}{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)


def parts(template, messages):
    text, spans = template.spans(messages)
    return [text[start:end] for start, end in spans]


def test_spans_by_prefixes_and_by_markers():
    assert parts(ChatTemplate(TEMPLATES["chatml"]), TALK) == ["c<|im_end|>", "f g<|im_end|>"]
    assert parts(ChatTemplate(TEMPLATES["plain"], {"eos_token": "<end>"}), TALK) == ["c<end>", "f g<end>"]
    marked = ChatTemplate(GENERATION)
    assert parts(marked, TALK) == ["c<end>", "f g<end>"]
    assert marked.render(TALK) == "[be brief][a b]<s>c<end>[d][e]<s>f g<end>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgets = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}(past)"
        "{% else %}{{ m['role'] }}:{{ m['content'] }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(TemplateError, match=r"rewrites turns.*message 3"):
        ChatTemplate(forgets, name="the template of x").spans(TALK)
    assert parts(ChatTemplate(forgets), TALK[:3]) == ["c;"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "not readable"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ absent.field }}", "fails"),
    ],
)
def test_templates_that_fail_or_reach_out_of_the_sandbox_are_refused(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(TALK)


def test_rendering_agrees_with_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- for m in messages %}\n  {%- if m['role'] == 'assistant' %}\n{% generation %}{{ m | tojson }}"
        "{{ eos_token }}{% endgeneration %}\n  {%- else %}{{ m['content'] | trim }}{%- endif %}\n{%- endfor %}\n end"
    )
    theirs, spans = utils.render_jinja_template(
        conversations=[TALK], chat_template=source, return_assistant_tokens_mask=True, eos_token="<end>"
    )
    text, ours = ChatTemplate(source, {"eos_token": "<end>"}).spans(TALK)
    assert text == theirs[0]
    assert ours == [tuple(span) for span in spans[0]]


@pytest.fixture
def tokenizer():
    words = ["<end>", "<bos>", "<unk>", *"abcdefg", "be", "brief", "[", "]", "<s>"]
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|[\[\]]"), "removed", invert=True)
    found.add_special_tokens(["<end>", "<bos>", "<s>"])
    return found


def shown(tokenizer, example):
    return " ".join(
        f"*{tokenizer.id_to_token(t)}" if label else tokenizer.id_to_token(t)
        for t, label in zip(example.tokens.tolist(), example.labels, strict=True)
    )


def test_labels_of_every_form(tokenizer):
    encoder = CausalEncoder(tokenizer, (0,), 1, ChatTemplate(GENERATION))
    assert shown(tokenizer, encoder.encode({"prompt": "a b", "completion": "c"})) == "<bos> a b *c *<end>"
    assert shown(tokenizer, encoder.encode({"text": "a b"})) == "<bos> *a *b *<end>"
    talk = "<bos> [ be brief ] [ a b ] <s> *c *<end> [ d ] [ e ] <s> *f *g *<end>"
    assert shown(tokenizer, encoder.encode({"messages": TALK})) == talk
    bare = CausalEncoder(tokenizer, (0,))
    assert shown(tokenizer, bare.encode({"text": "a b"})) == "a *b *<end>"  # nothing predicts the first


def test_training_and_use_begin_alike_with_one_bos(tokenizer):
    writes_bos = ChatTemplate("<bos>" + GENERATION + "{% if add_generation_prompt %}<s>{% endif %}")
    plain = ChatTemplate(GENERATION + "{% if add_generation_prompt %}<s>{% endif %}")
    for template in (writes_bos, plain):
        encoder = CausalEncoder(tokenizer, (0,), 1, template)
        trained = encoder.encode({"messages": TALK[:3]}).tokens.tolist()
        used = encoder.prompt(TALK[:2])
        assert trained[: len(used)] == used
        assert trained.count(1) == 1
    encoder = CausalEncoder(tokenizer, (0,), 1)
    assert encoder.encode({"prompt": "a", "completion": "b"}).tokens.tolist()[:2] == encoder.prompt("a")


def test_cuts_say_what_was_lost(tokenizer):
    example = {"prompt": "a b c", "completion": "d e"}
    right = CausalEncoder(tokenizer, (0,), 1, max_length=6).encode(example)
    assert shown(tokenizer, right) == "<bos> a b c *d *e"
    assert (right.cut, right.ended) == (1, False)
    left = CausalEncoder(tokenizer, (0,), 1, max_length=4, cut="left").encode(example)
    assert shown(tokenizer, left) == "<bos> *d *e *<end>"
    assert (left.cut, left.ended) == (3, True)
    assert not CausalEncoder(tokenizer, (0,), 1, max_length=3).encode(example).labels.any()
    with pytest.raises(ValueError, match="7 tokens, at most 6"):
        CausalEncoder(tokenizer, (0,), 1, max_length=6, cut="refuse").encode(example)
    assert CausalEncoder(tokenizer, (0,), 1, max_length=7, cut="refuse").encode(example).ended


def test_the_end_token_stays_a_label_where_padding_has_its_id(tokenizer):
    example = CausalEncoder(tokenizer, (0,), None).encode({"prompt": "a", "completion": "b"})
    from subspace_jax.training import pack_sequences

    rows = pack_sequences([example.tokens], [example.labels], 6)
    assert rows.tokens.tolist() == [[3, 4, 0, 0, 0, 0]]
    np.testing.assert_array_equal(rows.labels[0], [False, True, True, False, False, False])


def test_a_conversation_without_a_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="chat template"):
        CausalEncoder(tokenizer, (0,)).prompt(TALK)
