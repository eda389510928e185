"""Trains one network in many processes, any of which may die: only a few steps are lost.

    python examples/multi_process.py --processes 2    # starts two on the CPU of this machine

On a cluster, run it once per process, with a folder that all of them can see. They find each other:

    # Slurm: one task per GPU. A task must see all GPUs of its node, so no --gpus-per-task.
    srun --gpus-per-node=8 --ntasks-per-node=8 python multi_process.py --checkpoint FOLDER
    # Cloud TPU
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="python multi_process.py ..."
    # Kubernetes: in the pods of a JobSet, or of an Indexed Job with a headless service. Except for
    # TPUs on GKE, it needs pip install "jax[k8s]", and pods that may list pods and get jobs.
    python multi_process.py --checkpoint FOLDER
    # anywhere else: the same with --process 1, 2 and 3, where HOST is the one of process 0
    python multi_process.py --coordinator HOST:1234 --processes 4 --process 0 --checkpoint FOLDER

The network of simplenet.py learns the airfoil's noise; each device computes its part of every
batch. Parameters and optimizer state are saved every --every steps. If a process dies, the others
end within seconds, with a nonzero exit code. The same command then resumes from the newest intact
checkpoint, and its result is bit-identical to that of a run without interruption, even with another
number of processes, as long as the number of devices is the same. If the disk is full, the run
ends, and what it saved stays. On SIGTERM, which schedulers send before they take a machine away, or
on Ctrl-C with --processes, every process saves the current step and exits with code 143. Requests
that cannot work are refused with code 2. Two runs cannot share a folder: a lock keeps the second
out, but there is none in a bucket (gs://...). Prints the test loss and a hash of the parameters.
"""

import argparse
from collections.abc import Sequence
import errno
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

from flax import nnx
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import real_data
import recovery
from rmsprop_jax import rmsprop
import simplenet
from simplenet import Rows, SimpleNet

PATIENCE = 10  # seconds of silence after which a process counts as dead
REFUSED = 2  # the exit code of a run that would fail again


def launch(processes: int, argv: Sequence[str]) -> None:
    """Runs this program in this many processes, and waits until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": address}
    command = [sys.executable, __file__, *argv, "--coordinator", address, "--process"]
    children = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the children: Ctrl-C reaches them, too
        for i in range(processes):
            children.append(subprocess.Popen([*command, str(i)], env=env))
            print(f"process {i}: pid {children[i].pid}", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while None in (now := [child.poll() for child in children]) and not any(now):
            time.sleep(0.1)
        for child in children:  # if one failed, connected ones end by themselves
            child.wait(2 * PATIENCE)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
    finally:
        for child in children:
            child.kill()
    codes = [child.wait() for child in children]
    if any(codes):
        ends = ", ".join(f"process {i} {end(code)}" for i, code in enumerate(codes))
        if REFUSED in codes:
            print(f"multi_process.py: {ends}", file=sys.stderr)
            sys.exit(REFUSED)
        raise SystemExit(
            f"multi_process.py: {ends}; the same command resumes from the newest intact checkpoint"
        )


def end(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def load(data: str, seed: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Training inputs and targets, then test inputs and targets."""
    if data == "airfoil":
        return simplenet.airfoil(seed)
    return *simplenet.random_samples(seed), *simplenet.random_samples(seed + 1)


def train(args: argparse.Namespace, x: Rows, y: Rows) -> tuple[SimpleNet, int]:
    """The model and its number of steps, fewer than requested if a SIGTERM came."""
    me, processes = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("data"))

    def create() -> tuple[SimpleNet, nnx.Optimizer]:
        model = SimpleNet(x.shape[1], nnx.Rngs(args.seed))
        tx = rmsprop(args.learning_rate, momentum=0.9)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    graph = nnx.graphdef(nnx.eval_shape(create))
    state = jax.jit(lambda: nnx.state(create()), out_shardings=replicated)()

    @functools.partial(jax.jit, donate_argnames="state", out_shardings=replicated)
    def train_step(state: nnx.State, x: jax.Array, y: jax.Array) -> nnx.State:
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(simplenet.mse)(model, x, y))
        return nnx.state((model, optimizer))

    flags = {name: getattr(args, name) for name in ("data", "seed", "batch", "learning_rate")}
    run = {**flags, "devices": jax.device_count()}
    step = 0
    if found := recovery.newest_whole(args.checkpoint, state, flags):
        step = found.step
        to_devices = functools.partial(jax.make_array_from_process_local_data, replicated)
        state = jax.tree.map(to_devices, found.state)
        if me == 0 and found.run != run:
            counts = f"{found.run['devices']} devices before, {run['devices']} now"
            print(f"{counts}: the result may differ by rounding", flush=True)

    # Not in the background: there, if the disk is full for one process, the others wait for it.
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=args.every,
        max_to_keep=3,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    # Not in a with statement: on an exception it would wait for processes that are gone.
    manager = ocp.CheckpointManager(args.checkpoint, options=options)
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    print(f"process {me} of {processes}: {devices}, from step {step}", flush=True)

    def save(force: bool = False) -> None:
        if force or manager.should_save(step):
            manager.save(step, args=recovery.contents(state, run), force=force)

    with tqdm(initial=step, total=args.steps, unit="step", disable=me > 0) as bar:
        while step < args.steps and not manager.reached_preemption(step):
            # A batch depends on its step alone, so a resumed run sees the same batches.
            rng = np.random.default_rng((args.seed, step))
            rows = np.split(rng.choice(len(x), args.batch, replace=False), processes)[me]
            parts = (jax.make_array_from_process_local_data(by_row, a[rows]) for a in (x, y))
            # Overlapping steps can deadlock on a machine with few cores.
            state = jax.block_until_ready(train_step(state, *parts))
            step += 1
            save()
            bar.update()
    if step > (manager.latest_step() or 0):
        save(force=True)
    manager.close()
    return nnx.merge(graph, jax.device_get(state))[0], step


def work(args: argparse.Namespace) -> None:
    """Runs one of the processes."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also raises what it logs
    x, y, x_test, y_test = load(args.data, args.seed)
    if args.coordinator:
        where = f"at {args.coordinator}, for up to 5 minutes"
        print(f"process {args.process} waits for all {args.processes} {where}", flush=True)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            cluster_detection_method="deactivate" if args.coordinator else None,
            heartbeat_timeout_seconds=PATIENCE,
            shutdown_timeout_seconds=6 * PATIENCE,  # a process that is slow to end is not dead
        )
    except ValueError as error:
        raise recovery.RunError(f"no cluster: {error} Try --processes 2") from None
    me, devices = jax.process_index(), jax.device_count()
    try:
        recovery.check_devices()
        own = ("process", "coordinator")
        recovery.check_same({name: flag for name, flag in vars(args).items() if name not in own})
        args.batch = args.batch or min(128, len(x)) // devices * devices
        if not 0 < args.batch <= len(x) or args.batch % devices:
            raise recovery.RunError(
                f"--batch must be a multiple of {devices}, the number of devices, and at most "
                f"{len(x)}, the number of rows, but is {args.batch}"
            )
        with recovery.lock(args.checkpoint):
            model, step = train(args, x, y)
    except recovery.RunError:
        raise
    except Exception:
        explain(me, args.checkpoint)
        os._exit(1)  # sys.exit would wait for the process that is gone
    if step < args.steps:
        print(f"process {me}: stopped by SIGTERM, step {step} is saved", flush=True)
        sys.exit(128 + signal.SIGTERM)
    if me == 0:
        loss = float(simplenet.mse(model, x_test, y_test))
        parameters = recovery.sha256(nnx.state(model, nnx.Param))
        print(f"Step {step}, test loss {loss:.4f}, parameters {parameters}", flush=True)


def explain(me: int, folder: str) -> None:
    """Prints why the run ends, from the error being handled, and where it will resume."""
    trace = traceback.format_exc()
    if any(os.strerror(code) in trace for code in (errno.ENOSPC, errno.EDQUOT)):
        reason = f"the disk is full, nothing more can be saved in {folder}; once there is space,"
    else:
        print(trace, file=sys.stderr)
        reason = "cannot continue, perhaps because another process is gone;"
    step = max(ocp.utils.checkpoint_steps(folder), default=0)
    message = f"process {me}: {reason} the same command resumes from step {step}"
    print(message, file=sys.stderr, flush=True)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if a flag is invalid, and names it."""
    if any(n is not None and n < 1 for n in (args.processes, args.steps, args.every, args.batch)):
        parser.error("--processes, --steps, --every and --batch must be at least 1")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, but is {args.seed}")
    if not 0 < args.learning_rate <= float(np.finfo(np.float32).max):
        parser.error(f"--learning-rate must be a positive float32, but is {args.learning_rate}")
    if args.coordinator is None and args.process is None:
        return
    if None in (args.coordinator, args.process, args.processes):
        parser.error("--coordinator and --process need each other, and --processes")
    if not 0 <= args.process < args.processes:
        parser.error(
            f"--process must be from 0 to {args.processes - 1} with --processes "
            f"{args.processes}, but is {args.process}"
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        parser.error(
            f"--coordinator must be HOST:PORT, for example 10.0.0.1:1234, but is {args.coordinator}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--process", type=int, help="the index of this process")
    parser.add_argument("--data", choices=["random", "airfoil"], default="airfoil")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument(
        "--batch", type=int, help="rows, on all devices together; default 128, or all if fewer"
    )
    parser.add_argument("--learning-rate", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="out/multi_process", help="a folder, or gs://...")
    args = parser.parse_args(argv)
    check(parser, args)
    if "://" not in args.checkpoint:
        args.checkpoint = os.path.abspath(args.checkpoint)
    if args.processes is not None and args.coordinator is None:
        launch(args.processes, sys.argv[1:] if argv is None else argv)
    else:
        work(args)


if __name__ == "__main__":
    try:
        main()
    except (real_data.DataError, recovery.RunError) as error:
        print(f"multi_process.py: {error}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)
