"""Renders the result files: tables into README.md and benchmarks/README.md, charts into pictures/.

    python benchmarks/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is that of a result file, or
`targets`, which are judged as printed, to two decimals. Nothing between the two is written by hand.
Where there is no such file, it says so.
"""

from collections.abc import Callable, Iterator
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from matplotlib.figure import Figure
import numpy as np

from _results import RESULTS, Row, markdown, table

FOLDER = Path(__file__).parent
EMBEDDINGS = FOLDER.parent / "docs" / "how-to" / "embeddings.md"
PAGES = (FOLDER.parent / "README.md", FOLDER / "README.md", EMBEDDINGS)
PICTURES = FOLDER / "pictures"
TABLE = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """What a benchmark has measured: its `machine` and its `rows`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


class Target(NamedTuple):
    """A figure that is to be at most a limit, in every row that it names."""

    what: str
    limit: float
    benchmark: str
    column: str
    rows: Callable[[Row], bool] = lambda _: True

    def row(self) -> Row:
        """What was measured, over all of its rows."""
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
    """Whether the parameters are, and the state."""
    return "master weights" not in row["form"]


def of_networks(row: Row) -> bool:
    """Whether the parameters are those of a network."""
    return row["parameters"] != "all different"


TARGETS = (
    Target("jitted step, ours / Optax", 1.03, "step", "ours / optax", in_float32),
    Target("jitted step, ours / PyTorch foreach", 0.45, "step", "ours / torch foreach", in_float32),
    Target("temporary bytes a parameter, float32 step", 0.0, "step", "temporary, ours", in_float32),
    Target("update outside jit, small leaves, ours / Optax", 0.2, "eager", "ratio"),
    Target(
        "trace and lower a step of networks, ours / Optax", 0.7, "compilation", "ratio", of_networks
    ),
    Target("the same with `init`", 0.5, "compilation", "ratio, with init", of_networks),
    Target(
        "compile a step of networks, ours / Optax",
        1.25,
        "compilation",
        "ratio, compile",
        of_networks,
    ),
    Target(
        "state bytes a parameter, `q8`, plain",
        1.05,
        "memory",
        "state, q8",
        lambda row: row["form"] == "plain",
    ),
    Target(
        "step, `q8` / float32, plain",
        2.0,
        "low_memory_step",
        "ratio",
        lambda row: row["storage"] == "q8" and row["form"] == "plain",
    ),
)


def rendered(name: str) -> str:
    if name == "targets":
        return markdown([target.row() for target in TARGETS])
    if not (RESULTS / f"{name}.json").is_file():
        return "Not measured yet."
    results = load(name)
    return table(results["rows"], results["machine"])


def render(text: str) -> str:
    """The page, with its tables as the result files have them."""
    return TABLE.sub(lambda found: f"{found[1]}{rendered(found[2])}\n{found[3]}", text)


def grouped_bars(axes: Any, rows: list[Row], series: dict[str, str]) -> None:
    """Horizontal bars: a group a row, a bar a series, which names a column of the rows."""
    height = 0.8 / len(series)
    greys = np.linspace(0.15, 0.75, len(series))
    for i, (label, column) in enumerate(series.items()):
        at = np.arange(len(rows)) + (i - (len(series) - 1) / 2) * height
        values = [float(row[column]) for row in rows]
        bars = axes.barh(at, values, height, label=label, color=str(greys[i]))
        axes.bar_label(bars, [row[column] for row in rows], fontsize="x-small", padding=2)
    axes.set_yticks(range(len(rows)), [row["parameters"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)


def charts() -> Iterator[tuple[str, Figure]]:
    """Each with the name of its file."""
    steps = [row for row in load("step")["rows"] if in_float32(row)]
    libraries = [name.removeprefix("ours / ") for name in steps[0] if name.startswith("ours / ")]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    forms = list(dict.fromkeys(row["form"] for row in steps))
    for axes, form in zip(figure.subplots(1, len(forms), sharey=True), forms, strict=True):
        rows = [row for row in steps if row["form"] == form]
        grouped_bars(axes, rows, {name: f"ours / {name}" for name in libraries})
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=form, xlabel="time of our step / theirs")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    yield "step", figure

    held = load("memory")["rows"]
    kinds = ["optax", "float32", "bfloat16", "q8"]
    rows = [row | {"parameters": row["form"]} for row in held if row["parameters"] == "ResNet-50"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    grouped_bars(axes, rows, {kind: f"state, {kind}" for kind in kinds})
    axes.set(xlabel="bytes of state a parameter, ResNet-50")
    axes.legend(fontsize="small")
    yield "memory", figure


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))
        print(f"wrote the tables of {page}")
    PICTURES.mkdir(exist_ok=True)
    for name, figure in charts():
        figure.savefig(PICTURES / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"drew {PICTURES / name}.png")


if __name__ == "__main__":
    main()
