"""The example on runs that go wrong: a run by hand, what it prints, and the page on it."""

from pathlib import Path
import re

import jax
import numpy as np
import pytest

import when_it_goes_wrong as example

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "when-a-run-goes-wrong.md"
NAMES = [case.name for case in example.CASES]


def loss_and_grads(params, x, y):
    """Of a network of one hidden layer of tanh, in NumPy."""
    (w1, b1), (w2, b2) = params
    hidden = np.tanh(x @ w1 + b1)
    error = (hidden @ w2 + b2)[:, 0] - y
    back = 2 * error[:, None] / len(y)
    back1 = back @ w2.T * (1 - hidden**2)
    grads = [(x.T @ back1, back1.sum(0)), (hidden.T @ back, back.sum(0))]
    return np.mean(error**2), grads


def test_a_run_is_the_rule_by_hand():
    """The losses in float64, and of each step what is told of the state before it."""
    given = example.setup(30, seed=3)
    run = example.train(example.rmsprop(3e-3), given, (example.MEDIAN, example.RELATIVE))
    params = jax.tree.map(lambda p: np.asarray(p, float), given.params)
    s, losses, medians, relative = [(0.0, 0.0)] * 2, [], [], []
    for x, y in zip(given.x_batches.astype(float), given.y_batches, strict=True):
        _, grads = loss_and_grads(params, x, y)
        shapes = [np.shape(p) for layer in params for p in layer]
        flat = [np.broadcast_to(v, n) for v, n in zip(sum(s, ()), shapes, strict=True)]
        rates = np.sort(3e-3 / np.sqrt(np.concatenate([v.ravel() for v in flat]) + 1e-8))
        medians.append(rates[-(-len(rates) // 2) - 1])
        s = [
            tuple(0.9 * a + 0.1 * g**2 for a, g in zip(*layer, strict=True))
            for layer in zip(s, grads, strict=True)
        ]
        steps = [
            tuple(3e-3 * g / np.sqrt(a + 1e-8) for a, g in zip(*layer, strict=True))
            for layer in zip(s, grads, strict=True)
        ]
        norms = [np.sqrt(sum(np.sum(p**2) for layer in t for p in layer)) for t in (steps, params)]
        relative.append(norms[0] / norms[1])
        params = [
            tuple(p - u for p, u in zip(*layer, strict=True))
            for layer in zip(params, steps, strict=True)
        ]
        losses.append(loss_and_grads(params, given.x.astype(float), given.y)[0])
    np.testing.assert_allclose(run.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(run.told[example.MEDIAN], medians, rtol=1e-3)
    np.testing.assert_allclose(run.told[example.RELATIVE], relative, rtol=1e-3)


def blocks(text):
    """Of each table the numbers in its rows, and the words around them."""
    found = {}
    for block in text.split("\n\n"):
        title, _, rest = block.strip().partition(", at step ")
        if title.split("\n")[-1] in NAMES:
            step, _, *rows = rest.splitlines()
            rows = [row for row in rows if not row.startswith(("```", "other runs"))]
            cells = [re.split(r"\s{2,}", row) for row in rows]
            numbers = {name: [float(value) for value in values] for name, *values in cells}
            found[title.split("\n")[-1]] = int(step), numbers
    return found


def run_main(steps, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    results = example.main(["--steps", str(steps), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert printed.endswith(f"Curves in {out}\n")
    return results, blocks(printed)


def test_main_prints_what_it_returns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "CASES", [example.CASES[0], example.CASES[-1]])
    results, printed = run_main(40, tmp_path, capsys)
    assert list(results) == list(printed) == [NAMES[0], NAMES[-1]]
    for case in example.CASES:
        step, rows = printed[case.name]
        assert step == int(40 * case.at) + 1
        assert [*rows][-len(case.show) :] == list(case.show)
        for i, run in enumerate(results[case.name][:2]):
            assert len(run.losses) == 40
            for name in case.show:
                want = run.told[name][step - 1]
                np.testing.assert_allclose(rows[name][i], want, rtol=6e-3, err_msg=name)
            end = np.median(run.losses[-2:])
            np.testing.assert_allclose(rows["loss at the end"][i], end, rtol=6e-3)
    bad, good, *_ = results["NaN"]
    assert np.isnan(bad.losses).tolist() == [False] * 8 + [True] * 32
    assert bad.told["not_finite/grads"][7:10].tolist() == [0, 1, 1]
    assert bad.told["not_finite/params"][7:10].tolist() == [0, 0, 1]
    assert np.isfinite(good.losses).all()
    apart = printed[NAMES[-1]][1]["losses apart, at most"]
    assert apart[0] > 0.1
    assert apart[1] < 1e-5


@pytest.mark.parametrize("flag", [["--steps", "19"], ["--seed", "-1"]])
def test_flags_are_refused(flag, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    with pytest.raises(SystemExit, match="2"):
        example.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err
    assert not out.parent.exists()


def test_the_page_tells_of_every_case():
    assert list(blocks(PAGE.read_text())) == NAMES


@pytest.mark.slow
def test_the_page_has_the_numbers_that_are_printed(tmp_path, capsys):
    """To 10% on other machines; to a factor of 2 where a run is chaotic."""
    _, printed = run_main(1000, tmp_path, capsys)
    page = blocks(PAGE.read_text())
    assert printed.keys() == page.keys()
    for case, (step, rows) in page.items():
        assert printed[case][0] == step
        assert printed[case][1].keys() == rows.keys()
        factor = 2 if case.startswith("Centered") else 1.1
        for name, values in rows.items():
            for got, want in zip(printed[case][1][name], values, strict=True):
                if name == "losses apart, at most" and want < 1e-5:
                    assert got < 1e-5
                elif np.isnan(want) or want == 0:
                    np.testing.assert_equal(got, want, err_msg=f"{case}: {name}")
                else:
                    assert 1 / factor < got / want < factor, f"{case}: {name}"
