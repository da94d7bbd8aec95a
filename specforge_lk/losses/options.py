"""What ``training.loss_options`` may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from specforge_lk.serving import Serving, Verification, parse


def _not_bool(value: Any) -> Any:
    # pydantic would read true as 1.0; numeric strings are welcome, they come from command lines.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _canonical_rule(text: str) -> str:
    rule = parse(text)
    if rule.verification is not Verification.TOKEN:
        raise ValueError(
            f"{text!r} verifies by {rule.verification}: there a token's acceptance also depends on "
            "a weight of all tokens drafted before it, which no loss here carries; train for "
            "verification=token, than which block verification accepts no less"
        )
    return str(rule)


Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Rule = Annotated[str, AfterValidator(_canonical_rule)]


class ServingOptions(BaseModel):
    """Options of every loss."""

    # The docstring of an option is its description in `specforge-lk losses`.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    serving: Rule = "temperature=1"
    """The rule that will serve, as in `specforge-lk eval --serving`, such as
    "temperature=0.7,top_p=0.9" or "temperature=1,drafting=greedy": p and q are what target and
    draft sample from under it."""
    sharpness: Annotated[Number, Field(gt=0)] | None = None
    """With greedy drafting, one over the scale of the noise on the draft's logits, with which the
    likeliest token gets a gradient; 8 unless given. KL needs none, of the draft or reverse."""

    @property
    def rule(self) -> Serving:
        """The serving rule."""
        return parse(self.serving)

    @model_validator(mode="after")
    def _sharpness_needs_greedy_drafting(self) -> Self:
        if self.sharpness is not None and not self.rule.greedy_draft:
            raise ValueError(
                f"sharpness={self.sharpness} has no effect with serving={self.serving!r}: set "
                "serving to a rule with drafting=greedy or leave sharpness out"
            )
        return self


class CommonOptions(ServingOptions):
    """Options of every loss that is one draft position's own."""

    chain_weight: Literal["gamma", "survival", "dpace", "auf"] = "gamma"
    """Weight of a draft position in its chain: "gamma", the trainer's own, such as gamma^k; or, in
    its place and detached, "survival", the measured chance that the chain gets there; "dpace",
    D-PACE's cumulative weights; "auf", 1 up to the first draft position whose likeliest token is
    not the recorded one, 0 after it."""


#: The name that they had when there was none.
NoOptions = CommonOptions


class _WithoutSharpness(CommonOptions):
    @model_validator(mode="after")
    def _no_sharpness(self) -> Self:
        if self.sharpness is not None:
            raise ValueError(
                f"sharpness={self.sharpness} has no effect: KL is of the draft itself, "
                "softmax(z); leave it out or take another training.loss"
            )
        return self


class AlphaOptions(CommonOptions):
    """Options of ``lk_alpha``."""

    @model_validator(mode="after")
    def _some_overlap(self) -> Self:
        if self.rule.draft.truncates:
            raise ValueError(
                f"serving={self.serving!r} truncates the draft: where it keeps none of the "
                "target's tokens, -log alpha is infinite; leave out draft_top_k and draft_top_p, "
                "or take training.loss=tv"
            )
        return self


class ReverseKLOptions(_WithoutSharpness):
    """Options of ``reverse_kl``."""

    @model_validator(mode="after")
    def _full_support(self) -> Self:
        target = self.rule.target
        if target.truncates or target.temperature == 0:
            raise ValueError(
                f"serving={self.serving!r} leaves tokens without probability: there KL(q || p) is "
                "infinite; leave out top_k, top_p and temperature=0, or take another training.loss"
            )
        return self


class KLSettings(ServingOptions):
    """Options of every loss with a KL term."""

    kl_term: Literal["renormalized", "restricted"] = "renormalized"
    """The form: "renormalized" is KL(p~ || q), the paper's. "restricted" is
    sum_D p log(p / q) = c (KL(p~ || q) + log c), c the coverage, with gradient c (q - p~):
    positions that the draft vocabulary barely covers pull little."""


class LambdaSettings(KLSettings):
    """Options of every loss that blends KL with acceptance."""

    eta: Annotated[Number, Field(gt=0)] = 3.0
    """Rate, above 0, at which the weight of KL falls with the acceptance rate; the defaults are
    the paper's."""
    lambda_scope: Literal["head", "token", "fixed", "schedule"] = "head"
    """What sets lambda: "head", the mean acceptance rate over the supervised positions of a draft
    position (the paper's); "token", each position's own; "fixed", nothing; "schedule", the share
    of the run's steps that are done."""
    lambda_fixed: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Lambda of scope "fixed", from 0 to 1; 0.5 unless given."""
    lambda_until: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Of scope "schedule", the share of the run at which lambda, which falls from 1 in equal steps,
    is 0; 0.5 unless given."""

    @model_validator(mode="after")
    def _each_needs_its_scope(self) -> Self:
        for name, scope in (("lambda_fixed", "fixed"), ("lambda_until", "schedule")):
            value = getattr(self, name)
            if value is not None and self.lambda_scope != scope:
                raise ValueError(
                    f"{name}={value} has no effect with lambda_scope={self.lambda_scope!r}: "
                    f"set lambda_scope={scope!r} or leave {name} out"
                )
        return self


class KLOptions(KLSettings, _WithoutSharpness):
    """Options of ``kl``."""


class LambdaOptions(LambdaSettings, CommonOptions):
    """Options of ``lk_lambda``."""


class TauOptions(LambdaSettings):
    """Options of ``tau``."""

    eta: Annotated[Number, Field(gt=0)] = 10.0
    """Rate, above 0, at which the weight of KL falls with the acceptance rate: at an acceptance
    rate of 0.3 it leaves KL 0.05, where the paper's 3 leaves it 0.4."""
    estimator: Literal["weighted", "product"] = "weighted"
    """How likely a chain is taken to get past a draft position: "weighted", min(1, q(x) / p(x)) of
    the recorded token x, which is unbiased; "product", the acceptance rate there, the biased form
    of AngelSpec and Bebop."""
