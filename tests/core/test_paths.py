import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import subspace_jax as sj
from subspace_jax.core import (
    PatternError,
    is_weight,
    leaves_with_paths,
    map_with_paths,
    matches,
    path_string,
    select_paths,
)

from .helpers import adapt, normal


def brute_force(pattern, path):
    """Matches by trying every way to spend the path's names and characters; no regular expressions."""

    def names(patterns, parts):
        if not patterns:
            return not parts
        if patterns[0] == "**":
            return any(names(patterns[1:], parts[i:]) for i in range(len(parts) + 1))
        return bool(parts) and characters(patterns[0], parts[0]) and names(patterns[1:], parts[1:])

    def characters(pattern, text):
        if not pattern:
            return not text
        if pattern[0] == "*":
            return any(characters(pattern[1:], text[i:]) for i in range(len(text) + 1))
        if pattern[0] == "[":
            end = pattern.index("]")
            wanted = pattern[1:end]
            hit = bool(text) and ((text[0] not in wanted[1:]) if wanted[0] == "!" else (text[0] in wanted))
            return hit and characters(pattern[end + 1 :], text[1:])
        if pattern[0] == "{":
            end = pattern.index("}")
            return any(characters(choice + pattern[end + 1 :], text) for choice in pattern[1:end].split(","))
        return bool(text) and pattern[0] in ("?", text[0]) and characters(pattern[1:], text[1:])

    return names(pattern.split("/"), path.split("/"))


name = st.text("ab.", min_size=1, max_size=3)
piece = st.one_of(
    st.sampled_from(["a", "b", ".", "*", "?", "[ab]", "[!a]", "[!ab]", "{a,b}", "{ab,b.}", "{a*,.}"]),
)
part = st.one_of(st.just("**"), st.lists(piece, min_size=1, max_size=3).map("".join).filter(lambda p: "**" not in p))


@settings(max_examples=600, deadline=None)
@given(st.lists(part, min_size=1, max_size=4).map("/".join), st.lists(name, min_size=1, max_size=4).map("/".join))
def test_globs_agree_with_brute_force(pattern, path):
    assert matches(pattern, path) == brute_force(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        *(("**/kernel", "kernel", True), ("**/kernel", "a/b/kernel", True), ("**/kernel", "a/mykernel", False)),
        *(("a/**", "a/b/c", True), ("a/**", "a", True), ("a/**", "ab", False), ("**", "a/b", True)),
        *(("a/**/b", "a/b", True), ("a/**/b", "a/x/y/b", True), ("a/**/b", "ab", False)),
        *(("a**/b", "ab", False), ("a**/b", "axy/b", True), ("*", "a/b", False), ("a?c", "a/c", False)),
        *(
            ("[!x]", "y", True),
            ("a[!x]b", "a/b", False),
            ("[^x]", "x", True),
            ("[^x]", "y", False),
            ("a**", "a/b", False),
        ),
        *((r"[\d]", "5", False), (r"[\d]", "d", True), ("a.c", "abc", False), ("a+", "aa", False)),
        *(("[]", "[]", True), ("[", "[", True), ("{", "{", True), ("{a", "{a", True), ("[]a]", "a", True)),
        *(("layers_[0-3]/w", "layers_2/w", True), ("layers_[0-3]/w", "layers_5/w", False)),
        *(("{query,value}/k*", "value/kernel", True), ("{que*,value}/w", "query/w", True), ("", "a", False)),
        *(("a b/c", "a b/c", True), ("layers/0/w", "layers/0/w", True)),
    ],
)
def test_glob(pattern, path, expected):
    assert matches(pattern, path) is expected


@pytest.mark.parametrize(
    "pattern", ["[z-a]", "[[]", "[!]", "{}", "((", "*[", "\\", "[--x]", "[a\\]", "{a,{b}}", "/", "**/**"]
)
def test_no_text_is_a_malformed_glob(pattern):
    assert matches(pattern, "a") in (True, False)


def test_many_stars_are_quick():
    assert not matches("/".join(["**", "a*a*"] * 4) + "/b", "/".join(["a" * 30] * 12))


def test_paths_of_every_kind_of_tree():
    tree = {"a": [jnp.ones(1), (jnp.ones(2),)], "b": {"c/d": jnp.ones(3), 4: jnp.ones(4)}}
    assert [p for p, _ in leaves_with_paths(tree["a"])] == ["0", "1/0"]
    assert {p for p, _ in leaves_with_paths({"b": {"c/d": 1}})} == {"b/c/d"}
    assert path_string(()) == ""


def test_weights_are_whole_leaves():
    adapted = adapt({"w": normal(0, 4, 3), "b": normal(1, 3)}, "w")
    assert [(p, is_weight(v)) for p, v in leaves_with_paths(adapted)] == [("b", False), ("w", True)]
    assert map_with_paths(lambda path, leaf: path, adapted) == {"b": "b", "w": "w"}


def test_select_paths():
    tree = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "c": {"w": jnp.ones((2, 2))}}
    assert select_paths(tree, "**/w") == ["a/w", "c/w"]
    assert select_paths(tree, lambda path, leaf: leaf.ndim == 1) == ["a/b"]
    assert select_paths(tree, ["a/*", "c/w"]) == ["a/b", "a/w", "c/w"]
    with pytest.raises(PatternError, match=r"'a/v' matches no leaf; nearest paths: 'a/w'"):
        select_paths(tree, ["**/w", "a/v"])


def test_variables_of_nnx_have_the_paths_of_their_arrays():
    """`nnx.Optimizer` initializes with variables and updates with arrays."""
    model = nnx.Dict(head=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), value=nnx.Param(jnp.ones(1)))
    state = nnx.state(model)
    paths = [p for p, _ in leaves_with_paths(state)]
    assert paths == ["head/bias", "head/kernel", "value"] == [p for p, _ in leaves_with_paths(nnx.pure(state))]
    assert select_paths(state, "*/kernel") == ["head/kernel"]
    # A key of a dict, and a field of a stand-in, are names.
    assert [p for p, _ in leaves_with_paths({"a": {"value": jnp.ones(1)}})] == ["a/value"]
    adapted = sj.adapt(state, {"head/kernel": sj.lora(1), "value": sj.full()}, key=jax.random.key(0))
    assert [row.path for row in sj.summary(adapted).rows] == paths
