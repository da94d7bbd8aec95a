"""The text of a serving rule."""

from dataclasses import fields

import pytest
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.serving import PRESETS, Drafting, Sampling, Serving, parse


@pytest.mark.parametrize(
    "rule",
    [
        *(preset.rule for preset in PRESETS.values()),
        Serving(0),
        Serving(1 / 3, top_k=20, top_p=0.1 + 0.2, draft_temperature=1e-5, draft_top_p=0.9),
    ],
    ids=str,
)
def test_a_rule_is_read_back_from_its_text(rule):
    assert parse(str(rule)) == rule


def test_text_says_what_is_not_the_default():
    assert str(Sampling(0.7, top_p=0.95)) == "temperature=0.7,top_p=0.95"
    assert str(parse(" vllm, temperature=0.7 ")) == "temperature=0.7,drafting=greedy"
    # What has no effect is left out, so that rules are equal that decode alike.
    assert parse("temperature=0,top_p=0.9") == parse("vllm-block,temperature=0") == Serving(0)
    assert parse("verification=block,drafting=greedy") == Serving(drafting=Drafting.GREEDY)
    assert parse("temperature=0.7,draft_temperature=0.7") == Serving(0.7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begin with one of vllm, "),
        ("top_q=1", "'top_q=1': a serving rule has temperature, top_k, "),
        ("temperature=nan", "temperature must be 0, or at least 1e-37, got nan"),
        ("top_k=2.5", "top_k=2.5: give a whole number"),
        ("top_p=0", "top_p must be above 0 and at most 1, got 0.0"),
        ("drafting=some", "drafting=some: give probabilistic, greedy"),
        ("draft_top_k=-1", "draft_top_k must be 1 or more, or 0 for all tokens, got -1"),
        ("draft_temperature=0", "drafting=greedy takes the likeliest"),
        ("temperature=1,temperature=0", "has temperature twice"),
    ],
)
def test_bad_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_the_help_of_eval_names_every_preset_and_setting():
    shown = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200"}).output
    for name in (*PRESETS, *(field.name for field in fields(Serving))):
        assert name in shown
