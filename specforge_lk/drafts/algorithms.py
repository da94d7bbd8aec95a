"""Registration of this package's drafts as SpecForge algorithms.

Like SpecForge's own registrations this imports neither torch nor transformers: whoever trains with
an algorithm loads its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from specforge.algorithms.common.defaults import (
    one_loss_token,
    online_needs_input_tools,
    ploss_decay_options,
)
from specforge.algorithms.common.providers import (
    AlgorithmProviders,
    DraftConfigProvider,
    ModelProvider,
    OfflineCaptureLayout,
    OfflineDataProvider,
    ServerCaptureLayout,
    ServerStreamingProvider,
    StepProvider,
    make_registration,
)
from specforge.algorithms.contracts import (
    AlgorithmCapabilities,
    AlgorithmSpec,
    DraftRequirement,
    FeatureContract,
    FeatureMode,
    OfflineStorageContract,
)
from specforge.data.loss_mask import has_supervised_position

from specforge_lk.drafts.table import DRAFTS

if TYPE_CHECKING:
    import torch
    from specforge.algorithms.model_providers import AlgorithmModelParts
    from specforge.algorithms.registry import AlgorithmRegistration
    from specforge.config import Config
    from specforge.modeling.target.target_head import TargetHead
    from specforge.plugins import DraftRegistration
    from torch import nn
    from transformers import PretrainedConfig

    from specforge_lk.drafts.model import HeadDraftModel, TargetWeights

NORMALIZER_ID: Final = "last_hidden_state_v1"
FEATURES: Final = ("input_ids", "loss_mask", "hidden_state")
TRAINED_ON: Final = frozenset({*FEATURES, "attention_mask"})


@dataclass(frozen=True)
class HeadAlgorithm:
    """A draft that reads the target's last hidden state, as an algorithm of SpecForge.

    Attributes:
        name: ``training.strategy``.
        architecture: name of the draft's class, and ``architectures`` in its config.
        load: imports and returns the class, a `HeadDraftModel`.
        truncates: whether the draft vocabulary may be smaller than the target's.
    """

    name: str
    architecture: str
    load: Callable[[], type[HeadDraftModel]]
    truncates: bool = True

    def draft_registration(self) -> DraftRegistration:
        """Return what `specforge export` and draft configs need."""
        from specforge.plugins import DraftRegistration

        return DraftRegistration(self.architecture, self.load)

    def registration(self) -> AlgorithmRegistration:
        """Return what `specforge train` needs."""
        modes = (FeatureMode.OFFLINE, FeatureMode.STREAMING)
        spec = AlgorithmSpec(
            name=self.name,
            draft=DraftRequirement(
                compatible_architectures={self.architecture},
                default_architecture=self.architecture,
            ),
            feature_contracts=tuple(_contract(mode) for mode in modes),
            capabilities=AlgorithmCapabilities(
                attention_backends={"sdpa"},
                supports_vocab_mapping=self.truncates,
                supports_registered_losses=True,
                supports_ploss_decay=True,
                supports_fused_head=True,
            ),
        )
        providers = AlgorithmProviders(
            algorithm_name=self.name,
            step=StepProvider(
                build=partial(_build_step, name=self.name),
                options=ploss_decay_options,
                resume_contract=partial(_resume_contract, self.name),
                allowed_missing_checkpoint_keys=_tied_keys,
                uses_external_target_head=True,
            ),
            model=ModelProvider(
                draft_config=DraftConfigProvider(architecture=self.architecture),
                build_draft=_build_draft,
                build_training_model=_build_training_model,
                resolve_capture_layers=_any_layer,
                minimum_loss_tokens=one_loss_token,
                needs_input_tools=online_needs_input_tools,
                default_dataloader_num_workers=4,
                allow_missing_warm_start_embedding=True,
                loss_mask_filter=has_supervised_position,
            ),
            offline=(
                OfflineDataProvider(
                    modality="text",
                    normalizer_id=NORMALIZER_ID,
                    capture_layout=OfflineCaptureLayout(
                        capture_method="eagle3",
                        aux_feature=None,
                        last_hidden_feature="hidden_state",
                        passthrough=(("input_ids", "input_ids"), ("loss_mask", "loss_mask")),
                    ),
                    build_reader=partial(_build_reader, self.name),
                    build_normalizer=_build_normalizer,
                    build_collator=_build_collator,
                ),
            ),
            server_streaming=(
                ServerStreamingProvider(
                    modality="text",
                    capture_method="eagle3",
                    target_representation="hidden_state",
                    layout=ServerCaptureLayout(
                        aux_feature=None,
                        last_hidden_feature="hidden_state",
                        passthrough=(
                            ("input_ids", "input_ids", ()),
                            ("loss_mask", "loss_mask", ()),
                        ),
                        attention_mask_feature="attention_mask",
                    ),
                    build_collator=_build_server_collator,
                ),
            ),
            vocab_mapping_modes=frozenset(modes if self.truncates else ()),
        )
        return make_registration(spec, providers)


ALGORITHMS: Final = tuple(
    HeadAlgorithm(
        draft.name, draft.architectures[0], draft.trainer, truncates=not draft.whole_vocabulary
    )
    for draft in DRAFTS.values()
    if draft.trainer
)


def _contract(mode: FeatureMode) -> FeatureContract:
    storage = OfflineStorageContract(
        format="specforge_hidden_states_v1",
        required_tensors=frozenset(FEATURES),
        normalizer=NORMALIZER_ID,
    )
    return FeatureContract(
        mode=mode,
        modality="text",
        required_tensors=TRAINED_ON,
        allowed_target_representations={"hidden_state"},
        default_target_representation="hidden_state",
        storage=storage if mode is FeatureMode.OFFLINE else None,
    )


# ------------------------------------------------------------------------- data


def _build_reader(
    name: str, hidden_states_path: str, *, run_id: str, ttt_length: int, max_len: int
) -> Any:
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader

    return OfflineManifestReader(
        hidden_states_path,
        run_id=run_id,
        strategy=name,
        feature_keys=FEATURES,
        ttt_length=ttt_length,
        max_len=max_len,
        target_repr="hidden_state",
    )


def _normalize(raw: dict[str, torch.Tensor], max_len: int) -> dict[str, torch.Tensor]:
    import torch

    input_ids = raw["input_ids"][None, :max_len]
    return {
        "input_ids": input_ids,
        "loss_mask": raw["loss_mask"][None, :max_len],
        "attention_mask": torch.ones_like(input_ids),
        "hidden_state": raw["hidden_state"].squeeze(0)[None, :max_len],
    }


def _build_normalizer(max_len: int, **_topology: Any) -> Any:
    return partial(_normalize, max_len=max_len)


def _collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    from specforge.algorithms.common.collation import pad_and_concatenate_features

    names = sorted(TRAINED_ON)
    return pad_and_concatenate_features(
        features, sequence_axes=dict.fromkeys(names, 1), required_keys=names
    )


def _build_collator() -> Any:
    return _collate


def _build_server_collator() -> Any:
    # As offline: the last position has no label (patch 0010).
    from specforge.algorithms.eagle3.data import build_server_collator

    return build_server_collator()


# ------------------------------------------------------------------------ model


def _any_layer(config: Config, draft_config: Any, target_config: Any) -> list[int]:
    """Return a placeholder: capture requires a decoder layer; these drafts do not use it."""
    return [0]


def _build_draft(config: Config, draft_config: PretrainedConfig) -> HeadDraftModel:
    from specforge.algorithms.model_providers import (
        _device,
        _load_vocab_mapping,
        _torch_dtype,
        _warm_start,
    )
    from specforge.modeling.auto import AutoDraftModel

    draft = AutoDraftModel.from_config(draft_config, torch_dtype=_torch_dtype(config))
    _warm_start(config, draft, draft_config, allow_missing_embedding=True)
    _load_vocab_mapping(config, draft)
    return draft.to(device=_device(), dtype=_torch_dtype(config))


def _build_training_model(
    config: Config, draft: HeadDraftModel, _draft_config: Any, _target_config: Any, _tokenizer: Any
) -> AlgorithmModelParts:
    from specforge.algorithms.model_providers import (
        AlgorithmModelParts,
        _device,
        _target_head_dtype,
        _torch_dtype,
    )
    from specforge.losses import resolve_loss
    from specforge.modeling.target.target_head import TargetHead

    from specforge_lk.drafts.training import HeadModel
    from specforge_lk.losses import KL, KLOptions

    target_head = TargetHead.from_pretrained(
        config.model.target_model_path,
        lm_head_key=config.model.lm_head_key,
        cache_dir=config.model.cache_dir,
        trust_remote_code=config.model.trust_remote_code,
        embedding_key=config.model.embedding_key,
        **_target_head_dtype(config),
    )
    weights = target_weights(target_head, config.model.embedding_key)
    draft.tie_to_target(weights)
    if not config.model.draft_checkpoint_path:
        draft.start_from(weights)
    loss = resolve_loss(config)
    model = HeadModel(
        draft,
        draft.heads or config.training.ttt_length,
        # These algorithms' own loss, where training.loss is unset.
        KL(KLOptions()) if loss is None else loss.build(),
        loss is not None and loss.data_parallel,
        loss is not None and loss.fused_head,
    )
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in draft.parameters()) - trained
    print(
        f"{type(draft).__name__}: {trained:,} trained and {frozen:,} frozen parameters, "
        f"{model.heads} heads, draft vocabulary {len(draft.d2t)} of {len(draft.t2d)}"
    )
    return AlgorithmModelParts(
        model=model.to(device=_device(), dtype=_torch_dtype(config)), target_head=target_head
    )


def target_weights(target_head: TargetHead, embedding_key: str) -> TargetWeights:
    """Return what a draft may take over of the target that an LM head was loaded from.

    Args:
        target_head: SpecForge's.
        embedding_key: name of the target's embedding in its checkpoint.
    """
    from specforge.tensor_file import read_weight

    from specforge_lk.drafts.model import TargetWeights

    return TargetWeights(
        head=target_head.fc.weight,
        read=partial(read_weight, target_head.model_path, setting="model.embedding_key"),
        embedding_key=embedding_key,
        bias=target_head.fc.bias,
        transform=target_head.transform,
    )


def _build_step(model: nn.Module, *, target_head: nn.Module, name: str, **options: Any) -> Any:
    from specforge_lk.drafts.training import HeadTrainStrategy

    return HeadTrainStrategy(model, target_head=target_head, name=name, **options)


def _resume_contract(
    name: str, config: Config, draft: HeadDraftModel, model: Any
) -> dict[str, int | str]:
    """Return everything that a resumed run must share, beside the loss."""
    return {
        f"{name}_heads": model.heads,
        f"{name}_draft_vocab_size": len(draft.d2t),
        f"{name}_parameters": sum(parameter.numel() for parameter in draft.parameters()),
    }


def _tied_keys(_config: Config, draft: HeadDraftModel, _model: Any) -> frozenset[str]:
    return draft.tied_keys
