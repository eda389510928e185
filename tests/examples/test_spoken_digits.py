"""The example on speech, compared with its features, network and loss in float64 NumPy."""

import hashlib
import io
import os
import re
import runpy
import tarfile
import wave

from flax import nnx
import numpy as np
import optax
import pytest

from pictures import assert_picture
import real_data
import spoken_digits

REAL = bool(os.environ.get("RMSPROP_JAX_DATA"))


def wav(samples):
    file = io.BytesIO()
    with wave.open(file, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(8000)
        recording.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def tones(index_below):
    """By name: each digit has its pitch; two speakers say it at their own loudness and length."""
    rng = np.random.default_rng(0)
    recordings = {}
    for digit in range(10):
        for i, speaker in enumerate(("ann", "bob")):
            for index in range(index_below):
                t = np.arange(rng.integers(3000, 9000)) / 8000
                tone = (6000 - 3000 * i) * np.sin(2 * np.pi * (300 + 300 * digit) * t)
                noisy = tone + 100 * rng.standard_normal(len(t))
                recordings[f"{digit}_{speaker}_{index}.wav"] = noisy.astype(np.int16)
    return recordings


def pack(folder, monkeypatch, recordings):
    """Puts an archive in a folder, and makes it that of the spoken digits."""
    archive = folder / "digits.tar.gz"
    lines = ""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, samples in recordings.items():
            info = tarfile.TarInfo(f"free-digits/recordings/{name}")
            content = wav(samples)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if int(name[:-4].split("_")[2]) < 15:
                lines += f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    lines = "".join(sorted(lines.splitlines(keepends=True), key=lambda line: line[66:]))
    data_set = real_data.DATA_SETS["spoken_digits"]
    data_set = data_set._replace(
        file=archive.name, sha256=hashlib.sha256(lines.encode()).hexdigest()
    )
    monkeypatch.setitem(real_data.DATA_SETS, "spoken_digits", data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(folder))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Tones: 200 to train on and 100 to test on."""
    pack(tmp_path, monkeypatch, tones(15))


def test_the_loader_splits_by_index_and_leaves_out_15_and_more(tmp_path, monkeypatch):
    recordings = tones(17)
    pack(tmp_path, monkeypatch, recordings)
    digits = real_data.spoken_digits()
    parts = (
        (digits.recordings, digits.labels, range(5, 15)),
        (digits.test_recordings, digits.test_labels, range(5)),
    )
    for samples, labels, indices in parts:
        names = sorted(
            f"{digit}_{speaker}_{index}.wav"
            for digit in range(10)
            for speaker in ("ann", "bob")
            for index in indices
        )
        assert labels.dtype == np.uint8
        assert labels.tolist() == [int(name[0]) for name in names]
        for one, name in zip(samples, names, strict=True):
            assert one.dtype == np.int16
            np.testing.assert_array_equal(one, recordings[name])


def features_by_hand(samples):
    """Window by window, with the Fourier sum written out."""
    n = np.arange(256)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(129), n) / 256)
    hann = np.sin(np.pi * n / 256) ** 2
    mel_of_top = 2595 * np.log10(1 + 4000 / 700)
    corners = 700 * (10 ** (mel_of_top * np.arange(34) / 33 / 2595) - 1)
    hertz = 8000 / 256 * np.arange(129)
    bands = [np.interp(hertz, corners[i : i + 3], [0, 1, 0]) for i in range(32)]
    rows = []
    for start in range(0, len(samples) - 255, 128):
        power = np.abs(fourier @ (hann * samples[start : start + 256])) ** 2
        rows.append([np.log(power @ band + 1e-6) for band in bands])
    return np.array(rows)


def test_the_features_are_those_of_their_definition():
    rng = np.random.default_rng(1)
    t = np.arange(spoken_digits.LENGTH) / spoken_digits.RATE
    loud = rng.standard_normal(len(t)) * 0.1
    chirp = 0.3 * np.sin(2 * np.pi * (100 + 1500 * t) * t) + 0.01 * rng.standard_normal(len(t))
    half = np.where(t < 0.5, loud, 0)
    samples = np.stack([loud, chirp, half]).astype(np.float32)
    got = np.asarray(spoken_digits.log_mel(samples))
    assert got.shape == (3, 63, 32)
    want = np.stack([features_by_hand(row) for row in samples.astype(float)])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got[2, 32:], np.log(1e-6), rtol=1e-6)  # silence


def test_every_band_hears_some_frequency():
    filters = spoken_digits.mel_filters()
    assert filters.shape == (129, 32)
    assert (filters.max(axis=0) > 0).all()
    assert filters.min() == 0
    assert filters.max() <= 1


def test_recordings_are_cut_or_padded_with_silence():
    short, long = np.arange(1, 4, dtype=np.int16), np.full(9000, -32768, np.int16)
    padded = spoken_digits.pad([short, long])
    assert padded.dtype == np.float32
    assert padded[0].tolist() == [1 / 32768, 2 / 32768, 3 / 32768] + [0] * 8189
    assert padded[1].tolist() == [-1] * 8192


@pytest.mark.slow
def test_units_are_the_deviations_of_what_is_trained_on(data):
    pictures = spoken_digits.data()
    assert pictures.x.shape == (200, 63, 32)
    np.testing.assert_allclose(pictures.x.mean(axis=(0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(pictures.x.std(axis=(0, 1)), 1, atol=1e-3)
    digits = real_data.spoken_digits()
    log_mel = [
        spoken_digits.log_mel(spoken_digits.pad(recordings))
        for recordings in (digits.recordings, digits.test_recordings)
    ]
    train, test = (np.asarray(a, float) for a in log_mel)
    mean, deviation = train.mean(axis=(0, 1)), train.std(axis=(0, 1))
    np.testing.assert_allclose(pictures.x_test, (test - mean) / deviation, atol=1e-3)
    assert pictures.y_test.tolist() == digits.test_labels.tolist()


def logits_by_hand(net, x):
    x = np.asarray(x, float)
    for conv, stride in ((net.conv1, 1), (net.conv2, 2), (net.conv3, 1)):
        kernel, bias = np.asarray(conv.kernel[...], float), np.asarray(conv.bias[...], float)
        x = np.pad(x, ((0, 0), (2, 2), (0, 0)))
        steps = range(0, x.shape[1] - 4, stride)
        taps = np.stack([x[:, t : t + 5].reshape(len(x), -1) for t in steps], axis=1)
        x = np.maximum(taps @ kernel.reshape(-1, 64) + bias, 0)
    x = np.concatenate([x.max(axis=1), x.mean(axis=1)], axis=1)
    return x @ np.asarray(net.out.kernel[...], float) + np.asarray(net.out.bias[...], float)


@pytest.mark.slow
def test_losses_and_accuracies_are_those_of_the_network(data):
    """Which stays as it is: the learning rate is 0."""
    pictures = spoken_digits.data()
    run = spoken_digits.train(optax.sgd(0.0), pictures, epochs=2, batch=50, seed=3)
    net = spoken_digits.Net(nnx.Rngs(3))
    logits, y = logits_by_hand(net, pictures.x), np.asarray(pictures.y)
    loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y])
    correct = logits_by_hand(net, pictures.x_test).argmax(axis=1) == pictures.y_test
    np.testing.assert_allclose(run.losses, [loss] * 2, rtol=1e-5)
    np.testing.assert_allclose(run.accuracies, [np.mean(correct)] * 2, atol=0.011)  # one of 100


def test_main_prints_what_it_returns(data, tmp_path, monkeypatch, capsys):
    rates = []
    rmsprop = spoken_digits.rmsprop
    monkeypatch.setattr(
        spoken_digits,
        "rmsprop",
        lambda rate, *args, **kwargs: rates.append(rate) or rmsprop(rate, *args, **kwargs),
    )
    out = tmp_path / "new" / "curves.png"
    runs = spoken_digits.main(["--epochs", "4", "--seeds", "2", "--out", str(out)])
    assert_picture(out)
    last = [run.accuracies[-1] for run in runs]
    assert capsys.readouterr().out.splitlines() == [
        f"Seed 0, test accuracy {last[0]:.4f}",
        f"Seed 1, test accuracy {last[1]:.4f}",
        f"Mean test accuracy {np.mean(last):.4f} on 100 recordings, curves in {out}",
    ]
    assert [len(column) for run in runs for column in run] == [4] * 4
    assert runs[0].losses != runs[1].losses
    assert min(last) > 0.9  # tones are easily told apart
    # From --learning-rate to zero over the steps: of 200 recordings, 6 batches of 32 fit.
    (rate,) = rates
    assert [float(rate(step)) for step in (0, 12, 24)] == pytest.approx([3e-4, 1.5e-4, 0])


@pytest.mark.parametrize(
    "flag", [["--epochs", "0"], ["--seeds", "0"], ["--batch", "0"], ["--batch", "201"]]
)
def test_main_refuses_what_it_cannot_do(flag, data, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    with pytest.raises(SystemExit, match="2"):
        spoken_digits.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err
    assert not out.parent.exists()


def test_without_its_data_it_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", [spoken_digits.__file__])
    file = re.escape(str(tmp_path / "fsdd" / "fsdd_0-14.tar.gz"))
    with pytest.raises(SystemExit, match=f"^spoken_digits.py: spoken_digits: no file {file}"):
        runpy.run_path(spoken_digits.__file__, run_name="__main__")


@pytest.mark.skipif(not REAL, reason="of the real data")
def test_of_the_real_recordings_each_digit_has_60_and_30():
    digits = real_data.spoken_digits()
    assert np.bincount(digits.labels).tolist() == [60] * 10
    assert np.bincount(digits.test_labels).tolist() == [30] * 10
    lengths = np.array([len(one) for one in digits.recordings + digits.test_recordings])
    assert len(lengths) == 900
    assert (lengths.min(), lengths.max()) == (1148, 10504)
    assert np.mean(lengths < spoken_digits.LENGTH) == pytest.approx(0.99, abs=0.005)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="of the real data")
def test_a_few_epochs_on_the_real_recordings_go_far(tmp_path):
    (run,) = spoken_digits.main(["--epochs", "8", "--seeds", "1", "--out", str(tmp_path / "png")])
    assert run.accuracies[-1] >= 0.85
