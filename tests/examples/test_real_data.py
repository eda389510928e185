"""The loader of the examples' data, against a local server that misbehaves as told."""

import contextlib
import gzip
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import io
import os
import socket
import struct
import tarfile
import threading

import numpy as np
import pytest

import real_data

WHOLE = b"what the data set holds" * 10_000  # several reads long
SHA256 = hashlib.sha256(WHOLE).hexdigest()


class Server(ThreadingHTTPServer):
    """Counts its requests, and answers each as `answer` says."""

    block_on_close = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = "whole"
        self.requests = 0
        self.released = threading.Event()

    def url(self):
        return f"http://127.0.0.1:{self.server_port}/set.bin"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.server.answer == "404":
            self.send_error(404)
            return
        body = WHOLE[::-1] if self.server.answer == "other bytes" else WHOLE
        self.send_response(200)
        if self.server.answer != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.answer in ("cut", "reset", "stalled"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if self.server.answer == "stalled":
            self.server.released.wait(30)
        if self.server.answer == "reset":
            self.wfile.flush()
            # Closed without lingering, a connection is reset instead of ended.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setitem(
            real_data.DATA_SETS, "set", real_data.DataSet("sub/set.bin", server.url(), SHA256)
        )
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing that stands in its place."""
    monkeypatch.delenv("RMSPROP_JAX_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rmsprop_jax"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_downloaded_once(server, cache):
    for _ in range(2):
        assert real_data.path("set") == cache / "sub" / "set.bin"
        assert files(cache) == {"sub/set.bin": WHOLE}
    assert server.requests == 1


def test_a_server_need_not_say_how_long_the_file_is(server, cache):
    server.answer = "no length"
    assert real_data.path("set").read_bytes() == WHOLE
    assert list(files(cache)) == ["sub/set.bin"]


FAILURES = {
    "other bytes": f"has sha256 {hashlib.sha256(WHOLE[::-1]).hexdigest()}, expected {SHA256}",
    "cut": f"interrupted after {len(WHOLE) // 2} of {len(WHOLE)} bytes",
    "reset": "reset by peer",
    "stalled": "timed out",
    "404": "HTTP Error 404",
}


@pytest.mark.parametrize("answer", FAILURES)
def test_a_failed_download_is_one_clear_error_and_leaves_nothing(
    answer, server, cache, monkeypatch
):
    monkeypatch.setattr(real_data, "TIMEOUT", 0.5 if answer == "stalled" else 30)
    server.answer = answer
    with pytest.raises(real_data.DataError, match=FAILURES[answer]) as raised:
        real_data.path("set")
    for part in ("set: ", server.url(), str(cache / "sub" / "set.bin"), SHA256, "RMSPROP_JAX_DATA"):
        assert part in str(raised.value)
    assert files(cache) == {}
    assert server.requests == 1

    server.answer = "whole"
    assert real_data.path("set").read_bytes() == WHOLE


def test_a_refused_connection_is_a_clear_error(cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/set.bin"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data_set = real_data.DataSet("set.bin", url, SHA256)
    monkeypatch.setitem(real_data.DATA_SETS, "set", data_set)
    with pytest.raises(real_data.DataError, match=f"(?s)set: .*{url}.*refused"):
        real_data.path("set")
    assert files(cache) == {}


def test_a_cache_that_cannot_be_made_is_a_clear_error(server, cache):
    cache.write_bytes(b"not a folder")
    with pytest.raises(real_data.DataError, match=f"set: cannot download .* to {cache}"):
        real_data.path("set")
    assert server.requests == 0


def test_a_user_who_interrupts_leaves_nothing(server, cache, monkeypatch):
    class Bar(contextlib.nullcontext):
        def update(self, size):
            raise KeyboardInterrupt

    monkeypatch.setattr(real_data, "tqdm", lambda **kwargs: Bar(Bar()))
    with pytest.raises(KeyboardInterrupt):
        real_data.path("set")
    assert files(cache) == {}


@pytest.mark.parametrize("corrupt", [b"", WHOLE[:1000], WHOLE[::-1]])
def test_a_corrupt_file_in_the_cache_is_named_and_downloaded_anew(corrupt, server, cache, capsys):
    file = real_data.path("set")
    file.write_bytes(corrupt)
    assert real_data.path("set") == file
    assert f"{file} has sha256 {hashlib.sha256(corrupt).hexdigest()}" in capsys.readouterr().err
    assert files(cache) == {"sub/set.bin": WHOLE}
    assert server.requests == 2


def test_a_folder_of_data_takes_the_place_of_the_download(server, cache, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    file = folder / "sub" / "set.bin"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(folder))
    with pytest.raises(real_data.DataError, match=f"set: no file {file}"):
        real_data.path("set")
    file.write_bytes(WHOLE[:-1])
    found = hashlib.sha256(WHOLE[:-1]).hexdigest()
    with pytest.raises(
        real_data.DataError, match=f"set: {file} has sha256 {found}, expected {SHA256}"
    ):
        real_data.path("set")
    file.write_bytes(WHOLE)
    assert real_data.path("set") == file
    assert files(folder) == {"sub/set.bin": WHOLE}
    assert not cache.exists()
    assert server.requests == 0


def test_an_empty_variable_is_unset(server, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("RMSPROP_JAX_DATA", "")
    assert real_data.path("set") == cache / "sub" / "set.bin"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = tmp_path / "home" / ".cache" / "rmsprop_jax" / "sub" / "set.bin"
    assert real_data.path("set") == expected
    assert server.requests == 2


def packed(members):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


A, B = (np.random.default_rng(0).bytes(3000), b"two")
LINES = f"{hashlib.sha256(A).hexdigest()}  a.wav\n{hashlib.sha256(B).hexdigest()}  b.wav\n"
OF_MEMBERS = real_data.DataSet(
    "sub/set.bin", "", hashlib.sha256(LINES.encode()).hexdigest(), r"[a-z]\.wav"
)
SAME = {
    "as they are": packed({"a.wav": A, "b.wav": B}),
    "in another order and folder": packed({"x/y/b.wav": B, "x/y/a.wav": A}),
    "among others": packed({"b.wav": B, "ab.wav": b"", "a.wav.txt": b"", "a.wav": A, "c": b""}),
}
OTHER = {
    "another byte": packed({"a.wav": A, "b.wav": b"too"}),
    "swapped": packed({"a.wav": B, "b.wav": A}),
    "another name": packed({"a.wav": A, "c.wav": B}),
    "one more": packed({"a.wav": A, "b.wav": B, "c.wav": b""}),
    "one less": packed({"a.wav": A}),
    "none": packed({}),
}
NO_ARCHIVE = {
    "cut": SAME["as they are"][:2000],
    "a zeroed byte": SAME["as they are"][:2000] + b"\0" + SAME["as they are"][2001:],
    "no tar within": gzip.compress(A, mtime=0),
    "empty": b"",
    "text": b"Not Found",
}


@pytest.mark.parametrize("archive", SAME.values(), ids=SAME)
def test_members_are_checked_and_not_their_archive(archive, server, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "WHOLE", archive)
    monkeypatch.setitem(
        real_data.DATA_SETS, "set", OF_MEMBERS._replace(url=server.url(), file="set.bin")
    )
    for _ in range(2):
        assert real_data.path("set").read_bytes() == archive
    assert server.requests == 1
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(cache))
    assert real_data.path("set") == cache / "set.bin"


@pytest.mark.parametrize(
    "archive", [*OTHER.values(), *NO_ARCHIVE.values()], ids=[*OTHER, *NO_ARCHIVE]
)
def test_other_members_or_none_are_refused(archive, server, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "WHOLE", archive)
    monkeypatch.setitem(real_data.DATA_SETS, "set", OF_MEMBERS._replace(url=server.url()))
    found = r"none \(not a .*\), " if archive in NO_ARCHIVE.values() else "[0-9a-f]{64}, "
    match = rf"has sha256 {found}expected {OF_MEMBERS.sha256} of its members \[a-z\]"
    with pytest.raises(real_data.DataError, match=f"cannot download .* {match}"):
        real_data.path("set")
    assert files(cache) == {}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "set.bin").write_bytes(archive)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    with pytest.raises(real_data.DataError, match=f"set.bin {match}"):
        real_data.path("set")


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(real_data.DataError, match=r"no data set 'wings'; choose from airfoil"):
        real_data.path("wings")


def test_airfoil_reads_rows_of_tabs_that_end_in_carriage_returns(cache, tmp_path, monkeypatch):
    content = b"800\t0\t0.3048\t71.3\t0.00266337\t126.201\r\n1000\t-1.5\t0.1\t39.6\t1e-3\t125\r\n"
    (tmp_path / "wing.dat").write_bytes(content)
    data_set = real_data.DataSet("wing.dat", "", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(real_data.DATA_SETS, "airfoil", data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    rows = real_data.airfoil()
    expected = [[800, 0, 0.3048, 71.3, 0.00266337, 126.201], [1000, -1.5, 0.1, 39.6, 1e-3, 125]]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.float32(expected))


def in_folder(monkeypatch, folder, name, content):
    """Puts a file of a data set's name in a folder of data."""
    file = folder / real_data.DATA_SETS[name].file
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    data_set = real_data.DATA_SETS[name]._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(real_data.DATA_SETS, name, data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(folder))


def test_fashion_mnist_reads_its_four_files(cache, tmp_path, monkeypatch):
    """Written byte by byte as the format has it: 0, 0, type, rank, sizes, values in C order."""
    expected = []
    for part, count in (("train", 3), ("test", 2)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28).astype(np.uint8)
        content = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28]) + images.tobytes()
        in_folder(
            monkeypatch, tmp_path, f"fashion_mnist_{part}_images", gzip.compress(content, mtime=0)
        )
        labels = np.arange(7, 7 + count, dtype=np.uint8)
        content = bytes([0, 0, 8, 1, 0, 0, 0, count]) + labels.tobytes()
        in_folder(
            monkeypatch, tmp_path, f"fashion_mnist_{part}_labels", gzip.compress(content, mtime=0)
        )
        expected += [images, labels]
    for array, right in zip(real_data.fashion_mnist(), expected, strict=True):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, right)


def test_tiny_shakespeare_is_the_text_as_it_stands(cache, tmp_path, monkeypatch):
    in_folder(monkeypatch, tmp_path, "tiny_shakespeare", b"First Citizen:\nSpeak.\n\n")
    assert real_data.tiny_shakespeare() == "First Citizen:\nSpeak.\n\n"


def test_files_of_data_sets_and_their_homes_are_different():
    for column in zip(*(data_set[:3] for data_set in real_data.DATA_SETS.values()), strict=True):
        assert len(set(column)) == len(real_data.DATA_SETS)
    assert all(data_set.url.startswith("https://") for data_set in real_data.DATA_SETS.values())


if os.environ.get("RMSPROP_JAX_DATA"):

    def test_the_real_airfoil_file_has_1503_measurements():
        rows = real_data.airfoil()
        assert rows.shape == (1503, 6)
        assert np.isfinite(rows).all()
        assert rows[0].tolist() == np.float32([800, 0, 0.3048, 71.3, 0.00266337, 126.201]).tolist()
        # The ranges that its description gives: frequency, angle, chord, velocity.
        assert rows[:, :4].min(axis=0) == pytest.approx([200, 0, 0.0254, 31.7])
        assert rows[:, :4].max(axis=0) == pytest.approx([20000, 22.2, 0.3048, 71.3])

    @pytest.mark.slow
    def test_the_real_fashion_mnist_has_as_many_images_of_each_class():
        data = real_data.fashion_mnist()
        assert data.images.shape == (60_000, 28, 28)
        assert data.test_images.shape == (10_000, 28, 28)
        assert np.bincount(data.labels).tolist() == [6000] * 10
        assert np.bincount(data.test_labels).tolist() == [1000] * 10
        # The mean and deviation of a pixel that are given wherever the set is normalized.
        assert (data.images / 255).mean() == pytest.approx(0.2860, abs=5e-5)
        assert (data.images / 255).std() == pytest.approx(0.3530, abs=5e-5)

    def test_the_real_tiny_shakespeare_has_65_characters():
        text = real_data.tiny_shakespeare()
        assert len(text) == 1_115_394
        assert len(set(text)) == 65
        assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
