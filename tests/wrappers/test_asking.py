"""The rules a transformation contains: all that its init calls, at any depth, and no others."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from rmsprop_jax import describe, dialects, recipes, rmsprop, sharding
from rmsprop_jax._asking import ask_without_params
from rmsprop_jax._rule import rules_of

PARAMS = {"w": jnp.ones(3), "v": jnp.ones(2)}
LABELS = {"w": "a", "v": "b"}
A, B = rmsprop(0.1), rmsprop(0.2, momentum=0.9)
MESH = jax.make_mesh((1,), ("data",))


class Slotted:
    """A transformation of someone's own, without a dict."""

    __slots__ = ("tx",)

    def __init__(self, tx):
        self.tx = tx

    def init(self, params):
        return self.tx.init(params)

    def update(self, updates, state, params=None):
        return self.tx.update(updates, state, params)


class Trainer:
    """Whose method is a mask, and which has an optimizer of its own."""

    def __init__(self):
        self.own = rmsprop(0.7, cautious=True, momentum=0.5)

    def mask(self, params):
        return jax.tree.map(lambda p: True, params)


def by_partial(tx):
    def init(inner, params):
        return inner.init(params)

    def update(updates, state, params=None, *, inner):
        return inner.update(updates, state, params)

    return optax.GradientTransformation(
        functools.partial(init, tx), functools.partial(update, inner=tx)
    )


def by_default(tx):
    def init(params, inner=tx):
        return inner.init(params)

    return optax.GradientTransformation(init, tx.update)


def jitted(tx):
    return optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update))


def with_init(tx, call):
    return optax.GradientTransformation(lambda params: call(tx.init, params), tx.update)


def zeros_of(init, params):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(init, params))


def both_of(*wrapped):
    """A wrapper of several transformations of which bound methods are all that it has."""

    def init(params):
        return [tx.init(params) for tx in wrapped]

    def update(updates, state, params=None):
        for i, tx in enumerate(wrapped):
            updates, state[i] = tx.update(updates, state[i], params)
        return updates, state

    return optax.GradientTransformation(init, update)


WRAPPERS = {
    "none": (A, [A]),
    "chain": (optax.chain(optax.clip(1.0), A, B), [A, B]),
    "named_chain": (optax.named_chain(("a", A), ("b", B)), [A, B]),
    "nested": (optax.chain(optax.chain(optax.chain(A))), [A]),
    "masked": (optax.masked(A, {"w": True, "v": False}), [A]),
    "masked by a function": (optax.masked(A, Trainer().mask), [A]),
    "partition": (optax.partition({"a": A, "b": B}, LABELS), [A, B]),
    "partition by a function": (
        optax.partition({"a": A, "b": B}, lambda params: LABELS if params else params),
        [A, B],
    ),
    "MultiSteps": (optax.MultiSteps(A, 2), [A]),
    "two MultiSteps": (both_of(optax.MultiSteps(A, 2), optax.MultiSteps(B, 2)), [A, B]),
    "apply_if_finite": (optax.apply_if_finite(A, 3), [A]),
    "conditionally_mask": (optax.conditionally_mask(A, lambda step: step > 1), [A]),
    "flatten": (optax.flatten(A), [A]),
    "inject_hyperparams": (optax.inject_hyperparams(rmsprop)(0.1), [A]),
    "inject_hyperparams of a chain": (
        optax.inject_hyperparams(lambda r: optax.chain(rmsprop(r), B))(r=0.1),
        [A, B],
    ),
    "partial": (by_partial(A), [A]),
    "default argument": (by_default(A), [A]),
    "slots": (Slotted(A), [A]),
    "jit": (jitted(A), [A]),
    "eval_shape": (with_init(A, zeros_of), [A]),
    "checkpoint": (with_init(A, lambda init, params: jax.checkpoint(init)(params)), [A]),
    "cond": (with_init(A, lambda init, params: jax.lax.cond(True, init, init, params)), [A]),
    "make_jaxpr": (with_init(A, lambda init, p: jax.make_jaxpr(init)(p) and init(p)), [A, A]),
    "vmap": (
        with_init(A, lambda init, p: jax.vmap(init)(jax.tree.map(lambda x: x[None], p))),
        [A],
    ),
    "a name in the state": (
        with_init(A, lambda init, params: {"name": "x", "state": init(params)}),
        [A],
    ),
    "a state for each leaf": (
        with_init(A, lambda init, params: jax.tree.map(init, params)),
        [A, A],
    ),
    "a state for each name": (
        with_init(A, lambda init, params: {name: init(p) for name, p in params.items()}),
        [A, A],
    ),
    "recipe": (recipes.torchbeast(10), [recipes.torchbeast(10).part.tx]),
    "zero1": (sharding.zero1(A, MESH, "data"), [A]),
    "zero1_mapped": (sharding.zero1_mapped(optax.chain(A), "data"), [A]),
    "others alone": (optax.chain(optax.sgd(0.1), optax.masked(optax.adam(0.1), LABELS)), []),
}


def forms(rules):
    """What tells A and B apart, also where their numbers are in a state."""
    return [(rule.hyper.momentum is not None, rule.variant) for rule in rules]


def test_every_rule_is_found_and_no_other(subtests):
    for name, (tx, rules) in WRAPPERS.items():
        with subtests.test(wrapper=name):
            if not rules:
                with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax"):
                    rules_of(tx, PARAMS)
                continue
            for _ in range(2):  # the second time, whatever is compiled is
                assert forms(rules_of(tx, PARAMS)) == forms(rule.part for rule in rules)
                said = describe(tx, PARAMS).split("\n\n")
                assert len(said) == len({id(rule) for rule in rules})
                if ask_without_params(tx.init) is not None:
                    assert describe(tx).split("\n\n") == said
                    assert name != "a state for each name"  # which has no names without them


def test_the_optimizers_of_others_are_none_of_ours():
    """A mask, say, may be the method of a trainer, which has another optimizer."""
    trainer = Trainer()
    tx = optax.chain(optax.masked(A, trainer.mask), optax.masked(optax.clip(1.0), trainer.mask))
    assert "0.7" not in describe(tx)
    trainer.own = sharding.zero1_mapped(A, "data")
    sharding.state_sharding(tx, PARAMS, jax.sharding.NamedSharding(MESH, jax.P()))
    sharding.zero1(tx, MESH, "data")
    assert describe(sharding.zero1_mapped(tx, "data")).startswith(describe(A))


def test_data_that_hang_on_a_transformation_are_not_walked():
    deep = []
    for _ in range(2_000):
        deep = [deep]

    class Untouched(list):
        def __iter__(self):
            raise AssertionError("these are data")

    data = Untouched([deep])

    def scale(updates, params):
        del params
        return jax.tree.map(lambda u: u * len(data), updates)

    assert describe(optax.chain(optax.stateless(scale), A)).startswith(describe(A))


def test_cautious_rules_are_refused_wherever_they_are():
    cautious = rmsprop(0.1, momentum=0.9, cautious=True)
    for tx in (
        cautious,
        both_of(optax.MultiSteps(A, 2), optax.MultiSteps(cautious, 2)),
        optax.inject_hyperparams(rmsprop, static_args="momentum")(0.1, momentum=0.9, cautious=True),
        by_partial(cautious),
        optax.masked(cautious, {"w": True, "v": False}),
    ):
        with pytest.raises(ValueError, match="tx must not be cautious"):
            sharding.zero1_mapped(tx, "data")

    def of_first(tx):
        return optax.GradientTransformation(lambda params: tx.init(params["w"]), tx.update)

    # Where nothing is known without parameters, it is when they come, also in a restored state.
    tx = of_first(cautious)
    late, rows = sharding.zero1_mapped(tx, "data"), jax.tree.map(lambda p: p[None], PARAMS)
    with pytest.raises(ValueError, match="tx must not be cautious"):
        jax.vmap(late.init, axis_name="data")(rows)
    with pytest.raises(ValueError, match="tx must not be cautious"):
        jax.vmap(late.update, axis_name="data")(rows, jax.vmap(tx.init)(rows))
    sharding.zero1_mapped(with_init(A, lambda init, p: {n: init(x) for n, x in p.items()}), "data")
    with pytest.raises(ValueError, match="tx must not have zero1 or zero1_mapped inside it"):
        sharding.zero1(of_first(sharding.zero1(A, MESH, "data")), MESH, "data").init(PARAMS)
    with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax or contain one"):
        sharding.zero1_mapped(optax.sgd(0.1), "data")


def test_asking_computes_nothing_and_leaves_no_tracer():
    called = []

    def schedule(count):
        called.append(count)
        return 0.1

    tx = optax.chain(rmsprop(schedule), optax.inject_hyperparams(dialects.keras)(0.1))
    with jax.checking_leaks():
        describe(tx)
        rules = rules_of(tx, PARAMS)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
        assert forms(rules_of(tx, shapes)) == forms(rules)
        jax.jit(lambda params: rules_of(tx, params) and params)(PARAMS)
    assert not called
    assert not any(isinstance(x, jax.core.Tracer) for rule in rules for x in jax.tree.leaves(rule))


def test_functions_that_were_rebuilt_are_of_the_same_part():
    """As by programs that map over a tree with a transformation in it."""
    where = jax.sharding.NamedSharding(MESH, jax.P())
    for tx in (A, sharding.zero1(A, MESH, "data")):
        for rebuilt in (jax.tree.map(lambda function: function, tx), tx._replace(), type(tx)(*tx)):
            assert rebuilt.part is tx.part
            assert sharding.state_sharding(rebuilt, PARAMS, where).nu["w"] == where
    assert A._replace(update=B.update).part is None
    assert A._replace(init=B.init).part is None


def test_what_is_beside_a_rule_is_told_of_it_alone():
    """Whichever is called first."""

    def init(params):
        b = B.init(params)
        return optax.chain(optax.clip(1.0), A).init(params), b

    tx = optax.GradientTransformation(init, A.update)
    first, second = describe(tx, PARAMS).split("\n\n")
    assert first == describe(B)
    assert second == describe(A) + "\nand 1 other transformation before it, not described"
