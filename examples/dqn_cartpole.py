"""DQN learns to balance a pole, with the RMSProp of the Nature paper: centered, eps 0.01.

    python examples/dqn_cartpole.py                    # 4 agents, 300,000 steps each
    python examples/dqn_cartpole.py --steps 50000      # a short run

A cart is pushed left or right, 50 times a second, so that the pole on it stays up. An episode ends
when the pole leans by more than 12 degrees, when the cart is more than 2.4 m away, or after 500
steps; its return is the number of its steps. Task and agent are JAX functions, and one compiled
program trains all agents, which differ in their seeds.

The optimizer is recipes.nature_dqn, made for a loss that is a sum over 32 transitions, with every
temporal difference clipped to [-1, 1]. Its learning rate, the discount, four steps per update and
the final epsilon of 0.1 are also the paper's. Because this task is small, the network has two
hidden layers, the replay memory is smaller, the target is copied more often, and epsilon falls
sooner. The agent learns from the failure signal of Barto, Sutton and Anderson: -1 on failure and 0
otherwise. With a reward of 1 per step, values would reach 100, and a failure, a temporal difference
far beyond 1, would hardly count once it is clipped.

Every 10,000 steps each agent plays 100 episodes, always taking the action that it values most.
Prints, for each agent, the step after which its mean return first reached 475, which counts as
solved; the share of later evaluations, including that one, in which it was solved; its best return
(the highest of many, so flattered by chance); and its final return. Draws all returns. The settings
were chosen on seed 0; the default is another seed.

Sources: Barto, Sutton and Anderson, "Neuronlike adaptive elements that can solve difficult learning
control problems", IEEE Transactions on Systems, Man, and Cybernetics 13, 1983, for the cart and the
pole, here without friction; CartPole-v1 of Gym for where episodes start and end; Mnih et al.,
"Human-level control through deep reinforcement learning", Nature 518, 2015.
"""

import argparse
from collections.abc import Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from drawing import label_ends, picture
from rmsprop_jax import recipes

Params = dict[str, jax.Array]

# The task, in m, kg, s and radians.
GRAVITY = 9.8
CART_MASS = 1.0
POLE_MASS = 0.1
HALF_LENGTH = 0.5
FORCE = 10.0
INTERVAL = 0.02
FARTHEST = 2.4
STEEPEST = 12 * np.pi / 180
LONGEST = 500  # steps
SOLVED = 475  # mean return

# The agent.
HIDDEN = 64
SCALE = np.array([FARTHEST, 2, STEEPEST, 2], np.float32)  # the inputs are divided by it
CARTS = 4  # per agent; each makes a step before an update
BATCH = 32
DISCOUNT = 0.99
MEMORY = 40_000  # transitions
AT_RANDOM = 4_000  # steps before the first update
COPY_EVERY = 250  # updates between copies to the target network
LAST_EPSILON = 0.1
EPSILON_FALLS = 40_000  # steps
EVALUATE_EVERY = 10_000  # steps
EPISODES = 100  # per evaluation


def move(state: jax.Array, right: jax.Array) -> jax.Array:
    """An Euler step; the last axis holds position, velocity, angle and angular velocity."""
    _, dx, angle, dangle = jnp.moveaxis(state, -1, 0)
    force = jnp.where(right, FORCE, -FORCE)
    mass = CART_MASS + POLE_MASS
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force + POLE_MASS * HALF_LENGTH * dangle**2 * sin) / mass
    ddangle = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cos**2 / mass))
    ddx = push - POLE_MASS * HALF_LENGTH * ddangle * cos / mass
    return state + INTERVAL * jnp.stack([dx, ddx, dangle, ddangle], axis=-1)


def has_failed(state: jax.Array) -> jax.Array:
    return (jnp.abs(state[..., 0]) > FARTHEST) | (jnp.abs(state[..., 2]) > STEEPEST)


def starts(key: jax.Array, carts: int) -> jax.Array:
    return jax.random.uniform(key, (carts, 4), minval=-0.05, maxval=0.05)


def network(key: jax.Array) -> Params:
    """Parameters of a network from a state to the values of left and right."""
    keys, sizes = jax.random.split(key, 3), (4, HIDDEN, HIDDEN, 2)
    params = {}
    for i in range(3):
        shape = sizes[i : i + 2]
        params[f"w{i}"] = jax.random.normal(keys[i], shape) / shape[0] ** 0.5
        params[f"b{i}"] = jnp.zeros(shape[1])
    return params


def values(params: Params, state: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(state / SCALE @ params["w0"] + params["b0"])
    hidden = jax.nn.relu(hidden @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


class Transitions(NamedTuple):
    """Steps of carts; every array has one row per step."""

    state: jax.Array
    action: jax.Array
    reward: jax.Array
    next_state: jax.Array
    failed: jax.Array  # no value follows; false if the episode ended by its length


class Agent(NamedTuple):
    """Everything that changes in training."""

    params: Params
    target: Params
    opt_state: Any
    memory: Transitions
    state: jax.Array  # of each cart
    time: jax.Array  # steps so far in its episode


def new_agent(tx: optax.GradientTransformation, key: jax.Array) -> Agent:
    of_network, of_carts = jax.random.split(key)
    params = network(of_network)
    states, flags = jnp.zeros((MEMORY, 4)), jnp.zeros(MEMORY, bool)
    memory = Transitions(states, flags.astype(int), jnp.zeros(MEMORY), states, flags)
    time = jnp.zeros(CARTS, int)
    return Agent(params, params, tx.init(params), memory, starts(of_carts, CARTS), time)


def play(agent: Agent, key: jax.Array, count: jax.Array) -> Agent:
    """Every cart makes a step, replacing the oldest in memory; `count` is that of earlier calls."""
    chance, choice, start = jax.random.split(key, 3)
    done = (count * CARTS - AT_RANDOM) / EPSILON_FALLS
    epsilon = 1 - (1 - LAST_EPSILON) * jnp.clip(done, 0, 1)
    best = values(agent.params, agent.state).argmax(axis=-1)
    at_random = jax.random.uniform(chance, (CARTS,)) < epsilon
    action = jnp.where(at_random, jax.random.randint(choice, (CARTS,), 0, 2), best)
    state = move(agent.state, action)
    failed = has_failed(state)
    new = Transitions(agent.state, action, -failed.astype(float), state, failed)

    def replace(rows: jax.Array, by: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(rows, by, count * CARTS % MEMORY, axis=0)

    time = agent.time + 1
    over = failed | (time == LONGEST)
    return agent._replace(
        memory=jax.tree.map(replace, agent.memory, new),
        state=jnp.where(over[:, None], starts(start, CARTS), state),
        time=jnp.where(over, 0, time),
    )


def loss(params: Params, target: Params, batch: Transitions) -> jax.Array:
    """A sum of squares whose derivative by each temporal difference is clipped to [-1, 1]."""
    follows = jnp.where(batch.failed, 0, values(target, batch.next_state).max(axis=-1))
    taken = jnp.take_along_axis(values(params, batch.state), batch.action[:, None], axis=-1)
    return optax.huber_loss(taken[:, 0], batch.reward + DISCOUNT * follows).sum()


def learn(
    tx: optax.GradientTransformation, agent: Agent, key: jax.Array, count: jax.Array
) -> Agent:
    """One update, from transitions drawn from those in memory after `count` calls of `play`."""
    rows = jax.random.randint(key, (BATCH,), 0, jnp.minimum(count * CARTS, MEMORY))
    batch = jax.tree.map(lambda a: a[rows], agent.memory)
    grads = jax.grad(loss)(agent.params, agent.target, batch)
    updates, opt_state = tx.update(grads, agent.opt_state, agent.params)
    params = optax.apply_updates(agent.params, updates)
    copy = count % COPY_EVERY == 0
    target = jax.tree.map(lambda new, old: jnp.where(copy, new, old), params, agent.target)
    return agent._replace(params=params, target=target, opt_state=opt_state)


def evaluate(params: Params, key: jax.Array) -> jax.Array:
    """The mean return of greedy episodes."""

    def step(run: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], Any]:
        state, up = run
        moved = move(state, values(params, state).argmax(axis=-1))
        return (moved, up & ~has_failed(moved)), up.mean()

    run = starts(key, EPISODES), jnp.ones(EPISODES, bool)
    return lax.scan(step, run, length=LONGEST)[1].sum()


def train(
    tx: optax.GradientTransformation, agent: Agent, key: jax.Array, counts: jax.Array
) -> tuple[Agent, jax.Array]:
    """The agent after the calls of `play` numbered by `counts`, and its mean return then."""
    of_steps, of_episodes = jax.random.split(key)

    def step(agent: Agent, count: jax.Array) -> tuple[Agent, None]:
        of_play, of_learn = jax.random.split(jax.random.fold_in(of_steps, count))
        agent = play(agent, of_play, count)
        return lax.cond(
            (count + 1) * CARTS > AT_RANDOM,
            lambda agent: learn(tx, agent, of_learn, count + 1),
            lambda agent: agent,
            agent,
        ), None

    agent, _ = lax.scan(step, agent, counts)
    return agent, evaluate(agent.params, jax.random.fold_in(of_episodes, counts[-1]))


class Result(NamedTuple):
    """The number of steps at each evaluation, and the mean returns by agent and evaluation."""

    steps: list[int]
    returns: list[list[float]]


def print_table(result: Result) -> None:
    print(f"{'agent':5}  {'first solved':>12}  {'from then on':>12}  {'best':>6}  {'final':>6}")
    for agent, returns in enumerate(result.returns):
        solved = [mean >= SOLVED for mean in returns]
        since = solved.index(True) if any(solved) else None
        first = "never" if since is None else f"{result.steps[since]:,}"
        share = "" if since is None else f"{np.mean(solved[since:]):.0%}"
        ends = f"{max(returns):6.1f}  {returns[-1]:6.1f}"
        print(f"{agent:5}  {first:>12}  {share:>12}  {ends}")


def draw(result: Result, out: Path) -> None:
    with picture(out, height=4) as figure:
        axes = figure.subplots()
        for agent, returns in enumerate(result.returns):
            axes.plot(result.steps, returns, linewidth=1.2, label=f"agent {agent}")
        mean = np.mean(result.returns, axis=0)
        axes.plot(result.steps, mean, "k-", linewidth=3, label=f"mean: {mean[-1]:.0f}")
        level = [SOLVED] * len(result.steps)
        axes.plot(result.steps, level, "-", color="0.5", linewidth=1, label=f"solved: {SOLVED}")
        label = f"mean return of {EPISODES} greedy episodes"
        axes.set(xlabel="steps of an agent", ylabel=label, ylim=(0, LONGEST * 1.03))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        label_ends(axes)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300_000, help="per agent")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/dqn_cartpole.png"))
    args = parser.parse_args(argv)
    if args.steps < 1 or args.steps % EVALUATE_EVERY or args.agents < 1:
        parser.error(f"--steps must be a positive multiple of {EVALUATE_EVERY}, --agents positive")

    tx = recipes.nature_dqn(args.learning_rate)
    of_starts, keys = jax.random.split(jax.random.key(args.seed), (2, args.agents))
    agents = jax.jit(jax.vmap(functools.partial(new_agent, tx)))(of_starts)
    train_all = jax.jit(
        jax.vmap(functools.partial(train, tx), in_axes=(0, 0, None)), donate_argnums=0
    )
    counts = np.arange(args.steps // CARTS).reshape(-1, EVALUATE_EVERY // CARTS)
    returns = []
    for some in (bar := tqdm(counts, unit="evaluation")):
        agents, means = train_all(agents, keys, some)
        returns.append(means.tolist())
        bar.set_postfix_str(f"returns {', '.join(f'{mean:.0f}' for mean in returns[-1])}")
    steps = ((counts[:, -1] + 1) * CARTS).tolist()
    result = Result(steps, np.transpose(returns).tolist())

    draw(result, args.out)
    finals = [of[-1] for of in result.returns]
    print(f"Mean returns of {EPISODES} greedy episodes; solved means at least {SOLVED}\n")
    print_table(result)
    print(
        f"\nAfter {args.steps:,} steps: mean return {np.mean(finals):.1f}, "
        f"{sum(mean >= SOLVED for mean in finals)} of {args.agents} agents solved, "
        f"curves in {args.out}"
    )
    return result


if __name__ == "__main__":
    main()
