"""Steps on the rows of a table that a batch touches, at a cost that does not grow with the table.

    state = rows.init(tx, table)
    table, state = rows.advance(tx, indices, table, state)    # if rows move by themselves
    row_grads = jax.grad(loss)(table[indices])
    table, state = rows.update(tx, indices, row_grads, table, state)

tx is what :func:`rmsprop_jax.rmsprop`, ``scale_by_rms`` or a dialect returns. All four functions
are pure. In a jitted step with table and state donated, only the rows of the batch are copied.

Each table has a state of its own, and ``rows`` is called for each. A step has one of two meanings,
chosen by ``init``:

* the dense one, the default. Table and state go where tx would take them with a gradient of zeros
  for all other rows, within rounding (which tiny gradients amplify by learning_rate / sqrt(eps), as
  in every program). A row without a gradient still changes in each of those
  steps: s and m decay, and with momentum or decoupled weight decay the row moves. A count for each
  row tells how many steps it has missed, and they are made up at once, in closed form, when it is
  touched. ``advance`` does so before rows are read; ``settle`` for all rows, and what it returns is
  the table and state of the dense transformation. Rules whose missed steps have no closed form are
  refused.
* the lazy one of TensorFlow, ``init(..., lazy=True)``: a row takes only the steps that touch it. So
  do ``tf.compat.v1.train.RMSPropOptimizer``, Sonnet, and the legacy optimizer of tf.keras with
  momentum, where a gradient is a ``tf.IndexedSlices``.

A rare row has forgotten its gradients in the dense meaning, and makes a long step when it is
touched, up to learning_rate / sqrt(1 - decay); lazily its steps stay near the learning rate. Which
is better depends on the task.

Repeated indices count as one, with the sum of their gradients, as in all of these. (Without
momentum the legacy optimizer of tf.keras is dense, as are the newer one and Keras 3. The last
squares the gradients of repeated rows one by one, which no rule here does.) An index equal to the
number of rows is that of none: batches can be filled up with it.

Gradients are those with respect to the gathered rows, as above, and not to the table, whose
gradient is as large as that. Where a module looks them up, as ``nnx.Embed`` or linen's ``Embed``,
give the loss the rows instead; ``examples/embeddings.py`` shows how.

A table whose rows are split over the devices of an axis is best stepped inside ``jax.shard_map``,
each device on its own part, with indices that count from its first row; those of the others are
dropped, as every index is, inside jit, that is not in the table:

    own = indices - jax.lax.axis_index("data") * len(part)
    part, state = rows.update(tx, own, row_grads, part, state)    # no collective
"""

from rmsprop_jax.rows._rows import RowsState, advance, init, settle, update

__all__ = ["RowsState", "advance", "init", "settle", "update"]
