"""Writes build/site from the Markdown: `python -m docs.site [FOLDER]`. Works offline, and so does what it writes.

    navigation ──pages──▶ markdown ──tokens──▶ links (is everything there?) ──▶ page.html, style.css ──▶ build/site

No script runs on a page; other files of the repository that a page points to are copied beside it.
"""

import shutil
import sys
from html import escape
from pathlib import Path
from posixpath import dirname, relpath
from string import Template

from markdown_it.token import Token

from docs.site import links, markdown
from docs.site.navigation import HOME, NO_PAGES, PARTS, ROOT, pages

HERE = Path(__file__).resolve().parent
TARGET = ROOT / "build" / "site"
PICTURES = frozenset({".png", ".svg"})


def main(arguments: list[str]) -> int:
    """Write the site; exit code 1 where a link leads nowhere."""
    target = Path(arguments[0]) if arguments else TARGET
    read = {page: markdown.read((ROOT / page).read_text(encoding="utf-8")) for page in pages()}
    wrong = list(links.faults(read, ROOT))
    if wrong:
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 1
    write(read, target)
    sys.stdout.write(f"{target / 'index.html'}\n")
    return 0


def write(read: dict[str, list[Token]], target: Path) -> None:
    """Write every page and what it needs. What was in the folder is gone."""
    shutil.rmtree(target, ignore_errors=True)
    template = Template((HERE / "page.html").read_text(encoding="utf-8"))
    outs = {path: out_of(path) for path in (*read, *links.files_of(read, ROOT))}
    titles = {page: title_of(tokens) for page, tokens in read.items()}
    order = list(read)
    for at, (page, tokens) in enumerate(read.items()):
        sections = [heading for heading in markdown.headings(tokens) if heading.level == 2]
        markdown.point(tokens, moved(page, tokens, outs))
        text = template.substitute(
            title=escape(titles[page]),
            style=relative(page, "style.css"),
            home=link(page, HOME, outs),
            navigation=navigation(page, titles, outs, sections),
            body=markdown.html(tokens),
            source=escape(page),
            before=step(page, order[at - 1], titles, outs, "before") if at else "",
            after=step(page, order[at + 1], titles, outs, "after") if at + 1 < len(order) else "",
        )
        put(target / outs[page], text.encode())
    put(target / "style.css", (HERE / "style.css").read_bytes())
    for path, out in outs.items():
        if path not in read:
            put(target / out, (ROOT / path).read_bytes())


def out_of(path: str) -> str:
    """Where a file of the repository is on the site. Code is text there: a browser shows it, and saves no .py."""
    place = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
    if place.endswith(".md") and path not in NO_PAGES:
        return place.removesuffix(".md") + ".html"
    return place if Path(place).suffix in PICTURES else f"{place}.txt"


def put(path: Path, data: bytes) -> None:
    """Write a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def title_of(tokens: list[Token]) -> str:
    """The first heading."""
    return next(heading.text for heading in markdown.headings(tokens))


def relative(page: str, out: str) -> str:
    """The way from a page to a place on the site."""
    return relpath(out, dirname(out_of(page)) or ".")


def link(page: str, to: str, outs: dict[str, str]) -> str:
    """The same to another page, ready for an attribute."""
    return escape(relative(page, outs[to]))


def moved(page: str, tokens: list[Token], outs: dict[str, str]) -> dict[str, str]:
    """As written -> as it is on the site. What leads to a folder stays in words: it has no page."""
    there = {}
    for target in markdown.targets(tokens):
        place = links.place_of(page, target.to)
        if place is not None and place.path in outs:
            anchor = f"#{place.anchor}" if place.anchor else ""
            there[target.to] = relative(page, outs[place.path]) + anchor
    return there


def navigation(page: str, titles: dict[str, str], outs: dict[str, str], sections: list[markdown.Heading]) -> str:
    """The four parts as lists; the page that one is on has its sections under it."""
    lines = []
    for part in PARTS:
        lines.append(f"<h2>{part.title} <small>{part.about}</small></h2>\n<ul>")
        for one in (one for one in part.pages if one in titles):
            here = ' aria-current="page"' if one == page else ""
            inner = ""
            if one == page and sections:
                points = "".join(f'<li><a href="#{s.anchor}">{escape(s.text)}</a></li>' for s in sections)
                inner = f"\n<ul>{points}</ul>"
            lines.append(f'<li><a href="{link(page, one, outs)}"{here}>{escape(titles[one])}</a>{inner}</li>')
        lines.append("</ul>")
    return "\n".join(lines)


def step(page: str, to: str, titles: dict[str, str], outs: dict[str, str], which: str) -> str:
    """A link to the page before or after."""
    arrow = {"before": ("← ", ""), "after": ("", " →")}[which]
    return f'<a class="{which}" href="{link(page, to, outs)}">{arrow[0]}{escape(titles[to])}{arrow[1]}</a>'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
