"""The rule that an engine decodes by: how the target samples, how the draft does, what is accepted.

One value says what an evaluation measures, what a response was sampled by and what a loss trains
for. The arithmetic is in `specforge_lk.decode.sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

#: Lower temperatures are 0 in float32.
COLDEST: Final = 1e-37


class Drafting(StrEnum):
    """How draft tokens are chosen above temperature 0."""

    #: Sample from q.
    PROBABILISTIC = "probabilistic"
    #: Take argmax q at any temperature, as engines do by default (the paper's Appendix D).
    GREEDY = "greedy"


class Verification(StrEnum):
    """How drafted tokens are accepted; both leave the target's distribution unchanged."""

    #: Token by token (Leviathan et al. 2023, Algorithm 1).
    TOKEN = "token"
    #: All tokens of a chain together (Sun et al. 2024, Algorithm 2): accepts no fewer.
    BLOCK = "block"


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are sampled from, given logits.

    Temperature is applied first, then top-k, then top-p to what is left; tokens that are equally
    likely as the last one kept are kept, too.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the fewest likeliest tokens that have this probability together; 1 keeps all.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or COLDEST <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be 0, or at least {COLDEST:g}, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 1 or more, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0:  # nothing is left to choose from
            object.__setattr__(self, "top_k", 0)
            object.__setattr__(self, "top_p", 1.0)

    @property
    def truncates(self) -> bool:
        """Whether some tokens have no probability."""
        return self.top_k > 0 or self.top_p < 1

    def __str__(self) -> str:
        """``temperature=0.7,top_p=0.9``: the temperature, and what is not the default."""
        return _written(self, ("temperature",))


@dataclass(frozen=True)
class Serving:
    """The rule that an engine decodes by.

    A rule says nothing that has no effect: at temperature 0 everything is greedy, and a greedy
    draft has no distribution. So two rules are equal where they decode alike.

    Attributes:
        temperature, top_k, top_p: the target's; see `Sampling`. They apply to its full vocabulary.
        drafting: how the draft chooses its tokens.
        draft_temperature: None for the target's.
        draft_top_k, draft_top_p: the draft's. Engines ignore the target's top-k and top-p there.
        verification: how drafted tokens are accepted.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    drafting: Drafting = Drafting.PROBABILISTIC
    draft_temperature: float | None = None
    draft_top_k: int = 0
    draft_top_p: float = 1.0
    verification: Verification = Verification.TOKEN

    def __post_init__(self) -> None:
        target = self.target  # checks the ranges
        for name, given in (("top_k", target.top_k), ("top_p", target.top_p)):
            object.__setattr__(self, name, given)
        if self.draft_temperature is not None and not (
            COLDEST <= self.draft_temperature < math.inf
        ):
            raise ValueError(
                f"draft_temperature must be at least {COLDEST:g}, got {self.draft_temperature}; "
                "drafting=greedy takes the likeliest tokens"
            )
        try:
            Sampling(1.0, self.draft_top_k, self.draft_top_p)
        except ValueError as error:
            raise ValueError(f"draft_{error}") from None
        plain = Serving.__dataclass_fields__
        unused: list[str] = []
        if self.temperature == 0:
            object.__setattr__(self, "drafting", Drafting.GREEDY)
        elif self.draft_temperature == self.temperature:
            unused += ["draft_temperature"]
        if self.drafting is Drafting.GREEDY:
            # One-hot q: block verification accepts what token verification does.
            unused += ["draft_temperature", "draft_top_k", "draft_top_p", "verification"]
        for name in unused:
            object.__setattr__(self, name, plain[name].default)

    @property
    def target(self) -> Sampling:
        """What the target samples from, and so what responses are samples of."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def draft(self) -> Sampling:
        """What the draft samples from: at temperature 0 it is greedy."""
        if self.drafting is Drafting.GREEDY:
            return Sampling(0)
        temperature = self.temperature if self.draft_temperature is None else self.draft_temperature
        return Sampling(temperature, self.draft_top_k, self.draft_top_p)

    @property
    def greedy_draft(self) -> bool:
        """Whether the draft takes its likeliest token."""
        return self.drafting is Drafting.GREEDY

    def __str__(self) -> str:
        """``temperature=1,drafting=greedy``: the temperature, and what is not the default.

        `parse` reads it; at temperature 0 it is ``temperature=0``.
        """
        return _written(self, ("temperature",), () if self.temperature else ("drafting",))


def _written(rule: Sampling | Serving, always: tuple[str, ...], never: tuple[str, ...] = ()) -> str:
    values = ((field, getattr(rule, field.name)) for field in fields(rule))
    # All digits of a float, since the text is what a rule is known by.
    return ",".join(
        f"{field.name}={repr(value).removesuffix('.0') if isinstance(value, float) else value}"
        for field, value in values
        if field.name not in never and (field.name in always or value != field.default)
    )


@dataclass(frozen=True)
class Preset:
    """The rule of an engine as it comes.

    Attributes:
        rule: at temperature 1.
        engine: name and version it was read from.
        options: what has it decode so.
    """

    rule: Serving
    engine: str
    options: str


#: By the name that `parse` reads.
PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "vllm": Preset(Serving(drafting=Drafting.GREEDY), "vLLM 0.33.0", "the default"),
        "vllm-probabilistic": Preset(
            Serving(), "vLLM 0.33.0", 'speculative_config={"draft_sample_method": "probabilistic"}'
        ),
        "vllm-block": Preset(
            Serving(verification=Verification.BLOCK),
            "vLLM 0.33.0",
            'speculative_config={"draft_sample_method": "probabilistic", '
            '"rejection_sample_method": "block"}',
        ),
        "sglang": Preset(Serving(drafting=Drafting.GREEDY), "SGLang 0.5.23", "the default"),
        "sglang-rejection-sampling": Preset(
            Serving(), "SGLang 0.5.23", "--speculative-use-rejection-sampling"
        ),
        "sglang-block": Preset(
            Serving(verification=Verification.BLOCK),
            "SGLang 0.5.23",
            "--speculative-use-block-verification",
        ),
    }
)

_READ: Final = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "drafting": Drafting,
    "draft_temperature": float,
    "draft_top_k": int,
    "draft_top_p": float,
    "verification": Verification,
}


def parse(text: str) -> Serving:
    """Read ``temperature=0.7,top_p=0.95,drafting=greedy``, or a preset and what differs from it.

    Raises:
        ValueError: a name or a value is not known; the message has those that are.
    """
    rule, given = _read(text)
    return replace(rule, **given)  # type: ignore[arg-type]


def without_effect(text: str) -> list[str]:
    """Return the settings of a rule's text that its rule leaves out, such as ``draft_top_k=5``.

    Raises:
        ValueError: see `parse`.
    """
    rule, given = _read(text)
    made = replace(rule, **given)  # type: ignore[arg-type]
    said = {"draft_temperature": made.temperature}  # leaving that out is saying it
    return [
        f"{name}={value}"
        for name, value in given.items()
        if value not in (getattr(made, name), said.get(name))
    ]


def _read(text: str) -> tuple[Serving, dict[str, object]]:
    """Return the rule that a text begins from, and what it sets."""
    preset, _, rest = text.strip().partition(",")
    rule, settings = Serving(), text
    if "=" not in preset:
        if preset not in PRESETS:
            raise ValueError(
                f"{preset!r} is no serving rule: give settings such as temperature=0.7,"
                f"drafting=greedy, or begin with one of {', '.join(PRESETS)}"
            )
        rule, settings = PRESETS[preset].rule, rest
    given: dict[str, object] = {}
    for setting in filter(None, settings.split(",")):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in _READ:
            raise ValueError(f"{setting!r}: a serving rule has {', '.join(_READ)}")
        if name in given:
            raise ValueError(f"{text!r} has {name} twice")
        try:
            given[name] = _READ[name](value)
        except ValueError:
            kind = _READ[name]
            number = "a whole number" if kind is int else "a number"
            choices = ", ".join(kind) if issubclass(kind, StrEnum) else number
            raise ValueError(f"{name}={value}: give {choices}") from None
    return rule, given


__all__ = [
    "PRESETS",
    "Drafting",
    "Preset",
    "Sampling",
    "Serving",
    "Verification",
    "parse",
    "without_effect",
]
