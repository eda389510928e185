"""How the site renders docstrings, signatures, links and equations."""

import textwrap
from typing import NamedTuple

import pytest

from pages import ROOT
import rmsprop_jax

pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
pytest.importorskip("myst_parser", reason="the extra `docs` is not installed")

import docstrings
import gallery
import mathml
import names
import signatures


def lines(text):
    return textwrap.dedent(text).strip().splitlines()


def test_an_indented_block_of_equations_is_a_code_block():
    text = "One line.\n\n    s <- decay s\n    x <- x - u\n\nfor a gradient."
    assert docstrings.with_code_blocks(text.splitlines()) == [
        "One line.",
        "",
        ".. code-block:: text",
        "",
        "   s <- decay s",
        "   x <- x - u",
        "",
        "for a gradient.",
    ]


@pytest.mark.parametrize(
    ("block", "language"),
    [
        ("tx = f(1)", "python"),
        ("x <- y", "text"),
        ("u = a g / b", "text"),
        ("f(x)\ng(x)", "python"),
    ],
)
def test_the_language_of_a_block(block, language):
    found = docstrings.with_code_blocks(["A.", "", *textwrap.indent(block, "    ").splitlines()])
    assert found[2] == f".. code-block:: {language}"


def test_sections_and_lists_stay_as_they_are():
    text = lines("""
        One line.

        Args:
          x: number.

            A paragraph about it.

        * an item

          of two paragraphs
        """)
    assert docstrings.with_code_blocks(text) == text


def test_words_beside_their_meanings_are_a_table():
    text = lines("""
        The rest:

            plain        |g| is
                         squared
            centered     not so
            eps=1        x_ is left
        """)
    assert docstrings.with_code_blocks(text)[2:] == [
        ".. list-table::",
        "   :class: meanings",
        "   :widths: auto",
        "",
        "   * - ``plain``",
        r"     - \|g\| is",
        "       squared",
        "   * - ``centered``",
        "     - not so",
        "   * - ``eps=1``",
        r"     - x\_ is left",
        "",
    ]


def written(what, thing):
    return signatures.as_written(None, what, "", thing, None, "", "")


def documented(
    a: int, /, b: "Pair | None" = None, *rest: str, c: float = 1e-3, **more: bool
) -> "Pair":
    """Every kind of parameter."""


class Pair(NamedTuple):
    """Of two fields."""

    left: "Pair | int"
    right: float = 2.50

    def swapped(self, twice: bool = False) -> "Pair":
        """A method."""
        return self


def test_signatures_are_as_written():
    parameters = "(a: int, /, b: Pair | None = None, *rest: str, c: float = 1e-3, **more: bool)"
    assert written("function", documented) == (parameters, "Pair")
    assert written("class", Pair) == ("(left: Pair | int, right: float = 2.50)", None)
    assert written("method", Pair.swapped) == ("(twice: bool = False)", "Pair")


def test_signatures_have_type_aliases_by_their_names():
    parameters, returned = written("function", rmsprop_jax.rmsprop)
    assert parameters.startswith("(learning_rate: ScalarOrSchedule, decay: ScalarOrSchedule = 0.9,")
    assert ", *, lr_in_momentum: bool = True," in parameters
    assert returned == "optax.GradientTransformationExtraArgs"


def test_the_gallery_has_each_example_with_its_picture():
    text = (ROOT / "examples" / "README.md").read_text()
    found = gallery.examples(text)
    assert [one.script for one in found] == list(
        dict.fromkeys(
            line.split("/")[1].split()[0]
            for line in text.splitlines()
            if line.startswith("python examples/")
        )
    )
    pictures = [one.picture for one in found if one.picture]
    assert sorted(pictures) == sorted(
        path.relative_to(ROOT / "examples").as_posix()
        for path in (ROOT / "examples").glob("pictures/*.png")
    )
    assert all(one.shows and f"## {one.heading}\n" in text for one in found)


def test_equations_are_mathml_without_a_script():
    inline = mathml.rendered(r"|g|^2")
    assert inline.startswith("<math")
    assert inline.count('lspace="0" rspace="0">|') == 2
    block = mathml.rendered(r"s &\leftarrow a \\ x &\leftarrow \frac{g}{\sqrt{s}}", as_block=True)
    assert block.count("<mtr>") == 2
    assert "<mfrac>" in block
    assert "<msqrt>" in block
    assert "&" not in block


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("rmsprop", "rmsprop"),
        ('sharding.zero1(tx, mesh, "data")', "sharding.zero1"),
        ("rmsprop_jax", None),
        ("optax.rmsprop", None),
        ("rows", None),
        ("sharding.zero1 of", None),
        ("...", None),
    ],
)
def test_names_in_the_text_of_a_page(code, name):
    assert names.name_in(code) == name
