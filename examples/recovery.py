"""How the processes of multi_process.py agree on their flags, one folder, and where to resume.

If one process made a decision alone, the others would wait for it. So each process reports what it
has seen, all hear all reports (`gather`), and all draw the same conclusion. A run that cannot
continue ends with a `RunError` in every process.

A checkpoint is intact if every process can read all of it, and if its contents have the sha256 that
was saved with them. A damaged one is renamed to `STEP.damaged`, never deleted.
"""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
from pathlib import Path
import sys
import textwrap
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

LENGTH = 8192  # bytes in a message of one process


class RunError(RuntimeError):
    """The run cannot continue; the message says why, and what to do."""


def gather(text: str) -> list[str]:
    """The text of each process, in the order of the processes."""
    message = text.encode()[:LENGTH].ljust(LENGTH, b"\0")
    messages = multihost_utils.process_allgather(np.frombuffer(message, np.uint8))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in messages]


def check_devices() -> None:
    """Raises RunError unless all processes have equally many devices; needs no communication."""
    owners = [device.process_index for device in jax.devices()]
    counts = [owners.count(process) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        each = ", ".join(f"process {process} has {n}" for process, n in enumerate(counts))
        raise RunError(f"all processes must have equally many devices, but {each}")


def check_same(flags: Mapping[str, object]) -> None:
    """Raises RunError, naming the flags that differ, unless all processes have the same flags."""
    given = [json.loads(text) for text in gather(json.dumps(flags))]
    differences = [
        f"--{name.replace('_', '-')} {given[0][name]} in process 0, {other[name]} in process {i}"
        for name in flags
        for i, other in enumerate(given)
        if other[name] != given[0][name]
    ]
    if differences:
        raise RunError(f"all processes need the same flags, but found {'; '.join(differences)}")


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Keeps other runs out of the folder; raises RunError if one is already using it.

    Process 0 holds a lock on a file, which the kernel releases however the process ends. There is
    no lock in a bucket (gs://...), nor in a network file system that does not support locks.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0 and "://" not in folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((Path(folder) / "lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"another run is using {folder}; wait for it, or stop it"
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    problem = f"cannot write to --checkpoint {folder}: {error.strerror}"
        if problem := gather(problem)[0]:
            raise RunError(problem)
        yield


class Checkpoint(NamedTuple):
    """The step, the description of the run that was saved, and the arrays."""

    step: int
    run: dict[str, Any]
    state: Any


def contents(state: Any, run: Mapping[str, object]) -> ocp.args.Composite:
    """What to save: the arrays, a description of the run, and the sha256 of both."""
    about = {"run": run, "sha256": sha256(state, run)}
    return ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))


def sha256(tree: Any, run: Mapping[str, object] | None = None) -> str:
    """The sha256 of the description of the run, if there is one, and the bytes of all arrays."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode() if run else b"")
    for array in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def newest_whole(folder: str, like: Any, flags: Mapping[str, object]) -> Checkpoint | None:
    """The newest intact checkpoint, the same in all processes; None if there is none.

    `like` has the arrays' structure, shapes and dtypes. Raises RunError if the checkpoint was saved
    by a run with other flags. Process 0 reports newer, damaged checkpoints and renames them.
    """
    steps = sorted(ocp.utils.checkpoint_steps(folder), reverse=True)
    for process, other in enumerate(seen := gather(f"{steps}")):
        if other != seen[0]:
            raise RunError(
                f"all processes need the same --checkpoint folder, but in {folder} process 0 sees "
                f"the steps {seen[0]}, process {process} {other}"
            )
    found, damaged = None, {}
    with _quiet():
        for step in steps:
            path = epath.Path(folder) / str(step)
            try:
                found, reason = Checkpoint(step, *_read(path, jax.device_get(like))), ""
            except Exception as error:
                reason = f"{type(error).__name__}: {textwrap.shorten(f'{error}', 120)}"
            reasons = [reason for reason in gather(reason) if reason]
            if not reasons:
                break
            found, damaged[path] = None, reasons[0]
    if found:
        _check_flags(epath.Path(folder) / str(found.step), found.run, flags)
    for path, reason in damaged.items() if jax.process_index() == 0 else ():
        aside = path.with_name(f"{path.name}.damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        path.rename(aside)
        print(f"{path} is damaged ({reason}); renamed to {aside}", flush=True)
    if damaged and not found and jax.process_index() == 0:
        print(f"{folder} has no intact checkpoint: starting from step 0", flush=True)
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    return found


def _read(path: epath.Path, like: Any) -> tuple[dict[str, Any], Any]:
    """Reads a checkpoint in this process alone, without waiting for others that may have failed."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
    )
    handler = ocp.CompositeCheckpointHandler()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), about=ocp.args.JsonRestore())
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        restored = checkpointer.restore(path, args=args)
    if restored.about["sha256"] != sha256(restored.state, restored.about["run"]):
        raise ValueError("the contents do not match the sha256 that was saved with them")
    return restored.about["run"], restored.state


def _check_flags(path: epath.Path, run: Mapping[str, Any], flags: Mapping[str, object]) -> None:
    others = {name: run.get(name) for name in flags if run.get(name) != flags[name]}
    if others:
        was, now = (
            " ".join(f"--{name.replace('_', '-')} {values[name]}" for name in others)
            for values in (run, flags)
        )
        raise RunError(f"{path} is of a run with {was}, not {now}; use those or another folder")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the tracebacks of arrays that are still being read when another one fails."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        sys.unraisablehook = hook
