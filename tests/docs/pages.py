"""The pages of the site, according to its navigation and the public modules."""

import inspect
from pathlib import Path
import re

import rmsprop_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODULES = [
    rmsprop_jax,
    *(m for _, m in inspect.getmembers(rmsprop_jax, inspect.ismodule) if hasattr(m, "__all__")),
]
_TOCTREE = re.compile(r"```\{toctree\}\n(.*?)```", re.DOTALL)


def in_navigation():
    """The names of all documents in a toctree, without suffix, and the start page."""
    found = ["index"]
    for source in DOCS.rglob("*.md"):
        folder = source.parent.relative_to(DOCS)
        for block in _TOCTREE.findall(source.read_text()):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            names = [re.sub(r".*<(.+)>", r"\1", line) for line in lines]
            found += [(folder / name).as_posix() for name in names if name != "self"]
    return found


def documents():
    """The names of all documents that there are."""
    names = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    return names - {"navigation"}  # which the start page includes


def public_names(module):
    return {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}


def page_of(module):
    return DOCS / "api" / f"{module.__name__.split('.')[-1].replace('rmsprop_jax', 'rmsprop')}.md"
