"""Signals and methods compared at equal budgets, on house models: each cell of the grid is a whole run.

    python -m benchmarks.methods [--cells N] [--hours H]     run cells whose results are not there yet, in their order
    python -m benchmarks.methods --report [--json]           what the results say, with intervals
    python -m benchmarks.methods --page                      docs/results.md and its plots

Results lie in benchmarks/results/methods, one file a cell. Runs lie below --root, where cells find each other's stages.
A cell keeps one core busy, and cells of different seeds share little: with --seeds a process each, with a --root each,
may run them.
"""

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.conditions import RESULTS, options
from benchmarks.grid import SEEDS, core, grid
from benchmarks.lessons import HOUSE

FOLDER_OF_RESULTS = RESULTS / "methods"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cells", type=int, help="run at most so many")
    parser.add_argument("--hours", type=float, default=24.0, help="start no cell after this")
    parser.add_argument("--core", action="store_true", help="the core grid only")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="cells of these seeds only")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cells whose names begin so")
    parser.add_argument("--root", default="runs/methods", help="where the runs lie")
    parser.add_argument("--results", type=Path, default=FOLDER_OF_RESULTS)
    parser.add_argument("--house", type=Path, default=HOUSE, help="where the house models lie")
    parser.add_argument("--list", action="store_true", help="name the cells, and whether their results are there")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    arms = core()
    cells = [cell for cell in grid() if cell.seed in arguments.seeds and (not arguments.core or cell.arm in arms)]
    cells = [cell for cell in cells if not arguments.only or cell.name.startswith(tuple(arguments.only))]
    if arguments.report or arguments.page:
        from benchmarks import gains, real_text, results_page

        try:
            found = gains.load(arguments.results)
        except ValueError as error:
            parser.exit(2, f"error: {error}\n")
        summary, on_real_text = gains.summary(found), real_text.summary(real_text.load())
        if arguments.page:
            results_page.write(found, summary, on_real_text)
        print(results_page.text(found, summary, on_real_text))
        if arguments.json:
            print(json.dumps({key: summary[key] for key in gains.KEYS}))
        return
    from benchmarks.cells import run, run_all, todo

    left = todo(cells, arguments.results)
    if arguments.list:
        for cell in cells:
            print(f"{cell.name}{'' if cell in left else '  done'}")
        return
    perform = partial(run, house=arguments.house.resolve(), root=arguments.root)
    done = run_all(left[: arguments.cells], perform, arguments.root, arguments.results, 3600 * arguments.hours)
    print(f"{done} cells run, {len(left) - done} left", file=sys.stderr)


if __name__ == "__main__":
    main()
