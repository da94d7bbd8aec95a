"""A target of which single tensors are read, where loading all of it would be a waste."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from specforge_lk.drafts.algorithms import target_weights
from specforge_lk.target import load_target_config

if TYPE_CHECKING:
    from specforge.modeling.target.target_head import TargetHead

    from specforge_lk.drafts.model import TargetWeights


@dataclass(frozen=True)
class TargetFiles:
    """A target of which no more is read than an import needs.

    See `specforge_lk.decode.checkpoint.TargetFacts`.

    Attributes:
        source: folder or hub id.
        embedding_key: name of its embedding.
        lm_head_key: name of its LM head.
        trust_remote_code: run code that comes with the target.
    """

    source: str
    embedding_key: str = "model.embed_tokens.weight"
    lm_head_key: str = "lm_head.weight"
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> Any:
        """The target's Hugging Face config."""
        return load_target_config(self.source, trust_remote_code=self.trust_remote_code)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def _head(self) -> TargetHead:
        from specforge.modeling.target.target_head import TargetHead

        try:
            return TargetHead.from_pretrained(
                self.source,
                lm_head_key=self.lm_head_key,
                trust_remote_code=self.trust_remote_code,
                embedding_key=self.embedding_key,
                dtype=torch.float32,
            ).cpu()
        except KeyError as error:  # a tensor that the checkpoint has under another name
            raise ValueError(error.args[0]) from error

    @property
    def weights(self) -> TargetWeights:
        """What a draft may take over."""
        return target_weights(self._head, self.embedding_key)

    def lm_head_weight(self) -> torch.Tensor:
        """Return the LM head's weight [V, H]."""
        return self._head.fc.weight.detach()

    def embedding(self) -> torch.Tensor:
        """Return the embedding [V, H]."""
        try:
            return self.weights.read(self.embedding_key)
        except KeyError as error:
            raise ValueError(
                f"{str(error.args[0]).replace('model.embedding_key', '--embedding-key')}"
            ) from error
