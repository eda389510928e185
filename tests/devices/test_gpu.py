"""Programs for GPUs, compiled ahead of time by jax's CUDA plugin where it is: no GPU is needed."""

import pytest

import gpu_programs
from gpu_programs import compiled, moved, temporary
from rmsprop_jax import low_memory, rmsprop

pytest.importorskip("jax_cuda13_plugin")

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
    """A byte a number of each slot in 8 bits, for its largest; centered means are in 16."""
    program = compiled(rmsprop(0.1, **FORMS[form], storage=low_memory.q8()), gpu)
    eight = SLOTS[form] - ("centered" in FORMS[form])
    *passes, step = sorted(moved(program))
    assert step == pytest.approx(4 + 8 + 2 * eight + 4 * (SLOTS[form] - eight), abs=5e-3)
    assert sum(passes) == pytest.approx(eight, abs=0.01)
    assert sum(moved(program)) < 0.76 * sum(moved(compiled(rmsprop(0.1, **FORMS[form]), gpu)))
    assert temporary(program) < 5e-3


def test_the_table_is_printed(gpu, capsys):
    rows = gpu_programs.main(["--quick"])
    assert [row["bytes moved"] for row in rows[:2]] == ["20.0", "16.0"]
    assert [row["of float32"] for row in rows[:2]] == ["1.00", "0.80"]
    assert "| plain | bfloat16 | 1 | 16.0 | 0.80 | 0.00 |" in capsys.readouterr().out
