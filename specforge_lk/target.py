"""Load a Hugging Face target model with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specforge_lk.files import read_json

_AGAIN = "check that its files are complete: download or copy it again"
#: Tensors that an error message names; a checkpoint may lack thousands.
_NAMED = 4
#: ``quant_method`` of a target's config -> packages that transformers needs to load it.
_QUANTIZERS = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "eetq",
    "gptq": "gptqmodel optimum",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq",
}
#: Ends of names of tensors that quantized weights have beside them, or are in.
_QUANTIZED_TENSORS = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight")
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
    """Return whether an EAGLE draft's captured layers stand for inputs of layers in SGLang.

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
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``, the model in evaluation mode on its device.

    A multimodal target is loaded whole, to be given text only.

    Args:
        target: Folder or hub id.
        dtype: Name of a torch floating-point type, such as ``bfloat16``.
        device: A torch device, or ``auto`` for a GPU where there is one and else the CPU.
        trust_remote_code: Run model code that comes with the target.

    Raises:
        ValueError: there is no such target, its weights do not fit its config, or the device
            cannot hold it.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(target, trust_remote_code=trust_remote_code)
    config = load_target_config(target, trust_remote_code=trust_remote_code)
    # transformers would go on without one that it cannot read.
    load_generation_config(target, config.get_text_config().vocab_size)
    with _quantization_errors(target, config), _errors(target):
        model, found = _auto_class(config, target).from_pretrained(
            target,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            # Both only so that the report below has them all, instead of a traceback.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_weights(target, found)
    _check_finite(target, model)
    try:
        return model.to(device).eval(), tokenizer
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot hold the target: {error}") from error


def _auto_class(config: Any, target: str) -> Any:
    """Return the class of transformers that loads a target with its LM head.

    Raises:
        ValueError: transformers has none for this kind of model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # A class of the target's own code is named for the task it was written for.
    own = getattr(config, "auto_map", None) or {}
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    for loader in classes:
        if type(config) in loader._model_mapping or loader.__name__ in own:
            return loader
    raise ValueError(
        f"target {target!r} is a {config.model_type!r} model, which transformers loads neither as "
        "a causal language model nor as one of image and text; of a multimodal model, save the "
        "language model by itself and give that folder"
    )


def _check_weights(target: str, found: dict[str, Any]) -> None:
    """Refuse a model that has tensors which its checkpoint did not fill.

    transformers leaves random numbers in them and goes on. Tensors that the model lacks are no
    mistake: checkpoints hold MTP modules that transformers does not run. Tied LM heads, and what a
    model computes by itself, are not reported missing.

    Args:
        target: Folder or hub id, for the message.
        found: transformers' report of loading.

    Raises:
        ValueError: tensors are missing, or have other shapes than the config asks for.
    """
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"it has no {_some(missing)}")
    if mismatched:
        shapes = [
            f"{name} {tuple(held)} instead of {tuple(wanted)}" for name, held, wanted in mismatched
        ]
        faults.append(f"shapes differ from those of config.json: {_some(shapes)}")
    faults += found["error_msgs"]
    unused = sorted(found["unexpected_keys"])
    if scales := [name for name in unused if name.endswith(_QUANTIZED_TENSORS)]:
        faults.append(f"it is quantized, with {_some(scales)}, and transformers does not know how")
    if not faults:
        return
    rest = f" It has tensors that the model does not know: {_some(unused)}." if unused else ""
    raise ValueError(
        f"the weights of target {target!r} do not fill its model, and would be random numbers: "
        f"{'; '.join(faults)}.{rest} Check that the download is complete and that config.json "
        "belongs to these weights"
    )


def _check_finite(target: str, model: Any) -> None:
    """Refuse weights that are not finite, which states before them would not show.

    Raises:
        ValueError: a tensor has NaN or infinity.
    """
    import torch

    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    broken = [
        name
        for name, weight in model.named_parameters()
        # Both are NaN where a value is; neither needs a copy of the weight.
        if weight.dtype in types
        and weight.numel()
        and not torch.stack(weight.detach().aminmax()).isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"the weights of target {target!r} are not finite: NaN or infinity in {_some(broken)}; "
            "download them again, or load them in another --dtype if they overflow in this one"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def load_generation_config(target: str, vocab_size: int) -> Any | None:
    """Return the target's generation config; None where it has no generation_config.json.

    Args:
        target: Folder or hub id.
        vocab_size: V, the size of its vocabulary.

    Raises:
        ValueError: the file cannot be read, or no token of it can end a response.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    with _errors(target):
        found = cached_file(
            target,
            "generation_config.json",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if found is None:
        return None
    values = read_json(Path(found), _AGAIN)
    ends = values.get("eos_token_id")
    listed: list[Any] = ends if isinstance(ends, list) else [ends]
    if ends is not None and any(type(end) is not int for end in listed):
        raise ValueError(f"{found}: eos_token_id is {ends!r}, not token ids; {_AGAIN}")
    # Some targets list a token that their vocabulary lacks beside the one that they use.
    if ends is not None and not any(0 <= end < vocab_size for end in listed):
        raise ValueError(
            f"{found}: eos_token_id is {ends!r}, outside the target's vocabulary of {vocab_size}, "
            "so that no response would end; set it to the token that ends a turn"
        )
    return GenerationConfig.from_dict(values)


def load_eos_ids(target: str, tokenizer: Any, *, trust_remote_code: bool = False) -> frozenset[int]:
    """Return `eos_ids` of a target whose weights are not loaded.

    Raises:
        ValueError: there is no such target, or its generation config cannot be read.
    """
    from transformers import GenerationConfig

    own = load_target_config(target, trust_remote_code=trust_remote_code)
    config = load_generation_config(target, own.get_text_config().vocab_size)
    if config is None:
        # As transformers does with a model that has no generation_config.json.
        config = GenerationConfig.from_model_config(own)
    return eos_ids(config, tokenizer)


def eos_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a response: the generation config's, or else the tokenizer's.

    The end-of-turn token is among them. It need not be the tokenizer's end-of-sequence token: that
    is ``<eos>`` in Gemma and ``<|endoftext|>`` in Phi-4, where turns end with ``<end_of_turn>`` and
    ``<|im_end|>``.
    """
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in listed if i is not None)


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
def _quantization_errors(target: str, config: Any) -> Iterator[None]:
    """Say of a quantized target what it needs here to be loaded.

    Raises:
        ValueError: its package is missing, or does not work on this machine.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        yield
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    said = f"target {target!r} is quantized by {method!r}, which transformers cannot load"
    # transformers goes on with an unknown method, as if the weights were not quantized.
    if method not in {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}:
        raise ValueError(
            f"{said}; it knows {', '.join(AUTO_QUANTIZATION_CONFIG_MAPPING)}. Give the target "
            "without quantization"
        )
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        package = _QUANTIZERS.get(method)
        install = f"pip install {package}, or give" if package else "Give"
        raise ValueError(
            f"{said} here ({reason}): {install} the target without quantization"
        ) from error


def _no_json(folder: Path) -> str | None:
    """Return which of a target's JSON files is none, if any: transformers does not say."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            return f"{file.name} is not JSON: {error}"
    return None


@contextmanager
def _errors(target: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # An AttributeError is of a dtype in config.json that torch does not have.
    refused = (OSError, ValueError, StrictDataclassError, KeyError, TypeError, AttributeError)
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"target {target!r} has a weight file that is cut or damaged ({error}); {_AGAIN}"
        ) from error
    except refused as error:
        # What comes after the first sentence is the library's own advice.
        reason = " ".join(str(error).split()).partition(". ")[0]
        if isinstance(error, KeyError):  # whose text is the key alone
            reason = f"it does not know {reason}"
        if Path(target).is_dir():
            reason = _no_json(Path(target)) or reason
            raise ValueError(f"target {target!r} cannot be loaded ({reason}); {_AGAIN}") from error
        raise ValueError(
            f"target {target!r} is no model folder here and could not be had from the hub either; "
            f"check --target or model.target_model_path ({reason})"
        ) from error


__all__ = [
    "LAYER_IDS_OF_INPUTS",
    "eos_ids",
    "layer_ids_are_inputs",
    "load_eos_ids",
    "load_target",
    "load_target_config",
    "load_tokenizer",
]
