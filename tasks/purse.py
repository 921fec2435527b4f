"""The purse: a sampling stage's ledger, and what it leaves of it in the manifest.

Table ``queries`` has one row a prompt, asked or not; it is committed before the answers, so a query has one charge
however often its shard is done. Facts ``charged`` and ``spent``: by this stage, and ``…_in_all`` with those before it.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pyarrow as pa

from infra.endpoint import longest
from infra.parts import commit_part, read_part
from tasks import schemas
from tasks.config.budget import Price
from tasks.ledger import Amount, Caps, Ledger, together
from tasks.stage import Stage

# Of a call's requests, the share that may be tried once more where the reply was lost, and may have been billed.
SPARE = 0.1


class Purse:
    """What one stage may ask. ``caps`` are the budget's, with what earlier stages took of it."""

    def __init__(self, stage: Stage[Any], caps: Caps) -> None:
        settings, runtime = stage.settings, stage.spec.runtime
        self.stage, self.samples = stage, settings.sampling.samples
        self.response_tokens, self.prompt_tokens = settings.sampling.max_tokens, settings.prompt_tokens
        endpoint = runtime.engines.get(settings.engine, {}).get("endpoint")
        self.template_tokens = endpoint["template_tokens"] if endpoint else None
        before = stage.input(settings.charged_by).facts if settings.charged_by else {}
        spending = runtime.spending or {"caps": caps, "factor": 2.0}
        # The price is no part of the stage's settings where it decides nothing.
        first = Caps.model_validate(spending["caps"])
        own = (
            Price.model_validate(spending.get("prices", {}).get(settings.engine, first.price)) if first.price else None
        )
        self.total = first.model_copy(update={"price": own})
        charged, spent = amount(before.get("charged_in_all")), amount(before.get("spent_in_all"))
        # What other teachers took has their prices.
        known = before.get("paid", {"charged": first.cost(charged), "spent": first.cost(spent)})
        self.paid_before = {name: Fraction(value) for name, value in known.items()}
        self.caps = at_price(caps, charged, self.paid_before["charged"])
        samples, queries = stage.done("samples"), stage.done("queries")
        self.ledger = Ledger(
            store=stage.store,
            folder=stage.spec.folder,
            caps=self.caps,
            spending_caps=at_price(self.total, spent, self.paid_before["spent"], spending["factor"]),
            spending_factor=spending["factor"],
            charged_before=charged,
            spent_before=spent,
            committed={
                number: charges(read_part(stage.store, part)) for number, part in queries.items() if number in samples
            },
        )

    def worst(self, prompt: Mapping[str, Any]) -> Amount:
        """The most that one prompt may take."""
        if self.template_tokens is None:
            read = self.prompt_tokens or 0
        else:
            read = longest(prompt["messages"], self.template_tokens)
        return Amount(1, read, self.response_tokens) * self.samples

    def spare(self, prompts: int) -> int:
        """Tries beside each request's own that an endpoint may make of so many where replies are lost. An engine's
        calls are lost whole, and made again from here."""
        return 0 if self.template_tokens is None else 1 + int(SPARE * prompts)

    def charge(self, shard: int, prompt_ids: list[str], used: Mapping[int, Amount], reasons: Mapping[int, str]) -> None:
        """Commit what the prompts of a shard are charged."""
        amounts = [used.get(number, Amount()) for number in range(len(prompt_ids))]
        columns = {
            "prompt_id": prompt_ids,
            "queries": [amount.queries for amount in amounts],
            "prompt_tokens": [amount.prompt_tokens for amount in amounts],
            "completion_tokens": [amount.completion_tokens for amount in amounts],
            "reason": [reasons[number] for number in range(len(prompt_ids))],
        }
        rows = pa.table(columns, schema=schemas.QUERY)
        part = commit_part(self.stage.store, self.stage.spec.folder, "queries", shard, rows)
        # Another run of this stage may have been first: then its charges are the shard's.
        self.ledger.close(shard, charges(read_part(self.stage.store, part)))

    def charged(self) -> Amount:
        """By this run so far, what is under way at its worst."""
        return self.ledger.charged_before + self.ledger.charged

    def spent(self) -> Amount:
        return self.ledger.spent_before + self.ledger.spent

    def left(self) -> dict[str, Any]:
        """Of the budget, for those who watch: what is left in words, what is charged and spent in figures. Tries that
        may yet be needed are not spent."""
        charged, spent = self.charged(), self.spent() - self.ledger.spare
        figures = {"charged": self.in_all("charged", charged), "spent": self.in_all("spent", spent)}
        return {"left": in_words(self.caps, charged), **figures}

    def in_all(self, name: str, found: Amount) -> dict[str, Any]:
        """What was charged, or spent, so far, with its price."""
        own = self.ledger.charged if name == "charged" else self.ledger.spent
        priced_all = priced(self.total, found)
        return priced_all | ({"money": float(self.paid(name, own))} if self.total.price else {})

    def paid(self, name: str, own: Amount) -> Fraction:
        return self.paid_before[name] + self.total.cost(own)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        ledger = self.ledger
        found: dict[str, Any] = {
            "charged": priced(self.total, ledger.charged),
            "charged_in_all": self.in_all("charged", self.charged()),
            "spent": priced(self.total, ledger.spent),
            "spent_in_all": self.in_all("spent", self.spent()),
        }
        if self.total.price:
            paid = {"charged": self.paid("charged", ledger.charged), "spent": self.paid("spent", ledger.spent)}
            found["paid"] = {name: str(value) for name, value in paid.items()}
        return found


def at_price(caps: Caps, before: Amount, paid: Fraction, factor: float = 1.0) -> Caps:
    """The caps for an account that counts what came before at its own price, where ``paid`` was its price: ``factor``
    times the money differs by the difference."""
    if caps.money is None:
        return caps
    differs = (caps.cost(before) - paid) / Fraction(str(factor))
    return caps.model_copy(update={"money": at_most(Fraction(str(caps.money)) + differs)}) if differs else caps


def at_most(value: Fraction) -> float:
    """The number as a float that, written out, is not above it."""
    found = float(value)
    while Fraction(str(found)) > value:
        found = math.nextafter(found, -math.inf)
    return found


def amount(fact: Mapping[str, Any] | None) -> Amount:
    """An amount as a manifest has it."""
    return Amount(*(fact[name] for name in Amount.__dataclass_fields__)) if fact else Amount()


def charges(queries: pa.Table) -> Amount:
    """What the rows of a table ``queries`` are charged together."""
    columns = (queries[name].to_pylist() for name in ("queries", "prompt_tokens", "completion_tokens"))
    return together(Amount(*row) for row in zip(*columns, strict=True))


def priced(caps: Caps, found: Amount) -> dict[str, Any]:
    """An amount for a manifest, with its price where there is one."""
    plain = {name: getattr(found, name) for name in Amount.__dataclass_fields__}
    return plain | ({"money": float(caps.cost(found)), "currency": caps.price.currency} if caps.price else {})


def in_words(caps: Caps, charged: Amount) -> str:
    """What is left of a budget."""
    parts = [f"{caps.queries - charged.queries:,} queries"]
    if caps.tokens is not None:
        parts.append(f"{caps.tokens - charged.tokens:,} tokens")
    if caps.money is not None and caps.price is not None:
        parts.append(f"{caps.money - float(caps.cost(charged)):,.4g} {caps.price.currency}")
    return ", ".join(parts)
