"""Public data sets for the examples: downloaded once, verified, and kept.

    python examples/real_data.py    # fetches every file and prints its path

Files are kept in ~/.cache/rmsprop_jax (or under XDG_CACHE_HOME, if that is set). If
RMSPROP_JAX_DATA names a folder, files are read from there instead and nothing is downloaded. Either
way, a file is used only if its sha256 is the one in the table below.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
from pathlib import Path
import re
import sys
import tarfile
from typing import IO, NamedTuple, cast
from urllib.error import HTTPError
from urllib.request import urlopen
import wave
import zlib

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm


class DataSet(NamedTuple):
    """A file: its path within a folder of data, its public URL, and its checksum.

    With `members`, a pattern, the file is a tar.gz of which only the files with matching names are
    used. The sha256 is then that of the lines that `sha256sum` prints for them, sorted by name, so
    it does not depend on the archive that they come in.
    """

    file: str
    url: str
    sha256: str
    members: str = ""


_ZALANDO = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"

DATA_SETS = {
    "airfoil": DataSet(
        "airfoil_self_noise.dat",
        "https://archive.ics.uci.edu/ml/machine-learning-databases/00291/airfoil_self_noise.dat",
        "74c75fd71783f1e6b71f8a622b993dc592897a97cd689c5090a07147a1b097b3",
    ),
    "fashion_mnist_train_images": DataSet(
        "fashion-mnist/train-images-idx3-ubyte.gz",
        f"{_ZALANDO}/train-images-idx3-ubyte.gz",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "fashion_mnist_train_labels": DataSet(
        "fashion-mnist/train-labels-idx1-ubyte.gz",
        f"{_ZALANDO}/train-labels-idx1-ubyte.gz",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "fashion_mnist_test_images": DataSet(
        "fashion-mnist/t10k-images-idx3-ubyte.gz",
        f"{_ZALANDO}/t10k-images-idx3-ubyte.gz",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "fashion_mnist_test_labels": DataSet(
        "fashion-mnist/t10k-labels-idx1-ubyte.gz",
        f"{_ZALANDO}/t10k-labels-idx1-ubyte.gz",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    "tiny_shakespeare": DataSet(
        "tinyshakespeare/input.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "spoken_digits": DataSet(
        "fsdd/fsdd_0-14.tar.gz",
        "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz",
        # The release has 50 recordings of each digit by each speaker; indices 0 to 14 are used:
        # cd recordings; sha256sum *_[0-9].wav *_1[0-4].wav | LC_ALL=C sort -k2 | sha256sum
        "d35bba486dc0c69a10f0b875db20887b4e6fc54a5ae9e14d2fbca576779e1b4a",
        members=r"\d_[a-z]+_(?:\d|1[0-4])\.wav",
    ),
}

TIMEOUT = 30  # seconds without a byte after which a download has failed


class DataError(RuntimeError):
    """A data set is not available; the message says why, and what to do."""


def airfoil() -> NDArray[np.float32]:
    """NASA's airfoil self-noise measurements, 1503 rows of six columns.

    Frequency (Hz), angle of attack (degrees), chord length (m), free-stream velocity (m/s),
    displacement thickness (m); and the target, the sound pressure level (dB).
    """
    return np.loadtxt(path("airfoil"), dtype=np.float32, delimiter="\t")


class FashionMNIST(NamedTuple):
    """Grey images, uint8 from 0 to 255 of shape (n, 28, 28), and their labels, uint8 of (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def fashion_mnist() -> FashionMNIST:
    """Zalando's pictures of clothes: 60,000 to train on and 10,000 to test on, in ten classes.

    Labels 0 to 9 are T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag and ankle
    boot.
    """
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return FashionMNIST(*(_idx(path(f"fashion_mnist_{part}")) for part in parts))


def tiny_shakespeare() -> str:
    """1,115,394 ASCII characters of Shakespeare's plays, 65 of them different."""
    return path("tiny_shakespeare").read_text("ascii")


class SpokenDigits(NamedTuple):
    """Recordings at 8000 samples per second, int16 of various lengths, and their labels, uint8."""

    recordings: list[NDArray[np.int16]]
    labels: NDArray[np.uint8]
    test_recordings: list[NDArray[np.int16]]
    test_labels: NDArray[np.uint8]


def spoken_digits() -> SpokenDigits:
    """Digits spoken in English, 600 recordings to train on and 300 to test on, sorted by digit.

    Each of six speakers has 15 of each digit, named by digit, speaker and index; those of index 0
    to 4 are the test set, as the Free Spoken Digit Dataset defines it.
    """
    recordings: tuple[list[NDArray[np.int16]], list[NDArray[np.int16]]] = [], []
    labels: tuple[list[int], list[int]] = [], []
    data_set = DATA_SETS["spoken_digits"]
    for name, content in sorted(_members(path("spoken_digits"), data_set.members).items()):
        digit, _, index = name.removesuffix(".wav").split("_")
        with wave.open(io.BytesIO(content)) as recording:
            samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
        to_test_on = int(index) < 5
        recordings[to_test_on].append(samples)
        labels[to_test_on].append(int(digit))
    train, test = (np.array(of, np.uint8) for of in labels)
    return SpokenDigits(recordings[0], train, recordings[1], test)


def _idx(file: Path) -> NDArray[np.uint8]:
    """The array of bytes in a gzipped IDX file: after the rank come the sizes, 4 bytes each."""
    content = gzip.decompress(file.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def path(name: str) -> Path:
    """The verified file of a data set, downloaded if needed; raises DataError if there is none."""
    if name not in DATA_SETS:
        raise DataError(f"there is no data set {name!r}; choose from {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    folder = os.environ.get("RMSPROP_JAX_DATA")
    if folder:
        file = Path(folder) / data_set.file
        advice = "put the right file there, or unset RMSPROP_JAX_DATA to download it"
        if not file.is_file():
            raise DataError(f"{name}: no file {file}; {advice}")
        if (found := _sha256(file, data_set.members)) != data_set.sha256:
            raise DataError(f"{name}: {file} {_mismatch(found, data_set)}; {advice}")
        return file

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "rmsprop_jax" / data_set.file
    if file.is_file():
        if (found := _sha256(file, data_set.members)) == data_set.sha256:
            return file
        print(f"{name}: {file} {_mismatch(found, data_set)}; downloading it again", file=sys.stderr)
    _download(name, data_set, file)
    return file


def _download(name: str, data_set: DataSet, file: Path) -> None:
    """Stores the complete, verified file, or nothing."""
    advice = (
        "try again later, or set RMSPROP_JAX_DATA to a folder that contains "
        f"{data_set.file} with sha256 {_expected(data_set)}"
    )
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(data_set.url, timeout=TIMEOUT) as response, part.open("wb") as out:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, desc=name, unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 16):
                    bar.update(out.write(block))
        if (received := part.stat().st_size) < size:
            raise OSError(f"interrupted after {received} of {size} bytes")
        if (found := _sha256(part, data_set.members)) != data_set.sha256:
            raise OSError(f"the download {_mismatch(found, data_set)}")
        part.replace(file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()
        raise DataError(
            f"{name}: cannot download {data_set.url} to {file}: {error}; {advice}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # already moved, or never written
            part.unlink()


def _members(file: Path, pattern: str) -> dict[str, bytes]:
    """The files in a tar.gz with matching names, by name; nothing is unpacked to disk."""
    members = {}
    with tarfile.open(file, "r:gz") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if member.isfile() and re.fullmatch(pattern, name):
                members[name] = cast(IO[bytes], tar.extractfile(member)).read()
    return members


def _sha256(file: Path, members: str) -> str:
    if members:
        try:
            found = sorted(_members(file, members).items())
        except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError):
            return "none (not a complete tar.gz)"
        lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in found)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mismatch(found: str, data_set: DataSet) -> str:
    return f"has sha256 {found}, expected {_expected(data_set)}"


def _expected(data_set: DataSet) -> str:
    return data_set.sha256 + (f" of its members {data_set.members}" if data_set.members else "")


def main() -> None:
    for name in DATA_SETS:
        print(f"{name}: {path(name)}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"real_data.py: {error}") from None
