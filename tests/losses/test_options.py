"""Options of the losses: what is accepted, and what an error says."""

import inspect
import re
import sys

import pydantic
import pytest

from specforge_lk.losses import LOSSES

OPTIONS = {record.name: record.options for record in LOSSES}


def test_names_and_defaults():
    assert list(OPTIONS) == ["kl", "tv", "lk_alpha", "lk_lambda", "reverse_kl"]
    defaults = OPTIONS["lk_lambda"]()
    assert (defaults.eta, defaults.lambda_scope, defaults.kl_term) == (3.0, "head", "renormalized")


def test_every_loss_and_option_says_what_it_is():
    for record in LOSSES:
        assert inspect.getdoc(record.build).splitlines()[0].endswith(".")
        for name, option in record.options.model_fields.items():
            assert option.description, f"{record.name}.{name}"


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
        ("lk_lambda", {"lambda_scope": "batch"}, r"lambda_scope\b.*'head', 'token' or 'fixed'"),
        ("lk_lambda", {"lambda_fixed": 0.5}, "lambda_fixed.*lambda_scope='fixed'"),
        (
            "lk_lambda",
            {"lambda_scope": "fixed", "lambda_fixed": 1.5},
            r"lambda_fixed\b.*less than or equal to 1",
        ),
        ("kl", {"kl_term": "full"}, r"kl_term\b.*'renormalized' or 'restricted'"),
        ("kl", {"eta": 3}, r"eta\b.*Extra inputs"),
        ("tv", {"kl_term": "restricted"}, r"kl_term\b.*Extra inputs"),
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
