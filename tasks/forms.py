"""Forms of answers: finding a number, a letter, a yes or no, or a line of a known form in what a model wrote.

Plain functions of text, no state. All look at the last 20,000 characters only: answers stand at the end, and patterns
stay fast whatever the text.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

TAIL_CHARACTERS = 20_000
LINE_CHARACTERS = 2_000
# Longer digit strings are compared as they stand: no arithmetic on them.
NUMBER_CHARACTERS = 400

_SIGN = r"(?:(?<![\w)\]}])[-+])?(?<![A-Za-z_0-9])"
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"({_SIGN}{_DECIMAL}(?:[eE][-+]?\d{{1,3}}(?!\w))?)(?:\s?/\s?({_DECIMAL})(?![\d/]))?", re.ASCII)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{(-?[\d.,]+)\}\s?\{([\d.,]+)\}", re.ASCII)

_ANSWER_IS = r"(?i:answer|choice|option)(?i:\s+is)?\W{0,9}(?i:option\s+)?\W{0,3}"
_CHOICES = (
    re.compile(r"\\boxed\{\W{0,3}(?:text\{)?\W?([A-J])\b"),
    re.compile(rf"{_ANSWER_IS}([A-J])\b(?!')"),
    re.compile(r"\(([A-J])\)"),
    # "A" and "I" are words as well, unless a line ends with them or they are marked.
    re.compile(r"(?m)(?<![\w'])([B-HJ]|[AI](?=[.):*]*\s*$)|(?<=^)[AI](?=[.):]))(?![\w'])"),
)
_YES_NO = r"(?i:(yes|true)|(no|false))\b"
_VERDICTS = (
    re.compile(rf"(?i:answer\s*(?:is)?)\W{{0,9}}{_YES_NO}"),
    re.compile(rf"\A\W*{_YES_NO}"),
    re.compile(rf"\b{_YES_NO}"),
)
_LEAD = re.compile(
    r"^.*?\b(?:answer|result|solution|output|sum|value|total|difference|sequence|word|string|list|matrix|grid|text"
    r"|sentence|expression|fraction|day|date|time|duration|equals?)\b[^:=]{0,60}?(?:\b(?:is|are|be)\b:?|[:=])\**\s+",
    re.IGNORECASE,
)
_MARKUP = " \t\r\n*_`\"'“”‘’$"


def tail(text: str) -> str:
    """The end of what is said after thinking; NFC; storable (lone surrogates become question marks)."""
    text = text.rpartition("</think>")[2].strip()[-TAIL_CHARACTERS:]
    return unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())


def last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match."""
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def canonical_number(number: str, denominator: str | None = None) -> str:
    """``1,234.50`` as ``1234.5``, 3 over 4 as ``0.75``, 1 over 3 as ``1/3``."""
    if len(number) + len(denominator or "") > NUMBER_CHARACTERS:
        return number
    value, divisor = Decimal(number.replace(",", "")), Decimal((denominator or "1").replace(",", ""))
    if divisor and divisor != 1:
        ratio = Fraction(value) / Fraction(divisor)
        if 10**NUMBER_CHARACTERS % ratio.denominator:
            return f"{ratio.numerator}/{ratio.denominator}"
        with localcontext(prec=4 * NUMBER_CHARACTERS):
            value = Decimal(ratio.numerator) / Decimal(ratio.denominator)
    digits = format(value, "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def number(text: str) -> str | None:
    """The last number of a text."""
    text = tail(text).replace("−", "-").replace("{,}", ",").replace("\\$", "$").replace("-$", " -").replace("$", " ")
    found = last(_NUMBER, _LATEX_FRACTION.sub(r"\1/\2", text))
    return canonical_number(found[1], found[2]) if found else None


def choice(text: str) -> str | None:
    """A letter A to J."""
    text = tail(text)
    alone = re.fullmatch(r"\W{0,9}([A-Ja-j])\W{0,9}", text)
    if alone:
        return alone[1].upper()
    for pattern in _CHOICES:
        if found := pattern.findall(text):
            return found[-1]
    return None


def yes_no(text: str) -> str | None:
    """``yes`` or ``no``."""
    text = tail(text)
    for pattern in _VERDICTS:
        if found := pattern.findall(text):
            return "yes" if found[-1][0] else "no"
    return None


def exact(text: str) -> str | None:
    """The whole text, folded: case, white space and outer punctuation do not matter."""
    text = text.rpartition("</think>")[2]
    text = " ".join(unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode()).casefold().split())
    return text.strip(" .,;:!?*_`\"'“”‘’") or text or None


def marked(text: str) -> str | None:
    """What stands in the last <answer> tag or \\boxed{}, where there is one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 1, text[start + len("\\boxed{") :]
    for place, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:place].strip()
    return None


def lines(text: str) -> list[str]:
    """Lines that say something, without markdown's fences and rules."""
    return [line.rstrip() for line in text.splitlines() if line.strip(" \t`*-#=")]


def last_line(text: str) -> str | None:
    """The last line without markup and without what leads to the answer ("The result is")."""
    found = lines(text)
    if not found:
        return None
    line = found[-1][-LINE_CHARACTERS:].strip(_MARKUP)
    return _LEAD.sub("", line).strip(_MARKUP).removesuffix(".").strip(_MARKUP) or line


def word(text: str) -> str | None:
    """One word: the first behind "the answer is", or the last of the last line."""
    found = lines(text)
    line = found[-1][-LINE_CHARACTERS:] if found else ""
    led = _LEAD.match(line)
    words = re.findall(r"[\w'-]+", line[led.end() :] if led else line)
    return (words[0] if led else words[-1]) if words else None


def pattern_finder(pattern: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)

    def find(text: str) -> str | None:
        found = last(compiled, text)
        return found[0] if found else None

    return find


def bracketed(text: str) -> str | None:
    """The last line's part from the first bracket to the last."""
    line = next((line for line in reversed(text.splitlines()) if "[" in line and "]" in line), "")
    return line[line.find("[") : line.rfind("]") + 1] or None


def fraction(text: str) -> str | None:
    """The last fraction as it stands, not reduced."""
    found = pattern_finder(r"(?<!\d)-?(?<!\d)\d+\s?/\s?-?\d+")(_LATEX_FRACTION.sub(r"\1/\2", text))
    return found.replace(" ", "") if found else None


# Form of a known answer: how it is recognised, and how its like is found in a text. The first that fits counts.
FORMS: dict[str, tuple[re.Pattern[str], Callable[[str], str | None]]] = {
    "verdict": (re.compile(r"(?i:yes|no|true|false)"), yes_no),
    "number": (re.compile(r"[-+]?(0|[1-9][\d,]*)(\.\d+)?([eE][-+]?\d+)?"), number),
    "fraction": (re.compile(r"-?\d+/\d+"), fraction),
    "clock": (re.compile(r"\d+(:\d+)+(\.\d+)?"), pattern_finder(r"(?<!\d)\d+(?::\d+)+(?:\.\d+)?")),
    "word": (re.compile(r"[\w'-]+"), word),
    "list": (re.compile(r"\[.*\]"), bracketed),
    "line": (re.compile(r"[^\n]+"), last_line),
}


def form_of(answer: str | None) -> str:
    """The form of a known answer; ``lines:k`` for k lines, ``text`` where it is unknown."""
    if not answer or not answer.strip():
        return "text"
    name = next((name for name, (pattern, _) in FORMS.items() if pattern.fullmatch(answer.strip())), None)
    return name or f"lines:{len(lines(answer))}"


def last_lines(text: str, count: int) -> str | None:
    """The last lines, without what leads to them and without a closing dot."""
    found = lines(text)[-count:]
    if not found:
        return None
    found[0] = _LEAD.sub("", found[0][:LINE_CHARACTERS]) or found[0]
    return "\n".join(found).removesuffix(".")


def find_form(form: str, text: str) -> str | None:
    """The last part of a text that has a form."""
    text = tail(text)
    text = marked(text) or text
    if form.startswith("lines:"):
        return last_lines(text, int(form.removeprefix("lines:")))
    if form == "text":
        return "\n".join(lines(text)) or None
    return FORMS[form][1](text)


def verifier_for(answer: str | None) -> str:
    """The verifier that an answer's form asks for, where the settings say ``auto``."""
    if answer is None:
        return "none"
    if re.fullmatch(rf"\s*-?\$?{_DECIMAL}(/{_DECIMAL})?%?\s*", answer, re.ASCII):
        return "number"
    if re.fullmatch(r"\(?[A-J]\)?", answer.strip()):
        return "choice"
    if answer.strip().casefold() in ("yes", "no", "true", "false"):
        return "yes_no"
    return "math" if "\\" in answer or "^" in answer else "exact"
