"""The DQN example, compared with solved equations and loops in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dqn_cartpole as dqn
from pictures import assert_picture
import reference
from rmsprop_jax import recipes


@pytest.fixture
def small(monkeypatch):
    """Sizes that few steps go through."""
    sizes = {"HIDDEN": 5, "MEMORY": 32, "AT_RANDOM": 40, "COPY_EVERY": 3, "EPSILON_FALLS": 40}
    for name, value in {**sizes, "EVALUATE_EVERY": 80, "EPISODES": 3, "LONGEST": 30}.items():
        monkeypatch.setattr(dqn, name, value)


@functools.cache
def _small_agents():
    return jax.jit(functools.partial(dqn.new_agent, recipes.nature_dqn()))


@pytest.fixture
def new_agent(small):
    """Makes an agent of these sizes from a key; compiled once for all tests."""
    return _small_agents()


def leaves(params):
    return {name: np.asarray(value, float) for name, value in params.items()}


def layers(params, state):
    """Of the network, the inputs of each layer, and the values."""
    inputs = [state / [2.4, 2, np.pi / 15, 2]]
    for i in range(2):
        inputs.append(np.maximum(inputs[-1] @ params[f"w{i}"] + params[f"b{i}"], 0))
    return inputs, inputs[-1] @ params["w2"] + params["b2"]


# The task.


def move_by_hand(state, force):
    """The equations of motion of Lagrange, solved for both accelerations."""
    _, dx, angle, dangle = state
    m, half, sin, cos = 0.1, 0.5, np.sin(angle), np.cos(angle)
    inertia = [[1.0 + m, m * half * cos], [m * half * cos, m * (2 * half) ** 2 / 3]]
    ddx, ddangle = np.linalg.solve(
        inertia, [force + m * half * dangle**2 * sin, m * 9.8 * half * sin]
    )
    return state + 0.02 * np.array([dx, ddx, dangle, ddangle])


def test_carts_move_by_the_equations_of_motion():
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (200, 4)) * [2.4, 3, np.pi, 4]  # also with the pole hanging
    right = rng.random(200) < 0.5
    want = [move_by_hand(s, 10 if r else -10) for s, r in zip(states, right, strict=True)]
    # What float32 leaves of numbers up to 4.
    np.testing.assert_allclose(dqn.move(states, right), want, rtol=0, atol=2e-6)


def test_a_trajectory_stays_on_that_in_float64():
    pushes = np.arange(60) % 2 == 0
    state = want = np.array([0.01, -0.02, 0.03, 0.04])
    move = jax.jit(dqn.move)
    for right in pushes:
        state, want = move(state, right), move_by_hand(want, 10 if right else -10)
    # The pole falls by some e^3 / s: it takes an error of 1e-7 a step to some 1e-5 in 1.2 s.
    np.testing.assert_allclose(state, want, rtol=0, atol=2e-5)
    assert dqn.has_failed(state) == (abs(want[0]) > 2.4 or abs(want[2]) > np.radians(12))


def test_an_episode_fails_beyond_its_limits_on_either_side():
    inside = np.array([[2.39, 9, 0, 9], [-2.39, 9, 0, 9], [0, 9, 0.209, 9], [0, 9, -0.209, 9]])
    outside = np.array([[2.41, 0, 0, 0], [-2.41, 0, 0, 0], [0, 0, 0.21, 0], [0, 0, -0.21, 0]])
    assert not dqn.has_failed(inside).any()
    assert dqn.has_failed(outside).all()


def test_starts_are_within_a_twentieth_of_upright():
    starts = np.asarray(dqn.starts(jax.random.key(0), 1000))
    assert starts.shape == (1000, 4)
    assert 0.049 < np.abs(starts).max() <= 0.05
    assert (np.abs(starts.mean(axis=0)) < 5 * 0.05 / 3**0.5 / 1000**0.5).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["push right", "balance"])
def test_a_return_counts_the_steps_of_an_episode(policy):
    """Of push right; and of a straight line that balances, as two ReLUs of opposite sign."""
    shapes = jax.eval_shape(dqn.network, jax.random.key(0))
    params = {name: np.zeros(shape.shape, np.float32) for name, shape in shapes.items()}
    if policy == "push right":
        params["b2"][1] = 1
    else:
        line = np.array([0.3, 0.5, 6, 1]) * [2.4, 2, np.pi / 15, 2]
        params["w0"][:, :2] = np.stack([line, -line], axis=1)
        params["w1"][[0, 1], [0, 1]] = 1
        params["w2"][[0, 1], 1] = [1, -1]
    mean = float(jax.jit(dqn.evaluate)(params, jax.random.key(5)))
    steps = []
    for state in np.asarray(dqn.starts(jax.random.key(5), 100), float):
        count = 0
        while count < 500 and abs(state[0]) <= 2.4 and abs(state[2]) <= np.radians(12):
            gain = layers(leaves(params), state)[1]
            state, count = move_by_hand(state, 10 if gain[1] > gain[0] else -10), count + 1
        steps.append(count)
    if policy == "balance":
        assert set(steps) == {500}
    assert mean == pytest.approx(np.mean(steps), rel=1e-5)


# The agent.


@pytest.mark.slow
def test_memory_holds_the_last_steps_of_every_cart(new_agent):
    agent = new_agent(jax.random.key(0))
    play = jax.jit(dqn.play)
    ended, full = 0, 0
    for count in range(60):
        before = agent
        agent = play(agent, jax.random.key(count), count)
        rows = np.arange(4) + 4 * (count % 8)
        new = jax.tree.map(lambda a, rows=rows: np.asarray(a)[rows], agent.memory)
        np.testing.assert_array_equal(new.state, before.state)
        pushes = np.where(new.action, 10, -10)
        want = [move_by_hand(*pair) for pair in zip(new.state.astype(float), pushes, strict=True)]
        np.testing.assert_allclose(new.next_state, want, rtol=0, atol=2e-6)
        failed = (abs(new.next_state[:, 0]) > 2.4) | (abs(new.next_state[:, 2]) > np.pi / 15)
        np.testing.assert_array_equal(new.failed, failed)
        np.testing.assert_array_equal(new.reward, np.where(failed, -1, 0))
        late = np.asarray(before.time) == 29
        over = failed | late
        np.testing.assert_array_equal(agent.time, np.where(over, 0, before.time + 1))
        np.testing.assert_array_equal(np.asarray(agent.state)[~over], new.next_state[~over])
        assert (np.abs(np.asarray(agent.state)[over]) <= 0.05).all()
        for one, other in zip(agent.memory, before.memory, strict=True):
            others = np.setdiff1d(np.arange(32), rows)
            np.testing.assert_array_equal(one[others], other[others])
        ended, full = ended + failed.sum(), full + (late & ~failed).sum()
    assert ended
    assert full


@pytest.mark.slow
def test_epsilon_falls_in_a_line_after_the_steps_at_random(monkeypatch):
    monkeypatch.setattr(dqn, "CARTS", 4000)
    monkeypatch.setattr(dqn, "MEMORY", 4000)
    agent = jax.jit(functools.partial(dqn.new_agent, recipes.nature_dqn()))(jax.random.key(0))
    play = jax.jit(dqn.play)
    for count, epsilon in [(0, 1), (1, 1), (6, 0.55), (11, 0.1), (20, 0.1)]:
        memory = play(agent, jax.random.key(count), count).memory
        best = dqn.values(agent.params, memory.state).argmax(axis=-1)
        others = float((memory.action != best).mean())
        # Half of what is drawn at random is the other action; five standard errors of 4000.
        assert others == pytest.approx(epsilon / 2, abs=5 * (0.25 / 4000) ** 0.5)


def batch_of(rng, rows):
    states = rng.uniform(-1, 1, (2, rows, 4)).astype(np.float32)
    failed = rng.random(rows) < 0.4
    reward = rng.normal(0, 1, rows).astype(np.float32)
    return dqn.Transitions(states[0], rng.integers(2, size=rows), reward, states[1], failed)


def gradients_by_hand(params, target, batch):
    """Backwards through the network from clipped temporal differences."""
    inputs, values = layers(params, batch.state.astype(float))
    follows = layers(target, batch.next_state.astype(float))[1].max(axis=1)
    rows = np.arange(len(batch.reward))
    difference = values[rows, batch.action] - batch.reward - 0.99 * follows * ~batch.failed
    back = np.zeros_like(values)
    back[rows, batch.action] = np.clip(difference, -1, 1)
    grads = {}
    for i in (2, 1, 0):
        grads[f"w{i}"], grads[f"b{i}"] = inputs[i].T @ back, back.sum(axis=0)
        back = (back @ params[f"w{i}"].T) * (inputs[i] > 0)
    return grads, difference


@pytest.mark.slow
def test_gradients_are_of_clipped_temporal_differences():
    network = jax.jit(dqn.network)
    params, target = (network(jax.random.key(seed)) for seed in (0, 1))
    batch = batch_of(np.random.default_rng(0), 50)
    got = jax.jit(jax.grad(dqn.loss))(params, target, batch)
    want, difference = gradients_by_hand(leaves(params), leaves(target), batch)
    assert (abs(difference) > 1).any()
    assert (abs(difference) < 1).any()
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_updates_are_by_the_rule_of_the_paper_and_the_target_follows(new_agent):
    tx = recipes.nature_dqn(0.01)
    agent = new_agent(jax.random.key(2))
    agent = agent._replace(memory=jax.tree.map(jnp.asarray, batch_of(np.random.default_rng(1), 32)))
    learn = jax.jit(functools.partial(dqn.learn, tx))
    history, start, copies = [], leaves(agent.params), leaves(agent.params)
    for count in range(1, 8):
        before, key = agent, jax.random.key(count)
        agent = learn(agent, key, count)
        # Only rows that are filled are drawn, and all of these can be.
        rows = np.asarray(jax.random.randint(key, (32,), 0, min(4 * count, 32)))
        batch = jax.tree.map(lambda a, rows=rows: np.asarray(a)[rows], before.memory)
        history.append(gradients_by_hand(leaves(before.params), copies, batch)[0])
        if count % 3 == 0:
            copies = leaves(agent.params)
        for name, param in agent.target.items():
            np.testing.assert_array_equal(param, copies[name], err_msg=name)
    for name, param in agent.params.items():
        grads = [grads[name] for grads in history]
        settings = {"learning_rate": 0.01, "decay": 0.95, "eps": 0.01, "centered": True}
        updates = reference.run(grads, **settings)
        # Seven steps of some 0.04, with float32 gradients of cancelling terms.
        want = start[name] + sum(updates)
        np.testing.assert_allclose(param, want.astype(float), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_training_learns_only_after_the_steps_at_random(new_agent, monkeypatch):
    def note(tx, agent, key, count):
        return agent._replace(opt_state=agent.opt_state.at[count].add(1))

    monkeypatch.setattr(dqn, "learn", note)
    monkeypatch.setattr(dqn, "evaluate", lambda params, key: 0.0)
    agent = new_agent(jax.random.key(0))._replace(opt_state=jnp.zeros(21, int))
    train = jax.jit(functools.partial(dqn.train, None))
    agent, _ = train(agent, jax.random.key(1), np.arange(20))
    # Ten calls of play are the 40 steps; then each is followed by an update.
    np.testing.assert_array_equal(agent.opt_state, np.arange(21) > 10)


# The program.


@pytest.mark.parametrize("flag", [["--steps", "0"], ["--steps", "10001"], ["--agents", "0"]])
def test_flags_are_refused(flag, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    with pytest.raises(SystemExit, match="2"):
        dqn.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err
    assert not out.parent.exists()


def test_main_prints_what_it_returns(small, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    result = dqn.main(["--steps", "240", "--agents", "2", "--out", str(out)])
    assert_picture(out)
    assert result.steps == [80, 160, 240]
    assert np.shape(result.returns) == (2, 3)
    lines = capsys.readouterr().out.splitlines()
    for agent, returns in enumerate(result.returns):
        want = [str(agent), "never", f"{max(returns):.1f}", f"{returns[-1]:.1f}"]
        assert lines[3 + agent].split() == want
    final = np.mean([returns[-1] for returns in result.returns])
    end = f"After 240 steps: mean return {final:.1f}, 0 of 2 agents solved, curves in {out}"
    assert lines[-1] == end


def test_solved_is_from_475_on(capsys):
    dqn.print_table(dqn.Result([10_000, 20_000, 30_000], [[474.9, 475, 20], [1, 2, 500]]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "20,000", "50%", "475.0", "20.0"]
    assert lines[2].split() == ["1", "30,000", "100%", "500.0", "500.0"]
