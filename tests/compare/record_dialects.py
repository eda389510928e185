"""Records runs of other frameworks' RMSProp, for tests/dialects/test_frameworks.py.

    python tests/compare/record_dialects.py            # writes tests/fixtures/dialects_*.npz
    python tests/compare/record_dialects.py --check    # compares new runs with those files, and
                                                       # our dialects with the new runs
    python tests/compare/record_dialects.py --check --only pytorch timm

The runs are those of cases.py, each framework in a process of its own. A file contains the
parameters after some steps of each case in float64 and float32, [case, step, n], those of the
features under feature/variable, the names of the cases, the framework's version and a checksum of
the gradients.

--check prints a table and fails if a difference exceeds its tolerance. Differences are divided by
the distance from the start plus one learning rate. They may be 1e-11 in float64, and 5e-5 in
float32 or where the framework rounds its own defaults to float32. Centered forms in float32 are
compared with the framework's float64, because its v - m^2 cancels.
"""

import argparse
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import numpy as np

import cases
import frameworks

FIXTURES = Path(__file__).parents[1] / "fixtures"
DTYPES = ("float64", "float32")
KEPT = np.array(cases.KEPT) - 1
TABLE_HEAD = """\
| dialect | equals | runs | float64 (1e-11) | defaults rounded there (5e-5) | float32 (5e-5) |
| --- | --- | --- | --- | --- | --- |"""


def load(framework):
    """The recorded runs, if they were made from the gradients of cases.py."""
    with np.load(FIXTURES / f"dialects_{framework}.npz") as file:
        record = dict(file)
    if record["checksum"] != cases.checksum() or list(record["cases"]) != names(framework):
        raise ValueError(
            f"dialects_{framework}.npz was recorded from other gradients or cases than those of "
            "tests/compare/cases.py: run tests/compare/record_dialects.py (or else this NumPy has "
            "another random generator)"
        )
    return record


def names(framework):
    return [case.name for case in cases.CASES[framework]]


def run(framework):
    """All cases and features of a framework, with the parameters after every step."""
    record = {
        "cases": np.array(names(framework)),
        "version": np.array(frameworks.version(framework)),
        "checksum": np.array(cases.checksum()),
    }
    for dtype in DTYPES:
        paths = []
        for case in cases.CASES[framework]:
            gradients, start = cases.problem(framework, case, np.dtype(dtype))
            path = frameworks.RUN[framework](gradients, start, case.rates, case.options)
            assert path.dtype == dtype, (framework, case.name, path.dtype)
            paths.append(path)
        record[dtype] = np.stack(paths)
    if framework in frameworks.FEATURES:
        record |= frameworks.FEATURES[framework]()
    return record


def run_apart(framework):
    """run(framework), in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "runs.npz"
        command = [sys.executable, __file__, "--only", framework, "--into", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{framework} failed:\n{done.stderr}")
        with np.load(file) as runs:
            return dict(runs)


def kept(record):
    """A record with only the steps that the fixtures keep."""
    parts = dict(record)
    for name, value in record.items():
        if name in DTYPES:
            parts[name] = value[:, KEPT]
        elif "/" in name:
            parts[name] = value[KEPT]
    return parts


def differences(framework, record, other):
    """The largest difference of two records in each dtype, without what is ill conditioned."""
    errors = {dtype: [] for dtype in DTYPES}
    for i, case in enumerate(cases.CASES[framework]):
        for dtype in DTYPES:
            if case.constant or (case.centered and dtype == "float32"):
                continue
            _, start = cases.problem(framework, case, np.dtype(dtype))
            error = cases.error(framework, case, start, record[dtype][i], other[dtype][i])
            errors[dtype].append(error)
    for name in other:
        if "/" in name:
            largest = np.abs(other[name]).max()
            errors["float64"].append(np.abs(record[name] - other[name]).max() / largest)
    return {dtype: np.max(found) for dtype, found in errors.items()}  # NaN, if there is one


def compare(framework, record, steps=slice(None)):
    """Our dialect's error in each case and dtype, as rows (case, dtype, error, tolerance).

    The steps are those of the record.
    """
    rows = []
    for dtype in DTYPES:
        # Where gradients are constant the framework errs.
        numbered = [(i, c) for i, c in enumerate(cases.CASES[framework]) if not c.constant]
        paths = ours([(framework, case) for _, case in numbered], dtype)
        for (i, case), (got, start) in zip(numbered, paths, strict=True):
            want = record["float64" if case.centered else dtype][i]
            error = cases.error(framework, case, start, got[steps], want)
            rows.append((case, dtype, error, cases.tolerance(case, dtype)))
    return rows


def ours(listed, dtype):
    """The path of our dialect in each pair (framework, case), and the start."""
    runs = []
    for framework, case in listed:
        gradients, start = cases.problem(framework, case, np.dtype(dtype))
        runs.append(frameworks.Run(framework, gradients, start, case.rates, case.options))
    paths = frameworks.ours(runs)
    assert {path.dtype.name for path in paths} == {dtype}
    return [(path, run.start) for path, run in zip(paths, runs, strict=True)]


def table_row(framework, version, rows):
    """Of the Markdown table; defaults that the framework rounds to float32 are not exact."""

    def largest(dtype, rounded):
        found = [row[2] for row in rows if row[1] == dtype and row[0].rounded == rounded]
        return f"{np.max(found):.1e}" if found else ""

    optimizer, *_ = frameworks.OPTIMIZER[framework]
    cells = [
        f"`{framework}`",
        f"`{optimizer}`, {version}",
        str(len(rows)),
        largest("float64", rounded=False),
        largest("float64", rounded=True),
        f"{np.max([row[2] for row in rows if row[1] == 'float32']):.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    every = list(cases.CASES)
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="FRAMEWORK")
    args = parser.parse_args(argv)
    if args.into:
        np.savez(args.into, **run(args.only[0]))
        return
    table, failures = [], []
    for framework in args.only:
        begin = time.perf_counter()
        live = run_apart(framework)
        print(f"{framework}: {live['version']}, {len(live['cases'])} cases", end="", flush=True)
        if args.check:
            found = differences(framework, kept(live), load(framework))
            failures += [
                f"{framework}, {dtype}: {error:.1e} from its fixture"
                for dtype, error in found.items()
                if not error <= cases.TOLERANCE[dtype]
            ]
            rows = compare(framework, live)
            failures += [
                f"{framework}, {case.name}, {dtype}: {error:.1e}"
                for case, dtype, error, tolerance in rows
                if not error <= tolerance
            ]
            table.append(table_row(framework, live["version"], rows))
            print(", from the fixture", *(f"{error:.0e}" for error in found.values()), end="")
        else:
            file = FIXTURES / f"dialects_{framework}.npz"
            np.savez_compressed(file, **kept(live))
            print(f", {file.stat().st_size / 1000:.0f} kB in {file}", end="")
        print(f", {time.perf_counter() - begin:.0f} s", flush=True)
    if args.check:
        print()
        print(TABLE_HEAD, *table, sep="\n")
    if failures:
        sys.exit("\n".join(["beyond tolerance:", *failures]))


if __name__ == "__main__":
    main()
