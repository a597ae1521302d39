"""The documentation: every page has a place, every link leads somewhere, and the HTML of it works by itself."""

import ast
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.site import __main__ as site
from docs.site import links, markdown
from docs.site.navigation import HOME, NO_PAGES, PARTS, ROOT, pages
from tests.test_architecture import kept_files

# ---------------------------------------------------------------- what is kept


def test_every_page_is_in_the_navigation_exactly_once() -> None:
    listed = Counter([HOME, *(page for part in PARTS for page in part.pages)])
    assert [page for page, times in listed.items() if times > 1] == []
    there = {path.relative_to(ROOT).as_posix() for path in kept_files() if path.suffix == ".md"} - NO_PAGES
    assert there - set(listed) == set(), "a page without a place: add it to docs/site/navigation.py"
    assert set(listed) <= there, "a place without a page"


def test_no_link_picture_or_anchor_leads_nowhere() -> None:
    read = {page: markdown.read((ROOT / page).read_text(encoding="utf-8")) for page in pages()}
    assert list(links.faults(read, ROOT)) == []


def test_a_page_begins_with_one_title() -> None:
    for page in pages():
        headings = markdown.headings(markdown.read((ROOT / page).read_text(encoding="utf-8")))
        assert [heading.level for heading in headings].count(1) == 1, page
        assert headings[0].level == 1, page


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("[x](other.md)", ""), ("[x](other.md#a-heading)", ""), ("[x](#here)", ""), ("[x](deep/code.py)", ""),
        ("[x](https://example.org/no)", ""), ("`[x](no.md)`", ""), ("    [x](no.md)", ""),
        ("[x](no.md)", "link 'no.md': there is no docs/no.md"),
        ("[x](other.md#no)", "docs/other.md has no heading #no"),
        ("[x](#no)", "docs/page.md has no heading #no"),
        ("![x](no.png)", "picture 'no.png': there is no docs/no.png"),
        ("[x](deep)", "docs/deep is a folder"), ("[x](../../x)", "there is no ../x"),
        ("[x](deep/code.py#f)", "docs/deep/code.py has no headings"),
        ("| a |\n|---|\n| [x](no.md) |", "docs/page.md:5"),
    ],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_named_with_its_line(written: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "code.py").touch()
    texts = {"docs/page.md": f"# Here\n\n{written}\n", "docs/other.md": "# Other\n\n## A heading\n"}
    for page, text in texts.items():
        (tmp_path / page).write_text(text)
    found = list(links.faults({page: markdown.read(text) for page, text in texts.items()}, tmp_path))
    assert len(found) == (why != "")
    assert why in "".join(found)


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Several GPUs in a machine", "several-gpus-in-a-machine"), ("`[train]`, and more", "train-and-more"),
        ("A & B", "a--b"), ("new_key = 1.5", "new_key--15"), ("Müller", "müller"), ("*Wide* [link](x.md)", "wide-link"),
    ],
)  # fmt: skip
def test_a_heading_has_the_anchor_that_it_has_on_github(heading: str, anchor: str) -> None:
    assert [one.anchor for one in markdown.headings(markdown.read(f"# {heading}\n"))] == [anchor]


def test_headings_that_read_the_same_have_anchors_of_their_own() -> None:
    assert [one.anchor for one in markdown.headings(markdown.read("# A\n\n## B\n\n## B\n\n## B\n"))] == [
        "a", "b", "b-1", "b-2"
    ]  # fmt: skip


# ---------------------------------------------------------------- what is written


class Page(HTMLParser):
    """What a page has and points to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.points: list[str] = []
        self.tags: Counter[str] = Counter()
        self.current = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.ids += [given["id"]] if given.get("id") else []
        self.points += [value for name in ("href", "src") if (value := given.get(name))]
        self.current += given.get("aria-current") == "page"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    assert site.main([str(folder)]) == 0
    return folder


def test_every_link_of_the_html_is_answered_within_the_folder(built: Path) -> None:
    read = {path: Page(path) for path in built.rglob("*.html")}
    assert len(read) == len(pages())
    assert list(dead(read, built)) == []


def dead(read: dict[Path, Page], built: Path) -> Iterator[str]:
    """Links of pages that lead out of the folder, to no file, or to no anchor."""
    for path, page in read.items():
        for to in page.points:
            if to.startswith(links.OUTSIDE):
                continue
            name, _, anchor = to.partition("#")
            target = (path.parent / links.unquote(name)).resolve() if name else path
            found = target.is_relative_to(built.resolve()) or target == path
            if not found or not target.is_file() or (anchor and links.unquote(anchor) not in read[target].ids):
                yield f"{path.relative_to(built)}: {to}"


def test_a_page_runs_no_script_loads_nothing_from_elsewhere_and_says_where_one_is(built: Path) -> None:
    for path in built.rglob("*.html"):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert page.tags["script"] == page.tags["iframe"] == 0
        assert len(page.ids) == len(set(page.ids)), path.name
        assert page.current == (path.name != "index.html")
        assert 'src="http' not in text
        assert "<link" in text
    style = (built / "style.css").read_text()
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 860px", ":focus-visible"):
        assert rule in style
    assert "http" not in style


def test_python_in_a_page_is_python() -> None:
    for page in pages():
        for block in markdown.READER.parse((ROOT / page).read_text(encoding="utf-8")):
            if block.type == "fence" and block.info == "python":
                compile(block.content, f"{page}:{(block.map or [0])[0] + 1}", "exec", ast.PyCF_ONLY_AST)
