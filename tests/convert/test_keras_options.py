"""The config of Keras's optimizer, converted to arguments of ``dialects.keras``."""

import optax
import pytest

import record_keras_files
from rmsprop_jax import convert, dialects

CASES = record_keras_files.load()["cases"]
SAVED = {
    case: CASES[case]["files"]["keras"]["config.json"]["compile_config"]["optimizer"]
    for case in record_keras_files.CASES
}
CONFIG = SAVED["frozen"]["config"]
INNER = SAVED["wrapped"]["config"]["inner_optimizer"]["config"]
RULE = {"momentum": 0.9, "epsilon": 1e-3, "rho": 0.8}


def test_options_of_what_keras_says():
    want = RULE | {"learning_rate": 0.01, "centered": True, "weight_decay": 0.1}
    assert convert.keras_options(SAVED["frozen"]) == convert.keras_options(CONFIG) == want
    assert dialects.keras(**want) == dialects.keras(**convert.keras_options(CONFIG))
    others = convert.keras_options(CONFIG, weight_decay=None, momentum=0, learning_rate=0.5)
    assert others == want | {"weight_decay": None, "momentum": 0.0, "learning_rate": 0.5}


def test_options_of_what_is_wrapped():
    schedule = optax.constant_schedule(0.1)
    instead = {"gradient_accumulation_steps": None, "use_ema": False, "learning_rate": schedule}
    want = RULE | {"learning_rate": schedule, "centered": False, "weight_decay": None}
    wrapped = SAVED["wrapped"]
    for config in (wrapped, wrapped["config"], wrapped["config"]["inner_optimizer"]):
        assert convert.keras_options(config, **instead) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"clipnorm": 1.0},
            r"clipnorm=1.0, .*projection_l2_ball\(g, 1.0\)\), tx\).*config, clipnor",
        ),
        ({"clipvalue": 0.5}, r"clipvalue=0.5, .*optax.chain\(optax.clip\(0.5\), tx\)"),
        ({"global_clipnorm": 2.0}, r"global_clipnorm=2.0, .*optax.clip_by_global_norm\(2.0\), tx"),
        ({"gradient_accumulation_steps": 4}, r"optax.MultiSteps\(tx, 4\), .*config, gradient_acc"),
        ({"clipvalue": 0.0}, r"clipvalue=0.0, .*optax.clip\(0.0\)"),
        ({"use_ema": True}, r"optax.incremental_update\(.*keras_options\(config, use_ema=None\)"),
        (
            {"learning_rate": INNER["learning_rate"]},
            "has the schedule 'PolynomialDecay' .*'decay_steps': 16.*learning_rate=schedule",
        ),
        ({"class_name": "Adam", "config": {}}, "config must be of an RMSprop, got one of 'Adam'"),
        ({"class_name": "Custom>RMSprop"}, "config must be of an RMSprop, got one of 'Custom>RM"),
    ],
)
def test_refuses_what_is_no_argument(change, message):
    with pytest.raises(ValueError, match=message):
        convert.keras_options(CONFIG | change)


def test_refuses_configs_of_others():
    for name in ("rho", "momentum", "epsilon", "centered", "weight_decay", "learning_rate"):
        config = {key: value for key, value in CONFIG.items() if key != name}
        with pytest.raises(ValueError, match=f"config has no '{name}', which Keras 3's"):
            convert.keras_options(config)
    with pytest.raises(TypeError, match=r"lr is in no config of keras.optimizers.RMSprop"):
        convert.keras_options(CONFIG, lr=0.1)
