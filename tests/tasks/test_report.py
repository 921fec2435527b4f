"""The report stage run for real over synthetic manifests: page, facts, student, and what is left out."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from synthetic_run import HOSTILE, HOSTILE_NAME, SyntheticRun

from infra.manifest import load_manifest
from infra.parts import read_rows
from infra.store import open_store
from tasks import accounts, findings, page, plots
from tasks.card import plain
from tasks.config import load_config
from tasks.config.run import OPERATIONAL
from tasks.metrics import LABELS, METRIC, METRICS
from tasks.report import ReportSettings
from tasks.report import whole as report_config
from tasks.stage import Runtime, Stage, StageSpec


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, text and headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts, self.headings = [], [], [], []
        self.feed(html)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"] and data.strip():
            self.texts.append(data.strip())
            if self.tags[-1] in ("h1", "h2", "h3"):
                self.headings.append(data.strip())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = SyntheticRun(tmp_path_factory.mktemp("whole")).whole()
    stage, manifest = run.report()
    return run, stage, manifest, Page(stage.store.read(manifest.facts["report"]).decode())


def test_page_reaches_nothing_outside_itself(whole):
    _, stage, manifest, found = whole
    assert {"script", "img", "link", "iframe", "object", "form", "base", "foreignobject"}.isdisjoint(found.tags)
    for _tag, name, value in found.attributes:
        assert not name.startswith("on")
        assert "http" not in value.lower() or name == "http-equiv", value
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in found.attributes
    html = stage.store.read(manifest.facts["report"]).decode()
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []


def test_hostile_text_is_shown_as_text(whole):
    _, stage, manifest, found = whole
    assert HOSTILE in found.text
    assert HOSTILE_NAME[:20] in found.text
    html = stage.store.read(manifest.facts["report"]).decode()
    assert "<script" not in html
    assert "<img" not in html


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root.
        opened = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=os.geteuid() != 0)
        yield opened
        opened.close()


def opened(browser, address):
    """What a page does when it is opened and everything on it is clicked: requests beyond itself, and alerts."""
    context = browser.new_context()
    page, requests, alerts = context.new_page(), [], []
    context.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    context.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
    page.goto(address, wait_until="load")
    for summary in page.locator("summary").all():
        summary.click()
    page.wait_for_timeout(500)
    context.close()
    return {url for url in requests if url.split("#")[0] != address and url != "about:srcdoc"}, alerts


@pytest.mark.browser
def test_hostile_text_does_nothing_in_a_browser(whole, browser, tmp_path):
    _, stage, manifest, _ = whole
    assert opened(browser, Path(stage.store.location(manifest.facts["report"])).as_uri()) == (set(), [])
    # As it stands it would do all of it.
    (tmp_path / "raw.html").write_text(f"<div>{HOSTILE}")
    requests, alerts = opened(browser, (tmp_path / "raw.html").as_uri())
    assert any("evil.example" in url for url in requests)
    assert {"x", "1"} <= set(alerts)


def test_ids_are_unique_and_references_resolve(whole):
    _, stage, manifest, found = whole
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    html = stage.store.read(manifest.facts["report"]).decode()
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)) != set()
    for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html):
        assert (pair[0] or pair[1]) in ids


def test_figures_follow_the_page_colours(whole):
    _, stage, manifest, _ = whole
    html = stage.store.read(manifest.facts["report"]).decode()
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 3 + 2 + 3 + 4
    for figure in figures:
        assert re.findall(r"#[0-9a-f]{6}\b", figure) == []
        assert "DejaVu" not in figure
        assert "<style" not in figure
    # Every variable that is used is defined, in light and in dark.
    used = set(re.findall(r"var\(--([a-z]+)\)", html)) - {"c", "font", "page"}
    for scheme in html.split("prefers-color-scheme: dark")[:2]:
        assert used <= set(re.findall(r"--([a-z]+):", scheme[:9000]))


def test_every_section_is_there(whole):
    found = whole[3]
    for heading in (
        "The student learned",
        "Before and after",
        "By source",
        "Where rows went",
        "Refused rows, by reason",
        "How much the student disagrees with itself",
        "Accuracy by number of unique answers",
        "TA's confidence in the student's answers",
        "TA's confidence in the teacher's annotations",
        "Is the TA's confidence honest?",
        "Stage 1: loss",
        "Stage 2: loss",
        "Stage 2: who writes, by position",
        "Stage 2: rollouts",
        "Samples side by side",
        "Teacher queries against the budget",
        "Online teacher tokens against the cap",
        "By stage",
        "Models, settings, versions",
    ):
        assert heading in found.headings
    assert found.text.count("✓ right") + found.text.count("✗ wrong") == findings.SAMPLES * len(LABELS)
    assert "near_duplicates.threshold" in found.text
    assert "resources" in found.text


def test_facts(whole):
    _, stage, manifest, _ = whole
    facts = manifest.facts
    keys = [key for metric in METRICS for key in (metric, f"{metric}_ci")]
    assert list(facts["metrics"]) == list(LABELS)
    assert list(facts["differences"]) == ["final-base", "final-warmup", "final-teacher"]
    for row in (*facts["metrics"].values(), *facts["differences"].values()):
        assert list(row) == keys
        for metric in METRICS:
            low, high = row[f"{metric}_ci"]
            assert low <= row[metric] <= high
    assert json.loads(json.dumps(facts)) == facts
    marks = read_rows(stage.store, stage.input("evaluate-after"), "evaluations").to_pylist()
    final = [row["correct"] for row in marks if row["label"] == "final"]
    assert facts["metrics"]["final"]["accuracy"] == pytest.approx(sum(final) / len(final))
    assert facts["verdict"].startswith("The student learned: response loss fell by 0.")
    gain = facts["differences"]["final-base"]["accuracy"]
    value = facts["quality_for_cost"]
    tokens, paid = 400 * (60 + 48) + 160 * 120, 400 * (60 * 0.1 + 48 * 0.5) / 1000
    for key, took, size in (
        ("per_1000_queries", 400, 1000),
        ("per_million_teacher_tokens", tokens, 1e6),
        ("per_money", paid, 1),
    ):
        assert value[key]["took"] == pytest.approx(took)
        assert value[key]["accuracy"] == pytest.approx(gain / took * size)
        assert value[key]["accuracy_ci"][0] <= value[key]["accuracy"] <= value[key]["accuracy_ci"][1]
    assert value["per_device_hour"]["took"] > 0
    table = read_rows(stage.store, manifest, "metrics")
    assert table.schema == METRIC
    assert table.num_rows == (1 + 3) * (len(LABELS) + 3) * len(METRICS)


def test_funnel_counts_every_row(whole):
    _, stage, *_ = whole
    levels = accounts.funnel({name: stage.input(name) for name in stage.spec.inputs})
    counts = {level.name: (level.rows, level.warmup) for level in levels}
    kept = [stage.input(name).facts["kept"] for name in ("warmup-keep", "keep")]
    assert counts == {
        "Rows read": (2700 + 90 + 155, 0),
        "Prompts to learn from": (2700, 80),
        "Candidates the student answered": (900, 0),
        "Teacher queries": (400, 80),
        "Annotations kept": (sum(kept), kept[0]),
        "Rows trained on": (250, 0),
    }
    reasons = dict(page.refusals(stage.store, {"prompts": stage.input("prompts")}))
    assert reasons == {"Refused rows": [("duplicate", 130), ("too long", 21), ("empty", 4)]}
    costs = {cost.name: cost for cost in accounts.costs({name: stage.input(name) for name in stage.spec.inputs})}
    assert costs["annotate"].teacher_queries == 320
    assert costs["train"].teacher_tokens == 160 * 120


def test_the_budget_is_told_by_unit(whole):
    _, stage, *_, found = whole
    manifests = {name: stage.input(name) for name in stage.spec.inputs}
    queries, tokens, money = accounts.accounts(manifests, stage.settings.budget)
    assert (queries.charged, queries.cap, queries.left, queries.spent, queries.spending_cap) == (400, 400, 0, 430, 800)
    assert (tokens.charged, tokens.left) == (400 * 108, 50_000 - 400 * 108)
    assert (money.unit, money.charged, money.cap) == ("USD", pytest.approx(12), None)
    for text in ("50,000", "6,800", "Final − base per USD", "Final − base per device-hour"):
        assert text in found.text


def test_files_and_student(whole):
    _, stage, manifest, _ = whole
    for files in manifest.files.values():
        for file in files:
            data = stage.store.read(file.path)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    picture = stage.store.read(manifest.facts["overview"])
    assert picture.startswith(b"\x89PNG")
    trained = {file.path.rsplit("/", 1)[1]: file.sha256 for file in stage.input("train").files["student"]}
    finished = {file.path.rsplit("/", 1)[1]: file.sha256 for file in manifest.files["student"]}
    assert finished.keys() == trained.keys()
    assert {name for name in trained if trained[name] != finished[name]} == {"README.md"}
    # The training stage's own card stays as it is.
    assert b"own card" in stage.store.read(stage.input("train").files["student"][0].path)
    reference = manifest.facts["models"]["student"]
    assert reference["path"] == manifest.facts["student"] == f"{manifest.folder}/files/student"
    assert reference["revision"] == "train"


def test_model_card(whole):
    _, stage, manifest, _ = whole
    text = stage.store.read(f"{manifest.facts['student']}/README.md").decode()
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "house/student-135m"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["accuracy"] == pytest.approx(100 * manifest.facts["metrics"]["final"]["accuracy"])
    for part in (
        "vllm serve . --served-model-name synthetic",
        "AutoModelForCausalLM",
        "exponential\\_decay",
        "| Final |",
    ):
        assert part in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_markdown_is_plain():
    assert plain("a|b\n<script>*x*`") == "a\\|b &lt;script&gt;\\*x\\*\\`"


def test_same_inputs_give_the_same_page(whole):
    run, *_ = whole
    pages = [run.report(inputs=["prompts", "select", "evaluate-after"])[0].manifest.files["report"] for _ in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("inputs", "present", "absent"),
    [
        ([], "not known", "Before and after"),
        (["prompts"], "Where rows went", "Signals"),
        (["evaluate-before"], "Before and after", "Samples side by side"),
        (["models", "train", "evaluate-after", "evaluate-before", "prompts"], "Stage 2: loss", "Stage 1: loss"),
        (["select"], "Accuracy by number of unique answers", "TA's confidence in the teacher's annotations"),
    ],
)
def test_absent_inputs_leave_their_section_out(whole, inputs, present, absent):
    stage, manifest = whole[0].report(inputs=inputs)
    found = Page(stage.store.read(manifest.facts["report"]).decode())
    assert any(present in heading for heading in found.headings)
    assert absent not in found.headings
    assert (manifest.facts["student"] is None) == ("train" not in inputs)
    assert manifest.facts["promoted"] == ("train" in inputs)


def test_empty_tables(tmp_path):
    run = SyntheticRun(tmp_path)
    run.models()
    run.prompts(0)
    run.annotations("warmup", 0)
    run.signals(0)
    run.student("train", steps=0)
    run.evaluation("evaluate-before", ["teacher", "base"], 0)
    run.evaluation("evaluate-after", ["warmup", "final"], 0)
    stage, manifest = run.report()
    assert manifest.facts["metrics"]["final"]["accuracy"] is None
    assert manifest.facts["promoted"] is False
    assert "not known" in manifest.facts["verdict"]
    assert stage.store.exists(f"{manifest.facts['student']}/README.md")


def test_a_teacher_that_is_not_evaluated_leaves_its_row_empty(tmp_path):
    """As an endpoint's is not: it is asked for annotations only."""
    run = SyntheticRun(tmp_path, {"evaluate": {"seeds": [1], "bootstrap": 100}})
    run.models()
    run.prompts(30)
    run.annotations("warmup", 40)
    run.student("train", steps=5)
    run.evaluation("evaluate-before", ["base"], 30)
    run.evaluation("evaluate-after", ["warmup", "final"], 30)
    stage, manifest = run.report()
    assert manifest.facts["metrics"]["teacher"]["accuracy"] is None
    assert manifest.facts["differences"]["final-base"]["accuracy"] is not None
    assert manifest.facts["quality_for_cost"]["per_1000_queries"]["took"] == 40
    assert "Before and after" in Page(stage.store.read(manifest.facts["report"]).decode()).headings


def test_runs_alone_from_a_shell(whole, tmp_path):
    _, stage, *_ = whole
    spec = StageSpec.model_validate({**stage.spec.model_dump(), "inputs": {}, "redo": 1})
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "tasks.report", "--spec", str(tmp_path / "spec.json")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.splitlines()[-1].endswith(spec.manifest_path)
    assert "already complete" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_settings_are_light_to_import():
    code = "import sys, tasks.report; print([m for m in ('torch', 'ray', 'vllm', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_curves_are_thinned_and_smoothed():
    steps, means = plots.thin(np.arange(1.0, 11.0), 5)
    assert steps.tolist() == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert means.tolist() == [1.5, 3.5, 5.5, 7.5, 9.5]
    steps, means = plots.thin(np.array([1.0, np.nan, np.nan, np.nan, 5.0]), 3)
    assert steps.tolist() == [1.5, 3.5, 5.0]
    assert np.array_equal(means, [1, np.nan, 5], equal_nan=True)
    assert len(plots.thin(np.ones(1_000_000))[0]) <= plots.POINTS
    assert plots.smooth(np.ones(7)).tolist() == [1] * 7
    assert plots.smooth(np.array([0.0, np.nan, 4.0])).tolist() == [0, 2, 4]


def test_shown_samples_take_sources_in_turn():
    ids = [f"{number}" for number in range(100)]
    sources = ["common"] * 98 + ["rare"] * 2
    chosen = findings.draw(ids, sources, seed=1)
    assert len(set(chosen)) == findings.SAMPLES
    assert {"98", "99"} <= set(chosen)
    assert findings.draw(ids, sources, seed=1) == chosen
    assert findings.draw(["a"], ["s"], seed=0) == ["a"]


def test_words():
    assert [page.span(seconds) for seconds in (0.04, 59.94, 61, 7322)] == ["0.0 s", "59.9 s", "1 min 1 s", "2 h 2 min"]
    assert page.clip("x" * 2000, 10) == "x" * 10 + "\n… and 1,990 more characters"
    assert page.clip(None) == ""
    assert page.decimal(float("nan")) == "–"
    nested = {"name": "n", "a": {"b": {"c": 1}, "d": [{"e": "x"}, {"e": None}], "f": [1, 2], "g": {}}}
    assert page.flat(nested) == {
        "run": [("name", "n")],
        "a": [("b.c", "1"), ("d[0].e", "x"), ("d[1].e", "null"), ("f", "[1, 2]"), ("g", "{}")],
    }


def test_calibration_is_measured_on_rows_it_was_not_fitted_on(tmp_path):
    config = {"signals": {"keep": {"rule": "absolute", "threshold": 0.4, "calibrate": {}}}}
    run = SyntheticRun(tmp_path, config)
    run.annotations("warmup", 80)
    run.annotations("", 320)
    store = open_store(str(tmp_path))
    manifests = {name: load_manifest(store, path) for name, path in run.paths.items()}
    pairs = findings.calibrated(store, manifests)
    assert {len(correct) for _, correct in pairs.values()} == {320}
    figures, calibrations = findings.confidence(store, manifests)
    raw, as_scored, calibrated = calibrations
    assert (raw.known, as_scored.known, calibrated.known) == (400, 320, 320)
    assert as_scored.accuracy == calibrated.accuracy
    assert calibrated.brier == pytest.approx(((pairs["calibrated"][0] - pairs["calibrated"][1]) ** 2).mean())
    assert "after calibration" in figures[0].note


def test_columns_and_counts_are_of_all_parts(whole):
    run = whole[0]
    store = open_store(str(run.root))
    manifests = {"select": load_manifest(store, run.paths["select"])}
    rows = read_rows(store, manifests["select"], "signals").to_pylist()
    counts = findings.consistency(store, manifests)[0].data[0]
    assert counts == plots.Counts((row["unique_answers"], row["correct"]) for row in rows)
    found = findings.columns(store, manifests, ["select", "absent"], "signals", ["unique_answers", "correct"])
    assert found["unique_answers"].tolist() == [row["unique_answers"] for row in rows]
    known = [-1 if row["correct"] is None else int(row["correct"]) for row in rows]
    assert np.nan_to_num(found["correct"], nan=-1).tolist() == known


def test_settings_that_decide_no_result_are_the_runs_own() -> None:
    """Others are judged by them: with default engines these prompts would be too long."""
    folder = Path(__file__).parent.parent.parent / "configs"
    changes = ["engines.teacher.max_model_len=4096", "engines.student.max_model_len=4096"]
    config = load_config(folder / "quickstart.yaml", ["prompts.max_prompt_tokens=2000", *changes])
    operational = config.model_dump(mode="json", include=OPERATIONAL)
    settings = ReportSettings(
        name="long",
        config=config.model_dump(mode="json", exclude=OPERATIONAL),
        evaluate=config.evaluate,
        promote=config.promote,
        budget=config.budget,
    )
    spec = StageSpec(stage="report", module="tasks.report", root="/nowhere", runtime=Runtime(operational=operational))
    assert report_config(Stage(spec, settings)) == config
