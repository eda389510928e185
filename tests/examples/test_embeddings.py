"""The example on word vectors, compared with its loss, gradients and steps in float64 NumPy."""

import collections
import hashlib
import os
import re
import runpy

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

import embeddings
from pictures import assert_picture
import real_data
from rmsprop_jax import rmsprop, rows

REAL = bool(os.environ.get("RMSPROP_JAX_DATA"))
DENSE, ROWS, LAZY = embeddings.METHODS
TINY = ["--steps", "30", "--compared", "6", "--rows", "50", "7", "--batch", "16"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Lines of a few words, put in the place of Shakespeare."""
    words = np.array(["Thou", "art", "my", "king,", "and", "love"])
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(rng.choice(words, 5)) for _ in range(900))
    (tmp_path / "words.txt").write_text(text)
    data_set = real_data.DATA_SETS["tiny_shakespeare"]._replace(
        file="words.txt", sha256=hashlib.sha256(text.encode()).hexdigest()
    )
    monkeypatch.setitem(real_data.DATA_SETS, "tiny_shakespeare", data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    return text


def made_up(rng, n=12, size=8, steps=10):
    """Tables of n rows, and batches that repeat some of these and leave out others."""
    tables = embeddings.Tables(*rng.normal(0, 0.5, (2, n, embeddings.WIDTH)).astype(np.float32))
    others = (steps, size, embeddings.NEGATIVES + 1)
    i = rng.integers(n // 2, size=(steps, size), dtype=np.int32)
    return tables, list(zip(i, rng.integers(n - 2, size=others, dtype=np.int32), strict=True))


def loss_and_grads(words, neighbours, i, j):
    """The sum over a batch, pair by pair, and the gradients of both tables."""
    loss, of_words, of_neighbours = 0.0, np.zeros_like(words), np.zeros_like(neighbours)
    for word, others in zip(i, j, strict=True):
        for k, other in enumerate(others):
            sign = 1 if k == 0 else -1
            probability = 1 / (1 + np.exp(-sign * words[word] @ neighbours[other]))
            loss -= np.log(probability)
            back = sign * (probability - 1)
            of_words[word] += back * neighbours[other]
            of_neighbours[other] += back * words[word]
    return loss, [of_words, of_neighbours]


def by_hand(tables, batches, rates, decay, eps, *, lazy):
    """The tables after all steps, and the loss of a pair in each."""
    tables = [np.asarray(table, float) for table in tables]
    s, losses = [np.zeros_like(table) for table in tables], []
    for (i, j), rate in zip(batches, rates, strict=True):
        loss, grads = loss_and_grads(*tables, i, j)
        losses.append(loss / len(i))
        for k, (touched, g) in enumerate(zip((i, j), grads, strict=True)):
            at = np.unique(touched) if lazy else slice(None)
            s[k][at] = decay * s[k][at] + (1 - decay) * g[at] ** 2
            tables[k][at] -= rate * g[at] / np.sqrt(s[k][at] + eps)
    return tables, losses


def train(method, tx, tables, batches):
    tables = jax.tree.map(jnp.array, tables)  # their own, since they are donated
    return embeddings.train(method, tx, tables, batches, tqdm(disable=True))


def test_each_method_makes_the_steps_of_its_meaning():
    tables, batches = made_up(np.random.default_rng(0))
    rates = 0.05 * np.linspace(1, 0, len(batches), endpoint=False)
    tx = rmsprop(optax.linear_schedule(0.05, 0.0, len(batches)), decay=0.9, eps=1e-6)
    ends = []
    for method in embeddings.METHODS:
        want, losses = by_hand(tables, batches, rates, 0.9, 1e-6, lazy=method == LAZY)
        run = train(method, tx, tables, batches)
        np.testing.assert_allclose(run.losses, losses, rtol=1e-5, err_msg=method)
        # In float32: a step is up to .05 / sqrt(.1), and gradients are sums of some terms.
        np.testing.assert_allclose(run.tables, want, rtol=0, atol=1e-5, err_msg=method)
        ends.append(want)
    assert np.abs(np.subtract(ends[0], ends[2])).max() > 5e-3  # the meanings differ
    assert losses[-1] < losses[0]


def test_in_float64_dense_and_rows_differ_by_its_rounding():
    tables, batches = made_up(np.random.default_rng(1))
    with jax.enable_x64(True):
        wide = embeddings.Tables(*(table.astype(float) for table in tables))
        tx = rmsprop(0.05, decay=0.99, eps=1e-6)
        dense, ours = (train(method, tx, wide, batches) for method in (DENSE, ROWS))
        assert ours.tables.words.dtype == np.float64
        np.testing.assert_allclose(ours.tables, dense.tables, rtol=0, atol=1e-11)


def test_a_step_by_rows_makes_nothing_of_the_size_of_a_table():
    tables, [(i, j)] = made_up(np.random.default_rng(0), n=5000, steps=1)
    tables, tx = jax.tree.map(jnp.asarray, tables), rmsprop(0.1)

    def temporary(step, state):
        jitted = jax.jit(lambda *args: step(tx, *args), donate_argnums=(0, 1))
        compiled = jitted.lower(tables, state, i, j).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    states = embeddings.Tables(*(rows.init(tx, table) for table in tables))
    assert temporary(embeddings.rows_step, states) < tables.words.nbytes / 2
    assert temporary(embeddings.dense_step, tx.init(tables)) >= tables.words.nbytes


@pytest.mark.parametrize("lazy", [False, True])
def test_an_nnx_embed_moves_as_by_the_gradient_of_the_whole_module(lazy):
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)

    def loss(looked_up):
        return jnp.sum(jnp.tanh(looked_up) * target)

    tx = rmsprop(0.1)
    ours, usual = (nnx.Embed(6, 3, rngs=nnx.Rngs(0)) for _ in range(2))
    optimizer = nnx.Optimizer(usual, tx, wrt=nnx.Param)
    state = rows.init(tx, ours.embedding[...], lazy=lazy)
    for _ in range(4):
        i = jnp.asarray(rng.integers(5, size=5))
        optimizer.update(usual, nnx.grad(lambda module, i=i: loss(module(i)))(usual))
        state = embeddings.embed_step(tx, ours, state, i, loss)
    difference = np.abs(ours.embedding[...] - usual.embedding[...]).max()
    assert difference > 1e-3 if lazy else difference < 1e-6


def test_an_embed_of_linen_has_its_table_in_params():
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    embed, tx = linen.Embed(6, 3), rmsprop(0.1, momentum=0.9)
    params = embed.init(jax.random.key(0), jnp.zeros(5, int))["params"]
    table, momenta = params["embedding"], tx.init(params)
    state = rows.init(tx, table)
    for _ in range(4):
        i = jnp.asarray(rng.integers(5, size=5))

        def loss(params, i=i):
            return jnp.sum(jnp.tanh(embed.apply({"params": params}, i)) * target)

        updates, momenta = tx.update(jax.grad(loss)(params), momenta, params)
        params = optax.apply_updates(params, updates)
        table, state = rows.advance(tx, i, table, state)
        row_grads = jax.grad(lambda looked_up: jnp.sum(jnp.tanh(looked_up) * target))(table[i])
        table, state = rows.update(tx, i, row_grads, table, state)
    table, _ = rows.settle(tx, table, state)
    np.testing.assert_allclose(table, params["embedding"], rtol=0, atol=1e-6)


def test_pairs_are_neighbours_in_the_text(text, monkeypatch):
    monkeypatch.setattr(embeddings, "FREQUENT", 1.0)  # nothing is left out
    found = text.lower().replace(",", "").split()
    data = embeddings.data()
    assert data.words == sorted(set(found))
    assert data.counts.tolist() == [found.count(word) for word in data.words]
    want = collections.Counter()
    for here, word in enumerate(found):
        for there in range(max(here - 4, 0), min(here + 5, len(found))):
            want[word, found[there]] += here != there
    got = collections.Counter((data.words[a], data.words[b]) for a, b in data.pairs)
    assert got == want


def test_frequent_words_are_left_out_at_random(text):
    n = 900 * 5
    kept = (len(embeddings.data().pairs) + 20) / 8  # of k words 2 (k - 1 + k - 2 + k - 3 + k - 4)
    want = sum(np.sqrt(1e-3 * n * count) for count in embeddings.data().counts)
    assert kept == pytest.approx(want, abs=5 * np.sqrt(want))


def test_epochs_go_through_all_pairs_and_others_are_drawn_by_frequency():
    counts = np.array([1, 16, 81, 256])
    pairs = np.arange(4).repeat(2).reshape(-1, 2)[[0, 1, 2, 3] * 250]
    pairs[:, 1] = (pairs[:, 1] + 1) % 4
    text = embeddings.Text(["a", "b", "c", "d"], counts, pairs.astype(np.int32))
    at = embeddings.places(text.words, 1000).tolist()
    assert len(set(at)) == 4
    some = list(embeddings.batches(text, 1000, 48, 40, seed=3))
    assert [(i.shape, j.shape) for i, j in some] == [((48,), (48, 6))] * 40
    for epoch in (some[:20], some[20:]):
        i, j = (np.concatenate(parts) for parts in zip(*epoch, strict=True))
        code, neighbours = ([at.index(row) for row in rows] for rows in (i, j[:, 0]))
        np.testing.assert_array_equal(neighbours, (np.array(code) + 1) % 4)
        assert 250 - 40 <= np.bincount(code).min() <= np.bincount(code).max() <= 250
        share = np.array([np.mean(j[:, 1:] == row) for row in at])
        np.testing.assert_allclose(share, np.array([1, 8, 27, 64]) / 100, atol=0.03)
    assert some[0][0].tolist() != some[20][0].tolist()
    for pair, again in zip(some, embeddings.batches(text, 1000, 48, 40, seed=3), strict=True):
        np.testing.assert_array_equal(pair[0], again[0])
        np.testing.assert_array_equal(pair[1], again[1])


def test_the_nearest_have_the_largest_cosines():
    words, counts = ["a", "b", "c", "d", "e"], np.array([1, 99, 99, 5, 99])
    text = embeddings.Text(words, counts, np.zeros((0, 2), np.int32))
    vectors = np.float32([[2, 0], [1, 1], [-9, 0], [3, 0], [9, 1]])
    assert embeddings.nearest(text, vectors, "a") == ["e", "b", "c"]
    assert embeddings.nearest(text, vectors, "b", count=1) == ["e"]


def test_main_prints_what_it_returns(text, tmp_path, capsys):
    out = tmp_path / "new" / "times.png"
    result = embeddings.main([*TINY, "--out", str(out)])
    assert_picture(out)
    blocks = [block.split("\n") for block in capsys.readouterr().out.strip().split("\n\n")]
    times, losses, apart, near, [drawn] = blocks
    names = [DENSE, ROWS, LAZY]

    assert result.sizes == [7, 50]
    assert list(result.ms) == list(result.losses) == names
    assert times[1].split() == ["7", "50"]
    for name, line in zip(names, times[2:], strict=True):
        assert line.startswith(name)
        assert line[10:].split() == [f"{ms:.2f}" for ms in result.ms[name]]
        assert min(result.ms[name]) > 0

    assert losses[1].split() == ["1", "2", "3", "4", "6", "last"]
    for name, line in zip(names, losses[2:], strict=True):
        want = [f"{result.losses[name][step - 1]:.6f}" for step in (1, 2, 3, 4, 6)]
        want += [f"{result.last[name]:.4f}"] if name != DENSE else []
        assert line[10:].split() == want
    np.testing.assert_allclose(result.losses[ROWS], result.losses[DENSE], rtol=1e-6)
    assert result.losses[DENSE][0] == pytest.approx(6 * np.log(2), rel=1e-4)  # nothing known
    assert result.last[ROWS] < result.losses[DENSE][0]

    sentence = " ".join(apart)
    assert f"6 steps the tables of dense and rows differ by at most {result.apart:.1e};" in sentence
    assert f"element is {result.largest:.2f}." in sentence
    assert 0 <= result.apart < 1e-4 < result.largest
    assert list(result.nearest) == ["king", "thou", "love"]
    for line, (word, others) in zip(near[1:], result.nearest.items(), strict=True):
        assert line.split() == [word, *others]
        assert sorted([word, *others]) == ["and", "art", "king", "love", "my", "thou"]
    assert drawn == f"Times in {out}"


@pytest.mark.parametrize(
    "flag",
    [
        ["--steps", "1"],
        ["--compared", "1"],
        ["--rows", "0", "5"],
        ["--rows", "100", "20000000"],
        ["--batch", "0"],
        ["--batch", "30000"],
        ["--seed", "-1"],
    ],
)
def test_main_refuses_what_it_cannot_do(flag, text, tmp_path, capsys):
    out = tmp_path / "new" / "times.png"
    with pytest.raises(SystemExit, match="2"):
        embeddings.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err.partition("error: ")[2]
    assert not out.parent.exists()


def test_without_its_data_it_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", [embeddings.__file__])
    file = re.escape(str(tmp_path / "tinyshakespeare" / "input.txt"))
    with pytest.raises(SystemExit, match=f"^embeddings.py: tiny_shakespeare: no file {file}"):
        runpy.run_path(embeddings.__file__, run_name="__main__")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="of the real data")
def test_on_shakespeare_rows_save_time_and_find_neighbours(tmp_path):
    flags = ["--steps", "6000", "--compared", "20", "--rows", str(2**17)]
    result = embeddings.main([*flags, "--out", str(tmp_path / "png")])
    np.testing.assert_allclose(result.losses[ROWS], result.losses[DENSE], rtol=1e-5)
    assert result.apart < 1e-4
    assert result.ms[DENSE][0] > 5 * result.ms[ROWS][0]  # on two cores some 50 times
    assert max(result.last.values()) < 2.9  # at first 6 log 2 = 4.16
    assert {"art", "hast", "dost"} <= set(result.nearest["thou"])
