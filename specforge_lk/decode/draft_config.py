"""The config.json of a draft, in which a value that no draft can have is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

#: Fields that are whole numbers above 0, in the config and in its sections.
_SIZES: Final = (
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
    "block_size",
    "gru_hidden_dim",
    "emb_dim",
    "n_predict",
    "num_heads",
    "medusa_num_heads",
    "truncated_vocab_size",
)
#: Fields that are whole numbers, 0 for none.
_COUNTS: Final = ("inner_dim", "markov_rank", "pure_draft_prefix_len")
#: Fields that are one of some words.
_CHOICES: Final = {"markov_head_type": ("vanilla", "gated", "rnn")}
#: Fields that are finite numbers above 0.
_SCALES: Final = ("rms_norm_eps", "logit_scale")
#: Fields that are true or false: any other value is read as true.
_SWITCHES: Final = (
    "attention_bias",
    "fc_norm",
    "medusa_fc_bias",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "original_lm_head",
    "scale_input",
    "shift_label",
    "tie_weights",
)
_REMEDY: Final = "mend it, or export or download the draft again"


class DraftError(ValueError):
    """A draft checkpoint that cannot be evaluated; the message says what to change."""


def check_fields(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse values of the fields above that no draft can have, in sections too.

    Args:
        file: the config.json.
        config: its content, or a section of it. Fields that are absent or null do not count.

    Raises:
        DraftError: naming the first.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_fields(file, value)
        elif value is None:
            continue
        elif name in _SIZES:
            require_positive(file, {name: value})
        elif name in _COUNTS and (type(value) is not int or value < 0):
            raise DraftError(f"{file}: {name} is {value!r}, not a whole number; {_REMEDY}")
        elif name in _CHOICES and str(value).lower() not in _CHOICES[name]:
            known = ", ".join(_CHOICES[name])
            raise DraftError(f"{file}: {name} is {value!r}, not one of {known}; {_REMEDY}")
        elif name in _SCALES and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise DraftError(f"{file}: {name} is {value!r}, not a number above 0; {_REMEDY}")
        elif name in _SWITCHES and not isinstance(value, bool):
            raise DraftError(f"{file}: {name} is {value!r}, not true or false; {_REMEDY}")


def parse_config(file: Path, family: Any, config: Mapping[str, Any]) -> Any:
    """Return a config of transformers, made from that of a draft.

    Args:
        file: the config.json, for messages.
        family: the config's class.
        config: its fields.

    Raises:
        DraftError: transformers refuses it, such as a dtype that torch does not have, or no draft
            can have its attention heads, its activation or its rotary embedding.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.activations import ACT2FN

    try:
        parsed = family.from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        # A KeyError's own text is the repr of its message.
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise DraftError(f"{file}: {' '.join(str(said).split())}; {_REMEDY}") from error
    heads, shared = (
        getattr(parsed, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if heads and shared and heads % shared:
        raise DraftError(
            f"{file}: num_key_value_heads {shared} does not divide num_attention_heads {heads}; "
            f"{_REMEDY}"
        )
    activation = getattr(parsed, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise DraftError(f"{file}: hidden_act {activation!r} is not known; {_REMEDY}")
    _require_rotary(file, parsed)
    return parsed


def section(file: Path, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a config; an empty one where it is absent or null.

    Raises:
        DraftError: it is of another type.
    """
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise DraftError(f"{file}: {name} is {found!r}, not an object of settings; {_REMEDY}")
    return found


def listed_layers(file: Path, config: Mapping[str, Any], name: str) -> list[int] | None:
    """Return a list of layers in a config or a section of it; None where it is absent or null.

    Raises:
        DraftError: it is of another type.
    """
    found = config.get(name)
    if found is None:
        return None
    if not isinstance(found, list) or any(type(layer) is not int for layer in found):
        raise DraftError(f"{file}: {name} is {found!r}, not a list of layers; {_REMEDY}")
    return found


def require_positive(file: Path, values: Mapping[str, object]) -> None:
    """Refuse sizes that are not whole numbers above 0.

    Args:
        file: the config.json.
        values: sizes by their names there.

    Raises:
        DraftError: naming the first.
    """
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise DraftError(f"{file}: {name} is {value!r}, not a whole number above 0; {_REMEDY}")


def require_token(file: Path, name: str, value: object, vocab_size: int) -> int:
    """Return a token id of a config.

    Raises:
        DraftError: it is none of the target's.
    """
    if type(value) is not int or not 0 <= value < vocab_size:
        raise DraftError(
            f"{file}: {name} is {value!r}, not a token id below the target's vocab_size "
            f"{vocab_size}; {_REMEDY}"
        )
    return value


def are_distinct(layers: Sequence[int], count: int) -> bool:
    """Return whether layers are different ones of a target of ``count`` layers."""
    return len(set(layers)) == len(layers) and all(0 <= layer < count for layer in layers)


def _require_rotary(file: Path, config: Any) -> None:
    """Refuse rotary settings that give no finite frequencies.

    Raises:
        DraftError: naming them.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_theta" not in rope:  # none, or a set for every kind of layer
        return
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    reason: object = None
    if not isinstance(theta, int | float) or not theta > 0:
        reason = f"rope_theta is {theta!r}, not above 0"
    elif kind != "default":
        try:
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            if not frequencies.isfinite().all() or not factor > 0:
                reason = "its frequencies are not finite"
    if reason is not None:
        raise DraftError(f"{file}: rope_parameters {rope} cannot be used ({reason}); {_REMEDY}")


__all__ = [
    "DraftError",
    "are_distinct",
    "check_fields",
    "listed_layers",
    "parse_config",
    "require_positive",
    "require_token",
    "section",
]
