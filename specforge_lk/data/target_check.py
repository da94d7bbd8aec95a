"""Check that a target's captured features give training the target's own distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Positions that a target is checked on.
_PROBE = 64
#: Distributions may be this many times as far apart as rounding moves them.
_MARGIN = 3
#: Parts of the names of settings that change logits, in all models of transformers 5.8.
_ABOUT_LOGITS = ("logit", "softcap", "soft_cap", "lm_head", "output_mult", "mup")


def check_target(model: Any, decoder: Any, tokens: list[int], head: torch.nn.Module | None) -> None:
    """Refuse a target whose features would teach training other distributions than its own.

    Training computes the target's distributions from the last hidden states, with an LM head of
    its own. If the model does more than that to its logits, a cap for example, the two differ.
    So both are compared on one forward. They may differ by the model's rounding only, which is
    estimated by moving states and logits by a unit roundoff.

    Args:
        model: A Hugging Face model with its LM head.
        decoder: The part of it that is captured, which ends with the final norm.
        tokens: Token ids of a text to compare on; the first ones are used.
        head: Training's LM head in float32, from [..., H] to [..., V]; None if training of the
            algorithm uses none.

    Raises:
        ValueError: the distributions differ, or there is no state of every layer.
    """
    import torch

    text = model.config.get_text_config()
    seen: list[Any] = []
    hook = decoder.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([tokens[:_PROBE]], device=model.device),
                use_cache=False,
                output_hidden_states=True,
            ).logits[0]
    finally:
        hook.remove()
    name = f"{type(model).__name__} (model_type {model.config.model_type})"
    states = getattr(seen[0], "hidden_states", None) if len(seen) == 1 else None
    count = text.num_hidden_layers
    if not states or len(states) != count + 1 or states[0].ndim != 3:
        raise ValueError(
            f"{name} does not give one state of every position after each of its {count} layers, "
            "so no features can be captured from it with transformers; use another target"
        )
    if head is None:
        return
    hidden = seen[0].last_hidden_state[0]
    roundoff = torch.finfo(hidden.dtype).eps / 2
    # Products of a rounded weight, and their sum in float32 at least.
    relative = roundoff + hidden.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps / 2
    hidden = hidden.to(next(head.parameters()).device, torch.float32)
    with torch.inference_mode():
        ours = head(hidden)
        # A scale or a cap rounds three times after the sum, on average one unit roundoff in all.
        moved = _moved(head(_moved(hidden, relative)), roundoff)
    same = ours.shape == logits.shape
    found, rounding = _variation(ours, logits) if same else 1.0, _variation(ours, moved)
    if found <= _MARGIN * rounding:
        return
    named = [
        f"{key}={value!r}"
        for key, value in (model.config.to_dict() | text.to_dict()).items()
        if value is not None and any(part in key for part in _ABOUT_LOGITS)
    ]
    keys = f" (its config has {', '.join(named)})" if named else ""
    raise ValueError(
        "training would learn other distributions than the target's: those that SpecForge's target "
        f"head makes of the last hidden states of {name} are a total variation of {found:.2g} away "
        f"from the model's own, of which rounding explains {rounding:.2g}. Check "
        "model.lm_head_key; if that is right, the model does to its logits what the target head "
        f"does not{keys}: use another target"
    )


def _moved(values: torch.Tensor, size: float) -> torch.Tensor:
    """Return the values, each larger or smaller by a share of ``size``; always the same signs."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return values * (1 + size * signs.to(values.device))


def _variation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the mean over positions of the total variation between two logits [L, V]."""
    ours, theirs = ours.double().softmax(-1).cpu(), theirs.double().softmax(-1).cpu()
    return float((ours - theirs).abs().sum(-1).mean()) / 2


__all__ = ["check_target"]
