"""What each fix of the series changes, measured in the SpecForge that is on the path.

``python -m tools.probes NAME`` prints the figures of one probe as JSON. It runs with the SpecForge
of any patch level, so it imports nothing that a patch adds; `tools.defects` compares levels.
"""

from __future__ import annotations

from collections.abc import Callable

from tools.probes import data, drafts, objective, target, training
from tools.probes.common import Figures

PROBES: dict[str, Callable[[], Figures]] = {
    probe.__name__: probe
    for probe in (
        objective.without_triton,
        target.target_head_files,
        target.target_logits,
        target.target_head_precision,
        data.missing_features,
        data.pickled_code,
        objective.lk_objective,
        objective.kl_decay_default,
        training.acceptance_metric,
        data.streamed_samples,
        data.supervised_states,
        drafts.vocabulary_mapping,
        drafts.exported_settings,
        drafts.rotary_angles,
        training.evaluation_random_numbers,
        objective.legacy_lambda,
        objective.legacy_alpha,
        objective.registered_lk_lambda,
        objective.registered_lk_alpha,
    )
}
