"""What users read: every node has its texts, help page and picture of it in every language."""
import json
import re

import comfy_server
import pytest
from english import english, own_nodes
from test_server import cpu_option

LANGUAGES = "en", "zh", "zh-TW"
INPUTS = "## Inputs", "## 输入", "## 輸入"
DOCS = comfy_server.REPOSITORY / "nodes/web/docs"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    base = tmp_path_factory.mktemp("texts")
    comfy_server.prepare(base)
    with comfy_server.running(base, *cpu_option()) as server:
        yield own_nodes(server)


def locale(language):
    return json.loads((comfy_server.REPOSITORY / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))


def test_english_is_the_nodes_own_text(nodes):
    """`python tests/nodes/host/english.py` brings the file up to date."""
    assert locale("en") == {name: english(node) for name, node in nodes.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(nodes, language):
    for name, node in nodes.items():
        wanted, found = english(node), locale(language)[name]
        for group in ("inputs", "outputs"):
            assert found[group].keys() >= wanted[group].keys(), name
            for key, texts in found[group].items():
                assert texts["name"] and texts["tooltip"], (name, key)
        if language != "en":
            sentences = [found["description"], *(texts["tooltip"] for texts in found["inputs"].values())]
            assert all(re.search(r"[\u4e00-\u9fff]", text) for text in sentences), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_page_names_every_widget(nodes, language):
    for name, node in nodes.items():
        page = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
        widgets = {texts["name"] for texts in english(node)["inputs"].values()}
        for widget in widgets - {"model", "samples"}:
            assert widget in page, (name, widget)
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
        assert pictures and all((DOCS / picture).is_file() for picture in pictures), (name, pictures)
        for line in re.findall(r"^- \*\*(?!model|samples|params|other_positive).*", inputs_of(page), re.MULTILINE):
            assert re.search(r"\*(Recommended: |建议：|建議：)", line), (name, line)


def inputs_of(page):
    """The section of that heading."""
    return re.split(r"^## ", page.split(next(filter(page.__contains__, INPUTS)))[1], flags=re.MULTILINE)[0]
