"""Links that read the same on GitHub and on the site.

Pages link to each other and to files of the repository by relative paths. Here those to files
that have no page become links to the public repository, after a look whether they exist; those to
files that a page includes become links to that page. A name after #, as in
``api/rows.md#rmsprop_jax.rows.init``, leads to its description.
"""

import os.path
from pathlib import Path
import re
from typing import Any

from markdown_it.tree import SyntaxTreeNode
import myst_parser.parsers.sphinx_ as myst
from myst_parser.slugs import github_slugify
from myst_parser.warnings_ import MystWarnings
from sphinx import addnodes
from sphinx.application import Sphinx

_ROOT = Path(__file__).parents[2]


def setup(app: Sphinx) -> dict[str, Any]:
    """Makes MyST resolve links with the class below."""
    app.add_config_value("repository_url", "", "env")
    app.add_config_value("pages_of_files", {}, "env")  # files by the documents that include them
    myst.SphinxRenderer = RepositoryRenderer
    return {"parallel_read_safe": True}


class RepositoryRenderer(myst.SphinxRenderer):
    """MyST's, for which a link is relative to the file in which it stands, also an included one."""

    def render_link_unknown(self, token: SyntaxTreeNode) -> None:
        """A link without a scheme."""
        config = self.sphinx_env.config
        path, _, heading = self.md.normalizeLinkText(str(token.attrs["href"])).partition("#")
        file = Path(os.path.normpath(Path(self.document["source"]).parent / path))
        in_repository = file.relative_to(_ROOT).as_posix() if file.is_relative_to(_ROOT) else None
        if in_repository in config.pages_of_files:
            file = Path(self.sphinx_env.doc2path(config.pages_of_files[in_repository]))
        if heading.startswith("rmsprop_jax."):
            self._render_link_to_name(token, heading)
            return
        if file.is_relative_to(self.sphinx_env.srcdir) and self.sphinx_env.path2doc(file):
            here = Path(self.sphinx_env.doc2path(self.sphinx_env.docname)).parent
            token.attrs["href"] = os.path.relpath(file, here) + (heading and f"#{heading}")
            super().render_link_unknown(token)
            return
        if in_repository is None or not file.exists() or not _has_heading(file, heading):
            self.create_warning(
                f"no such file or heading in the repository: {token.attrs['href']!r}",
                MystWarnings.XREF_MISSING,
                line=token.map[0] if token.map else 0,
                append_to=self.current_node,
            )
        kind = "tree" if file.is_dir() else "blob"
        href = f"{config.repository_url}/{kind}/main/{in_repository}"
        token.attrs["href"] = href + (heading and f"#{heading}")
        self.render_link_url(token)

    def _render_link_to_name(self, token: SyntaxTreeNode, name: str) -> None:
        """A link to a public name: ``api/rows.md#rmsprop_jax.rows.init``."""
        node = addnodes.pending_xref(
            refdomain="py",
            reftype="obj",
            reftarget=name,
            refdoc=self.sphinx_env.docname,
            refexplicit=True,
        )
        self._process_wrap_node(node, token, explicit=True, classes=["xref"], path_dest=name)


def _has_heading(file: Path, slug: str) -> bool:
    if not slug or file.suffix != ".md":
        return True
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return slug in {github_slugify(heading) for heading in headings}
