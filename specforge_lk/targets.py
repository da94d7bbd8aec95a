"""Load a Hugging Face target model with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: Targets of which SGLang 0.5.14 captures the inputs of the layers it is given, not their outputs,
#: unless the first is layer 1; patch 0013 has the same list. Kimi K2 is a DeepseekV3ForCausalLM.
LAYER_IDS_OF_INPUTS = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM",
        "KimiK25ForConditionalGeneration",
        "MistralLarge3ForCausalLM",
    }
)


def layer_ids_are_inputs(config: Any, layers: Sequence[int]) -> bool:
    """Whether an EAGLE draft's captured layers stand for inputs of layers in SGLang.

    Args:
        config: The target's Hugging Face config.
        layers: As in ``eagle_config``, in any number.
    """
    architectures = getattr(config, "architectures", None) or ()
    return bool(layers) and layers[0] != 1 and not LAYER_IDS_OF_INPUTS.isdisjoint(architectures)


def load_target(
    target: str,
    dtype: str = "float32",
    device: str = "auto",
    *,
    head: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``, the model in evaluation mode on its device.

    Args:
        target: Folder or hub id.
        dtype: Name of a torch floating-point type, such as ``bfloat16``.
        device: A torch device, or ``auto`` for a GPU where there is one and else the CPU.
        head: With the language-model head; without it the model stops after its final norm.
        trust_remote_code: Run model code that comes with the target.

    Raises:
        ValueError: there is no such target, or the device cannot hold it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(target, trust_remote_code=trust_remote_code)
    with _errors(target):
        model = AutoModelForCausalLM.from_pretrained(
            target, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    if not head:
        model = model.base_model
    try:
        return model.to(device).eval(), tokenizer
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot hold the target: {error}") from error


def load_tokenizer(target: str, *, trust_remote_code: bool = False) -> Any:
    """Return the target's tokenizer.

    Raises:
        ValueError: there is no such target.
    """
    from transformers import AutoTokenizer

    with _errors(target):
        return AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code)


def load_target_config(target: str, *, trust_remote_code: bool = False) -> Any:
    """Return the target's Hugging Face config.

    Raises:
        ValueError: there is no such target.
    """
    from transformers import AutoConfig

    with _errors(target):
        return AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)


@contextmanager
def _errors(target: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"target {target!r} is no model folder here and could not be had from the hub either; "
            f"check --target or model.target_model_path ({reason})"
        ) from error


__all__ = ["load_target", "load_target_config", "load_tokenizer"]
