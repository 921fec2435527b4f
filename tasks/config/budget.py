"""The budget: what may be asked of the teacher, counted in queries, tokens and money (method.md, section 3)."""

from fractions import Fraction

from pydantic import Field, model_validator

from tasks.config.base import Config, absent


class Price(Config):
    """What a model's tokens cost."""

    input: float = Field(ge=0)
    """Per 1,000 prompt tokens."""
    output: float = Field(ge=0)
    """Per 1,000 response tokens."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Code of the currency."""

    def of(self, prompt_tokens: int, completion_tokens: int) -> Fraction:
        """The price of so many tokens, exactly: a sum of floats could creep past a cap."""
        rates = Fraction(str(self.input)), Fraction(str(self.output))
        return (rates[0] * prompt_tokens + rates[1] * completion_tokens) / 1000


class Approval(Config):
    """Amounts that a person has to agree to before a run spends them; none where absent."""

    queries: int | None = Field(default=None, ge=0)
    """Teacher queries."""
    tokens: int | None = Field(default=None, ge=0)
    """Teacher tokens, prompts and responses."""
    money: float | None = Field(default=None, ge=0)
    """In the currency of ``budget.price``."""
    wait_hours: float = Field(default=24.0, gt=0)
    """How long a run waits for approval before it gives up."""


class Budget(Config):
    """What may be asked of the teacher."""

    queries: int = Field(ge=2)
    """Annotation queries in all; each is charged once, kept or not."""
    warmup_share: float = Field(default=0.2, ge=0, lt=1)
    """Share spent on random prompts before the signals exist, of queries, tokens and money. 0: one stage, whose signals
    are those of the student as it comes."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of these queries, prompts and responses; no cap where absent. Prompts that it does not reach stay unasked,
    as ``budget_exhausted``."""
    money: float | None = Field(default=None, gt=0)
    """Price of these queries, by ``price``; no cap where absent."""
    price: Price | None = None
    """The teacher's."""
    prices: dict[str, Price] | None = Field(default=None, exclude_if=absent)
    """Of further teachers by name, where they cost something else."""
    spending_factor: float = Field(default=2.0, ge=1)
    """What is sent in all, repeated requests included, may come to so many times each of the amounts above. A run that
    would need more stops, and continues where this is raised."""
    approve_above: Approval | None = None
    """A run whose budget is larger waits for approval in Prefect before it asks the teacher anything; from a shell
    without a terminal it takes ``--yes`` instead."""
    online_teacher_tokens: int | None = Field(default=None, ge=1)
    """Cap on positions of rollouts that the teacher is asked about during on-policy training; none where absent. Not
    counted is what it reads of annotated rows, and what a training that died does again."""

    @property
    def warmup_queries(self) -> int:
        """Queries of stage 1."""
        return int(self.queries * self.warmup_share)

    def price_of(self, teacher: str) -> Price | None:
        """What a teacher costs, named as in ``peers``."""
        return (self.prices or {}).get(teacher, self.price)

    @model_validator(mode="after")
    def _one_currency(self) -> "Budget":
        for name, price in (self.prices or {}).items():
            if self.price is None or price.currency != self.price.currency:
                raise ValueError(
                    f"prices.{name}: it takes a price of the first teacher, in the same currency: set price"
                )
        return self

    @model_validator(mode="after")
    def _money_has_a_price(self) -> "Budget":
        capped = self.money is not None or (self.approve_above and self.approve_above.money is not None)
        if capped and self.price is None:
            raise ValueError(
                "money is counted by the teacher's price, which is absent: set price: {input: …, output: …}"
            )
        return self
