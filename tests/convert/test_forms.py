"""The forms in which PyTorch checkpoints occur, as recorded from PyTorch itself.

tests/compare/record_forms.py describes what is recorded, and continues in PyTorch from our states.
"""

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conversions import Framework, assert_same, begun, tree
import record_forms
from record_forms import FORMS, NORM_MOMENTUM, TOLERANCE, K, assert_alike, back, begin
from rmsprop_jax import convert

RECORD = record_forms.load()
STATS = convert.torch_norm_stats("norm", "norm")
PREFIXES = {
    "compiled": (r"'_orig_mod\.' of torch\.compile", r"name\.replace\('_orig_mod\.', ''\)"),
    "parallel": (r"'module\.' of DataParallel", r"name\.removeprefix\('module\.'\)"),
    "both": (
        r"'_orig_mod\.' of torch\.compile and 'module\.' of DataParallel",
        r"name\.replace\('_orig_mod\.', ''\)\.removeprefix\('module\.'\)",
    ),
}


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4, name="fc1")(x)
        x = linen.BatchNorm(use_running_average=False, momentum=1 - NORM_MOMENTUM, name="norm")(x)
        return linen.Dense(2, name="fc2")(x)


def stats_from(weights):
    like = {"norm": {"mean": jnp.zeros(4), "var": jnp.zeros(4)}}
    return convert.params_from(weights, like, STATS)


def end(params, tx, state):
    """The parameters and the running statistics after the other steps, in Flax."""

    @jax.jit
    def step(run, batch):
        params, state, stats = run
        x, y = batch

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            outputs, found = Net().apply(variables, x, mutable=["batch_stats"])
            return jnp.mean((outputs - y) ** 2), found["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, stats), None

    run = params, state, stats_from(RECORD["model"])
    (params, _, stats), _ = jax.lax.scan(step, run, (RECORD["x"][K:], RECORD["y"][K:]))
    return params, stats


def assert_ends(params, final):
    want = convert.params_from(final, params, record_forms.mapping())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, TOLERANCE), params, want)


def test_every_form_is_the_same_state_which_goes_on_as_in_pytorch(subtests, default_promotion):
    with jax.enable_x64(True):
        params, tx, state = begin(RECORD, "plain")
        for form in FORMS[1:]:
            with subtests.test(form=form):
                assert_same(begin(RECORD, form)[2], state)
        ended, stats = end(params, tx, state)
        assert_ends(ended, RECORD["final"])

        # What torch_norm_stats says of the running statistics.
        start, final = stats_from(RECORD["model"])["norm"], stats_from(RECORD["final"])["norm"]
        ours = stats["norm"]
        np.testing.assert_allclose(ours["mean"], final["mean"], 0, TOLERANCE)
        left, n = (1 - NORM_MOMENTUM) ** K * start["var"], RECORD["x"].shape[1]
        unbiased = left + n / (n - 1) * (ours["var"] - left)
        np.testing.assert_allclose(unbiased, final["var"], 0, TOLERANCE)
        assert np.all(np.abs(ours["var"] - final["var"]) > 1e-3)


def test_options_of_a_flattened_state():
    flat, (_, group, _) = RECORD["forms"]["flattened"], RECORD["forms"]["plain"]["param_groups"]
    start = "param_groups.norm.bias."
    found = {key.rpartition(".")[2]: value for key, value in flat.items() if key.startswith(start)}
    assert convert.pytorch_options(found) == convert.pytorch_options(group)
    assert found["lr"] == record_forms.NORM_LR


def test_momenta_that_the_docstring_names():
    assert linen.BatchNorm().momentum == nnx.BatchNorm(1, rngs=nnx.Rngs(0)).momentum == 0.99


@pytest.mark.parametrize("form", FORMS)
def test_back_in_the_same_form(form):
    with jax.enable_x64(True):
        found = back(RECORD, form, *begin(RECORD, form))
    assert_alike(found, RECORD["forms"][form])


def test_a_run_goes_on_with_a_layer_that_is_frozen(default_promotion):
    """From a checkpoint of all layers."""
    with jax.enable_x64(True):
        params, tx, state = begin(RECORD, "plain", frozen=True)
        ended = end(params, tx, state)[0]
        assert_ends(ended, RECORD["frozen"])
        assert_same(ended["norm"], params["norm"])


@pytest.mark.parametrize("option", record_forms.OFF)
def test_a_run_goes_on_without_what_was_switched_off(option, default_promotion):
    with jax.enable_x64(True):
        params, tx, state = begin(RECORD, "plain", **{option: record_forms.OFF[option]})
        assert_ends(end(params, tx, state)[0], RECORD["off"][option]["final"])


@pytest.mark.parametrize("name", ["pytorch", "timm"])
@pytest.mark.parametrize(
    "ignore", [("square_avg",), ["grad_avg", "step"], "momentum_buffer", ("velocity",), ""]
)
def test_only_slots_that_a_group_may_not_use_can_be_ignored(name, ignore):
    framework = Framework(name)
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    with pytest.raises(ValueError, match=r"ignore must be of \('grad_avg', 'momentum_buffer'\)"):
        framework.back(given, params, ignore=ignore)


@pytest.mark.parametrize("name", ["pytorch", "timm"])
def test_ignores_what_is_left_over_and_nothing_else(name):
    both = ("momentum_buffer", "grad_avg")
    framework = Framework(name, momentum=0.9)
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    assert_same(framework.back(given, params, ignore=both), state)
    for slots in given["state"].values():
        slots["grad_avg"] = np.ones(9)
    assert_same(framework.back(given, params, ignore=("grad_avg",)), state)
    with pytest.raises(ValueError, match=r"has \['grad_avg'\] left over"):
        framework.back(given, params, ignore=("momentum_buffer",))
    plain = Framework(name)
    given["param_groups"][0]["momentum"] = 0.0
    with pytest.raises(ValueError, match=r"ignore=\('grad_avg', 'momentum_buffer'\)"):
        plain.back(given, params, ignore=("grad_avg",))
    assert_same(plain.back(given, params, ignore=both), state._replace(trace=None))


@pytest.mark.parametrize("wrapped", PREFIXES)
def test_names_of_wrapped_models(wrapped):
    """Are refused with what to do, which helps."""
    prefixes, how = PREFIXES[wrapped]
    message = rf"must be those of mapping, without {prefixes}, got .*: use {how} for each name"
    names = RECORD["wrapped"][wrapped]
    weights = dict(zip(names, RECORD["model"].values(), strict=True))
    saved, mapping = RECORD["forms"]["plain"], record_forms.mapping()
    with jax.enable_x64(True):
        params, tx, state = begin(RECORD, "plain")
        with pytest.raises(ValueError, match=f"names {message}"):
            convert.from_pytorch(saved, params, mapping, tx, names=names)
        with pytest.raises(ValueError, match=f"names {message}"):
            convert.to_pytorch(
                state, params, mapping, tx, param_groups=saved["param_groups"], names=names
            )
        for like, of in ((params, mapping), (stats_from(RECORD["model"]), STATS)):
            with pytest.raises(ValueError, match=f"arrays {message}"):
                convert.params_from(weights, like, of)
        bare = [name.replace("_orig_mod.", "").removeprefix("module.") for name in names]
        assert_same(convert.from_pytorch(saved, params, mapping, tx, names=bare), state)
        weights = dict(zip(bare, weights.values(), strict=True))
        assert_same(convert.params_from(weights, params, mapping), params)


def test_an_optimizer_that_knows_the_names_of_a_wrapped_model():
    saved = RECORD["forms"]["named"]
    groups = [
        group | {"param_names": [f"module.{name}" for name in group["param_names"]]}
        for group in saved["param_groups"]
    ]
    prefixed, mapping = saved | {"param_groups": groups}, record_forms.mapping()
    with jax.enable_x64(True):
        params, tx, state = begin(RECORD, "named")
        with pytest.raises(ValueError, match="names must be those of mapping, without 'module"):
            convert.from_pytorch(prefixed, params, mapping, tx)
        names = list(RECORD["model"])
        assert_same(convert.from_pytorch(prefixed, params, mapping, tx, names=names), state)
        with pytest.raises(ValueError, match="names must be those of param_groups"):
            convert.from_pytorch(prefixed, params, mapping, tx, names=names[::-1])


def test_parameters_called_like_a_wrapper():
    """Names are taken as they are where the mapping has them."""
    found = convert.params_from(
        {"module.w": np.ones(2), "w": np.zeros(2)},
        {"a": jnp.zeros(2), "b": jnp.ones(2)},
        {"a": "module.w", "b": "w"},
    )
    np.testing.assert_array_equal(found["a"], 1)
    np.testing.assert_array_equal(found["b"], 0)
    with pytest.raises(ValueError, match=r"mapping names \['w'\], but the source has only"):
        convert.params_from({"submodule.w": np.ones(2)}, {"a": jnp.zeros(2)}, {"a": "w"})


def test_a_model_of_two_norms_needs_both():
    weights = RECORD["model"] | {"more.running_mean": np.ones(4), "more.running_var": np.ones(4)}
    with pytest.raises(ValueError, match=r"mapping has no entry for \['more.running_mean', 'more"):
        stats_from(weights)
    with pytest.raises(ValueError, match=r"mapping has no entry for \['more.position_ids'\]"):
        convert.params_from(
            RECORD["model"] | {"more.position_ids": np.arange(3)},
            begin(RECORD, "plain")[0],
            record_forms.mapping(),
        )


def test_parameters_and_statistics_in_one_tree():
    with jax.enable_x64(True):
        params = begin(RECORD, "plain")[0]
        stats = stats_from(RECORD["model"])
        both = params | {"norm": params["norm"] | stats["norm"]}
        found = convert.params_from(RECORD["model"], both, record_forms.mapping() | STATS)
        assert_same(found, both)


def test_param_groups_that_are_no_flattened_state():
    with jax.enable_x64(True):
        params, tx, state = begin(RECORD, "plain")
        with pytest.raises(ValueError, match="param_groups has 'state': a flattened state must"):
            convert.to_pytorch(
                state,
                params,
                record_forms.mapping(),
                tx,
                param_groups=RECORD["forms"]["plain"],
            )
