"""Renders the result files: tables into the pages that name them, charts into pictures/.

    python benchmarks/report.py

A table is everything between `<!-- table: NAME -->` and `<!-- end -->`; do not edit it by hand.
NAME is that of a result file, or `targets`, all targets and whether they are met, judged as
printed, to two decimals, or `headline`, some of the targets without that verdict. A missing result
file is reported in place.
"""

from collections.abc import Callable
import json
from pathlib import Path
import re
import sys
from typing import Any, NamedTuple

from matplotlib.figure import Figure
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from _results import RESULTS, Row, markdown, table
from drawing import picture

FOLDER = Path(__file__).parent
EMBEDDINGS = FOLDER.parent / "docs" / "how-to" / "embeddings.md"
PAGES = (FOLDER.parent / "README.md", FOLDER / "README.md", EMBEDDINGS)
PICTURES = FOLDER / "pictures"
TABLE = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """What a benchmark has measured: its `machine` and its `rows`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


class Target(NamedTuple):
    """An upper limit for a column of a benchmark, in every row that `rows` selects."""

    what: str
    limit: float
    benchmark: str
    column: str
    rows: Callable[[Row], bool] = lambda _: True
    headline: bool = False

    def row(self) -> Row:
        """The lowest and highest value measured in its rows, as a row of the table."""
        results = load(self.benchmark)
        rows = [row for row in results["rows"] if self.rows(row)]
        found = [float(row[self.column]) for row in rows if self.column in row]
        missed = sum(one > self.limit for one in found)
        return {
            "what": self.what,
            "at most": f"{self.limit:.2f}",
            # A library may not have been installed.
            "measured": f"{min(found):.2f} to {max(found):.2f}" if found else "not measured",
            "met": f"no: {missed} of {len(found)} rows above" if missed else "yes" if found else "",
            "command": f"`{results['machine']['command']}`",
        }


def in_float32(row: Row) -> bool:
    """Whether parameters and state are in float32."""
    return "master weights" not in row["form"]


def of_networks(row: Row) -> bool:
    """Whether the parameters are those of a network."""
    return row["parameters"] != "all different"


TARGETS = (
    Target("jitted step, ours / Optax", 1.03, "step", "ours / optax", in_float32, headline=True),
    Target(
        "jitted step, ours / PyTorch `foreach`",
        0.45,
        "step",
        "ours / torch foreach",
        in_float32,
        headline=True,
    ),
    Target(
        "temporary bytes per parameter, float32 step", 0.0, "step", "temporary, ours", in_float32
    ),
    Target(
        "update outside `jit`, small leaves, ours / Optax", 0.2, "eager", "ratio", headline=True
    ),
    Target(
        "trace and lower a network's step, ours / Optax", 0.7, "compilation", "ratio", of_networks
    ),
    Target(
        "trace and lower `init` and the step, ours / Optax",
        0.5,
        "compilation",
        "ratio, with init",
        of_networks,
    ),
    Target(
        "compile a network's step, ours / Optax",
        1.25,
        "compilation",
        "ratio, compile",
        of_networks,
        headline=True,
    ),
    Target(
        "bytes of state per parameter, `q8`, plain",
        1.05,
        "memory",
        "state, q8",
        lambda row: row["form"] == "plain",
        headline=True,
    ),
    Target(
        "step, `q8` / float32, plain",
        2.0,
        "low_memory_step",
        "ratio",
        lambda row: row["storage"] == "q8" and row["form"] == "plain",
        headline=True,
    ),
)


def rendered(name: str) -> str:
    if name == "targets":
        return markdown([target.row() for target in TARGETS])
    if name == "headline":
        rows = [target.row() for target in TARGETS if target.headline]
        return markdown(
            [{name: row[name] for name in ("what", "measured", "command")} for row in rows]
        )
    if not (RESULTS / f"{name}.json").is_file():
        return "Not measured yet."
    results = load(name)
    return table(results["rows"], results["machine"])


def render(text: str) -> str:
    """The page, with its tables filled from the result files."""
    return TABLE.sub(lambda found: f"{found[1]}{rendered(found[2])}\n{found[3]}", text)


INSIDE: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center_baseline"}
NAMES = {
    "optax": "Optax",
    "keras": "Keras",
    "torch foreach": "PyTorch, foreach",
    "torch single": "PyTorch, single",
}


def grouped_bars(axes: Any, rows: list[Row], series: dict[str, str]) -> None:
    """Horizontal bars: one group per row, one bar per series, which names a column."""
    height = 0.84 / len(series)
    for i, (label, column) in enumerate(series.items()):
        at = np.arange(len(rows)) + (i - (len(series) - 1) / 2) * height
        ends = [float(row[column]) for row in rows]
        axes.barh(at, ends, height, label=label, color=f"C{i}", edgecolor="white")
        ink = "black" if i in (1, 2) else "white"  # these two colours are light
        for row, *end in zip(rows, ends, at, strict=True):
            axes.annotate(row[column], end, (-3, 0), color=ink, **INSIDE)
    axes.set_yticks(range(len(rows)), [row["parameters"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(visible=False)


def draw_steps(figure: Figure) -> None:
    """The time of our step divided by each library's, for every form and every network."""
    steps = [row for row in load("step")["rows"] if in_float32(row)]
    libraries = [name.removeprefix("ours / ") for name in steps[0] if name.startswith("ours / ")]
    forms = list(dict.fromkeys(row["form"] for row in steps))
    for axes, form in zip(figure.subplots(1, len(forms), sharey=True), forms, strict=True):
        rows = [row for row in steps if row["form"] == form]
        grouped_bars(axes, rows, {NAMES[name]: f"ours / {name}" for name in libraries})
        axes.axvline(1, color="black", linewidth=1, zorder=0)
        axes.set(title=form, xlim=(0, 1.2), xticks=(0, 0.5, 1))
    figure.supxlabel(
        "time of our step / theirs: a bar shorter than 1 means that ours is faster", size="medium"
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(libraries))


def draw_memory(figure: Figure) -> None:
    """Bytes of state per parameter in Optax and in each of our storages, for every form."""
    held = [row for row in load("memory")["rows"] if row["parameters"] == "ResNet-50"]
    rows = [row | {"parameters": row["form"]} for row in held]
    kinds = {"Optax": "optax"} | {f"ours, {kind}": kind for kind in ("float32", "bfloat16", "q8")}
    axes = figure.subplots()
    grouped_bars(axes, rows, {label: f"state, {kind}" for label, kind in kinds.items()})
    axes.set(xlabel="bytes of state per parameter, ResNet-50: a shorter bar is less memory")
    axes.legend()


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))
        print(f"wrote the tables of {page}")
    for draw, file, height in (draw_steps, "step.png", 6), (draw_memory, "memory.png", 3.6):
        with picture(PICTURES / file, height) as figure:
            draw(figure)
        print(f"drew {PICTURES / file}")


if __name__ == "__main__":
    main()
