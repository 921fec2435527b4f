"""Sampling, and the signals that steer teacher queries. Constants by Zhou & Ai (2024) where stated there,
by our own choice otherwise: the paper's body leaves shares and thresholds open."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.config.base import Config, absent


class Sampling(Config):
    """How a model writes."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    """0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest response, tokens."""
    samples: int = Field(default=1, ge=1, le=64)
    """Responses per prompt."""


class TopTokens(Config):
    """The likeliest tokens of each position and the mass of the rest, from the engine as it writes."""

    type: Literal["top"] = "top"
    mass: float = Field(default=1.0, gt=0, le=1)
    """Tokens are kept until they hold this much."""
    limit: int = Field(default=29, ge=1, le=255)
    """Most tokens of a position."""
    min_prob: float = Field(default=1e-3, ge=0, lt=1)
    """Tokens below this probability are left to the rest."""
    resolution: int = Field(default=16, ge=1, le=55)
    """Steps of a log-probability's code: more is finer."""


class SampledTokens(Config):
    """Likely tokens for certain and draws from the others: unbiased. The teacher reads its answers once more for it."""

    type: Literal["sampled"] = "sampled"
    grain: float = Field(default=1 / 64, ge=0.004, le=1)
    """Tokens of this probability are kept for certain, and the others drawn once for so much mass."""
    resolution: int = Field(default=48, ge=1, le=55)
    """Steps of a log-probability's code: more is finer."""


# What annotation keeps of the teacher's distributions, compressed, at temperature 1 whatever the sampling temperature.
Distributions = Annotated[TopTokens | SampledTokens, Field(discriminator="type")]


P_TRUE = """Question: {question}
Proposed answer: {answer}
Is the proposed answer:
 (A) True
 (B) False"""


class PTrue(Config):
    """The TA reads question and answer and says whether it is true (Kadavath et al. 2022)."""

    type: Literal["p_true"] = "p_true"
    template: str = Field(default=P_TRUE, pattern=r"\{answer\}")
    """What the TA is asked; {question} and {answer} are filled in."""
    prefill: str = "The proposed answer is: ("
    """How its turn starts; the next token is read."""
    true: str = Field(default="A", min_length=1)
    """Continuation that means true; its first token is read."""
    false: str = Field(default="B", min_length=1)
    """Continuation that means false; its first token is read."""

    @property
    def tokens(self) -> int:
        """The most tokens that the question adds to prompt and answer: no tokenizer makes more of a text than it has
        bytes."""
        return len((self.template + self.prefill).encode()) + 1


class MeanLogprob(Config):
    """Length-normalised log-probability of the answer under the TA, as exp(mean)."""

    type: Literal["mean_logprob"] = "mean_logprob"

    @property
    def tokens(self) -> None:
        """Nothing is asked, and what is too long is read as far as it goes."""


VERBALIZED = """Question: {question}
Proposed answer: {answer}
How likely is the proposed answer to be correct? Rate it from 1 (surely wrong) to 5 (surely right). Rating:"""


class Verbalized(Config):
    """The TA writes a rating from 1 to 5, read as 0 to 1; an answer without one counts as 0."""

    type: Literal["verbalized"] = "verbalized"
    template: str = Field(default=VERBALIZED, pattern=r"\{answer\}")
    """What the TA is asked; {question} and {answer} are filled in."""
    max_tokens: int = Field(default=8, ge=1, le=256)
    """Longest rating, tokens."""

    @property
    def tokens(self) -> int:
        """The most tokens that question and rating add to prompt and answer."""
        return len(self.template.encode()) + self.max_tokens


Confidence = Annotated[PTrue | MeanLogprob | Verbalized, Field(discriminator="type")]


class Calibration(Config):
    """Isotonic regression of correctness on confidence, fitted on annotations of validation prompts only."""

    least: int = Field(default=20, ge=2)
    """Annotations of validation prompts with a known answer that it takes; with fewer confidences stay as they are."""


class Agreement(Config):
    """The TA answers the annotated prompts itself, greedily, and its final answer has to be the annotation's."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest answer of the TA, tokens."""


class StandIn(Config):
    """The student's majority answer replaces annotations that give another one and that the TA trusts clearly less."""

    margin: float = Field(default=0.2, gt=0, le=1)
    """How much higher the TA's confidence in the student's text has to be, after calibration where there is one."""


class Keep(Config):
    """Which annotations enter the training set."""

    rule: Literal["absolute", "quantile", "weight", "all"] = "all"
    """``absolute``: TA confidence at or above the threshold. ``quantile``: above that quantile of the stage's scores.
    ``weight``: all, weighted by confidence. ``all``: everything that is not empty."""
    threshold: float = Field(default=0.3, ge=0, le=1)
    """A confidence for ``absolute``, a quantile for ``quantile``."""
    drop_truncated: bool = True
    """Drop annotations that hit the length limit."""
    answers: Literal["all", "assistant", "majority"] = "all"
    """Of several annotations of one prompt that pass: ``all``, the one that the TA trusts most (``assistant``), or that
    of the ``majority`` by final answer."""
    calibrate: Calibration | None = None
    """Read the TA's confidence as the share correct, so that thresholds and weights are probabilities; ranks stay."""
    agreement: Agreement | None = Field(default=None, exclude_if=absent)
    """Beside the rule: drop annotations whose final answer is not the TA's. Prompts without a verifier have none."""
    stand_in: StandIn | None = Field(default=None, exclude_if=absent)
    """Train on the student's text where the TA trusts it clearly more than the teacher's, and the rule keeps it."""

    @property
    def compares(self) -> bool:
        """Whether the answers of one prompt are compared with each other."""
        return self.answers == "majority" or self.stand_in is not None


class Select(Config):
    """Which prompts are worth a teacher query."""

    rule: Literal["signals", "random", "oracle"] = "random"
    """``signals``: the highest uncertainty, the weighted rank average of both signals. ``random``: no signals.
    ``oracle``: what the student is known to get wrong, for analysis only."""
    consistency: Literal["unique", "majority", "entropy"] = "unique"
    """Self-consistency by the number of unique answers, the majority's share, or the answers' normalised entropy."""
    same_text: float = Field(default=50.0, gt=0, le=100)
    """ROUGE-L (F1, 0 to 100) from which on two free texts, those of prompts without a verifier, count as one answer;
    also where annotations are compared (``keep.answers: majority``, ``keep.stand_in``)."""
    consistency_weight: float = Field(default=1.0, ge=0)
    """Weight of the student's self-consistency (number of unique answers)."""
    assistant_weight: float = Field(default=1.0, ge=0)
    """Weight of the TA's doubt about the student's answer."""
    source_share: float = Field(default=1.0, gt=0, le=1)
    """Most of the queries that prompts of one source may take: of one task, or of what a file's column
    ``fields.source`` names, such as a cluster."""
    balance: float = Field(default=0.0, ge=0, le=1)
    """Places guaranteed to each source: 0 by its share of the candidates and not at all, 1 equally many. The warm-up
    before it is drawn as prompts come."""

    @model_validator(mode="after")
    def _something_decides(self) -> "Select":
        if self.rule == "signals" and not self.consistency_weight + self.assistant_weight:
            raise ValueError("consistency_weight and assistant_weight are both 0: raise one, or set rule random")
        return self


# The TA has no say.
KEEP_ALL: dict[str, Any] = {"rule": "all", "agreement": None, "stand_in": None}
# What a run with some of the signals does without the others: queries at random, every annotation kept.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {"select": {"rule": "random"}, "keep": KEEP_ALL},
    "consistency": {"select": {"rule": "signals", "assistant_weight": 0.0}, "keep": KEEP_ALL},
    "ta_student": {"select": {"rule": "signals", "consistency_weight": 0.0}, "keep": KEEP_ALL},
    "ta_teacher": {"select": {"rule": "random"}},
}


class Signals(Config):
    """Teaching-assistant-in-the-loop."""

    use: Literal["all", "none", "consistency", "ta_student", "ta_teacher"] = "all"
    """Which signals count, for ablations: one of them, or ``none``; it overrides the rules and weights below, and
    ``ta_teacher`` keeps by quantile where no rule of the TA's is set. ``all``: as set below."""
    confidence: Confidence = PTrue()
    """How the TA's confidence is read."""
    keep: Keep = Keep()
    """The filter behind the teacher."""
    select: Select = Select()
    """The filter before the teacher."""
    candidates: int | None = Field(default=None, ge=1)
    """Prompts the student is sampled on, drawn at random from those not yet asked. Absent: all; as many as are
    annotated where prompts are selected at random."""

    @model_validator(mode="before")
    @classmethod
    def _ablated(cls, data: Any) -> Any:
        use = data.get("use") if isinstance(data, dict) else None
        for part, fields in (ABLATIONS.get(use, {}) if isinstance(use, str) else {}).items():
            given = data.get(part) or {}
            # Anything else is left for its own check to refuse.
            if isinstance(given, dict | Config):
                data = {**data, part: {**dict(given), **fields}}
        keep = data.get("keep") or {} if isinstance(data, dict) else None
        if use == "ta_teacher" and isinstance(keep, dict | Config):
            rules = dict(keep)
            if [rules.get("rule", "all"), rules.get("agreement"), rules.get("stand_in")] == ["all", None, None]:
                data = {**data, "keep": {**rules, "rule": "quantile"}}
        return data
