"""The command line: ``switchyard run | plan | up | down``, and what `flows/keeper.py` adds.

Light until a command knows what it needs: Prefect reads its settings when it is imported, so servers come first.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from flows.console import console
from flows.keeper import Json, Root, UserError, keeper
from flows.local import Local, running_local
from infra.manifest import DamagedError
from infra.store import open_store
from infra.terminal import visible
from tasks.config import RunConfig, load_config
from tasks.config.problems import problems_of

if TYPE_CHECKING:
    from flows.plan import Plan

app = typer.Typer(
    help="Distil a large language model into a small one.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(keeper)
INTERRUPTED = 130

ConfigFile = Annotated[Path, typer.Argument(help="The run's settings, a YAML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key.path=value. May be repeated.")]


def read_config(path: Path, overrides: list[str] | None) -> RunConfig:
    try:
        return load_config(path, overrides)
    except ValidationError as error:
        raise UserError(problems_of(error)) from None
    except ValueError as error:
        raise UserError([str(error)]) from None


def refuse_open_prefect() -> None:
    """UserError where the environment names a server that runs code of whoever asks. Commands have a server of their
    own, but other programs of the same shell use that one."""
    from flows.doctor import open_prefect

    if lack := open_prefect(os.environ.get("PREFECT_API_URL")):
        raise UserError(lack)


@contextmanager
def prefect_server(root: str) -> Iterator[Any]:
    """The server of ``switchyard up`` where it runs, else one of this command's own. Yields a function that waits."""
    from flows.server import EmbeddedServer, environment

    refuse_open_prefect()
    # The terminal has a display of its own; Prefect's pages get everything.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    up = running_local()
    if up:
        os.environ.update({**environment(Path(up.home), up.prefect_url), **up.ray_environment})
        yield lambda: None
        return
    home = Path(root) / ".prefect" if "://" not in root else Path.home() / ".switchyard" / "prefect"
    server = EmbeddedServer(home)
    try:
        server.start()
    except OSError as error:
        raise UserError([f"--root: {root!r} cannot be written ({error.strerror}): choose another folder"]) from None
    try:
        yield server.wait
    finally:
        if "prefect" in sys.modules:
            from prefect.logging.handlers import APILogWorker

            from flows.notify import flush

            # What still waits to be sent would be lost, with a complaint on the terminal.
            APILogWorker.drain_all()
            flush()
        server.stop()


@app.command()
def run(
    config: ConfigFile,
    root: Root = "runs/default",
    set_: Set = None,
    from_: Annotated[str | None, typer.Option("--from", help="Do this stage, and what depends on it, again.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Agree to spend what budget.approve_above would have a person approve.")
    ] = False,
    json_: Json = False,
) -> None:
    """Run a distillation, or continue it where it was."""
    settings = read_config(config, set_)
    with prefect_server(root) as ready:
        from flows.display import terminal
        from flows.plan import plan_run

        with console.status("checking the plan"):
            plan = plan_run(settings, root)
        if plan.problems:
            raise UserError(plan.problems)
        if from_ and settings.recurring:
            raise UserError(["--from: a recurring run goes on or begins anew: leave it out"])
        if from_ and from_ not in plan.names:
            raise UserError([f"--from: {from_!r} is no stage; stages are {', '.join(plan.names)}"])
        if not yes and not sys.stdin.isatty() and (what := asks_approval(settings, root, plan, from_)):
            raise UserError([f"budget.approve_above: {what} need approval, and there is no terminal: pass --yes"])
        with console.status("starting Prefect's server"):
            ready()
        server = os.environ["PREFECT_API_URL"].removesuffix("/api")
        console.print(f"Prefect  {server}", highlight=False, soft_wrap=True)
        with terminal():
            state = start_flow(settings, root, from_, yes)
        result = ended(state, settings, root)
    show_result(result)
    if json_:
        print(json.dumps(result), flush=True)
    if result["state"] == "Cancelled":
        raise typer.Abort
    if result["state"] != "Completed":
        raise typer.Exit(1)


def start_flow(settings: RunConfig, root: str, from_: str | None, yes: bool) -> Any:
    """Run the flow that the settings ask for, to its final state."""
    if settings.recurring:
        from flows.recurring import distill_recurring

        return distill_recurring(settings, root, yes, return_state=True)
    from flows.distill import distill

    return distill(settings, root, from_, yes, return_state=True)


def asks_approval(settings: RunConfig, root: str, plan: "Plan", redo_from: str | None) -> str:
    """What a person would have to agree to; empty where nothing is left to ask the teacher, or they have."""
    from flows.approval import above, agreed
    from flows.record import load_record
    from tasks.accounts import annotates

    known = load_record(open_store(root), plan.run)
    left = redo_from or any(not stage.done for stage in plan.stages if annotates(stage.name))
    asked = redo_from or not agreed(known, settings.budget)
    return above(settings.budget) if left and asked else ""


def ended(state: Any, settings: RunConfig, root: str) -> dict[str, Any]:
    """The facts of a flow run that ended, well or not. UserError where a stage found a mistake of the user's."""
    from flows.record import load_record, outcome, run_id
    from flows.recurring import last_record

    store = open_store(root)
    if settings.recurring and state.is_completed():
        done: dict[str, Any] = state.result()
        return done
    record = last_record(store, settings.name) if settings.recurring else load_record(store, run_id(settings))
    if state.is_cancelled():
        if record is None:
            raise typer.Abort
        record.state, record.message = "Cancelled", state.message
    if record is None:
        # Its own look at the plan found what had not stood in the way a moment ago.
        raise UserError([state.message])
    if record.state == "Completed" and not state.is_completed():
        # It ended after its last stage.
        raise RuntimeError(state.message)
    if record.state == "Running":
        # The fault that ended it kept its record from being written, too.
        record.state, record.message = "Failed", state.message
    if record.refused:
        raise UserError([record.message])
    return outcome(record, store)


def show_result(result: dict[str, Any]) -> None:
    from flows.tables import metrics_table

    if result["metrics"]:
        console.print(metrics_table(result["metrics"]))
    if result["state"] != "Completed":
        if result["message"]:
            console.print(f"[red]{result['state']}[/]: {escape(result['message'])}", highlight=False)
        return
    if result["report"] is None:
        console.print(escape(result["message"]), highlight=False, soft_wrap=True)
        return
    print_gate(result)
    console.print(f"report   {escape(result['report'])}", highlight=False, soft_wrap=True)
    console.print(f"student  {escape(str(result['student']))}", highlight=False, soft_wrap=True)


def print_gate(result: dict[str, Any]) -> None:
    """Whether the student was promoted, and by which conditions."""
    word = "[green]promoted[/]" if result["promoted"] else "[yellow]not promoted[/]"
    console.print(f"{word}: {escape(result['reason'])}", highlight=False)
    for check in result["gate"] or []:
        console.print(f"  {'[green]✓[/]' if check['passed'] else '[red]✗[/]'} {escape(check['text'])}", highlight=False)


@app.command()
def plan(
    config: ConfigFile,
    root: Root = "runs/default",
    set_: Set = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also load the models and compare engines with training on a few answers.")
    ] = False,
    json_: Json = False,
) -> None:
    """Say what a run would do, what is done already, what it would cost, and what stands in its way. Starts nothing,
    unless --deep asks for it."""
    settings = read_config(config, set_)
    if deep and settings.text_only:
        raise UserError(["--deep: models.teacher (openai) shows no log-probabilities that could be compared"])
    # Prefect reads its settings when it is imported: a server comes before everything that imports it.
    with prefect_server(root) if deep else nullcontext(bool) as ready:
        from flows.plan import plan_run
        from flows.tables import plan_table

        found = plan_run(settings, root)
        console.print(plan_table(found))
        for name, passed in found.checks.items():
            console.print(f"{'[green]✓[/]' if passed else '[red]✗[/]'} {name}", highlight=False)
        facts = found.facts()
        if deep and not found.problems and not found.nothing:
            ready()
            facts["parity"] = deep_parity(settings, root)
    if json_:
        print(json.dumps(facts), flush=True)
    if found.problems:
        raise UserError(found.problems)


def deep_parity(settings: RunConfig, root: str) -> dict[str, Any]:
    """Run the deep check; its figures by role. UserError where they are past the tolerance."""
    from flows.deep import deep_check
    from flows.display import terminal
    from flows.tables import parity_table

    with terminal():
        state: Any = deep_check(settings, root, return_state=True)
    if not state.is_completed():
        raise UserError([state.message])
    found: dict[str, Any] = state.result()
    console.print(parity_table(found))
    return found


@app.command()
def doctor(config: ConfigFile, root: Root = "runs/default", set_: Set = None, json_: Json = False) -> None:
    """Say what this machine, or the cluster, lacks for these settings, each with its fix."""
    from flows.doctor import examine
    from flows.local import on_running_cluster
    from flows.tables import checks_table

    settings = read_config(config, set_)
    if up := running_local():
        os.environ.update({"PREFECT_API_URL": up.prefect_url, **up.ray_environment})
        settings = on_running_cluster(settings)
    with console.status("looking"):
        checks, notes = examine(settings, root)
    console.print(checks_table(checks))
    for note in notes:
        console.print(f"note: {escape(note)}", highlight=False)
    problems = [line for lines in checks.values() for line in lines]
    if json_:
        print(
            json.dumps(
                {"checks": {name: not lines for name, lines in checks.items()}, "problems": problems, "notes": notes}
            ),
            flush=True,
        )
    if problems:
        # The table has told them.
        raise typer.Exit(2)


@app.command()
def up() -> None:
    """Start Prefect's server, a worker and a Ray head on loopback, unless they run; runs use them until ``down``."""
    refuse_open_prefect()
    with console.status("starting Prefect's server, a worker and a Ray head"):
        local = Local.start()
    print(f"Prefect  {local.prefect_url.removesuffix('/api')}\nRay      {local.ray_address}")


@app.command()
def down() -> None:
    """End what ``up`` started."""
    local = running_local()
    if local is None:
        console.print("nothing is up")
        return
    with console.status("ending the server, the worker and the Ray head"):
        local.stop()


def main() -> None:
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        # Without its own exit, typer hands the code of an Exit back, 130 for Ctrl-C.
        code = app(standalone_mode=False) or 0
    except UserError as error:
        for problem in error.problems:
            print(visible(f"error: {problem}"), file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"state": "Refused", "problems": error.problems}), flush=True)
        code = 2
    except typer.Abort:
        code = INTERRUPTED
    except DamagedError as error:
        print(visible(f"error: {error}; switchyard verify names all that is damaged"), file=sys.stderr)
        code = 1
    except Exception as error:
        # Typer's own complaints about arguments know how to show themselves.
        if hasattr(error, "format_message"):
            line, code = error.format_message(), 2
        else:
            from flows.server import ServerFailed
            from infra.faults import fault_of

            fault = fault_of(error)
            if fault is None and not isinstance(error, ServerFailed):
                raise
            line, code = fault.line if fault else str(error), 1
        print(visible(f"error: {line}"), file=sys.stderr)
    if code == INTERRUPTED:
        print("interrupted; run the same command again to continue", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
