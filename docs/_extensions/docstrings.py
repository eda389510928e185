"""Docstrings in which equations and code are indented blocks, as they read best in a terminal."""

import ast
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

_BEFORE_NAPOLEON = 400


def setup(app: Sphinx) -> dict[str, Any]:
    """Makes code blocks of them, and gives each module a table of its names."""
    app.connect("autodoc-process-docstring", _process, priority=_BEFORE_NAPOLEON)
    app.connect("autodoc-skip-member", _skip_fields)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    del app, name
    lines[:] = with_code_blocks(lines)
    if what == "module" and options.get("exclude-members"):
        lines.clear()  # the rest of a module, which was introduced before
    elif what == "module":
        names = [n for n in thing.__all__ if not inspect.ismodule(getattr(thing, n))]
        lines += ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {n}" for n in names), ""]


def _skip_fields(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Those of a NamedTuple, which its docstring describes under ``Attributes:``."""
    del app, what, name, skip, options
    return True if inspect.isdatadescriptor(thing) else None


def with_code_blocks(lines: list[str]) -> list[str]:
    """The lines with a directive for each block that is indented by four after a blank line.

    Sections such as ``Args:`` are followed by their text at once, and indent it by two.
    """
    done: list[str] = []
    rest = list(lines)
    while rest:
        if rest[0].startswith("    ") and done and not done[-1].strip() and _outside(done):
            length = next((i for i, line in enumerate(rest) if line and line[0] != " "), len(rest))
            block = textwrap.dedent("\n".join(rest[:length])).strip("\n").split("\n")
            done += _table(block) or _code_block(block)
            rest = rest[length:]
        else:
            done.append(rest.pop(0))
    return done


def _outside(done: list[str]) -> bool:
    """Whether the last text stands at the margin, outside of sections."""
    last = next((line for line in reversed(done) if line.strip()), "")
    return not last.startswith(" ")


def _code_block(block: list[str]) -> list[str]:
    """Of Python if it can be parsed as such, and has no arrow, which Python takes for two signs."""
    code = "\n".join(block)
    language = "text" if "<-" in code else "python"
    try:
        ast.parse(code)
    except SyntaxError:
        language = "text"
    return [f".. code-block:: {language}", "", *(f"   {line}" for line in block), ""]


def _table(block: list[str]) -> list[str]:
    """A table of two columns, of words that stand beside their meanings; else nothing."""
    start = re.match(r"\S+ {2,}", block[0])
    at = start.end() if start else 0
    if len(block) < 4 or not at or any(line[at - 1] != " " or line[at] == " " for line in block):
        return []
    lines = [".. list-table::", "   :class: meanings", "   :widths: auto", ""]
    for line in block:
        name, meaning = line[:at].strip(), re.sub(r"([*|`_\\])", r"\\\1", line[at:])
        lines += [f"   * - ``{name}``", f"     - {meaning}"] if name else [f"       {meaning}"]
    return [*lines, ""]
