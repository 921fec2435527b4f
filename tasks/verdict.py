"""The verdict: what the figures mean, in words. Which way is better, and what lies outside the interval."""

from tasks.metrics import METRICS, Results

# Models as people read them.
NAMES = {"base": "Base", "warmup": "Warmed up", "final": "Final", "teacher": "Teacher", "promoted": "Promoted"}
# Which way is better.
BETTER = {"loss": -1, "rouge_l": 1, "accuracy": 1}


class Shown:
    """How people read a metric: its name, unit, and digits; accuracy in percent."""

    def __init__(self, name: str, unit: str, factor: float, digits: int, *, of_difference: str) -> None:
        self.name, self.unit, self.factor, self.digits, self.of_difference = name, unit, factor, digits, of_difference

    def number(self, value: float | None, *, signed: bool = False) -> str:
        if value is None:
            return "–"
        text = f"{self.factor * value:{'+' if signed else ''}.{self.digits}f}"
        # A true minus sign, as wide as the plus.
        return text.replace("-", "−")

    def interval(self, bounds: list[float] | None, *, signed: bool = False) -> str:
        return "" if bounds is None else " to ".join(self.number(bound, signed=signed) for bound in bounds)


SHOWN = {
    "loss": Shown("Response loss", "nats per token", 1, 3, of_difference="nats per token"),
    "rouge_l": Shown("ROUGE-L", "0 to 100", 1, 1, of_difference="points"),
    "accuracy": Shown("Accuracy", "%", 100, 1, of_difference="points"),
}


def outcome(metric: str, bounds: list[float] | None) -> str:
    """better | worse | unclear: on which side of 0 the whole interval of a difference lies. unknown without one."""
    if bounds is None:
        return "unknown"
    low, high = sorted(BETTER[metric] * bound for bound in bounds)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def outcomes(results: Results, difference: str = "final-base") -> dict[str, list[str]]:
    """Metrics by outcome."""
    found: dict[str, list[str]] = {side: [] for side in ("better", "worse", "unclear", "unknown")}
    for metric in METRICS:
        found[outcome(metric, results.differences[difference][f"{metric}_ci"])].append(metric)
    return found


def headline(results: Results) -> str:
    """Did the student learn? In a few words."""
    found = outcomes(results)
    if found["better"]:
        return "The student learned" if not found["worse"] else "The student changed for better and worse"
    if found["worse"]:
        return "The student got worse"
    return "The student did not measurably change" if found["unclear"] else "Whether the student learned is not known"


def details(results: Results, confidence: float) -> str:
    """By how much, and is that outside the interval? What follows the headline."""
    change, found = results.differences["final-base"], outcomes(results)
    parts = []
    for metric in found["better"] + found["worse"]:
        shown = SHOWN[metric]
        low, high = sorted(abs(bound) for bound in change[f"{metric}_ci"])
        verb = "rose" if change[metric] > 0 else "fell"
        parts.append(
            f"{in_sentence(metric)} {verb} by {shown.number(abs(change[metric]))} {shown.of_difference} "
            f"({confidence * 100:g} % interval {shown.interval([low, high])})"
        )
    if found["unclear"]:
        parts.append(f"no difference outside the interval in {' and '.join(map(in_sentence, found['unclear']))}")
    return "; ".join(parts) or "final and base student were not measured on the same held-out problems"


def verdict(results: Results, confidence: float) -> str:
    """One sentence: did the student learn, by how much, and is that outside the interval?"""
    return f"{headline(results)}: {details(results, confidence)}."


def in_sentence(metric: str) -> str:
    name = SHOWN[metric].name
    return name if name.isupper() or "-" in name else name.lower()
