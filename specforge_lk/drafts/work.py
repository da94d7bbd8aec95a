"""Matrix products of every draft, counted on the module that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Work:
    """Matrix products of a draft, per position and over all draft positions.

    Attributes:
        trained: weights that a position is multiplied with and that learn.
        frozen: those that do not learn.
        features: sizes of these products' inputs and outputs, LM heads' outputs excepted.
        attention: width heads * (d_qk + d_v) of attention, per draft position; 0 without.
    """

    trained: float
    frozen: float
    features: float
    attention: int


#: (the module that trains, K) -> its work.
WorkOf = Callable[[Any, int], Work]


def eagle3(draft: Any, heads: int) -> Work:
    """Count fc once, the layer and the LM head for every test-time-training step."""
    layers = [part for part in _all_linears(draft) if part is not draft.fc]
    config, vocabulary = draft.config, draft.lm_head.out_features
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _sum(
        _linears([draft.fc]),
        _linears(layers, heads, vocabulary),
        attention=2 * config.num_attention_heads * width,
    )


def medusa(draft: Any, heads: int) -> Work:
    """Count every MEDUSA head's blocks and its LM head once."""
    blocks = [part for block in draft.blocks[:heads] for part in _all_linears(block)]
    return _sum(_linears(blocks), _linears(draft.lm_head_of_each[:heads], 1, len(draft.d2t)))


def mlp_speculator(draft: Any, heads: int) -> Work:
    """Count every head once; tied modules are in the lists once for every head."""
    return _sum(
        _linears(list(draft.proj)[:heads]), _linears(list(draft.head)[:heads], 1, len(draft.d2t))
    )


def mtp(draft: Any, heads: int) -> Work:
    """Count the module once for every draft position; of its experts those that a token uses."""
    config = draft.config
    experts = [p for name, p in draft.named_parameters() if ".experts." in name and p.ndim == 3]
    routers = [p for name, p in draft.named_parameters() if name.endswith(".gate.weight")]
    dense = _linears(_all_linears(draft), heads, config.vocab_size)
    sparse = 0.0
    features = 0.0
    if experts:
        active = config.num_experts_per_tok
        sparse = heads * (
            sum(p.numel() for p in experts) * active / experts[0].shape[0]
            + sum(p.numel() for p in routers)
        )
        features = heads * active * sum(sum(p.shape[1:]) for p in experts)
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    value = getattr(config, "v_head_dim", None) or width
    return _sum(
        dense,
        Work(sparse, 0, features, 0),
        attention=config.num_attention_heads * (width + value),
    )


def _linears(modules: Iterable[Any], repeats: float = 1, vocabulary: int = 0) -> Work:
    """Return the work of linear layers, each used ``repeats`` times."""
    trained = frozen = features = 0.0
    for module in modules:
        size = module.weight.numel() * repeats
        if module.weight.requires_grad:
            trained += size
        else:
            frozen += size
        outputs, inputs = module.weight.shape
        features += repeats * (inputs + (outputs if outputs != vocabulary else 0))
    return Work(trained, frozen, features, 0)


def _sum(*parts: Work, attention: int = 0) -> Work:
    return Work(
        sum(part.trained for part in parts),
        sum(part.frozen for part in parts),
        sum(part.features for part in parts),
        attention,
    )


def _all_linears(module: nn.Module) -> list[nn.Linear]:
    from torch import nn

    return [part for part in module.modules() if isinstance(part, nn.Linear)]
