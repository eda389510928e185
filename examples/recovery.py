"""How the processes of multi_process.py agree: on their flags, one folder, and where to go on from.

A decision that one process takes alone leaves the others waiting for it. So each says what it has
seen, all hear what all have said (`gather`), and all draw the same conclusion. A run that cannot
go on ends with a `RunError` in every process.

A checkpoint is whole if every process can read all of it, and if its contents have the sha256 that
was saved with them. One that is not is renamed to `STEP.damaged`, never deleted.
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

LENGTH = 8192  # bytes that one process can say at once


class RunError(RuntimeError):
    """The run cannot go on; the message says why, and what to do."""


def gather(text: str) -> list[str]:
    """What each process says, in the order of the processes."""
    message = text.encode()[:LENGTH].ljust(LENGTH, b"\0")
    messages = multihost_utils.process_allgather(np.frombuffer(message, np.uint8))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in messages]


def check_devices() -> None:
    """Raises RunError unless every process has as many devices; no process need be asked."""
    owners = [device.process_index for device in jax.devices()]
    counts = [owners.count(process) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        each = ", ".join(f"process {process} has {n}" for process, n in enumerate(counts))
        raise RunError(f"every process must have as many devices, but {each}")


def check_same(flags: Mapping[str, object]) -> None:
    """Raises RunError, naming the flags that differ, unless all processes were given the same."""
    given = [json.loads(text) for text in gather(json.dumps(flags))]
    differences = [
        f"--{name.replace('_', '-')} {given[0][name]} in process 0, {other[name]} in process {i}"
        for name in flags
        for i, other in enumerate(given)
        if other[name] != given[0][name]
    ]
    if differences:
        raise RunError(f"all processes need the same flags, but there is {'; '.join(differences)}")


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Keeps other runs out of the folder; raises RunError if one is at work there.

    Process 0 holds a lock on a file, which the kernel releases however the process ends. There is
    none in a bucket, as in gs://, nor in a network file system without locks.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0 and "://" not in folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((Path(folder) / "lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"another run is at work in {folder}; wait for it, or stop it"
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    problem = f"cannot write into --checkpoint {folder}: {error.strerror}"
        if problem := gather(problem)[0]:
            raise RunError(problem)
        yield


class Checkpoint(NamedTuple):
    """The step, what is known about the run (see `contents`), and the arrays."""

    step: int
    run: dict[str, Any]
    state: Any


def contents(state: Any, run: Mapping[str, object]) -> ocp.args.Composite:
    """What to save: the arrays, what is to be known about the run, and the sha256 of both."""
    about = {"run": run, "sha256": sha256(state, run)}
    return ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))


def sha256(tree: Any, run: Mapping[str, object] | None = None) -> str:
    """Of the bytes of all arrays, after what is to be known about the run, if anything."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode() if run else b"")
    for array in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def newest_whole(folder: str, like: Any, flags: Mapping[str, object]) -> Checkpoint | None:
    """The newest checkpoint that is whole, the same in all processes; None if there is none.

    `like` has the arrays' structure, shapes and dtypes. Raises RunError if the checkpoint was saved
    by a run with other flags. Process 0 prints which newer ones are damaged, and renames them.
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
        print(f"{path} is damaged ({reason}), and now {aside}", flush=True)
    if damaged and not found and jax.process_index() == 0:
        print(f"{folder} has no whole checkpoint: from step 0", flush=True)
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    return found


def _read(path: epath.Path, like: Any) -> tuple[dict[str, Any], Any]:
    """Reads a checkpoint in this process alone: it waits for no other, which may have failed."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
    )
    handler = ocp.CompositeCheckpointHandler()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), about=ocp.args.JsonRestore())
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        restored = checkpointer.restore(path, args=args)
    if restored.about["sha256"] != sha256(restored.state, restored.about["run"]):
        raise ValueError("the contents do not have the sha256 that was saved with them")
    return restored.about["run"], restored.state


def _check_flags(path: epath.Path, run: Mapping[str, Any], flags: Mapping[str, object]) -> None:
    others = {name: run.get(name) for name in flags if run.get(name) != flags[name]}
    if others:
        was, now = (
            " ".join(f"--{name.replace('_', '-')} {values[name]}" for name in others)
            for values in (run, flags)
        )
        raise RunError(f"{path} is of a run with {was}, not {now}; give those or another folder")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks of the arrays that were still being read when one had failed."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        sys.unraisablehook = hook
