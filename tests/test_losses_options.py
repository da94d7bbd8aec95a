"""Options of the losses: what is accepted, and what an error says."""

import re
from importlib.util import find_spec

import pydantic
import pytest

from specforge_lk.losses import LOSSES

OPTIONS = {record.name: record.options for record in LOSSES}


def test_names_and_defaults():
    assert list(OPTIONS) == ["kl", "tv", "lk_alpha", "lk_lambda", "reverse_kl"]
    defaults = OPTIONS["lk_lambda"]()
    assert (defaults.eta, defaults.lambda_scope, defaults.kl_term) == (3.0, "head", "renormalized")


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


def _specforge_has_plugins():
    return find_spec("specforge") is not None and find_spec("specforge.plugins") is not None


@pytest.mark.skipif(not _specforge_has_plugins(), reason="needs the patched SpecForge")
def test_plugin_registers_every_loss():
    from specforge_lk.plugin import create_plugin

    plugin = create_plugin()
    assert plugin.name == "specforge-lk" and plugin.api_version == 1
    assert [loss.name for loss in plugin.losses] == list(OPTIONS)
    for loss in plugin.losses:
        assert loss.build(loss.options()).options == loss.options()


@pytest.mark.skipif(_specforge_has_plugins(), reason="needs a SpecForge without the patches")
def test_plugin_without_the_patches_says_what_to_do():
    from specforge_lk.plugin import create_plugin

    with pytest.raises(ImportError, match="specforge-lk patch apply"):
        create_plugin()
