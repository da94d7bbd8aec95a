"""The checks of the doctor, a row each: what it needs, whom it concerns, what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from specforge_lk.doctor.case import Case
from specforge_lk.doctor.checks import rule, states, target, tokens, vocabulary
from specforge_lk.doctor.findings import Finding, Outcome, State

#: The options that an input comes from, and whether a case has it.
_INPUTS: Final[dict[str, Callable[[Case], bool]]] = {
    "--held-out": lambda case: case.bench is not None,
    "--config": lambda case: case.run is not None,
    "--features": lambda case: case.features is not None,
}
HELD_OUT, CONFIG, FEATURES = ("--held-out",), ("--config",), ("--features",)
#: A check that measures where there is nothing to compare with.
EITHER = ("--config", "--held-out")


def _everyone(case: Case) -> str:
    return ""


@dataclass(frozen=True)
class Check:
    """A difference that the doctor looks for.

    Attributes:
        name: in reports.
        run: finds it.
        needs: inputs; of every group one suffices.
        concerns: returns why a case is not concerned, and nothing where it is.
    """

    name: str
    run: Callable[[Case], Sequence[Finding]]
    needs: tuple[tuple[str, ...], ...] = ()
    concerns: Callable[[Case], str] = _everyone


#: All checks, in the order of reports. A new one is a row.
CHECKS: Final[tuple[Check, ...]] = (
    Check("captured layers", states.layers, concerns=states.reads_layers),
    Check("captured layers, off by one", states.neighbors, (HELD_OUT,), states.reads_layers),
    Check("dtype of the features", states.features_dtype, (HELD_OUT, FEATURES)),
    Check(
        "vocabulary mapping",
        vocabulary.mapping_of_training,
        (CONFIG,),
        vocabulary.truncates,
    ),
    Check("order of the vocabulary", vocabulary.mapping_order, (HELD_OUT,), vocabulary.truncates),
    Check("coverage of the vocabulary", vocabulary.coverage, (HELD_OUT,), vocabulary.truncates),
    Check("embeddings", vocabulary.embeddings, (HELD_OUT,), vocabulary.has_embeddings),
    Check("better than frequencies", vocabulary.knows_target, (HELD_OUT,)),
    Check("mask token", tokens.mask_token, (EITHER,), tokens.has_mask_token),
    Check("rotary base and scaling", states.rotary, (EITHER,), states.has_rotary),
    Check("rotary precision", states.rotary_precision, (HELD_OUT,), states.has_rotary),
    Check(
        "norm before the residual",
        states.norm_before_residual,
        (HELD_OUT,),
        states.has_eagle_norms,
    ),
    Check("output norm", states.output_norm, concerns=states.has_eagle_norms),
    Check("chat template", tokens.chat_template, (FEATURES,)),
    Check("system prompt", tokens.system_prompt, (CONFIG,)),
    Check("supervised positions", tokens.supervised_positions, (FEATURES,)),
    Check("dtype of the target's LM head", target.head_dtype, (HELD_OUT, CONFIG)),
    Check("transform of the logits", target.transform, (HELD_OUT,), target.transforms_logits),
    Check("embedding at position 0", target.zeroed_embedding, (HELD_OUT,), target.is_mtp),
    Check("greedy or probabilistic drafting", rule.drafting, (HELD_OUT,), rule.samples),
    Check("top-k and top-p of the draft", rule.draft_truncation, (HELD_OUT,), rule.truncates),
    Check("length", rule.length, (HELD_OUT,)),
)


def examine(case: Case, check: Check) -> Outcome:
    """Return what a check makes of a case; an input that cannot be used leaves it unchecked."""
    if reason := check.concerns(case):
        return Outcome(check.name, State.NOT_CONCERNED, reason)
    missing = [
        " or ".join(group)
        for group in check.needs
        if not any(_INPUTS[option](case) for option in group)
    ]
    if missing:
        return Outcome(check.name, State.NOT_CHECKED, f"give {' and '.join(missing)}")
    try:
        found = tuple(check.run(case))
    except (OSError, ValueError, ImportError) as error:
        return Outcome(check.name, State.NOT_CHECKED, str(error))
    return Outcome(check.name, State.FOUND if found else State.OK, findings=found)


__all__ = ["CHECKS", "Check", "examine"]
