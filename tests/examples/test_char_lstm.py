"""The example on text, compared with its network, loss and text in float64 NumPy."""

import hashlib
import os
import re
import runpy

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import char_lstm
from pictures import assert_picture
import real_data

REAL = bool(os.environ.get("RMSPROP_JAX_DATA"))
TINY = ["--steps", "100", "--hidden", "8", "--batch", "4", "--window", "8"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Lines of a few words, put in the place of Shakespeare."""
    words = np.array(["thou", "art", "my", "lord,", "and", "speak"])
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(rng.choice(words, 5)) for _ in range(900))
    (tmp_path / "words.txt").write_text(text)
    data_set = real_data.DATA_SETS["tiny_shakespeare"]._replace(
        file="words.txt", sha256=hashlib.sha256(text.encode()).hexdigest()
    )
    monkeypatch.setitem(real_data.DATA_SETS, "tiny_shakespeare", data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    return text


def arrays(net):
    """The parameters in float64, by name."""
    cell = net.lstm.cell
    params = {
        "embedding": net.embed.embedding,
        "input": cell.dense_i.kernel,
        "recurrent": cell.dense_h.kernel,
        "bias": cell.dense_h.bias,
        "out": net.out.kernel,
        "out_bias": net.out.bias,
    }
    return {name: np.asarray(param[...], float) for name, param in params.items()}


def lstm(p, carry, x):
    """Logits (streams, length, characters), and the carry, character by character."""
    c, h = (np.asarray(a, float) for a in carry)
    logits = []
    for codes in np.asarray(x).T:
        gates = p["embedding"][codes] @ p["input"] + h @ p["recurrent"] + p["bias"]
        i, f, g, o = np.split(gates, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        logits.append(h @ p["out"] + p["out_bias"])
    return np.stack(logits, axis=1), (c, h)


def surprise(p, carry, x, y):
    """-log of the probability of each character, and the carry."""
    logits, carry = lstm(p, carry, x)
    chosen = np.take_along_axis(logits, np.asarray(y)[..., None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - chosen, carry


def nothing(streams, hidden):
    return np.zeros((streams, hidden)), np.zeros((streams, hidden))


def random_windows(rng, count, streams=3, length=5, characters=7):
    return char_lstm.windows(
        rng.integers(characters, size=count * streams * length + 1, dtype=np.int32),
        streams,
        length,
    )


def first_steps(net, rates, text):
    """Of SGD: the parameters after, the losses and the lengths of the steps."""
    sgd = char_lstm.METHODS["sgd"]
    graph, params = nnx.split(net)
    state = char_lstm.clipped(sgd.make(0.0)).init(params)
    start = params, state, net.no_memory(text.x.shape[1])
    end, (losses, lengths) = char_lstm.train_windows(graph, sgd, start, jnp.array(rates), text)
    return arrays(nnx.merge(graph, end[0])), losses, lengths


@pytest.mark.slow
def test_the_network_and_its_loss_are_those_of_their_definition():
    rng = np.random.default_rng(0)
    net = char_lstm.Net(7, 6, nnx.Rngs(1))
    net.lstm.cell.dense_h.bias[...] = jnp.asarray(rng.standard_normal(24), jnp.float32)
    x, y = rng.integers(7, size=(2, 3, 9), dtype=np.int32)
    carry = tuple(rng.standard_normal((2, 3, 6)).astype(np.float32))
    loss, after = nnx.jit(char_lstm.cross_entropy)(net, carry, char_lstm.Windows(x, y))
    want, want_after = surprise(arrays(net), carry, x, y)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(after, want_after, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_carry_goes_on_from_window_to_window():
    """At a learning rate of 0, windows have the losses of the whole streams."""
    text = random_windows(np.random.default_rng(0), count=4)
    net = char_lstm.Net(7, 6, nnx.Rngs(1))
    _, losses, lengths = first_steps(net, [0.0] * 4, text)
    streams = [np.concatenate(list(codes), axis=1) for codes in text]
    each, _ = surprise(arrays(net), nothing(3, 6), *streams)
    want = each.reshape(3, 4, 5).mean(axis=(0, 2))
    np.testing.assert_allclose(losses, want, rtol=1e-6)
    np.testing.assert_array_equal(lengths, 0)
    forgetful = [
        surprise(arrays(net), nothing(3, 6), x, y)[0].mean() for x, y in zip(*text, strict=True)
    ]
    assert np.abs(forgetful - want)[1:].min() > 1e-4  # it could have been seen


@pytest.mark.slow
def test_the_gradient_ends_at_the_beginning_of_a_window():
    """The first step has length 0. The second is compared with differences of the loss."""
    rng = np.random.default_rng(0)
    text = random_windows(rng, count=2, length=2)
    net = char_lstm.Net(7, 6, nnx.Rngs(1))
    net.lstm.cell.dense_i.kernel[...] *= 5  # much to remember
    before = arrays(net)
    after, _, lengths = first_steps(net, [0.0, 0.5], text)
    (x0, x1), (y0, y1) = text
    step = {name: after[name] - before[name] for name in before}
    length = np.sqrt(sum(np.sum(moved**2) for moved in step.values()))
    np.testing.assert_allclose(lengths, [0, length], rtol=1e-4)
    assert length < 0.5 * char_lstm.CLIP  # not clipped

    def slope(of, name, direction):
        near = [before | {name: before[name] + h * direction} for h in (1e-5, -1e-5)]
        return (of(near[0]) - of(near[1])) / 2e-5

    _, carry = surprise(before, nothing(3, 6), x0, y0)

    def truncated(p):
        return surprise(p, carry, x1, y1)[0].mean()

    def whole(p):
        return surprise(p, surprise(p, nothing(3, 6), x0, y0)[1], x1, y1)[0].mean()

    for name in before:
        direction = rng.standard_normal(before[name].shape)
        got = np.sum(step[name] * direction) / -0.5
        assert got == pytest.approx(slope(truncated, name, direction), rel=1e-4, abs=1e-5)
        if name in ("input", "recurrent", "embedding"):
            assert abs(got - slope(whole, name, direction)) > 1e-3


def test_gradients_are_clipped_to_the_same_norm():
    grads = {"a": np.float32([3, 0]), "b": np.float32([4])}
    tx = char_lstm.clipped(optax.sgd(2.0))
    updates = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])(grads)
    np.testing.assert_allclose(updates["a"], [-2 * 3 / 5 * char_lstm.CLIP, 0])
    np.testing.assert_allclose(updates["b"], [-2 * 4 / 5 * char_lstm.CLIP])


def test_training_goes_through_the_text_and_begins_again(monkeypatch):
    monkeypatch.setattr(char_lstm, "EVERY", 2)
    text = random_windows(np.random.default_rng(0), count=3)
    seen = []

    def record(graph, method, training, rates, some):
        seen.append((rates.tolist(), some))
        return training, (None, np.array([1.0, 3.0]))

    monkeypatch.setattr(char_lstm, "train_windows", record)
    net = char_lstm.Net(7, 6, nnx.Rngs(1))
    points = list(char_lstm.train(net, char_lstm.METHODS["adam"], np.arange(4.0), text))
    assert [length for _, length in points] == [2, 2]
    assert [rates for rates, _ in seen] == [[0, 1], [2, 3]]
    for codes, *parts in zip(text, *(some for _, some in seen), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), codes[[0, 1, 2, 0]])


def test_windows_cover_the_text_in_order():
    codes = np.arange(100, 153, dtype=np.int32)
    x, y = char_lstm.windows(codes, streams=3, length=4)
    assert x.shape == (4, 3, 4)  # 17 characters a stream, of which 16 fill windows
    assert np.concatenate(list(x), axis=1).ravel().tolist() == list(range(100, 148))
    np.testing.assert_array_equal(y, x + 1)
    assert char_lstm.windows(codes[:49], 3, 4).x.shape == (4, 3, 4)
    assert char_lstm.windows(codes[:48], 3, 4).x.shape == (3, 3, 4)  # the last has no follower


def test_the_text_is_cut_into_what_is_trained_on_chosen_by_and_judged_by(text):
    data = char_lstm.data()
    assert data.characters == "".join(sorted(set(text)))
    streams, n = char_lstm.HELD_OUT_STREAMS, len(text)
    decoded = ["".join(data.characters[code] for code in data.train)]
    for x, y in (data.validation, data.test):
        assert x.shape[:2] == (1, streams)
        decoded.append("".join(data.characters[code] for code in x.ravel()))
        np.testing.assert_array_equal(x.ravel()[1:], y.ravel()[:-1])
    for part, start, end in zip(decoded, (0, 0.9, 0.95), (0.9, 0.95, 1), strict=True):
        assert text[int(start * n) :].startswith(part)
        assert (end - start) * n - streams - 2 <= len(part) <= (end - start) * n + 1


def perplexity_by_hand(net, window):
    (x,), (y,) = window
    hidden = net.out.in_features
    return np.exp(surprise(arrays(net), nothing(len(x), hidden), x, y)[0].mean())


@pytest.mark.slow
def test_perplexity_is_exp_of_the_mean_cross_entropy(text):
    net = char_lstm.Net(20, 6, nnx.Rngs(1))
    net.out.kernel[...] *= 10  # far from 20
    data = char_lstm.data()
    for window in (data.validation, data.test):
        want = perplexity_by_hand(net, window)
        np.testing.assert_allclose(char_lstm.perplexity(net, window), want, rtol=1e-5)
    net.out.kernel[...] *= 0
    np.testing.assert_allclose(char_lstm.perplexity(net, data.test), 20, rtol=1e-5)


def test_the_choice_passes_over_runs_that_diverged():
    assert char_lstm.lowest([np.nan, 3.0, np.inf, 2.0, np.nan]) == 3
    assert char_lstm.lowest([np.inf, 7.0, np.nan]) == 1
    assert char_lstm.lowest([np.nan, np.nan]) in (0, 1)


@pytest.mark.slow
def test_text_at_a_low_temperature_is_the_likeliest():
    net = char_lstm.Net(7, 6, nnx.Rngs(1))
    net.out.kernel[...] *= 10
    net.lstm.cell.dense_i.kernel[...] *= 5
    written = char_lstm.write(net, 2, 30, 1e-4, jax.random.key(0))
    code, carry, want = 2, nothing(1, 6), []
    for _ in range(30):
        logits, carry = lstm(arrays(net), carry, [[code]])
        code = int(logits.argmax())
        want.append(code)
    assert written.tolist() == want
    assert len(set(want)) > 1


@pytest.mark.slow
def test_text_has_the_probabilities_of_its_temperature_and_is_that_of_its_key():
    net = char_lstm.Net(3, 6, nnx.Rngs(1))
    net.out.kernel[...] *= 0
    net.out.bias[...] = jnp.array([0.0, 1.0, 3.0])
    one, again, other = (
        np.asarray(char_lstm.write(net, 0, 4000, 2.0, jax.random.key(seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    odds = np.exp([0, 0.5, 1.5])
    frequencies = np.bincount(one, minlength=3) / 4000
    np.testing.assert_allclose(frequencies, odds / odds.sum(), atol=0.03)  # 4 deviations


@pytest.mark.parametrize(
    "names", [["rmsprop"], pytest.param(list(char_lstm.METHODS), marks=pytest.mark.slow)]
)
def test_main_prints_what_it_returns(names, text, tmp_path, monkeypatch, capsys):
    methods = {name: char_lstm.METHODS[name] for name in names}
    monkeypatch.setattr(char_lstm, "METHODS", methods)
    out = tmp_path / "new" / "curves.png"
    runs, written = char_lstm.main([*TINY, "--out", str(out)])
    assert_picture(out)
    printed = capsys.readouterr().out
    tables, _, end = printed.partition("\n\nBy rmsprop's first new network, at temperature 0.7:")
    assert end == f"\n\n{written}\n\nCurves in {out}\n"
    assert len(written) == char_lstm.WRITTEN
    assert set(written) <= set(text)
    choice, chosen = ([line.split() for line in t.split("\n")] for t in tables.split("\n\n"))
    assert "after 100 steps," in " ".join(choice[0])
    assert list(runs) == names
    for (name, run), of_rates, of_new in zip(runs.items(), choice[1:], chosen[2:], strict=True):
        rates = char_lstm.METHODS[name].rates
        pairs = " ".join(of_rates[1:]).replace(":", " ").split()
        assert [of_rates[0], of_new[0]] == [name, name]
        assert pairs[::2] == [f"{rate:g}" for rate in rates]
        assert pairs[1::2] == [f"{value:.4g}" for value in run.choice]
        assert run.rate == rates[np.nanargmin(run.choice)]
        assert run.curves.shape == run.lengths.shape == (2, 2)
        means = [*run.lengths.mean(axis=0), *run.curves.mean(axis=0)]
        assert of_new[1:6] == [f"{run.rate:g}", *(f"{value:.3f}" for value in means)]
        assert of_new[6:] == ", ".join(f"{value:.3f}" for value in run.test).split()
        assert len(set(run.test)) == 2

    # The second network of a method, made and judged once more; and its text, of the first.
    data, run = char_lstm.data(), runs["rmsprop"]
    streams = char_lstm.windows(data.train, 4, 8)
    rates = np.full(100, run.rate, np.float32)
    for i in range(2):
        net = char_lstm.Net(len(data.characters), 8, nnx.Rngs(i + 1))
        points = list(char_lstm.train(net, char_lstm.METHODS["rmsprop"], rates, streams))
        curve = [perplexity_by_hand(net, data.validation) for net, _ in points]
        np.testing.assert_allclose(run.curves[i], curve, rtol=1e-4)
        np.testing.assert_allclose(run.lengths[i], [length for _, length in points], rtol=1e-4)
        net = points[-1][0]
        np.testing.assert_allclose(run.test[i], perplexity_by_hand(net, data.test), rtol=1e-4)
        if i == 0:
            start = data.characters.index("\n")
            codes = char_lstm.write(net, start, char_lstm.WRITTEN, 0.7, jax.random.key(0))
            assert "".join(data.characters[code] for code in codes) == written
    assert max(run.test) < 0.8 * unigram_perplexity(data)


def unigram_perplexity(data):
    """On the test text, from the frequencies in what is trained on."""
    frequencies = np.bincount(data.train) / len(data.train)
    return np.exp(-np.mean(np.log(frequencies[data.test.y])))


@pytest.mark.parametrize("cosine", [False, True])
def test_learning_rates_are_constant_or_fall_along_a_cosine(cosine, text, tmp_path, monkeypatch):
    seen = []

    def record(net, method, rates, streams):
        seen.append(rates)
        return [(net, 0.0)]

    monkeypatch.setattr(char_lstm, "train", record)
    method = char_lstm.Method(optax.sgd, (1.0, 0.1))
    monkeypatch.setattr(char_lstm, "METHODS", {"rmsprop": method})
    flags = [*TINY, "--seeds", "1", "--out", str(tmp_path / "png")]
    char_lstm.main(flags + ["--cosine"] * cosine)
    assert [rates.shape for rates in seen] == [(100,)] * 3
    assert [rates[0] for rates in seen] == pytest.approx([1, 0.1, 1])
    for rates in seen:
        assert rates[50] / rates[0] == pytest.approx(0.5 if cosine else 1)
        assert rates[-1] / rates[0] == pytest.approx(0.00025 if cosine else 1, abs=1e-5)


@pytest.mark.parametrize("values", [[np.nan] * 5, [2.0, 3.0, np.inf, np.nan, 1e30]])
def test_runs_that_diverged_can_be_drawn_and_printed(values, tmp_path, capsys):
    curves = np.array([values])
    run = char_lstm.Run(values, 0.1, curves, curves, [values[-1]])
    runs = dict.fromkeys(char_lstm.METHODS, run)
    char_lstm.draw(runs, tmp_path / "png")
    char_lstm.print_tables(runs, 100)
    assert_picture(tmp_path / "png")
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    [
        ["--steps", "0"],
        ["--steps", "-50"],
        ["--steps", "75"],
        ["--batch", "0"],
        ["--window", "0"],
        ["--hidden", "0"],
        ["--seeds", "0"],
        ["--seed", "-1"],
        ["--batch", "30000", "--window", "1"],
        ["--temperature", "0"],
        ["--temperature", "inf"],
        ["--temperature", "nan"],
    ],
)
def test_main_refuses_what_it_cannot_do(flag, text, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    with pytest.raises(SystemExit, match="2"):
        char_lstm.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err.partition("error: ")[2]
    assert not out.parent.exists()


def test_without_its_data_it_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", [char_lstm.__file__])
    file = re.escape(str(tmp_path / "tinyshakespeare" / "input.txt"))
    with pytest.raises(SystemExit, match=f"^char_lstm.py: tiny_shakespeare: no file {file}"):
        runpy.run_path(char_lstm.__file__, run_name="__main__")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="of the real data")
def test_a_few_steps_on_shakespeare_beat_the_frequencies_of_characters():
    data = char_lstm.data()
    assert len(data.characters) == 65
    assert unigram_perplexity(data) == pytest.approx(28.8, abs=0.1)
    net = char_lstm.Net(65, 64, nnx.Rngs(0))
    rates = np.full(150, 0.01, np.float32)
    streams = char_lstm.windows(data.train, 32, 32)
    *_, (net, _) = char_lstm.train(net, char_lstm.METHODS["rmsprop"], rates, streams)
    assert float(char_lstm.perplexity(net, data.test)) < 12
