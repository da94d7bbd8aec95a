"""What a run's data were sampled by is compared with the rule that its loss trains for."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest

from specforge_lk.losses import LOSSES

(RECORD,) = (record for record in LOSSES if record.name == "tau")
HOT, COOL = {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}


@pytest.fixture(params=["features", "tokens"])
def data(request, tmp_path):
    """Return a function that writes what data of these samplings say: it returns the run config."""

    def write(*samplings):
        paths = {"hidden_states_path": "", "prompts_path": "", "train_data_path": ""}
        if request.param == "features":
            paths["hidden_states_path"] = str(tmp_path)
            (tmp_path / "capture.json").write_text(json.dumps({"sampling": samplings}))
        else:
            path = tmp_path / "tokens.jsonl"
            paths["prompts_path"] = str(path)
            rows = [{"input_ids": [1], **({"sampling": s} if s else {})} for s in samplings]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = SimpleNamespace(target_model_path="some/target")
        return SimpleNamespace(data=SimpleNamespace(**paths), model=model)

    return write


def check(config, **options):
    RECORD.check(RECORD.options(**options), config)


def test_fitting_samples_are_not_mentioned(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(data(HOT))
        check(data(HOT), serving="vllm")
        check(data(COOL), serving="temperature=0.7,top_p=0.9,draft_temperature=0.5")
        missing = data()
        missing.data.hidden_states_path += "/not captured yet"
        check(missing)


def test_other_samples_are_named_with_both_rules_and_the_remedy(data):
    with pytest.warns(UserWarning, match="some that were sampled") as said:
        check(data(HOT, COOL, None), serving="temperature=0")
    (message,) = (str(warning.message) for warning in said)
    assert "serving=temperature=0 is for responses sampled at temperature=0" in message
    assert "sampled at temperature=0.7,top_p=0.9; temperature=1." in message
    assert "`specforge-lk generate --target some/target --serving temperature=0 --pr" in message


@pytest.mark.parametrize("known", [(), (None,), (HOT, None)])
def test_unknown_samples_are_said(data, known):
    with pytest.warns(UserWarning, match="does not say of all responses.*is for temperature=1"):
        check(data(*known))


def test_what_cannot_be_read_is_an_error(data):
    with pytest.raises(ValueError, match=r"'sampling'.*top_q"):
        check(data({"temperature": 1.0, "top_q": 3}))
