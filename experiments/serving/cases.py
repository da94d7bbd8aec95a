"""The drafts of `make serve-check`, in the form that vLLM loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.runner import CONFIGS, RUNS, Training
from experiments.serving.layouts import write_eagle3_1, write_mimo
from specforge_lk.engines import VLLM_METHOD, VLLM_PROPOSER
from specforge_lk.files import write_text

SERVING = RUNS / "serving"
#: Every draft here reads what EAGLE-3 reads, or a part of it: one capture serves all.
FEATURES = RUNS / "features" / "train"
#: Drafted tokens per step, K.
HEADS = 4

Sampling = Literal["greedy", "probabilistic"]


@dataclass(frozen=True)
class Layout:
    """Another form than the exported one that vLLM is given.

    Attributes:
        write: makes it, from the exported draft, in a folder.
        decoded: whether decoding here reads it as well, and not the exported draft.
    """

    write: Callable[[Path, Path], None]
    decoded: bool = False


@dataclass(frozen=True)
class ServedDraft(Training):
    """A training whose draft config is changed to what vLLM loads.

    Attributes:
        changes: keys of the draft's config that differ from the committed one.
        method: vLLM's name of the algorithm; None where it has a loader but cannot serve.
        hf_overrides: keys that the target's config needs for vLLM to build the draft.
        options: arguments of vLLM's ``LLM``; `engine_options` has all of them.
        layout: what vLLM is given; None for the exported draft itself.
        runs: temperature and drafting of every comparison.
        given: a draft that was exported before, to check instead of training one.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    runs: tuple[tuple[float, Sampling], ...] = ((0.0, "greedy"),)
    given: Path | None = None

    @property
    def name(self) -> str:
        return self.parent.name

    @property
    def draft(self) -> Path:
        return self.given or super().draft

    @property
    def served(self) -> Path:
        """The folder that vLLM is given."""
        return self.parent / "served" if self.layout else self.draft

    @property
    def decoded(self) -> Path:
        """The folder that decoding here reads."""
        return self.served if self.layout and self.layout.decoded else self.draft

    def write_served(self) -> None:
        """Write `served` where that is not the exported draft itself."""
        if self.layout:
            self.layout.write(self.draft, self.served)

    @property
    def config_path(self) -> Path:
        return self.parent / "config.yaml"

    def write_config(self) -> None:
        """Write config.yaml and draft.json of this training from the committed ones."""
        config = yaml.safe_load((CONFIGS / f"{self.algorithm}.yaml").read_text())
        draft = json.loads(Path(config["model"]["draft_model_config"]).read_text()) | self.changes
        config["data"]["hidden_states_path"] = str(FEATURES)
        config["model"]["draft_model_config"] = str(self.parent / "draft.json")
        if draft.get("draft_vocab_size", draft["vocab_size"]) == draft["vocab_size"]:
            config["model"].pop("vocab_mapping_path", None)
        write_text(self.parent / "draft.json", json.dumps(draft, indent=2) + "\n")
        write_text(self.config_path, yaml.safe_dump(config, sort_keys=False))

    @property
    def engine_options(self) -> dict[str, Any]:
        """Further arguments of vLLM's ``LLM``."""
        if self.method != VLLM_METHOD:
            return self.options
        return self.options | {"additional_config": {"specforge_lk": {"draft": str(self.served)}}}

    def speculative_config(self, sampling: Sampling) -> dict[str, Any]:
        """Return vLLM's ``speculative_config`` of this draft."""
        config: dict[str, Any] = {
            "method": self.method,
            "model": VLLM_PROPOSER if self.method == VLLM_METHOD else str(self.served),
            "num_speculative_tokens": HEADS,
        }
        if sampling == "probabilistic":
            config |= {
                "draft_sample_method": "probabilistic",
                "rejection_sample_method": "standard",
            }
        return config


def _draft(name: str, algorithm: str, loss: str = "lk_lambda", **options: Any) -> ServedDraft:
    return ServedDraft(algorithm, loss, 0, SERVING / name, epochs=1, batch=2, **options)


#: The whole vocabulary is twelve times the work of 4096 tokens. To see whether drafts are loaded
#: and read rightly they need not be good, but some of their tokens must be accepted.
DRAFTS = (
    _draft(
        "eagle3",
        "eagle3",
        method="eagle3",
        runs=((0.0, "greedy"), (1.0, "probabilistic"), (1.0, "greedy")),
    ),
    _draft(
        "eagle3_1",
        "eagle3",
        changes={"fc_norm": True},
        method="eagle3",
        layout=Layout(write_eagle3_1, decoded=True),
        max_steps=64,
    ),
    _draft(
        "medusa",
        "medusa",
        # The only form in which vLLM loads a truncated vocabulary. Heads of their own would need
        # the whole one, 113 million parameters.
        changes={"original_lm_head": True},
        method="medusa",
        # vLLM 0.32.0 reads token_map but does not count it as loaded, and would refuse the draft.
        options={"model_loader_extra_config": {"enable_weights_track": False}},
        runs=((0.0, "greedy"), (1.0, "greedy")),
        max_steps=64,
    ),
    _draft(
        "mtp",
        "mtp",
        # One position in training, which a quarter of the work buys; serving uses the module for
        # all of them.
        loss="untuned",
        method="mtp",
        # vLLM builds the module from the target's config.
        hf_overrides={"num_nextn_predict_layers": 1},
        layout=Layout(write_mimo),
        runs=((0.0, "greedy"), (1.0, "probabilistic")),
        max_steps=24,
    ),
    # The recipes as they are: a truncated vocabulary, and for MEDUSA an LM head per head. Neither
    # has a method of vLLM's own.
    *(
        _draft(
            f"{algorithm}_recipe",
            algorithm,
            method=VLLM_METHOD,
            runs=((0.0, "greedy"), (1.0, "greedy")),
            max_steps=64,
        )
        for algorithm in ("medusa", "mlp_speculator")
    ),
    _draft(
        "mlp_speculator",
        "mlp_speculator",
        # vLLM's class has the whole vocabulary; tied, it is a third of the parameters. It is only
        # loaded and run once.
        changes={"draft_vocab_size": 49152, "tie_weights": True},
        runs=(),
        max_steps=4,
    ),
)
