"""Names of the library in the pages' text lead to the reference.

Where a page says `sharding.zero1(tx, mesh, "data")` in its text, the code is a link to the
description of that function. GitHub shows the same text without the link.
"""

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import rmsprop_jax

_NAME = re.compile(r"[\w.]+")


def setup(app: Sphinx) -> dict[str, Any]:
    """Changes each page after it was read."""
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True}


def public_names() -> set[str]:
    """All functions and classes, as a page calls them: "rmsprop", "sharding.zero1"."""
    modules = {name: getattr(rmsprop_jax, name) for name in rmsprop_jax.__all__}
    modules = {name: of for name, of in modules.items() if inspect.ismodule(of)}
    inside = {f"{module}.{name}" for module, of in modules.items() for name in of.__all__}
    return {*rmsprop_jax.__all__} - {*modules} | inside


_PUBLIC = public_names()


def name_in(code: str) -> str | None:
    """The public name that code begins with, if it is a call of that or nothing else."""
    found = _NAME.match(code)
    if found is None or found[0] not in _PUBLIC or code[found.end() :][:1] not in ("", "("):
        return None
    return found[0]


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Makes links of the names in text; those in headings and links stay as they are."""
    page = app.env.docname
    if page.startswith("api/"):
        return
    for code in [*doctree.findall(nodes.literal)]:
        name = name_in(code.astext())
        parent = code.parent
        if name is None or isinstance(
            parent, nodes.title | nodes.reference | addnodes.pending_xref
        ):
            continue
        link = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=f"rmsprop_jax.{name}",
            refexplicit=False,
            refwarn=True,
            refdoc=page,
        )
        link["py:module"] = link["py:class"] = None
        parent.replace(code, link)
        link += code
