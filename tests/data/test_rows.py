"""A user's rows: read from every kind of file, with every mistake named by its line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_jax.data import DataError, Rows, check_classes, check_form, find_form, read_rows, split_rows
from subspace_jax.data import unused_columns as unused

RECORDS = [{"text": 'a "quoted", text\nof two lines', "label": "x"}, {"text": "été", "label": "y"}]


def write(path, content, encoding="utf-8"):
    path.write_text(content, encoding=encoding, newline="")
    return path


def test_one_table_in_every_kind_of_file(tmp_path):
    import csv

    lines = "".join(json.dumps(r) + "\n" for r in RECORDS)
    write(tmp_path / "a.jsonl", lines, "utf-8-sig")
    write(tmp_path / "a.NDJSON", lines.replace("\n", "\r\n") + "\r\n")
    write(tmp_path / "a.json", json.dumps(RECORDS, indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(RECORDS)
    names = ["a.jsonl", "a.NDJSON", "a.json", "a.csv", "a.tsv"]
    try:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
        names.append("a.parquet")
    except ImportError:
        pass
    for name in names:
        assert list(read_rows(tmp_path / name).records) == RECORDS, name
    assert read_rows(tmp_path / "a.csv").numbers == (2, 4)  # the first row has two lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": }\n\n[1]\n{"a": NaN}\n{"a": 1, "a": 2}\n',
            ["line 2", "line 4", "line 5", "line 6"],
        ),
        ("a.jsonl", "\n \n", ["no rows"]),
        ("a.json", '[{"a": 1}, 2]', ["entry 2"]),
        ("a.json", '[{"a": 1},]', ["JSON"]),
        ("a.csv", "a,b\n1,2\n1\n1,2,3\n", ["line 3: 1 cells", "line 4: 3 cells"]),
        ("a.csv", "a,a\n1,2\n", ["twice: a"]),
        ("a.csv", 'a,b\n1,"2\n', ["CSV"]),
        ("a.csv", "", ["no rows"]),
        ("a.txt", "text", [".jsonl"]),
        ("a.parquet", "no parquet", ["Parquet"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path / name, content))
    assert all(part in str(error.value) for part in [*message, name])


def test_other_encodings_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xe9t\xe9"}\n')
    with pytest.raises(DataError, match=r"line 2 is not UTF-8 \(byte 0xe9\)"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "b.jsonl")


def rows(*records):
    return Rows(tuple(records), tuple(range(1, len(records) + 1)), "data.jsonl")


def test_forms_are_found_by_columns():
    say = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert find_form(rows({"messages": say, "text": "x"})) == "messages"
    assert find_form(rows({"prompt": "a", "completion": "b", "text": "c"})) == "completion"
    assert find_form(rows({"text": "a", "label": 1, "id": 2})) == "classification"
    assert find_form(rows({"text": "a"})) == "text"
    assert find_form(rows({"review": "a", "stars": 1}), {"text": "review", "label": "stars"}) == "classification"
    assert unused(rows({"text": "a", "label": 1, "id": 2}), "classification") == ("id",)


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="line 2: has body"):
        find_form(rows({"text": "a"}, {"body": "b"}))
    with pytest.raises(DataError, match=r"different forms.*\n  line 3: text"):
        find_form(rows({"text": "a", "label": 1}, {"text": "b", "label": 2}, {"text": "c"}))
    with pytest.raises(DataError, match=r"'review', named for 'text', is missing in 1 rows.*\n  line 2"):
        find_form(rows({"review": "a", "label": 1}, {"label": 2}), {"text": "review"})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None, "label": 1}, "'text' is null"),
        ({"text": " ", "label": 1}, "'text' is empty"),
        ({"text": 3, "label": 1}, "'text' is int"),
        ({"text": "a", "label": None}, "'label' is null"),
        ({"text": "a", "label": ""}, "'label' is ''"),
        ({"text": "a", "label": 1.5}, "'label' is 1.5"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' is str"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1 of 'messages' has no role"),
        ({"messages": [{"role": "user", "content": ""}]}, "message 1 of 'messages' (user) has no content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "'messages' has no message of the assistant"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ],
)
def test_fields_that_cannot_be_used_are_named_by_line(record, message):
    form = find_form(rows(record))
    with pytest.raises(DataError) as error:
        check_form(rows(record), form)
    assert f"line 1: {message}" in str(error.value)


def test_labels_have_one_type_and_tools_may_be_silent():
    with pytest.raises(DataError, match=r"most are int.*\n  line 3: True \(bool\)"):
        check_form(rows(*({"text": "a", "label": label} for label in (1, 2, True))), "classification")
    calls = [{"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert check_form(rows({"messages": calls, "tools": [1], "id": 3}), "messages") == [
        {"messages": calls, "tools": [1]}
    ]


def test_long_lists_of_mistakes_are_cut():
    with pytest.raises(DataError, match=r"line 12.*\n  and 28 more"):
        check_form(rows(*({"text": ""} for _ in range(40))), "text")


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=2, max_size=60),
    st.floats(0.05, 0.9),
    st.integers(0, 3),
)
def test_a_split_keeps_copies_together_and_every_class_in_training(pairs, fraction, seed):
    texts, labels = [f"t{text}" for text, _ in pairs], [label for _, label in pairs]
    if len(set(texts)) < 2:
        return
    found = split_rows(texts, fraction, labels=labels, seed=seed)
    assert sorted([*found.train, *found.validation]) == list(range(len(pairs)))
    assert found.train
    assert found.validation
    assert not {texts[i] for i in found.train} & {texts[i] for i in found.validation}
    assert found == split_rows(texts, fraction, labels=labels, seed=seed)


def test_a_split_is_stratified():
    labels = ["rare"] * 20 + ["often"] * 180
    found = split_rows([str(i) for i in range(200)], 0.1, labels=labels, seed=3)
    assert [labels[i] for i in found.validation].count("rare") == 2
    assert len(found.validation) == 20
    other = split_rows([str(i) for i in range(200)], 0.1, labels=labels, seed=4)
    assert other != found


def test_impossible_splits_and_classes_are_refused():
    with pytest.raises(DataError, match="copies of one input"):
        split_rows(["a", "a"], 0.5)
    with pytest.raises(DataError, match="between 0 and 1"):
        split_rows(["a", "b"], 1.0)
    three = rows(*({"label": label} for label in ("x", "x", "y")))
    with pytest.raises(DataError, match="line 3: 'y'"):
        check_classes(three, ["x", "x", "y"])
    assert check_classes(three, ["x", "x", "y"], ["x"]) == ("x", "y")
    with pytest.raises(DataError, match="never sees: 'z'"):
        check_classes(three, ["x", "x", "y"], ["z"])
    with pytest.raises(DataError, match="every row has the label 'x'"):
        check_classes(three, ["x", "x", "x"])
