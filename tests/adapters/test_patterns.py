"""Patterns of an upload match as Python's do, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneplusn.adapters.converters.patterns import Matcher
from oneplusn.errors import AdapterInvalid

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.mlp.down_proj",
    "model.layers.3.block_sparse_moe.experts.7.w1",
    "transformer.h.0.attn.c_attn",
    "lm-head",
    "q_proj",
    "",
)

PATTERNS = (
    "q_proj",
    r"^model\.layers\.0\.self_attn\.q_proj$",
    ".*q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.\w+)",
    r"model\.layers\.([0-9]|1[0-2])\..*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    r"[^.]+(\.[^.]+)*",
    r"\S+\B\S*",
    r"(.{3}){2,4}.*",
    r"(a|a)*|.*proj\Z",
    r"\Amodel.*|[^\W\d]+",
    r"[^a-m]*|(?:)*.*",
    r"(?:^|.*\.)h\.\d\..*[^b]",
    ".+?(?:c_attn|w1)",
    "(|q)_?.*",
    "",
)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", PATHS)
def test_matching_is_that_of_python(pattern, path):
    matcher = Matcher()
    assert matcher.fullmatch(pattern, path) == (re.fullmatch(pattern, path) is not None)
    tail = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path)
    assert matcher.match_tail(pattern, path) == (tail is not None)


def _regex() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(
        ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", ""]
    )

    def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        repeats = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,}"])
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
            st.tuples(inner, repeats).map(lambda pair: f"({pair[0]}){pair[1]}"),
        )

    return st.recursive(atoms, combine, max_leaves=8)


@settings(max_examples=300)
@given(_regex(), st.text("ab.1", max_size=8))
def test_random_patterns_match_as_python_does(pattern, text):
    assert Matcher().fullmatch(pattern, text) == (re.fullmatch(pattern, text) is not None)


HANGING = "(?:.|..)*[!?]"


def test_a_pattern_that_would_hang_is_cut_off():
    with pytest.raises(AdapterInvalid) as refusal:
        Matcher(budget_s=0.05).fullmatch(HANGING, "model.layers.0.self_attn.q_proj")
    assert refusal.value.code == "pattern_too_costly"
    assert "names of the modules instead" in str(refusal.value)


def test_work_is_bounded_over_all_modules_together():
    matcher = Matcher(budget_s=0.02)
    paths = [f"model.layers.{index}.self_attn.q_proj" for index in range(100_000)]
    with pytest.raises(AdapterInvalid) as refusal:
        any(matcher.fullmatch(".*never", path) for path in paths)
    assert refusal.value.code == "pattern_too_costly"


@pytest.mark.parametrize(
    "pattern", ["(a", "[", "(" * 5000, "a" * 5000, "(?P<n>a)(?P=m)"], ids=lambda p: p[:12]
)
def test_what_is_no_pattern_or_too_long_is_refused(pattern):
    with pytest.raises(AdapterInvalid) as refusal:
        Matcher().fullmatch(pattern, "aa")
    assert refusal.value.code == "pattern_not_supported"
    assert "a list of names" in str(refusal.value)
