"""The example multi_process.py, run as a user does, while its processes are killed and worse.

Each run is compared with an undisturbed one: the loss must be equal, and every parameter
bit-identical. Time limits allow for a machine that is busy with other things.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp
import pytest

import multi_process as example
import recovery
import rmsprop_jax

DATA = "airfoil" if os.environ.get("RMSPROP_JAX_DATA") else "random"
STEPS, EVERY = 150, 10
RESULT = r"Step \d+, test loss \d\.\d{4}, parameters [0-9a-f]{64}"


class Run:
    """A launcher and its processes, in a session of their own; they all write into one log."""

    def __init__(self, folder, log, processes, steps, devices):
        self.log = log
        command = [sys.executable, example.__file__, "--data", DATA, "--batch", "64"]
        command += ["--processes", str(processes), "--steps", str(steps), "--every", str(EVERY)]
        env = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(Path(rmsprop_jax.__file__).parents[1]),
            "TQDM_MININTERVAL": "0",  # every step is in the log
            "TQDM_MINITERS": "1",
        }
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*command, "--checkpoint", str(folder)],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def find(self, pattern):
        """All matches in the log so far, which must come to have one."""
        deadline = time.monotonic() + 120
        while not (found := re.findall(pattern, self.log.read_text())):
            assert self.launcher.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)
        return found

    def pid(self, process):
        return int(self.find(rf"process {process}: pid (\d+)\n")[0])

    def first_step(self):
        return int(self.find(r"process 0 of \d: \d of 2 devices, from step (\d+)")[0])

    def reach(self, step):
        """The last step made, once it is this one or a later one."""
        while (last := int(self.find(r"(\d+)/\d+ \[")[-1])) < step:
            assert self.launcher.poll() is None, self.log.read_text()
            time.sleep(0.005)
        return last

    def end(self, seconds=120):
        """Everything that was printed, and the code."""
        code = self.launcher.wait(seconds)
        return self.log.read_text(), code

    def result(self):
        text, code = self.end()
        assert code == 0, text
        return re.findall(RESULT + "\n", text)[-1]


@pytest.fixture
def start(tmp_path):
    """Starts a run with its checkpoints in this folder; no process outlives the test."""
    runs = []

    def start(name, processes=2, steps=STEPS, devices=1):
        log = tmp_path / f"{len(runs)}.log"
        runs.append(Run(tmp_path / name, log, processes, steps, devices))
        return runs[-1]

    yield start
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.launcher.pid, signal.SIGKILL)
        run.launcher.wait()


def saved(tmp_path, name):
    return max(ocp.utils.checkpoint_steps(tmp_path / name), default=0)


@pytest.mark.slow
def test_kills_cost_nothing_but_the_steps_since_the_last_checkpoint(start, tmp_path):
    rng = random.Random(0)
    first = 0
    for victim in (1, 0, 1, 0, 1):  # process 0 is the coordinator
        run = start("killed")
        assert run.first_step() == first
        step = run.reach(first + rng.randint(3, 15))
        time.sleep(rng.uniform(0, 0.03))
        os.kill(run.pid(victim), signal.SIGKILL)
        text, code = run.end(seconds=60)
        assert code == 1, text
        assert f"process {victim} was killed by SIGKILL" in text
        survivor = 1 - victim
        assert re.search(rf"process {survivor} (exited with code 1|was killed by SIGABRT)", text)
        assert (
            f"process {survivor}: cannot continue" in text
            or "the JAX distributed service detected fatal errors" in text
        )
        # What was saved last may have been on its way to the disk.
        first = saved(tmp_path, "killed")
        assert first > step - 2 * EVERY
    run = start("killed")
    assert run.first_step() == first > 0
    assert run.result() == start("whole").result()
    others = [path.name for path in (tmp_path / "killed").iterdir() if not path.name.isdigit()]
    assert others == ["lock"]  # no halves


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        lambda run: os.kill(run.pid(1), signal.SIGTERM),
        lambda run: os.killpg(run.launcher.pid, signal.SIGINT),
    ],
    ids=["SIGTERM of one process", "Ctrl-C"],
)
def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_at(stop, start, tmp_path):
    run = start("run", steps=100_000)
    run.reach(EVERY + 3)
    stop(run)
    text, code = run.end()
    assert code == 1
    steps = re.findall(r"process \d: stopped by SIGTERM, step (\d+) is saved", text)
    assert steps == [str(saved(tmp_path, "run"))] * 2, text
    assert text.count("exited with code 143") == 2, text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_death_before_the_processes_have_met_ends_the_run(start):
    run = start("run")
    os.kill(run.pid(1), signal.SIGKILL)
    text, code = run.end()
    assert code == 1
    assert "process 0 was killed by SIGTERM, process 1 was killed by SIGKILL" in text


@pytest.mark.slow
def test_devices_count_not_the_processes_that_have_them(start):
    """A run may resume in another number of processes, to the same bits."""
    assert start("moved", processes=1, steps=15, devices=2).result().startswith("Step 15,")
    run = start("moved", processes=2, steps=25)
    assert run.first_step() == 15
    assert run.result() == start("whole", processes=1, steps=25, devices=2).result()


@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_bits(start, tmp_path):
    assert start("damaged", steps=30).result().startswith("Step 30,")
    data = max((tmp_path / "damaged/30/state/d").iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    (tmp_path / "damaged/20/about/metadata").unlink()
    run = start("damaged", steps=40)
    assert run.first_step() == 10
    assert run.result() == start("whole", steps=40).result()
    text = run.log.read_text()
    for step, why in ((30, "ValueError: OUT_OF_RANGE"), (20, "FileNotFoundError: ")):
        path = tmp_path / f"damaged/{step}"
        assert re.search(rf"{path} is damaged \({why}.*\); renamed to {path}.damaged\n", text), text
    names = {path.name for path in (tmp_path / "damaged").iterdir()}
    assert names == {"20", "30", "40", "20.damaged", "30.damaged", "lock"}  # 3 are kept


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=212k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here: that takes Linux and root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_saved(start, small_disk):
    text, code = start("disk/run").end()
    assert code == 1, text
    step = saved(small_disk, "run")
    message = rf"process \d: the disk is full, .*/disk/run; once .* resumes from step {step}\n"
    assert re.search(message, text), text
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run = start("disk/run")
    assert run.first_step() == step > 0
    assert run.result() == start("whole").result()
    assert "damaged" not in run.log.read_text()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(start, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text, code = start("run").end()
    assert code == 2, text
    assert text.count(f"multi_process.py: another run is using {tmp_path}/run; ") == 2, text
    assert "resumes" not in text


def meet(tmp_path, *processes):
    """What two processes print that are started by hand; each has flags and a number of devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(rmsprop_jax.__file__).parents[1])}
    command = [sys.executable, example.__file__, "--data", "random", "--coordinator", address]
    command += ["--checkpoint", str(tmp_path / "run"), "--processes", "2", "--process"]
    started = [
        subprocess.Popen(
            [*command, str(i), *flags],
            env=os.environ | own | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, (flags, devices) in enumerate(processes)
    ]
    try:
        texts = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [2, 2], texts
    return texts


@pytest.mark.slow
def test_processes_with_different_flags_name_them(tmp_path):
    for text in meet(tmp_path, (["--steps", "10"], 1), (["--steps", "20", "--seed", "3"], 1)):
        assert "--steps 10 in process 0, 20 in process 1; --seed 0 in process 0, 3 in" in text, text


@pytest.mark.slow
def test_processes_with_unequal_counts_of_devices_name_them(tmp_path):
    for text in meet(tmp_path, ([], 1), ([], 3)):
        assert "but process 0 has 1, process 1 has 3\n" in text, text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--processes 0", "--processes, --steps, --every and --batch must be at least 1"),
        ("--steps 0", "--processes, --steps, --every and --batch must be at least 1"),
        ("--every 0", "--processes, --steps, --every and --batch must be at least 1"),
        ("--batch 0", "--processes, --steps, --every and --batch must be at least 1"),
        ("--seed -1", "--seed must be from 0 to 4294967295, but is -1"),
        ("--seed 4294967296", "--seed must be from 0 to 4294967295, but is 4294967296"),
        ("--learning-rate nan", "--learning-rate must be a positive float32, but is nan"),
        ("--learning-rate 1e39", "--learning-rate must be a positive float32, but is 1e+39"),
        ("--learning-rate inf", "--learning-rate must be a positive float32, but is inf"),
        ("--learning-rate -0.1", "--learning-rate must be a positive float32, but is -0.1"),
        ("--process 0 --processes 2", "--coordinator and --process need each other"),
        ("--coordinator a:1 --processes 2", "--coordinator and --process need each other"),
        ("--coordinator a:1 --process 0", "need each other, and --processes"),
        ("--coordinator a:1 --processes 2 --process 2", "--process must be from 0 to 1 with"),
        ("--coordinator a:1 --processes 2 --process -1", "--process must be from 0 to 1 with"),
        ("--coordinator a --processes 2 --process 0", "--coordinator must be HOST:PORT, "),
        ("--coordinator :1 --processes 2 --process 0", "--coordinator must be HOST:PORT, "),
        ("--coordinator a:b --processes 2 --process 0", "--coordinator must be HOST:PORT, "),
        ("--coordinator a:65536 --processes 2 --process 0", "--coordinator must be HOST:PORT, "),
    ],
)
def test_main_refuses_flags_that_make_no_sense(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(flags.split())
    assert message in capsys.readouterr().err


def test_main_without_a_cluster_says_what_to_do(monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(recovery.RunError, match=r"no cluster: coordinator.*Try --processes 2"):
        example.main(["--data", "random"])


@pytest.fixture
def alone(monkeypatch):
    """This process is the only one, with its eight devices."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: None)


def test_one_process_goes_on_from_its_checkpoint_to_the_same_bits(alone, tmp_path, capsys):
    def run(name, steps):
        flags = ["--data", "random", "--batch", "64", "--every", "2", "--steps", str(steps)]
        example.main([*flags, "--checkpoint", str(tmp_path / name)])
        return capsys.readouterr().out.splitlines()

    at, end = run("stopped", 3)
    assert at == "process 0 of 1: 8 of 8 devices, from step 0"
    assert re.fullmatch(RESULT.replace(r"\d+", "3", 1), end)
    assert saved(tmp_path, "stopped") == 3
    at, resumed = run("stopped", 6)
    assert at == "process 0 of 1: 8 of 8 devices, from step 3"
    assert resumed == run("whole", 6)[1] != end


@pytest.mark.parametrize("batch", ["7", "104"])
def test_main_refuses_a_batch_that_does_not_fit(batch, alone):
    with pytest.raises(recovery.RunError, match=r"--batch must be a multiple of 8, .* at most 100"):
        example.main(["--data", "random", "--batch", batch])


def test_a_checkpoint_of_another_run_is_refused_but_not_for_its_devices(
    alone, tmp_path, monkeypatch, capsys
):
    flags = ["--data", "random", "--batch", "48", "--checkpoint", str(tmp_path), "--steps"]
    with monkeypatch.context() as patch:
        contents = recovery.contents
        patch.setattr(
            recovery, "contents", lambda state, run: contents(state, run | {"devices": 3})
        )
        example.main([*flags, "1"])
    other = ["--seed", "7", "--batch", "96", "--learning-rate", "0.1"]
    message = (
        f"{tmp_path}/1 is of a run with --seed 0 --batch 48 --learning-rate 0.002, "
        "not --seed 7 --batch 96 --learning-rate 0.1; use those or another folder"
    )
    with pytest.raises(recovery.RunError, match=message):
        example.main([*flags, "2", *other])
    capsys.readouterr()
    example.main([*flags, "2"])
    note, *_ = capsys.readouterr().out.splitlines()
    assert note == "3 devices before, 8 now: the result may differ by rounding"


def test_random_data_have_a_default_batch_that_fits(alone, tmp_path, capsys):
    """Of the 100 rows, 96: a multiple of the 8 devices."""
    flags = ["--data", "random", "--steps", "2", "--checkpoint"]
    ends = []
    for name, batch in (("default", []), ("same", ["--batch", "96"])):
        example.main([*flags, str(tmp_path / name), *batch])
        ends += capsys.readouterr().out.splitlines()[-1:]
    assert ends[0] == ends[1]


def test_a_full_disk_is_named(alone, tmp_path, monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def save(*args, **kwargs):
        raise ValueError("no") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def end(code):
        assert code == 1
        raise Ended

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        example.main(["--data", "random", "--steps", "2", "--checkpoint", str(tmp_path)])
    error = capsys.readouterr().err
    assert f"the disk is full, nothing more can be saved in {tmp_path}; once there" in error
    assert "the same command resumes from step 0" in error
    assert "Traceback" not in error
