"""Caption rules."""

from random import Random

import pytest

from library.config_util import CaptionRules
from library.data.captions import is_dropped, vary_caption


def process(caption, seed=0, epoch=1, step=0, max_steps=100, **rules):
    given, rng = CaptionRules(**rules), Random(seed)
    return "" if is_dropped(given, rng, epoch) else vary_caption(caption, given, rng, step=step, max_steps=max_steps)


def variants(caption, count=60, **rules):
    return {process(caption, seed=seed, **rules) for seed in range(count)}


def test_untouched():
    assert process("a, b ,c") == "a, b ,c"
    assert process("first\nsecond") == "first"


def test_prefix_and_suffix_reach_the_chosen_line():
    rules = {"caption_prefix": "photo of", "caption_suffix": "end", "enable_wildcard": True}
    assert variants("cat\ndog", **rules) == {"photo of cat end", "photo of dog end"}


def test_wildcards():
    assert variants("{a|b} {{lit}} {c}", enable_wildcard=True) == {"a {lit} c", "b {lit} c"}
    assert variants("x{|y}", enable_wildcard=True) == {"x", "xy"}
    assert process("{a|b}") == "{a|b}"


def test_shuffle_keeps_tags_and_the_first_ones():
    found = variants("a, b, c, d", shuffle_caption=True, keep_tokens=2)
    assert found == {"a, b, c, d", "a, b, d, c"}


def test_keep_tokens_separator():
    rules = {"shuffle_caption": True, "keep_tokens_separator": "|||"}
    found = variants("x, y ||| a, b ||| z", **rules)
    assert found == {"x, y, a, b, z", "x, y, b, a, z"}
    # without shuffling the marker does not stay in the text
    assert process("x ||| a, b", keep_tokens_separator="|||") == "x, a, b"


def test_joined_with_comma_whatever_the_separator():
    assert variants("a;b", shuffle_caption=True, caption_separator=";") == {"a, b", "b, a"}


def test_secondary_separator():
    assert process("x;;;y, b", secondary_separator=";;;") == "x,y, b"


def test_dropout():
    assert variants("a", caption_dropout_rate=0.5) == {"", "a"}
    assert process("a", caption_dropout_rate=1.0) == ""
    assert [process("a", epoch=e, caption_dropout_every_n_epochs=2) for e in (1, 2, 3, 4)] == ["a", "", "a", ""]


def test_tag_dropout_spares_the_kept():
    found = variants("a, b, c", caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert found == {"a", "a, b", "a, c", "a, b, c"}
    assert process("a, b", caption_tag_dropout_rate=1.0, keep_tokens=1) == "a"


@pytest.mark.parametrize(("step", "count"), [(0, 2), (5, 3), (9, 4), (10, 5), (50, 5)])
@pytest.mark.parametrize("given", [10, 0.1])
def test_warmup(step, count, given):
    text = process("a, b, c, d, e", step=step, token_warmup_min=2, token_warmup_step=given)
    assert len(text.split(", ")) == count


def test_captions_that_vary_or_are_dropped_are_known():
    plain = CaptionRules(caption_prefix="a", secondary_separator=";")
    assert not plain.varies and not plain.drops
    for rule in (
        {"shuffle_caption": True},
        {"enable_wildcard": True},
        {"token_warmup_step": 3},
        {"caption_tag_dropout_rate": 0.1},
    ):
        assert CaptionRules(**rule).varies and not CaptionRules(**rule).drops
    for rule in ({"caption_dropout_rate": 0.1}, {"caption_dropout_every_n_epochs": 2}):
        assert CaptionRules(**rule).drops and not CaptionRules(**rule).varies
