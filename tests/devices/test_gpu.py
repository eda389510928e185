"""Programs for GPUs, compiled without a GPU by jax's CUDA plugin, if it is installed."""

import pytest

import gpu_programs
from gpu_programs import compiled, moved, temporary
from rmsprop_jax import low_memory, rmsprop
import training_memory

pytest.importorskip("jax_cuda13_plugin")
pytestmark = pytest.mark.usefixtures("default_promotion")  # of parameters in 16 bits and updates

FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "eps_in_sqrt": False},
    "weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "bias_correction": True},
}
SLOTS = {"plain": 1, "momentum": 2, "centered": 3, "nesterov": 2, "weight decay": 1}


@pytest.fixture(scope="module")
def gpu():
    return gpu_programs.gpu()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_one_kernel(gpu, form):
    """Which reads the gradient, reads and writes parameter and slots, once, and needs no more."""
    program = compiled(rmsprop(0.1, **FORMS[form]), gpu)
    assert moved(program) == pytest.approx([4 + 8 * (1 + SLOTS[form])])
    assert temporary(program) < 1e-3  # scalars


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_state_in_16_bits_is_one_kernel(gpu, form):
    program = compiled(rmsprop(0.1, **FORMS[form], storage=low_memory.bfloat16()), gpu)
    assert moved(program) == pytest.approx([4 + 8 + 4 * SLOTS[form]])
    assert temporary(program) < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_state_in_8_bits_is_one_kernel_after_a_pass_over_its_codes(gpu, form):
    """A byte a number of each slot in 8 bits, for its largest; centered means are in 16.

    Of two slots the hash of the rows is computed before: 4 bytes a row.
    """
    program = compiled(rmsprop(0.1, **FORMS[form], storage=low_memory.q8()), gpu)
    momentum, centered = "momentum" in FORMS[form], "centered" in FORMS[form]
    kernels = sorted(moved(program))
    small, passes, (step,) = (
        [size for size in kernels if low < size <= high]
        for low, high in ((0, 0.5), (0.5, 1.5), (1.5, 100))
    )
    rows = 4 / gpu_programs.SHAPE[1] if momentum else 0
    assert step == pytest.approx(14 + 2 * momentum + 4 * centered + rows, abs=1e-4)
    assert passes == pytest.approx([1] * (1 + momentum), abs=1e-3)
    assert sum(small) < 1e-3 + rows
    assert sum(kernels) == pytest.approx(15 + 3 * momentum + 4 * centered, abs=0.01)
    assert temporary(program) < 1e-3 + rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_a_step_with_master_weights_is_one_kernel(gpu, bits, form):
    """Gradient 2, parameter 2 and 2, correction (bits - 16) / 8 and as much again; and the slots.

    Where two things are drawn at random, the hash of the rows may be computed before.
    """
    tx = low_memory.master_weights(rmsprop(0.1, **FORMS[form]), bits)
    program = compiled(tx, gpu, "bfloat16")
    *small, step = sorted(moved(program))
    rows = 4 / gpu_programs.SHAPE[1]
    assert step == pytest.approx(6 + (bits - 16) / 4 + 8 * SLOTS[form], abs=1.01 * rows)
    assert sum(small) < 1.01 * rows
    assert temporary(program) < 1e-3 + rows


def test_all_in_4_bytes_a_parameter_moves_11_where_float32_moves_20(gpu):
    """One of the 11 is the pass over the codes, for their largest."""
    tx = low_memory.master_weights(rmsprop(0.1, storage=low_memory.q8()), 24)
    program = compiled(tx, gpu, "bfloat16")
    assert [size for size in moved(program) if size > 0.01] == pytest.approx([1, 10], abs=1e-3)
    assert temporary(program) < 1e-3
    assert sum(moved(compiled(rmsprop(0.1), gpu))) == pytest.approx(20)


def test_the_table_is_printed(gpu, capsys):
    rows = gpu_programs.main(["--quick"])
    assert [row["bytes moved"] for row in rows[:2]] == ["20.0", "16.0"]
    assert [row["of float32"] for row in rows[:2]] == ["1.00", "0.80"]
    assert "| plain | float32 | bfloat16 | 1 | 16.0 | 0.80 | 0.00 |" in capsys.readouterr().out
    (all_small,) = (
        row for row in rows if row["parameters"][-7:] == "24 bits" and row["state"] == "q8"
    )
    assert all_small["bytes moved"] == "11.0"


def test_a_whole_training_step_holds_what_is_counted(gpu, capsys):
    """Its peak is the sum of parameters, corrections, state and gradients; .1 are activations."""
    rows = {row["training"]: row for row in training_memory.main(["--quick"])}
    assert rows["float32"]["sum"] == "12.00"
    small = rows["master weights of 24 bits, `q8`"]
    assert [small[name] for name in ("parameters", "corrections", "state", "gradients", "sum")] == [
        "2.00",
        "1.00",
        "1.00",
        "2.00",
        "6.00",
    ]
    for name, row in rows.items():
        if name != "standard mixed precision":  # whose gradients are in bfloat16 till they are used
            assert float(row["peak"]) == pytest.approx(float(row["sum"]), abs=0.1)
    assert "| standard mixed precision | plain | 4.00 |" in capsys.readouterr().out
