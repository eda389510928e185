"""Steps on only those rows of a table that a batch touches, as for embeddings.

    state = rows.init(tx, table)
    table, state = rows.advance(tx, indices, table, state)    # if rows move by themselves
    row_grads = jax.grad(loss)(table[indices])
    table, state = rows.update(tx, indices, row_grads, table, state)

The cost of a step does not grow with the table. tx is what :func:`rmsprop_jax.rmsprop`,
``scale_by_rms`` or a dialect returns. All four functions are pure. In a jitted step with table and
state donated, only the rows of the batch are copied.

Each table has its own state; call ``rows`` once for each table. A step has one of two meanings,
chosen in ``init``:

* Dense, the default. Table and state become what tx would make of them with a gradient of zeros for
  all other rows, within rounding (which tiny gradients amplify by learning_rate / sqrt(eps), as in
  every program). A row without a gradient still changes in each of those steps: s and m decay, and
  with momentum or decoupled weight decay the row moves. A count per row records how many steps it
  has missed; when the row is touched, they are made up at once, in closed form. ``advance`` does so
  before rows are read. ``settle`` does so for all rows, and returns the table and state of the
  dense transformation. Rules whose missed steps have no closed form are refused.
* Lazy, as in TensorFlow, with ``init(..., lazy=True)``: a row takes only the steps that touch it.
  This is what ``tf.compat.v1.train.RMSPropOptimizer``, Sonnet, and the legacy optimizer of tf.keras
  with momentum do if a gradient is a ``tf.IndexedSlices``.

With the dense meaning, a rare row has forgotten its gradients, and takes a long step when it is
touched, up to learning_rate / sqrt(1 - decay). With the lazy meaning, its steps stay near the
learning rate. Which is better depends on the task.

Repeated indices count as one, with the sum of their gradients, as in the lazy optimizers above.
(Without momentum the legacy optimizer of tf.keras is dense, as are the newer one and Keras 3.
Keras 3 squares the gradients of repeated rows one by one, which no rule here does.) An index equal
to the number of rows refers to no row; use it to pad batches.

Pass gradients with respect to the gathered rows, as above, not with respect to the table, which
would be as large as the table. If a module such as ``nnx.Embed`` or linen's ``Embed`` looks the
rows up, pass the rows to the loss instead; ``examples/embeddings.py`` shows how.

If the rows of a table are sharded over the devices of an axis, it is best to step inside
``jax.shard_map``, each device on its own shard, with indices that count from its first row. Inside
jit every index that is not in the table is dropped, and so are those of other shards:

    own = indices - jax.lax.axis_index("data") * len(part)
    part, state = rows.update(tx, own, row_grads, part, state)    # no collective
"""

from rmsprop_jax.rows._rows import RowsState, advance, init, settle, update

__all__ = ["RowsState", "advance", "init", "settle", "update"]
