"""Every algorithm trains on the states that docs/supervised_positions.md names, and on no others.

The sign of one target state after the other is changed, and of one input state after the other;
what the losses of the draft positions notice is compared with the definition, token by token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from specforge.application import resolve_run
from specforge.config import load_config
from specforge.runtime.contracts import TrainBatch
from specforge.training.assembly import build_model_bundle
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE
from training_run import DRAFT_VOCAB_SIZE, HEADS, prepare

from specforge_lk.data.vocabulary import save_mapping, vocabulary_mapping
from specforge_lk.evaluate.teacher_forced import Places

BLOCKS = ("dflash", "domino", "dspark")
LAST_STATE_ALONE = ("medusa", "mlp_speculator", "mtp")
ALGORITHMS = ("eagle3", "peagle", *BLOCKS, *LAST_STATE_ALONE)
#: Of the draft, the target's states and of what the draft reads.
FEATURES = {
    "eagle3": ("target", "hidden_state", 3),
    "peagle": ("target", "hidden_state", 3),
    **dict.fromkeys(BLOCKS, ("target_last_hidden_states", "hidden_states", 2)),
    **dict.fromkeys(LAST_STATE_ALONE, ("hidden_state", "hidden_state", 1)),
}
#: More anchors than a sample has positions, and no depth thinned out.
ALL_POSITIONS = ("training.num_anchors=256", "training.down_sample_ratio=1")

SAMPLES = {
    # Three answers, of which the second has two tokens and the last is cut.
    "several turns": [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1],
    # An answer of one token, and one that ends before the sample.
    "finished": [0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0],
    "answer first": [1, 1, 1, 0, 0, 0, 1, 1, 1, 1],
}
#: A draft position and the target state that it is compared with.
Pair = tuple[int, int]


def supervised_pairs(mask: list[int]) -> set[Pair]:
    """The definition: (k, t + k) where tokens t + 1 to t + 1 + k are all the response's."""
    pairs = set()
    for t in range(len(mask)):
        for k in range(1, HEADS + 1):
            tokens = range(t + 1, t + k + 2)
            if all(token < len(mask) and mask[token] for token in tokens):
                pairs.add((k, t + k))
    return pairs


@dataclass(frozen=True)
class Training:
    """An algorithm's strategy with its data providers, built as `specforge train` builds them."""

    algorithm: str
    strategy: Any
    offline: Any
    streaming: Any

    def features(self, mask: list[int], seed: int) -> dict[str, torch.Tensor]:
        """Random captured features of one sample, under the names of its stored file."""
        generator = torch.Generator().manual_seed(seed)
        length, layers = len(mask), FEATURES[self.algorithm][2]
        sources = {
            "input_ids": torch.randint(VOCAB_SIZE, (length,), generator=generator),
            "loss_mask": torch.tensor(mask),
            "aux_hidden_states": torch.randn(1, length, layers * HIDDEN_SIZE, generator=generator),
            "last_hidden_states": torch.randn(1, length, HIDDEN_SIZE, generator=generator),
        }
        return self.offline.capture_layout.materialize(sources)

    def batch(self, samples: list[dict[str, torch.Tensor]], source: str) -> dict[str, torch.Tensor]:
        """Stored samples as training gets them, from files or from a capture server."""
        if source == "files":
            normalize = self.offline.build_normalizer(64)
            return self.offline.build_collator()([normalize(sample) for sample in samples])
        stored, sent = self.offline.capture_layout, self.streaming.layout
        streamed = []
        for sample in samples:
            features = {name: sample[name][None] for name, _, _ in sent.passthrough}
            for field in ("aux_feature", "last_hidden_feature"):
                if getattr(sent, field):
                    features[getattr(sent, field)] = sample[getattr(stored, field)]
            if sent.attention_mask_feature:
                features[sent.attention_mask_feature] = torch.ones_like(features["input_ids"])
            streamed.append(features)
        return self.streaming.build_collator()(streamed)

    @torch.no_grad()
    def losses(
        self, batch: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[list[float], dict[str, Any]]:
        """Summed KL of every draft position, and all ratio metrics.

        Args:
            batch: what the draft and the loss read.
            targets: the target's states for the loss, where the draft reads the same feature.
        """
        torch.manual_seed(0)
        tensors = TrainBatch(
            sample_ids=["0"],
            strategy=self.algorithm,
            tensors=batch,
            metadata={"target_repr": "hidden_state"},
        )
        if targets is None:
            output = self.strategy.forward_loss(tensors)
        else:
            head = self.strategy.target_head
            with mock.patch.object(
                head,
                "preprocess",
                lambda ids, _, mask: type(head).preprocess(head, ids, targets, mask),
            ):
                output = self.strategy.forward_loss(tensors)
        assert output.loss.isfinite()
        return output.ratio_metrics["kl"][0].tolist(), output.ratio_metrics

    def noticed(self, batch: dict[str, torch.Tensor], row: int, *, target: bool) -> set[Pair]:
        """Draft positions and states of a row: the loss of one changes with the other's sign."""
        before, _ = self.losses(batch)
        found = set()
        for state in range(batch["input_ids"].shape[1]):
            after = self._losses_without(batch, row, state, target)
            changes = zip(before, after, strict=True)
            found |= {(k, state) for k, (old, new) in enumerate(changes, 1) if old != new}
        return found

    def _losses_without(
        self, batch: dict[str, torch.Tensor], row: int, state: int, target: bool
    ) -> list[float]:
        """The losses with one state of the target, or of what the draft reads, negated."""
        name = FEATURES[self.algorithm][0 if target else 1]
        changed = batch[name].clone()
        changed[row, state] *= -1
        if self.algorithm not in LAST_STATE_ALONE:
            return self.losses({**batch, name: changed})[0]
        # These read and are compared with the same feature.
        read, compared = (batch[name], changed) if target else (changed, batch[name])
        return self.losses({**batch, name: read}, compared)[0]


@pytest.fixture(scope="module", params=ALGORITHMS)
def training(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Training:
    algorithm = request.param
    setup = prepare(tmp_path_factory.mktemp(algorithm), algorithm)
    ids = list(range(VOCAB_SIZE))
    random.Random(0).shuffle(ids)
    kept = Counter(ids[:DRAFT_VOCAB_SIZE])
    save_mapping(vocabulary_mapping(kept, DRAFT_VOCAB_SIZE, VOCAB_SIZE), setup.mapping)
    config = load_config(str(setup.config), ["training.loss=kl", *ALL_POSITIONS])
    run = resolve_run(config)
    torch.manual_seed(0)
    bundle = build_model_bundle(config, algorithm=run.algorithm)
    providers = run.algorithm.providers
    options = providers.step.options(config)
    strategy = providers.step.build(bundle.model, target_head=bundle.target_head, **options)
    return Training(
        algorithm, strategy, providers.offline_for("text"), providers.server_streaming_for("text")
    )


def batches(names: Iterable[str], algorithm: str) -> list[list[str]]:
    """All samples at once; P-EAGLE takes one."""
    return [[name] for name in names] if algorithm == "peagle" else [list(names)]


@pytest.mark.parametrize(
    "mask", [[0] * 12, [1, 1] + [0] * 10, [0, 1, 0, 1] * 3], ids=["none", "first", "alone"]
)
def test_a_sample_without_a_supervised_position_is_a_step(
    training: Training, mask: list[int]
) -> None:
    """A response behind data.max_length. One rank must not leave while the others wait for it."""
    batch = training.batch([training.features(mask, 0)], "files")
    module = training.strategy.trainable_module()
    module.zero_grad()
    tensors = TrainBatch(["0"], training.algorithm, batch, {"target_repr": "hidden_state"})
    output = training.strategy.forward_loss(tensors)
    assert output.loss.item() == 0 and output.must_be_finite
    assert not output.ratio_metrics["kl"][1].any()
    if training.algorithm in BLOCKS:
        assert [int(part) for part in output.ratio_metrics["unsupervised"]] == [1, 1]
    output.loss.backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("source", ["files", "a server"])
def test_the_target_states_of_every_draft_position(training: Training, source: str) -> None:
    for names in batches(SAMPLES, training.algorithm):
        samples = [training.features(SAMPLES[name], seed) for seed, name in enumerate(names)]
        batch = training.batch(samples, source)
        pairs = [supervised_pairs(SAMPLES[name]) for name in names]
        for row, name in enumerate(names):
            assert training.noticed(batch, row, target=True) == pairs[row], name
        _, metrics = training.losses(batch)
        counts = [sum(k == head for row in pairs for k, _ in row) for head in range(1, HEADS + 1)]
        assert metrics["kl"][1].tolist() == counts and counts[-1] > 0
        # Chains of all draft positions start where the evaluation's do.
        starts = [_whole_chains(SAMPLES[name]) for name in names]
        assert int(metrics["tau_expected"][1]) == sum(starts) == counts[-1]


def _whole_chains(mask: list[int]) -> int:
    """Return how many chains of the evaluation all K positions of which are a response's."""
    response = np.array([mask + [0] * (HEADS + 1)], dtype=bool)
    places = Places.of(response, torch.device("cpu"))
    return int((places.left >= HEADS).sum())


def test_the_positions_that_drafts_start_from(training: Training) -> None:
    """A draft that starts at t reads the target's states up to t, and none behind."""
    mask = SAMPLES["several turns"]
    batch = training.batch([training.features(mask, 0)], "files")
    starts = {(k, state - k) for k, state in supervised_pairs(mask)}
    # Attention reads all states up to t; these two read the state at t alone.
    alone = training.algorithm in ("medusa", "mlp_speculator")
    expected = {(k, read) for k, t in starts for read in range(t if alone else 0, t + 1)}
    assert training.noticed(batch, 0, target=False) == expected


@pytest.mark.parametrize("training", ["peagle"], indirect=True)
@pytest.mark.parametrize("lengths", [[10, 9], [6, 7, 6], [12, 5]])
def test_packed_documents_are_apart(training: Training, lengths: list[int]) -> None:
    """Also where one document ends and the next begins with tokens of responses."""
    mask = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    batch = training.batch([training.features(mask, 0)], "a server")
    batch["lengths"] = torch.tensor(lengths)
    expected, start = set(), 0
    for length in lengths:
        document = mask[start : start + length]
        expected |= {(k, start + state) for k, state in supervised_pairs(document)}
        start += length
    assert training.noticed(batch, 0, target=True) == expected
