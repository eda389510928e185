"""Two things timed in turn, with medians: so a drift of the machine falls on both."""

from collections.abc import Callable, Sequence
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax

RESULTS = Path(__file__).parent / "results"


class Pair(NamedTuple):
    """Median seconds of each side, median and quartiles of the ratio ours / theirs."""

    theirs: float
    ours: float
    ratio: float
    quartiles: tuple[float, float]


def compare(sides: Sequence[Callable[[], Any]], pairs: int) -> Pair:
    """Times theirs and ours after a warm-up, which comes first taking turns."""
    for side in (*sides, *sides):
        jax.block_until_ready(side())
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for i in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            jax.block_until_ready(sides[i]())
            seconds[i].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    theirs, ours = (statistics.median(s) for s in seconds)
    return Pair(theirs, ours, statistics.median(ratios), (low, high))


def machine() -> dict[str, Any]:
    """Where, with what, when and by which command something was measured."""
    packages = ("jax", "jaxlib", "optax", "numpy")
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes a table, with the machine, to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return file


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Rows as a Markdown table, with a line under it that says where they come from."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    versions = ", ".join(f"{k} {about[k]}" for k in ("jax", "jaxlib", "optax"))
    accelerator = "" if about["device"] == "cpu" else f"{about['device']}, "
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + f"\n\n`{about['command']}`, {about['date']}: {accelerator}{about['processor']}, "
        + f"{about['cores']} cores, Python {about['python']}, {versions}."
    )
