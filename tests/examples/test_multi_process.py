"""The example multi_process.py, run as a user does, while its processes are killed.

Each run is held to one that nothing happened to: the same loss, and the same bits of every
parameter. Where a wait is bounded, the bound is for a machine busy with other things.
"""

import contextlib
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp
import pytest

import multi_process as example
import rmsprop_jax

DATA = "airfoil" if os.environ.get("RMSPROP_JAX_DATA") else "random"
STEPS, EVERY = 150, 10
RESULT = r"Step \d+, test loss \d\.\d{4}, parameters [0-9a-f]{64}"


class Run:
    """A launcher and its processes, in a session of their own; they all write into one log."""

    def __init__(self, folder, processes, steps, devices):
        self.log = folder.with_suffix(".log")
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
        runs.append(Run(tmp_path / name, processes, steps, devices))
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
        assert f"process {victim} was ended by SIGKILL" in text
        survivor = 1 - victim
        assert re.search(rf"process {survivor} (ended with code 1|was ended by SIGABRT)", text)
        assert (
            f"process {survivor}: cannot go on" in text
            or "the JAX distributed service detected fatal errors" in text
        )
        # What was saved last may have been on its way to the disk.
        first = saved(tmp_path, "killed")
        assert first > step - 2 * EVERY
    run = start("killed")
    assert run.first_step() == first > 0
    assert run.result() == start("whole").result()
    halves = [path.name for path in (tmp_path / "killed").iterdir() if not path.name.isdigit()]
    assert halves == []


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
    assert text.count("ended with code 143") == 2, text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_death_before_the_processes_have_met_ends_the_run(start):
    run = start("run")
    os.kill(run.pid(1), signal.SIGKILL)
    text, code = run.end()
    assert code == 1
    assert "process 0 was ended by SIGTERM, process 1 was ended by SIGKILL" in text


@pytest.mark.slow
def test_devices_count_not_the_processes_that_have_them(start):
    """A run may resume in another number of processes, to the same bits."""
    assert start("moved", processes=1, steps=15, devices=2).result().startswith("Step 15,")
    run = start("moved", processes=2, steps=25)
    assert run.first_step() == 15
    assert run.result() == start("whole", processes=1, steps=25, devices=2).result()


@pytest.mark.parametrize("flag", ["--processes", "--steps", "--every", "--batch"])
def test_main_refuses_what_it_cannot_do(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main([flag, "0"])
    assert flag in capsys.readouterr().err


def test_main_without_a_cluster_says_what_to_do(monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match=r"no cluster: coordinator.*Try --processes 2"):
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
    with pytest.raises(SystemExit, match=r"--batch must be a multiple of 8, .* at most 100"):
        example.main(["--data", "random", "--batch", batch])
