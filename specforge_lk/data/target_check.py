"""Check that a target's captured features give training the target's own distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Positions that a target is checked on.
_PROBE = 64
#: How many times as far as rounding moves them distributions may be apart.
_MARGIN = 3
#: What settings that change logits have in their names, in all models of transformers 5.8.
_ABOUT_LOGITS = ("logit", "softcap", "soft_cap", "lm_head", "output_mult", "mup")


def check_target(model: Any, decoder: Any, tokens: list[int], head: torch.nn.Module | None) -> None:
    """Refuse a target from whose features training would learn other distributions than its own.

    Training makes the target's distributions of the last hidden states with a head of its own,
    which has to know what the model does to them. In one forward, what that head makes of them is
    compared with the model's own logits. They may differ by the model's rounding only; how much
    that is shows when states and logits are moved by a unit roundoff.

    Args:
        model: A Hugging Face model with its head.
        decoder: Its part that is captured, which ends with the final norm.
        tokens: A text to compare on; its first positions are used.
        head: Training's head in float32, from [..., H] to [..., V]; None where it needs none.

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
        # What comes after the sum, a scale or a cap: three roundings are one roundoff in the mean.
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
    """Every value larger or smaller by a share of ``size``, at random but always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return values * (1 + size * signs.to(values.device))


def _variation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean over positions of the total variation between the distributions of logits [L, V]."""
    ours, theirs = ours.double().softmax(-1).cpu(), theirs.double().softmax(-1).cpu()
    return float((ours - theirs).abs().sum(-1).mean()) / 2


__all__ = ["check_target"]
