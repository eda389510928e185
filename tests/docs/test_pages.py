"""Nothing is forgotten: read from the sources of the pages, without building the site."""

import inspect
from pathlib import Path
import re

import pytest

from pages import DOCS, MODULES, ROOT, documents, in_navigation, page_of, public_names
import rmsprop_jax


def test_every_document_is_in_the_navigation_once():
    assert sorted(in_navigation()) == sorted(documents())


def test_the_start_page_includes_the_navigation():
    assert "```{include} navigation.md\n```" in (DOCS / "index.md").read_text()


def test_every_public_module_has_a_page():
    public = {name for name in rmsprop_jax.__all__ if inspect.ismodule(getattr(rmsprop_jax, name))}
    assert public == {module.__name__.split(".")[-1] for module in MODULES[1:]}
    assert all(page_of(module).is_file() for module in MODULES)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_on_the_page_of_its_module(module):
    """By itself, or as one of all members without those that stand there by themselves."""
    page = page_of(module).read_text()
    by_themselves = set(re.findall(r"\.\. auto(?:function|class):: (\w+)", page))
    assert by_themselves <= public_names(module)
    if ":members:\n" in page:
        left_out = re.findall(r":exclude-members: (.*)", page)
        assert {name for names in left_out for name in names.split(", ")} == by_themselves
    else:
        assert by_themselves == public_names(module)


def test_type_aliases_are_those_of_the_code():
    page = (DOCS / "api" / "index.md").read_text()
    aliases = re.findall(r"\.\. py:type:: (\w+)\n +:canonical: (.+)", page)
    assert len(aliases) >= 8
    code = "\n".join(path.read_text() for path in (ROOT / "rmsprop_jax").rglob("*.py"))
    for name, meaning in aliases:
        assert re.search(rf"^{name} = {re.escape(meaning)}(  #.*)?$", code, re.MULTILINE), name


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("benchmarks", "benchmarks/README.md"),
        ("gallery", "examples/README.md"),
        ("changelog", "CHANGELOG.md"),
        ("contributing", "CONTRIBUTING.md"),
    ],
)
def test_pages_include_the_files_of_the_repository(page, file):
    assert f"```{{include}} ../{file}\n" in (DOCS / f"{page}.md").read_text()
    assert f'"{file}": "{page}",' in Path(DOCS / "conf.py").read_text()  # for links to them


def test_every_example_is_in_the_gallery():
    """It is made of the README of the examples, with a card for each block of commands."""
    assert "```{gallery}\n```" in (DOCS / "gallery.md").read_text()
    text = (ROOT / "examples" / "README.md").read_text()
    told = re.findall(r"^python examples/(\w+\.py)", text, re.MULTILINE)
    also = re.findall(r"\[`(\w+\.py)`\]\(\1\)", text)
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    imported = {"drawing.py", "real_data.py", "recovery.py"}
    assert {*told, *also} | imported == scripts
