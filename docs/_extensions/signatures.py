"""Signatures as they are written: type aliases by their names, defaults with their digits."""

import ast
import inspect
import textwrap
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode


def setup(app: Sphinx) -> dict[str, Any]:
    """Makes autodoc take signatures from the source."""
    app.connect("autodoc-process-signature", as_written)
    app.connect("missing-reference", _by_last_name)
    return {"parallel_read_safe": True}


def as_written(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returns: str
) -> tuple[str, str | None] | None:
    """The arguments and the return type of a function, a method or a NamedTuple."""
    del app, name, options, signature, returns
    if what not in ("function", "method", "class"):
        return None
    source = textwrap.dedent(inspect.getsource(thing))
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return _bracketed([_one(source, f.target, f.annotation, f.value) for f in fields]), None
    assert isinstance(node, ast.FunctionDef), node
    returned = None if node.returns is None else _type(node.returns)
    return _bracketed(_parameters(source, node.args)), returned


def _parameters(source: str, args: ast.arguments) -> list[str]:
    places = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(places) - len(args.defaults)), *args.defaults]
    written = [_one(source, a, a.annotation, d) for a, d in zip(places, defaults, strict=True)]
    if args.posonlyargs:
        written.insert(len(args.posonlyargs), "/")
    if args.vararg is not None:
        written.append("*" + _one(source, args.vararg, args.vararg.annotation, None))
    elif args.kwonlyargs:
        written.append("*")
    keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    written += [_one(source, a, a.annotation, default) for a, default in keywords]
    if args.kwarg is not None:
        written.append("**" + _one(source, args.kwarg, args.kwarg.annotation, None))
    return written if not places or places[0].arg != "self" else written[1:]


def _one(source: str, name: ast.AST, annotation: ast.expr | None, default: ast.expr | None) -> str:
    """One parameter."""
    text = name.arg if isinstance(name, ast.arg) else ast.unparse(name)
    if annotation is not None:
        text += f": {_type(annotation)}"
    if default is not None:
        text += f" = {' '.join((ast.get_source_segment(source, default) or '').split())}"
    return text


def _type(annotation: ast.expr) -> str:
    """Without the quotes of classes that are defined later."""
    return ast.unparse(annotation).replace("'", "")


def _bracketed(parameters: list[str]) -> str:
    return f"({', '.join(parameters)})"


def _by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """A class that a signature names as its module imports it, without the public path."""
    last = node["reftarget"].split(".")[-1]
    objects = env.domains.python_domain.objects.items()
    found = [o for name, o in objects if name.split(".")[-1] == last and o.objtype == "class"]
    if node["refdomain"] != "py" or len(found) != 1:
        return None
    ((docname, identifier, _, _),) = found
    return make_refnode(app.builder, node["refdoc"], docname, identifier, content)
