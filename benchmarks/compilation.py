"""How long does it take until a step can run, and how large is the program?

    python benchmarks/compilation.py             # minutes; writes results/compilation.json
    python benchmarks/compilation.py --quick     # seconds; checks that it runs, writes nothing

Measures tracing and lowering with nothing cached, and compilation, of a step (update and
apply_updates) on the parameters of real networks, many of which have the same shape, and on 50 that
all differ; also tracing and lowering of init and a step in one function. Ratios are ours / optax,
medians over alternating pairs, and for tracing and lowering a step with quartiles: below 1, ours is
faster. Networks with more than 500 leaves are compiled in two pairs, others in four. "instructions"
are those of the compiled program, in all its kernels; "lowered" are those given to XLA.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import gc
import re
from typing import Any

import jax
import optax
from tqdm import tqdm

import _results
import _timing
from libraries import FORMS, train_step
from rmsprop_jax import rmsprop
from trees import TREES, Shapes

ALL_DIFFERENT: Shapes = [(3 + i, 7) for i in range(50)]


def lowering(
    tx: optax.GradientTransformation, shapes: Shapes, init: bool = False
) -> Callable[[], Any]:
    """A function that traces and lowers a step, optionally after init; arrays are shapes only."""
    params = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    step = train_step(tx)

    def first(params: Any, grads: Any) -> Any:
        return step(params, tx.init(params), grads)

    state = jax.eval_shape(tx.init, params)
    function, args = (first, (params,)) if init else (step, (params, state))

    def lower() -> Any:
        donated = tuple(range(len(args)))
        return jax.jit(function, donate_argnums=donated).trace(*args, params).lower()

    return lower


def forget() -> None:
    """Clears what jax has traced, and keeps the garbage collector out of the timing."""
    jax.clear_caches()
    gc.collect()
    gc.freeze()


def anew(lower: Callable[[], Any]) -> Any:
    """A new program, since one that jax remembers would already be compiled."""
    forget()
    return lower()


def compile_next(programs: Iterator[Any]) -> None:
    """Compiles a program that was not compiled before, since each keeps the result."""
    next(programs).compile()


def instructions(text: str | None) -> int:
    """Lines of a program that define a value."""
    return len(re.findall(r"^\s+(?:ROOT )?%\S+ = ", text or "", re.MULTILINE))


def row(name: str, form: str, shapes: Shapes, pairs: int, compiles: int) -> _results.Row:
    txs = [make(1e-3, **FORMS[form]) for make in (optax.rmsprop, rmsprop)]
    lowerings = [lowering(tx, shapes) for tx in txs]
    lower = _timing.compare(lowerings, pairs, warm_up=1, before=forget)
    from_init = [lowering(tx, shapes, init=True) for tx in txs]
    with_init = _timing.compare(from_init, pairs, warm_up=1, before=forget)
    programs = [[anew(lower) for _ in range(compiles)] for lower in lowerings]
    sides = [functools.partial(compile_next, iter(these)) for these in programs]
    compiled = _timing.compare(sides, compiles, warm_up=0)
    before = [instructions(these[0].as_text()) for these in programs]
    after = [instructions(these[0].compile().as_text()) for these in programs]
    return {
        "parameters": name,
        "leaves": len(shapes),
        "shapes": len(set(shapes)),
        "form": form,
        "trace and lower: optax (s)": f"{lower.theirs:.2f}",
        "ours (s)": f"{lower.ours:.2f}",
        **lower.columns(),
        "ratio, with init": f"{with_init.ratio:.2f}",
        "compile: optax (s)": f"{compiled.theirs:.2f}",
        "ours, compile (s)": f"{compiled.ours:.2f}",
        "ratio, compile": f"{compiled.ratio:.2f}",
        "lowered, optax / ours": "{:,} / {:,}".format(*before),
        "instructions, optax / ours": "{:,} / {:,}".format(*after),
    }


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    networks = TREES | {"all different": ALL_DIFFERENT}
    pairs = 6
    if quick:
        networks, pairs = {"two leaves": [(8, 8), (8,)]}, 2
    rows = []
    lowering(rmsprop(1e-3), [(2,)])().compile()  # the first compilation of a process takes longer
    with tqdm(total=len(networks) * len(FORMS), unit="row") as bar:
        for name, shapes in networks.items():
            for form in FORMS:
                bar.set_description(f"{name}, {form}")
                rows.append(row(name, form, shapes, pairs, 2 if len(shapes) > 500 else 4))
                bar.update()
    return _results.finish("compilation", rows, quick)


if __name__ == "__main__":
    main()
