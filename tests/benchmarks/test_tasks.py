"""The tasks that the quality benchmarks train."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tasks
import real_data
from small_tasks import TASKS
from storages import types

pytestmark = pytest.mark.usefixtures("default_promotion")  # networks divide pixels, integers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_loss_of_its_parameters_on_its_rows(name, dtype):
    """Only traced; the gradients have the dtype of the parameters, the loss is float32."""

    def losses():
        task = TASKS[name](dtype=jnp.dtype(dtype))
        params = task.init(0)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        gradient = jax.value_and_grad(task.loss)
        both = [gradient(params, *map(jnp.asarray, rows)) for rows in (task.train, task.test)]
        return params, both

    params, both = jax.eval_shape(losses)
    assert jax.tree.leaves(params)
    for loss, grads in both:
        assert loss.shape == ()
        assert loss.dtype == jnp.float32
        assert types(grads) == types(params)


def test_words_are_numbered_from_the_most_frequent_and_others_are_0(monkeypatch):
    monkeypatch.setattr(_tasks, "classifier", lambda *_: (None, None))
    text = "Who's there? there, there? who's. " * 10
    task = _tasks.words(text, size=3)  # "there" is 1, one more is 2
    codes = np.unique(np.concatenate([task.train[0].ravel(), task.train[1]]))
    assert codes.tolist() == [0, 1, 2]
    assert task.train[0][0].tolist() == [2, 1, 0]


def test_a_text_is_split_into_a_beginning_and_an_end():
    """Of 100 codes: runs of 4 from each of the first 90, and side by side in the last 10."""
    train, test = _tasks.windows(np.arange(100), 4)
    assert train[:, 0].tolist() == [*range(87)]
    assert train[-1].tolist() == [86, 87, 88, 89]
    assert test.tolist() == [[90, 91, 92, 93], [94, 95, 96, 97]]


if os.environ.get("RMSPROP_JAX_DATA"):

    @pytest.mark.slow
    def test_the_real_tasks_have_the_sizes_that_the_data_have():
        clothes = _tasks.clothes(real_data.fashion_mnist())
        assert (len(clothes.train[0]), len(clothes.test[0])) == (60_000, 10_000)
        text = real_data.tiny_shakespeare()
        task = _tasks.lstm(text)
        assert task.train[0].shape == task.train[1].shape == (1_003_854 - 32, 32)
        assert len(task.test[0]) == 111_540 // 33
        words = _tasks.words(text)
        assert int(words.train[0].max()) == 2999
