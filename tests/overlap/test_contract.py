"""The public contract of the overlap operation: errors, and what importing it pulls in."""

import subprocess
import sys

import pytest
import torch

import specforge_lk


def test_unknown_implementation_lists_the_known():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"'fast'.*auto, reference, closed_form"):
        specforge_lk.overlap_terms(z, z, torch.zeros(2), impl="fast")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("target_logits", (2, 4)),
        ("log_normalizer", (2, 1)),
        ("mask", (3,)),
        ("log_coverage", (2, 3)),
        ("tokens", (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    inputs = {
        "draft_logits": torch.zeros(2, 3),
        "target_logits": torch.zeros(2, 3),
        "log_normalizer": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=name):
        specforge_lk.overlap_terms(**inputs | {name: torch.zeros(shape)})


def test_a_full_vocabulary_has_no_log_coverage_to_give():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="log_coverage without log_normalizer"):
        specforge_lk.overlap_terms(z, z, None, log_coverage=torch.zeros(2))


def test_tokens_must_be_integers():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"tokens.*integers.*float32"):
        specforge_lk.overlap_terms(z, z, torch.zeros(2), tokens=torch.zeros(2))


def test_import_is_light():
    code = (
        "import sys, specforge_lk, specforge_lk.losses, specforge_lk.plugin;"
        "print({'specforge', 'triton', 'transformers', 'matplotlib'} & set(sys.modules) or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
