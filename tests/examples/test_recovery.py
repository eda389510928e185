"""How processes agree and recover, in one process with eight devices."""

import fcntl
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import recovery

FLAGS = {"data": "airfoil", "learning_rate": 0.5}
STATE = {"a": jnp.arange(250.0).reshape(50, 5), "b": jnp.float32(7), "count": jnp.int32(3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1 and 2; all numbers of the latter are greater by one."""
    folder = tmp_path_factory.mktemp("saved")
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            state = jax.tree.map(lambda a: a + step, STATE)  # noqa: B023
            manager.save(step, args=recovery.contents(state, FLAGS))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "copy")


def restored(folder):
    """The step, and how much its numbers are above those of STATE."""
    found = recovery.newest_whole(str(folder), STATE, FLAGS)
    differences = jax.tree.map(lambda a, b: np.unique(a - b), found.state, jax.device_get(STATE))
    (above,) = {difference.item() for difference in jax.tree.leaves(differences)}
    return found.step, above


def empty(content):
    return b""


def half(content):
    return content[: len(content) // 2]


def flipped(content):
    """With another bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def gone(content):
    return None


@pytest.mark.parametrize("damage", [empty, half, flipped, gone])
def test_whatever_file_is_damaged_only_right_numbers_come_back(damage, saved, tmp_path, capsys):
    """Orbax does not need every file; without those that it needs, step 1 is the newest."""
    files = sorted(file.relative_to(saved) for file in (saved / "2").rglob("*") if file.is_file())
    steps = {}
    for i, file in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(i))
        content = damage((folder / file).read_bytes())
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        step, above = restored(folder)
        assert above == step, file
        name = "data" if file.match("state/d/*") else str(file)
        steps[name] = step
        out, err = capsys.readouterr()
        aside = f"{folder}/2 is damaged (" in out and f"); renamed to {folder}/2.damaged\n" in out
        assert aside == (folder / "2.damaged").exists() == (step == 1)
        assert "Traceback" not in err
    assert {steps[name] for name in ("data", "2/state/manifest.ocdbt", "2/about/metadata")} == {1}


def test_a_bit_that_is_wrong_in_the_flags_is_damage_not_another_run(folder):
    content = (folder / "2/about/metadata").read_bytes()
    for at in range(0, len(content), 4):
        wrong = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (folder / "2/about/metadata").write_bytes(wrong)
        assert restored(folder) == (1, 1)
        (folder / "2.damaged").rename(folder / "2")


def test_a_step_can_be_saved_again_after_its_checkpoint_was_damaged_twice(folder, capsys):
    for aside in ("2.damaged", "2.damaged+"):
        (folder / "2/about/metadata").unlink()
        assert restored(folder) == (1, 1)
        assert (folder / aside).is_dir()
        with ocp.CheckpointManager(folder) as manager:
            assert manager.latest_step() == 1
            state = jax.tree.map(lambda a: a + 2, STATE)
            assert manager.save(2, args=recovery.contents(state, FLAGS))
    assert restored(folder) == (2, 2)


def test_with_no_whole_checkpoint_a_run_begins_anew(folder, capsys):
    for step in (1, 2):
        shutil.rmtree(folder / f"{step}/state")
    assert recovery.newest_whole(str(folder), STATE, FLAGS) is None
    printed = capsys.readouterr().out
    assert f"{folder} has no intact checkpoint: starting from step 0\n" in printed
    assert sorted(os.listdir(folder)) == ["1.damaged", "2.damaged"]


def test_a_checkpoint_of_other_flags_is_refused_and_stays(folder):
    (folder / "2/about/metadata").unlink()
    with pytest.raises(recovery.RunError, match=r"1 is of a run with --learning-rate 0.5, not --l"):
        recovery.newest_whole(str(folder), STATE, FLAGS | {"learning_rate": 0.1})
    assert (folder / "2").is_dir()


def test_what_another_process_cannot_read_is_not_whole(folder, monkeypatch, capsys):
    """The other one, which is made up here, reads step 1 only."""
    says = iter(["[2, 1]", "ValueError: torn", ""])
    monkeypatch.setattr(recovery, "gather", lambda text: [text, next(says)])
    assert restored(folder) == (1, 1)
    assert "2 is damaged (ValueError: torn); renamed to" in capsys.readouterr().out


def test_another_folder_of_the_same_name_is_refused(folder, monkeypatch):
    monkeypatch.setattr(recovery, "gather", lambda text: [text, "[]"])
    with pytest.raises(recovery.RunError, match=r"0 sees the steps \[2, 1\], process 1 \[\]"):
        recovery.newest_whole(str(folder), STATE, FLAGS)
    assert (folder / "2").is_dir()


def test_gather_gives_back_what_is_said():
    assert recovery.gather("") == [""]
    assert recovery.gather("Größe 1") == ["Größe 1"]
    assert recovery.gather("a" * 10_000) == ["a" * recovery.LENGTH]


def test_flags_that_differ_are_named(monkeypatch):
    flags = {"steps": 10, "learning_rate": 0.5, "checkpoint": "a"}
    recovery.check_same(flags)
    other = json.dumps(flags | {"learning_rate": 0.1})
    monkeypatch.setattr(recovery, "gather", lambda text: [text, text, other])
    message = "--learning-rate 0.5 in process 0, 0.1 in process 2"
    with pytest.raises(recovery.RunError, match=f"found {re.escape(message)}$"):
        recovery.check_same(flags)


def test_a_folder_is_locked_for_as_long_as_a_run_is_at_work(tmp_path):
    folder = str(tmp_path / "new")
    refused = pytest.raises(recovery.RunError, match=f"another run is using {folder}; ")
    for _ in range(2):
        with recovery.lock(folder), refused, recovery.lock(folder):
            pass


def test_a_bucket_has_no_lock():
    with recovery.lock("gs://bucket/folder"), recovery.lock("gs://bucket/folder"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = "cannot write to --checkpoint .*file/folder: Not a directory"
    with (
        pytest.raises(recovery.RunError, match=message),
        recovery.lock(str(tmp_path / "file/folder")),
    ):
        pass


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with recovery.lock(str(tmp_path)):
        pass
