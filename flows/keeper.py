"""Commands that look at a store, and look after it: ``switchyard show | compare | signals | verify | trace | rollback |
gc``."""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.console import console
from infra.store import Store, open_store
from infra.terminal import visible

if TYPE_CHECKING:
    from flows.record import RunRecord

keeper = typer.Typer()

Root = Annotated[str, typer.Option(help="Where results are: a folder or s3://bucket/prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line of stdout.")]


class UserError(Exception):
    """Mistakes to be told in one line each, exit code 2."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def opened(root: str, run: str) -> tuple[Store, "RunRecord"]:
    """The store and a run's record, by its id or the start of it."""
    from flows.record import find_record

    store = open_store(root)
    try:
        return store, find_record(store, run)
    except ValueError as error:
        raise UserError([str(error)]) from None


@keeper.command()
def show(run: str, root: Root = "runs/default", json_: Json = False) -> None:
    """Show a run: its stages, signals, accounting and metrics."""
    from flows.record import outcome
    from flows.tables import budget_table, facts_table, metrics_table, stages_table
    from tasks.accounts import accounts
    from tasks.config.budget import Budget

    store, record = opened(root, run)
    result = outcome(record, store)
    console.print(stages_table(result))
    manifests = record.manifests(store)
    console.print(facts_table(manifests))
    if found := accounts(manifests, Budget.model_validate(record.config["budget"])):
        console.print(budget_table(found))
    if result["metrics"]:
        console.print(metrics_table(result["metrics"]))
    if json_:
        print(json.dumps(result), flush=True)


@keeper.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs, by id or the start of it.")],
    root: Root = "runs/default",
    html: Annotated[Path | None, typer.Option(help="Also write the table as a page.")] = None,
    json_: Json = False,
) -> None:
    """Put runs side by side: method, cost, results, and quality for cost."""
    from flows.compare import comparison
    from flows.tables import comparison_table

    rows = [comparison(*opened(root, run)) for run in runs]
    table = comparison_table(rows)
    console.print(table)
    if html:
        page = Console(record=True, width=160, file=io.StringIO())
        page.print(table)
        html.write_text(page.export_html())
        console.print(f"page     {escape(str(html))}", highlight=False)
    if json_:
        print(json.dumps(rows), flush=True)


@keeper.command()
def signals(run: str, root: Root = "runs/default", json_: Json = False) -> None:
    """Say what each signal would have selected, what that would be charged, and what the TA's filter dropped."""
    from flows.compare import choices
    from flows.tables import choices_table

    store, record = opened(root, run)
    try:
        rows = choices(store, record)
    except ValueError as error:
        raise UserError([str(error)]) from None
    console.print(choices_table(rows))
    if json_:
        print(json.dumps(rows), flush=True)


@keeper.command()
def verify(
    run: str,
    root: Root = "runs/default",
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget what is damaged: the next run makes exactly that anew.")
    ] = False,
    json_: Json = False,
) -> None:
    """Read every byte of a run again and say what is not as it was committed. Exit code 1 if anything is."""
    from rich.progress import track

    from flows.upkeep import verify as check

    store, record = opened(root, run)
    found: dict[str, list[dict[str, Any]]] = {}
    stages = track(check(store, record, repair), "reading", len(record.stages), console=console)
    for stage, damages in stages:
        found[stage] = [{"path": damage.path, "what": damage.what} for damage in damages]
        for damage in damages:
            print(visible(f"{stage}: {damage.path} {damage.what}"))
    bad = sum(map(len, found.values()))
    end = ("; forgotten, run again to make them" if repair else "; --repair forgets them") if bad else ""
    console.print(f"{len(found)} stages read, {bad} objects damaged{end}")
    if json_:
        print(json.dumps({"run": record.run, "damaged": bad, "stages": found}), flush=True)
    if bad:
        raise typer.Exit(1)


@keeper.command()
def trace(
    row_id: str, run: Annotated[str, typer.Option(help="The run that trained on it.")], root: Root = "runs/default"
) -> None:
    """Where a training row comes from: its prompt, its samples, scores, seeds and models."""
    from flows.tables import trace_table
    from flows.trace import trace as follow

    store, record = opened(root, run)
    try:
        found = follow(store, record, row_id)
    except ValueError as error:
        raise UserError([str(error)]) from None
    console.print(trace_table(found))
    print(json.dumps(found, default=str), flush=True)


@keeper.command()
def rollback(
    root: Root = "runs/default",
    name: Annotated[str | None, typer.Option(help="The pipeline; needed where the root has several.")] = None,
    json_: Json = False,
) -> None:
    """Return to the student that was promoted before. What was promoted stays in the history."""
    from tasks.promoted import names, roll_back

    store = open_store(root)
    known = names(store)
    if not known:
        raise UserError([f"--root: no student is promoted in {root!r}"])
    if name is None and len(known) != 1:
        raise UserError([f"--name: {len(known)} pipelines in {root} have a promoted student: {', '.join(known)}"])
    try:
        now, before = roll_back(store, name or known[0])
    except ValueError as error:
        raise UserError([str(error)]) from None
    said = f"{now.name}: entry {before.number} gave way to the student of {now.run}"
    console.print(escape(said), highlight=False)
    console.print(f"student  {escape(store.location(now.student))}", highlight=False, soft_wrap=True)
    if json_:
        print(now.model_dump_json(), flush=True)


@keeper.command()
def gc(
    root: Root = "runs/default",
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List stage results that no run and no promotion leads to, and remove them once confirmed."""
    from rich.progress import track

    from flows.upkeep import Garbage, garbage

    def look() -> Garbage:
        try:
            return garbage(store)
        except ValueError as error:
            raise UserError([str(error)]) from None

    store = open_store(root)
    found = look()
    for folder, paths in found.folders.items():
        print(visible(f"{folder}: {len(paths)} objects"))
    console.print(f"{len(found.paths)} objects in {len(found.folders)} results lead nowhere; {found.kept} are kept")
    if not found.paths:
        return
    if not yes and not (sys.stdin.isatty() and typer.confirm("remove them?")):
        console.print("nothing removed; --yes removes without asking")
        return
    # While somebody made up their mind, a run may have come to need some of it.
    still = set(look().paths)
    for path in track([path for path in found.paths if path in still], "removing", console=console):
        store.delete(path)
