"""Options of the losses: what is accepted, and what an error says."""

import inspect
import re
import sys

import pydantic
import pytest

from specforge_lk.losses import LOSSES

OPTIONS = {record.name: record.options for record in LOSSES}


def test_names_and_defaults():
    assert list(OPTIONS) == ["kl", "tv", "lk_alpha", "lk_lambda", "tau", "reverse_kl"]
    defaults = OPTIONS["lk_lambda"]()
    assert (defaults.eta, defaults.lambda_scope, defaults.kl_term) == (3.0, "head", "renormalized")


def test_every_loss_and_option_says_what_it_is():
    for record in LOSSES:
        assert inspect.getdoc(record.build).splitlines()[0].endswith(".")
        for name, option in record.options.model_fields.items():
            assert option.description, f"{record.name}.{name}"


def test_a_rule_is_kept_as_its_canonical_text():
    """A checkpoint records it: one rule must not have two names."""
    for text, canonical in {
        "temperature=1.0": "temperature=1",
        "temperature=0,top_k=5,drafting=probabilistic": "temperature=0",
        "vllm,temperature=0.70": "temperature=0.7,drafting=greedy",
        "drafting=greedy,verification=block": "temperature=1,drafting=greedy",
    }.items():
        assert OPTIONS["tau"](serving=text).serving == canonical


def test_numbers_may_come_as_strings():
    assert OPTIONS["lk_lambda"](eta="3").eta == 3.0


def test_options_survive_a_round_trip():
    for options in OPTIONS.values():
        assert options(**options().model_dump()) == options()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lk_lambda", {"eta": True}, r"eta\b.*must be a number"),
        ("lk_lambda", {"eta": "abc"}, r"eta\b.*valid number"),
        ("lk_lambda", {"eta": 0}, r"eta\b.*greater than 0"),
        ("lk_lambda", {"eta": "nan"}, r"eta\b.*finite"),
        ("lk_lambda", {"eta": float("inf")}, r"eta\b.*finite"),
        (
            "lk_lambda",
            {"lambda_scope": "batch"},
            r"lambda_scope\b.*'fixed' or 'schedule'",
        ),
        ("lk_lambda", {"lambda_fixed": 0.5}, "lambda_fixed.*lambda_scope='fixed'"),
        ("tau", {"lambda_until": 0.5}, "lambda_until.*lambda_scope='schedule'"),
        (
            "lk_lambda",
            {"lambda_scope": "fixed", "lambda_fixed": 1.5},
            r"lambda_fixed\b.*less than or equal to 1",
        ),
        ("kl", {"kl_term": "full"}, r"kl_term\b.*'renormalized' or 'restricted'"),
        ("kl", {"eta": 3}, r"eta\b.*Extra inputs"),
        ("tv", {"kl_term": "restricted"}, r"kl_term\b.*Extra inputs"),
        ("tau", {"lambda_fixed": 0.5}, "lambda_fixed.*lambda_scope='fixed'"),
        ("tau", {"estimator": "biased"}, r"estimator\b.*'weighted' or 'product'"),
        ("tau", {"chain_weight": "auf"}, r"chain_weight\b.*Extra inputs"),
        ("tv", {"chain_weight": "decay"}, r"chain_weight\b.*'gamma', 'survival', 'dpace' or 'auf'"),
        ("tv", {"serving": "top_q=3"}, r"serving\b.*a serving rule has temperature, top_k"),
        ("tv", {"serving": "temperature=-1"}, r"serving\b.*temperature must be 0, or at least"),
        ("tv", {"serving": "sglang-block"}, r"serving\b.*verifies by block.*verification=token"),
        ("tv", {"sharpness": 4}, "sharpness=4.0 has no effect.*drafting=greedy"),
        ("tv", {"serving": "temperature=0", "sharpness": 0}, r"sharpness\b.*greater than 0"),
        ("kl", {"serving": "temperature=0", "sharpness": 4}, "sharpness=4.0 has no effect: KL"),
        ("lk_alpha", {"serving": "draft_top_k=3"}, "serving.*truncates the draft.*loss=tv"),
        ("reverse_kl", {"serving": "temperature=0"}, r"serving.*KL\(q \|\| p\) is infinite"),
        ("reverse_kl", {"serving": "top_p=0.9"}, r"serving.*KL\(q \|\| p\) is infinite"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(pydantic.ValidationError) as error:
        OPTIONS[name](**options)
    assert re.search(message, str(error.value), re.DOTALL)


def test_plugin_registers_every_loss():
    from specforge_lk.plugin import create_plugin

    plugin = create_plugin()
    assert plugin.name == "specforge-lk" and plugin.api_version == 1
    assert [loss.name for loss in plugin.losses] == list(OPTIONS)
    for loss in plugin.losses:
        assert loss.build(loss.options()).options == loss.options()


def test_plugin_without_the_patches_says_what_to_do(monkeypatch):
    from specforge_lk.plugin import create_plugin

    monkeypatch.setitem(sys.modules, "specforge.plugins", None)  # as if there were no such module
    with pytest.raises(ImportError, match="specforge-lk patch apply"):
        create_plugin()
