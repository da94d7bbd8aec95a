"""The files of an exported draft, and the checks that loaders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from specforge_lk.decode.draft_config import DraftError, check_fields
from specforge_lk.drafts.table import ARCHITECTURES, DraftType, draft_type
from specforge_lk.files import compare_checksums, read_json

_Module = TypeVar("_Module", bound=nn.Module)
_EXPORT = "`specforge export --to hf`"
_AGAIN = "export or download the draft again"
#: Characters of a list of differences that are printed.
_LONGEST = 600
#: Tensors that map a draft vocabulary to the target's.
VOCABULARY = ("d2t", "t2d", "token_map")


class TargetFacts(Protocol):
    """What a draft's files are read for: a target, or what is known of one without its weights."""

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head, padding included."""
        ...

    @property
    def hidden_size(self) -> int:
        """Columns of the LM head."""
        ...

    def lm_head_weight(self) -> torch.Tensor:
        """Return the LM head's weight [V, H]."""
        ...


class DraftTarget(TargetFacts, Protocol):
    """What a draft is loaded for: a target of ours, or that of an engine."""

    def place(self, draft: _Module) -> _Module:
        """Put a draft on the target's device, its parameters in the target's dtype."""
        ...


def read_config(path: Path) -> tuple[dict[str, Any], DraftType]:
    """Return the config.json in a draft's folder, and the type of draft it is of.

    Raises:
        DraftError: there is no config.json, or it is of no known draft.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise DraftError(f"draft {path} is no folder; give that of an exported draft")
    if not file.is_file():
        raise DraftError(
            f"draft {path}: no config.json; export the checkpoint with {_EXPORT} and give the "
            "exported directory"
        )
    try:
        config = read_json(file, _AGAIN)
    except ValueError as error:
        raise DraftError(str(error)) from error
    if not isinstance(config.get("architectures") or [], list):
        raise DraftError(
            f"{file}: architectures is {config['architectures']!r}, not a list; {_AGAIN}"
        )
    kind = draft_type(config)
    if kind is None:
        named = (config.get("architectures") or [None])[0]
        raise DraftError(
            f"{file}: architectures {named!r} is not a known draft; "
            f"known are {', '.join(sorted(ARCHITECTURES))}"
        )
    check_fields(file, config)
    # An MTP module's blocks in fp8 have scales that are read.
    if config.get("quantization_config") and kind.name != "mtp":
        raise DraftError(
            f"{file}: quantization_config, but a quantized {kind.title} is not read here; give "
            "the draft without quantization"
        )
    return config, kind


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a draft's folder, from safetensors or torch files, sharded or not.

    Raises:
        DraftError: there is no such file, a shard is missing, one is cut, or numbers in it are
            not finite or need scales that are not read here.
    """
    from safetensors.torch import load_file

    def load_torch(file: Path) -> dict[str, torch.Tensor]:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)

    files = sorted(path.glob("*.safetensors"))
    if index := next(path.glob("*.safetensors.index.json"), None):
        files = [path / name for name in sorted(_shards(index))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DraftError(
                f"draft {path}: {', '.join(missing)} of {index.name} is missing; {_AGAIN}"
            )
    load: Callable[[Path], dict[str, torch.Tensor]] = load_file
    if not files:
        files, load = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt")]), load_torch
    if not files:
        raise DraftError(
            f"draft {path}: no *.safetensors file; export the checkpoint with {_EXPORT} and give "
            "the exported directory"
        )
    require_listed(path)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with damage_named(file):
            weights |= load(file)
    check_tensors(path, weights)
    return weights


def require_listed(path: Path) -> None:
    """Refuse a draft whose files are not those that its export listed.

    Raises:
        DraftError: naming the first.
    """
    try:
        compare_checksums(path, _AGAIN)
    except ValueError as error:
        raise DraftError(f"draft {path}: {error}") from error


def _shards(index: Path) -> set[str]:
    with damage_named(index):
        return set(read_json(index, _AGAIN)["weight_map"].values())


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Say of an error in reading a draft's files which they are, and the remedy.

    Raises:
        DraftError: a file is cut, damaged or missing.
    """
    from safetensors import SafetensorError

    damage = (LookupError, AttributeError, OSError, RuntimeError, ValueError, EOFError)
    try:
        yield
    except (SafetensorError, UnpicklingError, *damage) as error:
        if isinstance(error, DraftError):
            raise
        # What comes after the first sentence is a library's own advice.
        said = str(error).split(". ")[0].strip() or type(error).__name__
        reason = " ".join(said.split())
        raise DraftError(f"draft file {file} is cut or damaged ({reason}); {_AGAIN}") from error


def check_tensors(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are nan or infinite, or of a type that is none of a weight.

    Raises:
        DraftError: naming the first tensor.
    """
    for name, weight in weights.items():
        counts, floats = name.rpartition(".")[2] in VOCABULARY, weight.is_floating_point()
        if floats == counts or (floats and weight.dtype.itemsize < 2):
            wanted = "whole numbers" if counts else "numbers in bfloat16, float16 or float32"
            raise DraftError(
                f"draft {path}: {name} has type {weight.dtype}, not {wanted}; give the draft "
                "without quantization, or export it again"
            )
        # nan is the least and the greatest of what it is among.
        if not counts and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
            raise DraftError(
                f"draft {path}: {name} has numbers that are nan or infinite; its training "
                "diverged or the file is damaged: give another checkpoint"
            )


def require_matrices(path: Path, weights: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """Refuse weights that are no matrices.

    Raises:
        DraftError: naming the first.
    """
    for name in names:
        if name in weights and weights[name].ndim != 2:
            raise disagreement(path, f"{name} has shape {list(weights[name].shape)}")


def require_sizes(path: Path, sizes: Mapping[str, int | None], target: TargetFacts) -> None:
    """Check a config's sizes against the target's LM head.

    Args:
        path: the draft's folder.
        sizes: by their names in config.json, the size of the vocabulary, and then the hidden size
            if the draft's is to be the target's.
        target: the target.

    Raises:
        DraftError: a size is another.
    """
    wanted_sizes = (target.vocab_size, target.hidden_size)
    for (name, size), wanted in zip(sizes.items(), wanted_sizes, strict=False):
        if size != wanted:
            raise DraftError(
                f"{path / 'config.json'}: {name} {size}, but the target's is {wanted}; give the "
                "target the draft was trained for"
            )


def refuse_layers(path: Path, algorithm: str, layers: tuple[int, ...] | None) -> None:
    """Refuse ``--aux-layers`` for a draft that captures no decoder layers.

    Raises:
        DraftError: layers are given.
    """
    if layers is not None:
        raise DraftError(
            f"draft {path}: {algorithm} reads the target's last hidden state, not layers "
            f"{list(layers)}; leave out --aux-layers"
        )


def draft_vocabulary(
    path: Path, weights: Mapping[str, torch.Tensor], rows: int, vocab_size: int
) -> torch.Tensor | None:
    """Return the target ids [V_d] of a draft vocabulary; None for the whole one in order.

    SpecForge stores ``d2t`` as OFFSETS (target id - draft index) and ``t2d`` as a mask over the
    target vocabulary; vLLM's MEDUSA has the ids themselves in ``token_map``.

    Args:
        path: the draft's folder.
        weights: its tensors.
        rows: rows of its LM head, V_d.
        vocab_size: V.

    Raises:
        DraftError: these tensors disagree with the LM head, the target or one another.
    """

    def refuse(message: str) -> DraftError:
        return DraftError(
            f"draft {path}: {message}; export again with the vocabulary mapping the draft was "
            f"trained with ({_EXPORT} … --vocab-mapping FILE)"
        )

    if "token_map" in weights:
        name, ids = "token_map", weights["token_map"].long()
    elif "d2t" in weights:
        name, ids = "d2t", weights["d2t"].long() + torch.arange(weights["d2t"].numel())
    elif rows == vocab_size:
        return None
    else:
        raise refuse(f"d2t is missing, the LM head has {rows} rows of {vocab_size}")
    if ids.numel() != rows:
        raise refuse(f"{name} has {ids.numel()} entries, the LM head {rows} rows")
    if ids.min() < 0 or ids.max() >= vocab_size or ids.unique().numel() != rows:
        raise refuse(f"{name} does not map to {rows} distinct ids below {vocab_size}")
    if "t2d" in weights:
        t2d = weights["t2d"].bool()
        if t2d.numel() != vocab_size:
            raise refuse(f"t2d has {t2d.numel()} entries, the target vocabulary {vocab_size}")
        if t2d.sum() != rows:
            raise refuse(f"t2d selects {int(t2d.sum())} tokens, the LM head has {rows} rows")
        if not t2d[ids].all():
            raise refuse(f"{name} and t2d name different tokens")
    return None if torch.equal(ids, torch.arange(vocab_size)) else ids


def fill(
    draft: _Module, weights: Mapping[str, torch.Tensor], path: Path, target: DraftTarget
) -> _Module:
    """Give a draft its weights and put it beside the target.

    Raises:
        DraftError: the tensors are not those that its config asks for.
    """
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        raise disagreement(path, error) from error
    return target.place(draft)


def disagreement(path: Path, found: object) -> DraftError:
    """Return the error of a folder whose config.json and tensors do not fit one another."""
    said = " ".join(str(found).split())
    # Hundreds of tensors may differ.
    said = said if len(said) <= _LONGEST else said[:_LONGEST] + " …"
    return DraftError(f"draft {path}: config.json and safetensors disagree ({said}); export again")


__all__ = [
    "VOCABULARY",
    "DraftError",
    "DraftTarget",
    "TargetFacts",
    "check_tensors",
    "damage_named",
    "disagreement",
    "draft_vocabulary",
    "fill",
    "read_config",
    "read_weights",
    "refuse_layers",
    "require_listed",
    "require_matrices",
    "require_sizes",
]
