"""What all benchmarks share: their flags, where their rows go, and how they are printed."""

import argparse
from collections.abc import Sequence
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import sys
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only check that it runs")
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="default: what jax finds")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags, and makes jax use the device."""
    args = parser.parse_args(argv)
    if args.device:
        try:
            jax.devices(args.device)
        except RuntimeError as error:
            parser.error(f"--device {args.device}: {error}")
        jax.config.update("jax_platform_name", args.device)
    return args


def finish(benchmark: str, rows: list[Row], quick: bool) -> list[Row]:
    """Writes the rows to results/, unless quick, and prints them as a table."""
    if not quick:
        print(f"wrote {save(benchmark, rows)}\n")
    print(table(rows, machine()))
    return rows


def save(benchmark: str, rows: list[Row]) -> Path:
    """Writes rows and machine to results/; on an accelerator, the file is named after it."""
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f"_{device.device_kind}".replace(" ", "_")
    return write(RESULTS / f"{benchmark}{kind}.json", rows)


def write(file: Path, rows: list[Row]) -> Path:
    """Writes rows and machine to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return file


def machine() -> dict[str, Any]:
    """The machine, the versions, the date and the command of a measurement."""
    about = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for package in ("jax", "jaxlib", "optax", "numpy"):
        about[package] = importlib.metadata.version(package)
    for package in ("torch", "keras"):  # if the benchmark has imported them
        if package in sys.modules:
            about[package] = importlib.metadata.version(package)
    return about


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows: list[Row], about: dict[str, Any]) -> str:
    """Rows as a Markdown table, followed by a line that says how they were measured."""
    packages = ("jax", "jaxlib", "optax", "keras", "torch")
    versions = ", ".join(f"{package} {about[package]}" for package in packages if package in about)
    accelerator = "" if about["device"] == "cpu" else f"{about['device']}, "
    return (
        f"{markdown(rows)}\n\n"
        f"`{about['command']}`, {about['date']}: {accelerator}{about['processor']}, "
        f"{about['cores']} cores, Python {about['python']}, {versions}."
    )
