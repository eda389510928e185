"""The example on Fashion-MNIST, compared with both networks and all rules in float64 NumPy."""

import gzip
import hashlib
import os
import re
import runpy
import struct

from flax import nnx
import jax
import numpy as np
import pytest

import fashion_mnist
from pictures import assert_picture
import real_data

REAL = bool(os.environ.get("RMSPROP_JAX_DATA"))
METHODS = ["RMSProp", "RMSProp (falling)", "Adam", "Adagrad", "SGD"]


def idx(array):
    """As the IDX format has an array of bytes, gzipped."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return gzip.compress(head + array.tobytes(), 1)


def made_up():
    """600 pictures to train on, of which 100 are held out, and 50 to test on: one a class, noisy.

    By name, as the files are called in DATA_SETS.
    """
    rng = np.random.default_rng(0)
    classes = rng.integers(128, size=(10, 28, 28), dtype=np.uint8)
    arrays = {}
    for part, n in (("train", 600), ("test", 50)):
        labels = rng.integers(10, size=n, dtype=np.uint8)
        noise = rng.integers(128, size=(n, 28, 28), dtype=np.uint8)
        arrays |= {f"{part}_images": classes[labels] + noise, f"{part}_labels": labels}
    return arrays


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The arrays, which lie in a folder as the files of Fashion-MNIST."""
    arrays = made_up()
    for part, array in arrays.items():
        content = idx(array)
        (tmp_path / part).write_bytes(content)
        name = f"fashion_mnist_{part}"
        data_set = real_data.DataSet(part, "", hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(real_data.DATA_SETS, name, data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    return arrays


def test_the_last_sixth_of_the_training_pictures_is_held_out(files):
    images, labels = files["train_images"], files["train_labels"]
    want = (images[:500], labels[:500], images[500:], labels[500:])
    want += (files["test_images"], files["test_labels"])
    for got, array in zip(fashion_mnist.data(), want, strict=True):
        np.testing.assert_array_equal(got, array)


def test_an_epoch_sees_each_picture_once_but_for_those_that_fill_no_batch():
    batches = fashion_mnist.batches_of(103, 2, 10, seed=4)
    assert batches.shape == (20, 10)
    first, second = batches.reshape(2, 100).tolist()
    for epoch in (first, second):
        assert len(set(epoch)) == 100
        assert set(epoch) <= set(range(103))
    assert first != second
    assert first != fashion_mnist.batches_of(103, 1, 10, seed=5).ravel().tolist()


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(logits, y):
    return -np.log(softmax(logits)[np.arange(len(y)), y]).mean()


def mlp_by_hand(params, x):
    w1, b1, w2, b2 = params
    hidden = np.maximum(x.reshape(len(x), -1) / 255 @ w1 + b1, 0)
    return hidden, hidden @ w2 + b2


def mlp_gradients(params, x, y):
    hidden, logits = mlp_by_hand(params, x)
    error = (softmax(logits) - np.eye(10)[y]) / len(y)
    back = (error @ params[2].T) * (hidden > 0)
    return [x.reshape(len(x), -1).T / 255 @ back, back.sum(0), hidden.T @ error, error.sum(0)]


def rule(name, rate, steps):
    """Steps of one parameter by its gradients, as the papers have them, with Optax's defaults."""
    m, s = 0.0, 0.1 if name == "Adagrad" else 0.0

    def step(g, t):
        nonlocal m, s
        if name == "SGD":
            return rate * g
        if name == "Adagrad":
            s = s + g**2
            return rate * g / np.sqrt(s + 1e-7)
        if name == "Adam":
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            return rate * m / (1 - 0.9**t) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
        s = 0.9 * s + 0.1 * g**2
        falling = 1 - (t - 1) / steps if name == "RMSProp (falling)" else 1
        return rate * falling * g / np.sqrt(s + 1e-8)

    return step


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_network_of_a_population_is_as_one_trained_alone_by_hand(name, files):
    rates = [0.0005, 0.003]
    pictures = fashion_mnist.data()
    x, y, x_held, y_held = (np.asarray(array) for array in pictures[:4])
    got = fashion_mnist.sweep(fashion_mnist.METHODS[name], rates, pictures, 2, 50, 2)
    losses, accuracies = np.zeros((2, 2)), np.zeros((2, 2))
    for seed in range(2):
        for i, rate in enumerate(rates):
            net = fashion_mnist.MLP(nnx.Rngs(seed))
            layers = (net.hidden.kernel, net.hidden.bias, net.out.kernel, net.out.bias)
            params = [np.asarray(layer[...], float) for layer in layers]
            batches = fashion_mnist.batches_of(500, 2, 50, seed)
            steps = [rule(name, rate, len(batches)) for _ in params]
            for t, rows in enumerate(batches, 1):
                grads = mlp_gradients(params, x[rows], y[rows])
                params = [p - step(g, t) for p, g, step in zip(params, grads, steps, strict=True)]
            _, logits = mlp_by_hand(params, x_held)
            losses[i, seed] = cross_entropy(logits, y_held)
            accuracies[i, seed] = np.mean(logits.argmax(axis=1) == y_held)
    np.testing.assert_allclose(got.losses, losses, rtol=1e-4)  # Adam is 1e-5 away
    np.testing.assert_allclose(got.accuracies, accuracies, atol=0.011)  # one of 100


def convolved(x, conv, stride):
    """Padded as "SAME" has it, more at the end where it is uneven."""
    kernel, bias = np.asarray(conv.kernel[...], float), np.asarray(conv.bias[...], float)
    size, n = len(kernel), x.shape[1]
    places = range(0, n, stride)
    padding = (len(places) - 1) * stride + size - n
    before = padding // 2
    x = np.pad(x, ((0, 0), (before, padding - before), (before, padding - before), (0, 0)))
    rows = [
        np.stack([x[:, i : i + size, j : j + size].reshape(len(x), -1) for j in places], axis=1)
        for i in places
    ]
    return np.stack(rows, axis=1) @ kernel.reshape(-1, kernel.shape[-1]) + bias


def cnn_by_hand(net, x):
    x = np.maximum(convolved(np.asarray(x, float)[..., None] / 255, net.conv1, 2), 0)
    x = np.maximum(convolved(x, net.conv2, 1), 0)
    x = x.reshape(len(x), 7, 2, 7, 2, 32).max(axis=(2, 4)).reshape(len(x), -1)
    for layer, last in ((net.hidden, False), (net.out, True)):
        x = x @ np.asarray(layer.kernel[...], float) + np.asarray(layer.bias[...], float)
        x = x if last else np.maximum(x, 0)
    return x


def few(pictures, n=40):
    return fashion_mnist.Pictures(*(array[:n] for array in pictures))


@pytest.mark.slow
def test_losses_and_accuracies_of_a_cnn_are_those_of_the_network(files):
    """Which stays as it is: the learning rate is 0."""
    pictures = few(fashion_mnist.data())
    run = fashion_mnist.train("SGD", 0.0, pictures, 1, 20, seed=3)
    net = fashion_mnist.CNN(nnx.Rngs(3))
    x, y, x_held, y_held, x_test, y_test = map(np.asarray, pictures)
    want = [
        cross_entropy(cnn_by_hand(net, x[rows]), y[rows])
        for rows in fashion_mnist.batches_of(40, 1, 20, 3)
    ]
    np.testing.assert_allclose(run.losses, want, rtol=1e-5)
    held = np.mean(cnn_by_hand(net, x_held).argmax(axis=1) == y_held)
    test = np.mean(cnn_by_hand(net, x_test).argmax(axis=1) == y_test)
    assert held != test
    np.testing.assert_allclose((run.held_accuracy, run.test_accuracy), (held, test), rtol=1e-6)


@pytest.mark.slow
def test_a_cnn_moves_as_its_method_has_it(files):
    """All parameters by a rule in NumPy, of JAX's gradients; each batch has all pictures."""
    pictures = few(fashion_mnist.data())
    rate, steps = 1e-3, 5
    run = fashion_mnist.train("RMSProp (falling)", rate, pictures, steps, 40, seed=0)
    graphdef, params = nnx.split(fashion_mnist.CNN(nnx.Rngs(0)), nnx.Param)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        of_labels = jax.nn.one_hot(pictures.y, 10) * jax.nn.log_softmax(
            nnx.merge(graphdef, params)(pictures.x)
        )
        return -of_labels.sum() / 40

    rules = [rule("RMSProp (falling)", rate, steps) for _ in jax.tree.leaves(params)]
    losses = []
    for t in range(1, steps + 1):
        value, grads = loss(params)
        losses.append(value)
        leaves, structure = jax.tree.flatten(params)
        moves = [
            step(np.asarray(g), t) for step, g in zip(rules, jax.tree.leaves(grads), strict=True)
        ]
        params = structure.unflatten([p - move for p, move in zip(leaves, moves, strict=True)])
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(run.losses, losses, rtol=1e-5)


def test_the_best_rate_is_that_of_the_mean_and_no_diverged_one():
    nan = np.nan
    losses = np.array([[0.5, 0.6], [0.4, 0.4], [0.5, 0.5], [0.1, nan], [nan, nan]])
    accuracies = np.array([[0.79, 0.784], [0.78, 0.81], [0.78, 0.786], [0.97, 0.1], [0.1, 0.1]])
    of = fashion_mnist.Sweep(losses, accuracies)
    assert of.best() == 1
    assert of.close() == [0, 1]  # 0.008 below, where the next one is 0.012


@pytest.mark.parametrize(
    "names", [["RMSProp"], pytest.param(["RMSProp (falling)", "SGD"], marks=pytest.mark.slow)]
)
def test_main_prints_what_it_returns(names, files, tmp_path, monkeypatch, capsys):
    """Of some methods, to save time."""
    assert list(fashion_mnist.METHODS) == METHODS
    methods = {name: fashion_mnist.METHODS[name] for name in names}
    monkeypatch.setattr(fashion_mnist, "METHODS", methods)
    out = tmp_path / "new" / "curves.png"
    flags = ["--epochs", "1", "--batch", "64", "--rates", "1e30", "0.0003", "0.003", "0.03"]
    result = fashion_mnist.main([*flags, "--out", str(out)])
    assert_picture(out)
    assert result.rates == [0.0003, 0.003, 0.03, 1e30]
    assert list(result.sweeps) == list(result.runs) == names
    assert np.isnan(result.sweeps[names[-1]].losses[3]).all()
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"\s{2,}", line) for line in lines]
    assert rows[2] == ["rate", *names]
    for i, rate in enumerate(result.rates):
        cells = [
            f"{np.mean(of.accuracies[i]):.4f} {np.mean(of.losses[i]):.4f}"
            for of in result.sweeps.values()
        ]
        assert rows[3 + i] == [f"{rate:g}", *cells]
    for row, name in zip(rows[9:-2], names, strict=True):
        means, run = result.sweeps[name].accuracies.mean(axis=1), result.runs[name]
        assert run.rate == result.rates[means.argmax()] < 1
        near = [
            rate
            for rate, mean in zip(result.rates, means, strict=True)
            if mean >= means.max() - 0.01
        ]
        assert row == [
            name,
            f"{run.rate:g}",
            f"{means.max():.4f}",
            f"{near[0]:g} to {near[-1]:g}",
            f"{run.held_accuracy:.4f}",
            f"{run.test_accuracy:.4f}",
        ]
        assert len(run.losses) == 500 // 64
    best = max(names, key=lambda name: result.runs[name].test_accuracy)
    assert lines[-1] == (
        f"Best test accuracy {result.runs[best].test_accuracy:.4f} on 50 pictures, by {best}; "
        f"curves in {out}"
    )


@pytest.mark.parametrize(
    "flag",
    [
        ["--epochs", "0"],
        ["--seeds", "0"],
        ["--batch", "0"],
        ["--batch", "501"],
        ["--rates", "0.1", "0"],
        ["--rates", "nan"],
        ["--rates", "inf"],
    ],
)
def test_main_refuses_what_it_cannot_do(flag, files, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    with pytest.raises(SystemExit, match="2"):
        fashion_mnist.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err.splitlines()[-1]
    assert not out.parent.exists()


def test_without_its_data_it_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", [fashion_mnist.__file__])
    file = re.escape(str(tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz"))
    message = f"^fashion_mnist.py: fashion_mnist_train_images: no file {file}"
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(fashion_mnist.__file__, run_name="__main__")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="of the real data")
def test_on_the_real_pictures_a_rate_in_the_middle_is_best_and_a_cnn_goes_far():
    pictures = fashion_mnist.data()
    assert [len(array) for array in pictures] == [50_000] * 2 + [10_000] * 4
    method = fashion_mnist.METHODS["RMSProp"]
    assert fashion_mnist.sweep(method, [1e-5, 1e-3, 1.0], pictures, 1, 128, 1).best() == 1
    assert fashion_mnist.train("RMSProp", 1e-3, pictures, 1, 128).test_accuracy >= 0.84
