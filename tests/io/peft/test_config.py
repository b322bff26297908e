import json
import math
import re

import pytest

from subspace_jax.io import AdapterFileError, ManifestError
from subspace_jax.io.peft._config import check_settings, exact_pattern, read_settings

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def write(folder, config):
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_numbers_and_flags():
    settings = check_settings({**LORA, "use_dora": True, "lora_dropout": 0.25})
    assert settings.flag("use_dora")
    assert not settings.flag("use_rslora")
    assert settings.probability("lora_dropout") == 0.25
    assert settings.integer("r") == 4
    assert settings.number("lora_alpha") == 8.0
    assert settings.ignored == ()


@pytest.mark.parametrize(
    ("name", "read", "value"),
    [
        ("r", "integer", 4.0),
        ("r", "integer", True),
        ("r", "integer", -1),
        ("lora_alpha", "number", "8"),
        ("lora_alpha", "number", math.nan),
        ("lora_alpha", "number", None),
        ("lora_dropout", "probability", 1.0),
        ("use_dora", "flag", 1),
    ],
)
def test_wrong_values(name, read, value):
    with pytest.raises(ManifestError, match=name):
        getattr(check_settings({**LORA, name: value}), read)(name)


@pytest.mark.parametrize(
    ("pattern", "module", "fits"),
    [
        ("query", "encoder.query", True),
        ("query", "encoder.my_query", False),
        ("query", "encoder.query.inner", False),
        ("layer.1.query", "encoder.layer.1.query", True),
        ("^layer.1.query", "encoder.layer.1.query", False),
        (r"layer\.[01]\.(query|key)", "layer.0.key", True),
        (r".*\.output\.dense", "a.output.dense", True),
        ("query|key", "a.key", True),
    ],
)
def test_patterns_fit_as_in_peft(pattern, module, fits):
    # The expression that PEFT searches with.
    assert bool(re.match(rf"(.*\.)?({pattern})$", module)) == fits
    settings = check_settings({**LORA, "rank_pattern": {pattern: 7}})
    assert settings.pattern("rank_pattern", module, 4) == (7 if fits else 4)


def test_the_first_pattern_counts():
    settings = check_settings({**LORA, "alpha_pattern": {"b": 1, "a.b": 2}})
    assert settings.pattern("alpha_pattern", "a.b", 8) == 1


def test_exact_pattern():
    settings = check_settings({**LORA, "rank_pattern": {exact_pattern("a.b"): 7}})
    assert [settings.pattern("rank_pattern", name, 4) for name in ("a.b", "x.a.b", "axb", "a.b.c")] == [7, 4, 4, 4]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"(a+)+": 1}, "repeated group"),
        ({"(a|a)*b": 1}, "repeated group"),
        ({"a" * 501: 1}, "at most 500"),
        ({"(": 1}, "no regular expression"),
        ({"query": "8"}, "expected a number"),
        ([1], "expected an object"),
    ],
)
def test_hostile_patterns(patterns, message):
    settings = check_settings({**LORA, "rank_pattern": patterns})
    with pytest.raises(ManifestError, match=message):
        settings.pattern("rank_pattern", "query", 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["experts.gate"]),
        ("use_bdlora", {"a": 1}),
        ("use_qalora", True),
        ("velora_config", {"rank": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", 1),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
    ],
)
def test_what_changes_the_mathematics_is_refused(name, value):
    with pytest.raises(ManifestError, match=name) as error:
        check_settings({**LORA, name: value})
    assert name in str(error.value).splitlines()[0]


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone(start):
    assert check_settings({**LORA, "init_lora_weights": start}).ignored == ()


def test_every_refused_key_is_named():
    with pytest.raises(ManifestError, match=r"has layer_replication=\[1\]: (.|\n)*use_qalora=True: inputs"):
        check_settings({**LORA, "layer_replication": [1], "use_qalora": True})


@pytest.mark.parametrize("start", ["pissa", "PiSSA", "olora"])
def test_starts_that_the_base_gives_again(start):
    assert check_settings({**LORA, "init_lora_weights": start}).start == start.lower()
    assert check_settings(LORA).start is None


@pytest.mark.parametrize(
    ("name", "value"), [("ensure_weight_tying", True), ("lora_bias", True), ("trainable_token_indices", [5])]
)
def test_what_is_done_as_peft_does_it(name, value):
    assert check_settings({**LORA, name: value}).ignored == ()


def test_unknown_keys_are_told():
    settings = check_settings(
        {**LORA, "corda_config": {"beta": 2}, "eva_config": None, "brand_new": 3, "task_type": "X"}
    )
    assert [line.split(",")[0] for line in settings.ignored] == ["corda_config={'beta': 2}", "brand_new=3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON list"),
        ("[" * 100_000, "no JSON"),
        ('{"peft_type": "LORA", "use_qalora": 1}', "use_qalora"),
    ],
)
def test_damaged_files(text, message, tmp_path):
    with pytest.raises(AdapterFileError, match=message) as error:
        read_settings(write(tmp_path, text))
    assert "adapter_config.json" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(AdapterFileError, match="cannot be read: No such file"):
        read_settings(tmp_path)


def test_overlong_file(tmp_path):
    with pytest.raises(AdapterFileError, match="more than 10000000 bytes"):
        read_settings(write(tmp_path, " " * 10_000_001))
