"""Equations as MathML, which browsers render themselves: no script, no font, no network."""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True}


def rendered(latex: str, as_block: bool = False) -> str:
    """MathML, in which bars stand close to what is between them, unlike operators."""
    if as_block and "\\\\" in latex and "\\begin" not in latex:
        latex = f"\\begin{{aligned}}{latex}\\end{{aligned}}"
    mathml: str = tex2mathml(latex, as_block=as_block)
    return mathml.replace(
        '<mo stretchy="false">|<', '<mo stretchy="false" lspace="0" rspace="0">|<'
    )


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(rendered(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    equation = rendered(node.astext().strip(), as_block=True)
    translator.body.append(f'<div class="equation">{equation}</div>\n')
    raise nodes.SkipNode
