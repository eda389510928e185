"""The directive ``gallery``: a card for each example of ``examples/README.md``."""

from pathlib import Path
import re
from typing import Any, NamedTuple

from docutils import nodes
from myst_parser.slugs import github_slugify
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

README = Path(__file__).parents[2] / "examples" / "README.md"


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True}


class Example(NamedTuple):
    """A script, the heading it stands under, and its picture, if it has one."""

    script: str
    heading: str
    picture: str | None
    shows: str


def examples(text: str) -> list[Example]:
    """Those of a page, in its order: each is a block of commands, and a picture or words below."""
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        blocks = re.findall(
            r"```sh\npython examples/(\w+\.py).*?```\n\n(.*?)(?=\n```sh|\Z)", body, re.DOTALL
        )
        for script, below in blocks:
            picture = re.match(r"!\[(.+?)\]\((.+?)\)", below)
            first_sentence = re.split(r"(?<=\.)\s", below)[0].replace("\n", " ")
            shows, path = picture.groups() if picture else (first_sentence, None)
            found.append(Example(script, heading, path, shows))
    return found


class Gallery(SphinxDirective):
    """Cards in a grid, two beside each other where there is room."""

    def run(self) -> list[nodes.Node]:
        """The nodes of the grid."""
        self.env.note_dependency(README)
        lines = [":::::{grid} 1 1 2 2", ":gutter: 3", ""]
        for one in examples(README.read_text()):
            lines += [f"::::{{grid-item-card}} {one.heading}"]
            if one.picture:
                lines += [f":img-top: ../examples/{one.picture}", f":img-alt: {one.shows}"]
            lines += ["", one.shows.rstrip(".") + ".", "", ":::{card-footer}"]
            lines += [f"[Results](#{github_slugify(one.heading)}) ·"]
            lines += [f"[`{one.script}`](../examples/{one.script})", ":::", "::::", ""]
        return self.parse_text_to_nodes("\n".join([*lines, ":::::"]))
