import importlib.util
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tasks.child import Unanswered, ask
from tasks.forms import form_of, verifier_for
from tasks.verify import EVALUATING, check_verifier, final_answer, harmless, is_correct, rouge_l

# What a model may write at worst.
NASTY = [
    "",
    "\0\x07\x1b[31m",
    "\ud800 lone \udfff",
    "</think>",
    "\\boxed{" * 1000,
    "<answer>" * 1000,
    "-" * 1_000_000,
    "1," * 500_000,
    "9" * 1_000_000,
    "answer is " * 100_000,
    "(A " * 300_000,
    "yes" * 300_000,
    "\n" * 1_000_000,
    "🙂" * 200_000,
    "[" * 500_000 + "]",
    "1/" * 500_000,
    "1:" * 500_000,
    "word " * 200_000,
]


def gym_entry(task, answer, options=None, metadata=None):
    return json.dumps(
        {"task": task, "options": json.dumps(options or {}), "form": form_of(answer), "metadata": metadata or {}}
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The sum is 8.", "8"),
        ("She makes $1,234.50 a day.", "1234.5"),
        ("#### 18", "18"),
        ("so -$5", "-5"),
        ("it is −3", "-3"),
        ("10-5", "5"),
        ("x=-5", "-5"),
        ("7 + 8 = 15.0", "15"),
        ("1,000,000", "1000000"),
        ("1, 2, 3", "3"),
        ("007", "7"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("3/4", "0.75"),
        ("\\frac{1}{3}", "1/3"),
        ("2/6", "1/3"),
        ("5/0", "5"),
        ("50%", "50"),
        ("1e3", "1000"),
        ("1{,}500", "1500"),
        ("item B12", None),
        ("none", None),
        ("<think>first 4, then 5</think> The answer is 9", "9"),
        ("0." + "0" * 300 + "1", "0." + "0" * 300 + "1"),
        ("123456789012345678901234567890.10", "123456789012345678901234567890.1"),
    ],
)
def test_number(text, number):
    assert final_answer("number", text, None) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b)", "B"),
        ("(c)", "C"),
        ("The answer is (B).", "B"),
        ("**Answer: D**", "D"),
        ("The correct option is C because A is wrong", "C"),
        ("\\boxed{\\text{E}}", "E"),
        ("A dog is an animal. I think so.", None),
        ("It could be (A) or (B). I choose (A)", "A"),
        ("Between B and D, it is D", "D"),
        ("Therefore: A", "A"),
        ("nothing", None),
    ],
)
def test_choice(text, letter):
    assert final_answer("choice", text, None) == letter


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes, because there is no other way.", "yes"),
        ("No.", "no"),
        ("**True**", "yes"),
        ("One might say no, but the answer is yes.", "yes"),
        ("It holds in no case, so yes", "yes"),
        ("Nobody knows", None),
    ],
)
def test_yes_no(text, verdict):
    assert final_answer("yes_no", text, None) == verdict


def test_exact():
    assert final_answer("exact", "  The\tCapital of\n FRANCE. ", None) == "the capital of france"
    assert is_correct("exact", "**Paris**", "paris", None)
    assert final_answer("exact", " \n", None) is None
    assert final_answer("none", "Some Text", None) == "some text"
    assert is_correct("none", "Some text", "some text", None) is None


@pytest.mark.parametrize(
    ("verifier", "text", "answer", "correct"),
    [
        ("number", "The total is $18.00", "18", True),
        ("number", "The total is 17", "18", False),
        ("number", "no idea", "18", False),
        ("number", "18", None, None),
        ("number", "18", "no number", None),
        ("choice", "The answer is B", "(b)", True),
        ("yes_no", "False", "No", True),
    ],
)
def test_is_correct(verifier, text, answer, correct):
    assert is_correct(verifier, text, answer, None) is correct


@pytest.mark.parametrize("verifier", ["number", "choice", "yes_no", "exact", "none"])
@pytest.mark.parametrize("text", NASTY)
def test_any_text(verifier, text):
    final = final_answer(verifier, text, None)
    assert final is None or final.encode()
    is_correct(verifier, text, "7", None)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_at_random(text):
    for verifier in ("number", "choice", "yes_no", "exact"):
        final = final_answer(verifier, text, None)
        # What is extracted is its own final answer, so a known answer may be given in its normal form.
        assert final is None or final_answer(verifier, final, None) == final


def test_auto():
    found = {answer: verifier_for(answer) for answer in (None, "18", "$1,200", "3/4", "B", "no", "\\frac12", "Paris")}
    assert list(found.values()) == ["none", "number", "number", "number", "choice", "yes_no", "math", "exact"]


def test_math():
    assert is_correct("math", "so it is \\boxed{\\frac{1}{2}}", "0.5", None)
    assert is_correct("math", "$(x+1)^2$", "x^2+2x+1", None)
    assert is_correct("math", "It is 0.5", "\\frac{1}{2}", None)
    assert not is_correct("math", "$x^2$", "x^3", None)
    assert is_correct("math", "5", "", None) is None
    assert final_answer("math", "$\\frac{2}{4}$", None) == final_answer("math", "that is 0.50", None) == "0.5"
    assert final_answer("math", "I do not know", None) is None
    for text in NASTY:
        final_answer("math", text, None)
        is_correct("math", text, "7", None)


def test_an_answer_without_end_is_wrong():
    assert is_correct("math", "$9^{9^{9^9}}$", "5", None) is False
    assert is_correct("math", "5", "5", None) is True


def test_a_request_that_fails_is_unanswered():
    with pytest.raises(Unanswered, match="KeyError"):
        ask("reasoning_gym", "no such request")
    assert "chain_sum" in ask("reasoning_gym", "tasks")


@pytest.mark.parametrize(
    "said",
    ["{}", "The sum is {}.", "<think>3 or 4</think>So 1 + 1 is\n**Answer:** {}", "<answer>{}</answer> (sure, 5/5)"],
)
@pytest.mark.parametrize(
    ("task", "answer", "wrong"),
    [
        ("chain_sum", "-1234", "1234"),
        ("gcd", "12", "1"),
        ("decimal_arithmetic", "6.25", "9"),
        ("fraction_simplification", "3/4", "6/8"),
        ("calendar_arithmetic", "Friday", "Monday"),
        ("game_of_life_halting", "False", "True"),
        ("spiral_matrix", "1 2 3 6 9", "1 2 3"),
        ("rotate_matrix", "1 2\n3 4", "4 3\n2 1"),
        ("simple_integration", "x**2 + C", "x**3 + C"),
    ],
)
def test_reasoning_gym(task, answer, wrong, said):
    metadata = {
        "task": "weekday_of_date",
        "integrand": "2*x",
        "variable": "x",
        "simplified_numerator": 3,
        "simplified_denominator": 4,
        "numerator": 6,
        "denominator": 8,
    }
    entry = gym_entry(task, answer, metadata=metadata)
    assert is_correct("reasoning_gym", said.format(answer), answer, entry) is True
    assert is_correct("reasoning_gym", said.format(wrong), answer, entry) is False


def test_reasoning_gym_scores_what_has_no_single_answer():
    numbers = {"numbers": [2, 3, 7], "target": 13}
    entry = gym_entry("countdown", "2*3 + 7", metadata=numbers)
    assert is_correct("reasoning_gym", "The answer is 7 + 3*2", "2*3 + 7", entry)
    assert not is_correct("reasoning_gym", "The answer is 13", "2*3 + 7", entry)


@pytest.mark.parametrize("text", NASTY)
def test_reasoning_gym_takes_any_text(text):
    for answer in ("5", "3/4", "word", "two words", "[1, 2]", "1\n2", "12:30", "Yes"):
        entry = gym_entry("chain_sum", answer)
        final = final_answer("reasoning_gym", text, entry)
        assert final is None or final.encode()
    is_correct("reasoning_gym", text, "5", gym_entry("chain_sum", "5"))


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('true')",
        "print(1)",
        "(print)(1)",
        "[].append(1)",
        "x. real",
        "eval ('1')",
        "sin(exec('1'))",
        "1" * 2000,
        "a; b",
    ],
)
def test_answers_that_do_more_than_calculate_are_not_evaluated(answer):
    assert not harmless(answer)


@pytest.mark.parametrize("answer", ["3*x**2 + sin(2*x) + C", "-2*(x - 8)**(3/2)/3", "['a', 'b']", "10*(8 - 5) - 6"])
def test_calculations_are_evaluated(answer):
    assert harmless(answer)


def test_all_scorers_that_evaluate_are_known():
    package = importlib.util.find_spec("reasoning_gym")
    files = [file.read_text() for file in Path(package.submodule_search_locations[0]).rglob("*.py")]
    # One task brings a parser of its own under sympy's name.
    evaluates = re.compile(r"\beval\(\w*answer|\bparse_expr\(\w*answer")
    sources = [text for text in files if evaluates.search(text) and "def parse_expr" not in text]
    names = {re.search(r'^DATASET_NAME = "(.*)"', text, re.MULTILINE)[1] for text in sources}
    assert names == EVALUATING


def test_own_verifier(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text(
        "def tests(text, answer, entry):\n    return text.strip(), text.strip() in entry['allowed']\n"
        "def wrong(text, answer, entry):\n    return True\n"
        "value = 3\n"
    )
    (tmp_path / "own_broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = json.dumps({"allowed": ["a", "b"]})
    assert final_answer("own_checks:tests", " a ", entry) == "a"
    assert is_correct("own_checks:tests", "b", None, entry) is True
    assert is_correct("own_checks:tests", "c", None, entry) is False
    with pytest.raises(ValueError, match=r"return \(final_answer, correct\)"):
        is_correct("own_checks:wrong", "c", None, entry)
    for name in ("no_such_module:f", "own_checks:nothing", "own_checks:value", "own_broken:f", "own_checks:", ":f"):
        with pytest.raises(ValueError, match=r"prompts\.verifier"):
            check_verifier(name)


def test_unknown_verifier():
    with pytest.raises(ValueError, match="use number"):
        is_correct("numbr", "1", "1", None)


def test_rouge_l():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [("The cats were running home", "a cat runs home"), ("x y z", "z y x"), ("one", "one")]
    for text, reference in pairs:
        assert rouge_l(text, [reference]) == pytest.approx(100 * scorer.score(reference, text)["rougeL"].fmeasure)
    assert rouge_l("the cat", ["a dog", "the cat"]) == 100
    assert rouge_l("", ["a"]) == rouge_l("a", []) == rouge_l("\ud800", ["a"]) == 0
    assert rouge_l("word " * 200_000, ["word"]) < 1
