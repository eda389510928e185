"""Records checkpoints of other frameworks' RMSProp.

For tests/convert/test_continuation.py and test_models.py:

    python tests/compare/record_convert.py             # writes tests/fixtures/convert_*.npz
    python tests/compare/record_convert.py --check     # compares new runs with those files, and
                                                       # continues ours there and theirs here
    python tests/compare/record_convert.py --check --only pytorch timm

The runs are those of checkpoint_cases.py and models.py, each framework in a process of its own. For
each case and dtype, a file contains the framework's checkpoint and parameters halfway, and the
parameters at the end of the uninterrupted run. It also contains the results of models.py, the
versions, and a checksum of the gradients.

--check prints a table and fails if a difference exceeds its tolerance: 1e-11 in float64 and 5e-5 in
float32. Differences between parameters are divided by the distance from the start plus one learning
rate, those between checkpoints by each array's largest element. Centered forms in float32 start
from the framework's float64 checkpoint, and are compared with its float64 run.
"""

import argparse
import hashlib
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import numpy as np

import cases
from checkpoint_cases import CASES, K, error, problem, theirs
import checkpoint_runs
import checkpoints
import frameworks
import models

FIXTURES = Path(__file__).parents[1] / "fixtures"
DTYPES = ("float64", "float32")
ERRORS = ("k there, k here", "k here, k there", "checkpoint at k")
TABLE_HEAD = """\
| dialect | from and to | runs | k there, k here | k here, k there | checkpoint at k |
| --- | --- | --- | --- | --- | --- |"""


def checksum():
    """Of all that is random."""
    names = [name for name in models.NAMES if name not in models.OF_WORDS]
    arrays = [array for name in names for array in models.batch(name)]
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return hashlib.sha256(data).hexdigest() + cases.checksum()


def load(framework):
    """The recorded runs, if they were made from the gradients of cases.py."""
    with np.load(FIXTURES / f"convert_{framework}.npz") as file:
        record = checkpoints.unpack(file)
    if record["checksum"] != checksum() or list(record["cases"]) != names(framework):
        raise ValueError(
            f"convert_{framework}.npz was recorded from other gradients or cases than those of "
            "tests/compare: run tests/compare/record_convert.py (or else this NumPy has another "
            "random generator)"
        )
    return record


def names(framework):
    return [case.name for case in CASES[framework]]


def run(framework):
    """All cases and models of a framework, and the ends of the runs that we begin."""
    found = {}
    for case in CASES[framework]:
        found[case.name] = {}
        for dtype in DTYPES:
            checkpoint, params = checkpoint_runs.RUN[framework](case, dtype, 0, K)
            _, final = checkpoint_runs.RUN[framework](case, dtype, 0, cases.STEPS)
            part = {"checkpoint": checkpoint, "params": params, "final": final}
            ((given, params),) = begun_here(framework, [case], dtype, [part], tensors=True)
            _, ended = checkpoint_runs.RUN[framework](case, dtype, K, cases.STEPS, given, params)
            found[case.name][dtype] = part | {"ended": ended}
    record = {
        "version": frameworks.version(framework),
        "checksum": checksum(),
        "cases": found,
    }
    if framework in models.RUN:
        record["models"] = {name: models.RUN[framework](name) for name in models.NAMES}
    if framework == "tensorflow_v1":
        record["objects"] = checkpoint_runs.tensorflow_v1_objects()
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
            return checkpoints.unpack(runs)


def kept(record):
    """A record with only what the fixtures keep."""
    found = {
        name: {dtype: {n: v for n, v in part.items() if n != "ended"} for dtype, part in of.items()}
        for name, of in record["cases"].items()
    }
    return record | {"cases": found}


def reference(case, dtype, record):
    """What a run is compared with."""
    return record["cases"][case.name]["float64" if case.centered else dtype]


def begun_here(framework, listed, dtype, parts, *, tensors=False):
    """What the framework is given in each case, checkpoint and parameters, after K steps of ours.

    Parts are what was recorded of each.
    """
    import jax

    from rmsprop_jax import convert

    tensor = np.asarray
    if tensors and framework in ("pytorch", "timm"):
        import torch

        tensor = torch.tensor
    mapping = checkpoints.mapping(framework)
    found = []
    with jax.enable_x64(dtype == "float64"):
        starts = [checkpoints.params_of(problem(case, dtype)[1]) for case in listed]
        txs = [checkpoints.transformation(framework, case) for case in listed]
        runs = [(start, tx.init(start)) for start, tx in zip(starts, txs, strict=True)]
        runs = checkpoints.ours(framework, listed, dtype, runs, 0, K)
        for case, part, tx, (params, state) in zip(listed, parts, txs, runs, strict=True):
            groups = groups_of(framework, part)
            given = checkpoints.to_theirs(framework, case, state, params, tx, groups, tensor)
            found.append((given, convert.params_to(params, mapping)))
    return found


def groups_of(framework, part):
    return part["checkpoint"]["param_groups"] if framework in ("pytorch", "timm") else None


def at_k(framework, case, dtype, part):
    """Our parameters, transformation and state at the framework's checkpoint."""
    from rmsprop_jax import convert

    _, start = problem(case, dtype)
    params = checkpoints.params_of(start)
    params = convert.params_from(part["params"], params, checkpoints.mapping(framework))
    tx = checkpoints.transformation(framework, case)
    return params, tx, checkpoints.from_theirs(framework, case, part["checkpoint"], params, tx)


def ended_here(framework, listed, dtype, parts, *, anew=False):
    """The parameters after the framework's K steps and the others of ours, in each case.

    Anew, ours begin with a new state, and not with that of the framework's checkpoint.
    """
    import jax

    from rmsprop_jax import convert

    with jax.enable_x64(dtype == "float64"):
        runs = []
        for case, part in zip(listed, parts, strict=True):
            params, tx, state = at_k(framework, case, dtype, part)
            runs.append((params, tx.init(params) if anew else state))
        runs = checkpoints.ours(framework, listed, dtype, runs, K, cases.STEPS)
        mapping = checkpoints.mapping(framework)
        return [convert.params_to(params, mapping) for params, _ in runs]


def errors(framework, listed, dtype, record):
    """{name of case: {name of ERRORS: error}}, of what the record has."""
    wanted = [reference(case, dtype, record) for case in listed]
    begun = begun_here(framework, listed, dtype, wanted)
    ended = ended_here(framework, listed, dtype, wanted)
    found = {}
    for case, want, (given, _), end in zip(listed, wanted, begun, ended, strict=True):
        start = theirs(framework, problem(case, dtype)[1])
        ends = {ERRORS[0]: end}
        if "ended" in record["cases"][case.name][dtype]:
            ends[ERRORS[1]] = record["cases"][case.name][dtype]["ended"]
        of = {n: error(case, start, p, want["final"]) for n, p in ends.items()}
        of[ERRORS[2]] = distance(
            *checkpoints.comparable(framework, case, given, want["checkpoint"])
        )
        found[case.name] = of
    return found


def distance(got, want):
    """The largest difference of trees of arrays, in units of each array's largest number."""
    if isinstance(want, dict | list):
        assert len(got) == len(want)
        keys = want if isinstance(want, dict) else range(len(want))
        return max((distance(got[key], want[key]) for key in keys), default=0.0)
    if isinstance(want, str | bool) or want is None:
        return 0.0 if got == want else np.inf
    assert np.shape(got) == np.shape(want)
    return np.max(np.abs(np.subtract(got, want)) / max(np.max(np.abs(want)), 1e-30))


def check(framework, live):
    """{part: (difference from the fixture, tolerance)} and rows (case, dtype, name, error)."""
    now, then = kept(live), load(framework)
    apart = {
        dtype: (
            distance(
                *([r["cases"][name][dtype] for name in names(framework)] for r in (now, then))
            ),
            cases.TOLERANCE[dtype],
        )
        for dtype in DTYPES
    }
    if "models" in now:
        apart["models"] = distance(now["models"], then["models"]), cases.TOLERANCE["float32"]
    rows = [
        (case.name, dtype, name, error)
        for case in CASES[framework]
        for dtype in DTYPES
        for name, error in errors(framework, [case], dtype, live)[case.name].items()
    ]
    return apart, rows


def table_row(framework, version, rows):
    """Of the Markdown table: the largest errors, in float64 and in float32."""

    def largest(name):
        found = ([e for _, d, n, e in rows if (d, n) == (dtype, name)] for dtype in DTYPES)
        return ", ".join(f"{np.max(errors):.1e}" for errors in found)

    optimizer, *_ = frameworks.OPTIMIZER[framework]
    runs = len({row[:2] for row in rows})
    cells = [f"`{framework}`", f"`{optimizer}`, {version}", str(runs), *map(largest, ERRORS)]
    return "| " + " | ".join(cells) + " |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    every = list(CASES)
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="FRAMEWORK")
    args = parser.parse_args(argv)
    if args.into:
        np.savez(args.into, **checkpoints.pack(run(args.only[0])))
        return
    table, failures = [], []
    for framework in args.only:
        begin = time.perf_counter()
        live = run_apart(framework)
        print(f"{framework}: {live['version']}, {len(live['cases'])} cases", end="", flush=True)
        if args.check:
            apart, rows = check(framework, live)
            failures += [
                f"{framework}, {part}: {error:.1e} from its fixture"
                for part, (error, tolerance) in apart.items()
                if not error <= tolerance
            ]
            failures += [
                f"{framework}, {', '.join(where)}: {error:.1e}"
                for *where, error in rows
                if not error <= cases.TOLERANCE[where[1]]
            ]
            table.append(table_row(framework, live["version"], rows))
            print(", from the fixture", *(f"{e:.0e}" for e, _ in apart.values()), end="")
        else:
            file = FIXTURES / f"convert_{framework}.npz"
            np.savez_compressed(file, **checkpoints.pack(kept(live)))
            print(f", {file.stat().st_size / 1000:.0f} kB in {file}", end="")
        print(f", {time.perf_counter() - begin:.0f} s", flush=True)
    if args.check:
        print()
        print(TABLE_HEAD, *table, sep="\n")
    if failures:
        sys.exit("\n".join(["beyond tolerance:", *failures]))


if __name__ == "__main__":
    main()
