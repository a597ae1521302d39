"""Markdown into tokens and HTML. Headings have the anchors that GitHub gives them, so a link works in both places."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@dataclass(frozen=True)
class Heading:
    """A heading of a page."""

    level: int  # 1 to 6
    text: str
    anchor: str


@dataclass(frozen=True)
class Target:
    """What a link or a picture of a page points to."""

    line: int  # of the block that it is in, from 1
    to: str
    picture: bool


def read(text: str) -> list[Token]:
    """The page as tokens; each heading has its anchor as `id`."""
    tokens = READER.parse(text)
    taken: dict[str, int] = {}
    for opening, inner in pairwise(tokens):
        if opening.type == "heading_open":
            anchor = slug(plain(inner))
            seen = taken.get(anchor, -1) + 1
            taken[anchor] = seen
            opening.attrSet("id", f"{anchor}-{seen}" if seen else anchor)
    return tokens


def slug(heading: str) -> str:
    """The anchor of a heading: lower case, spaces as dashes, and nothing but letters, digits, - and _ of the rest."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def plain(inline: Token) -> str:
    """The text of a line without its marks."""
    return "".join(
        child.content if child.type in ("text", "code_inline") else " " if child.type.endswith("break") else ""
        for child in inline.children or []
    )


def headings(tokens: list[Token]) -> list[Heading]:
    """The headings of a page, in order."""
    return [
        Heading(int(opening.tag[1]), plain(inner), str(opening.attrGet("id")))
        for opening, inner in pairwise(tokens)
        if opening.type == "heading_open"
    ]


def targets(tokens: list[Token]) -> Iterator[Target]:
    """What a page points to. Within code nothing is a link."""
    for block in tokens:
        for child in block.children or []:
            to = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if child.type in ("link_open", "image") and to is not None:
                yield Target((block.map or [0])[0] + 1, str(to), child.type == "image")


def point(tokens: list[Token], there: dict[str, str]) -> None:
    """Have links and pictures point somewhere else: old target -> new one."""
    for block in tokens:
        for child in block.children or []:
            name = {"link_open": "href", "image": "src"}.get(child.type)
            if name is not None and (to := str(child.attrGet(name))) in there:
                child.attrSet(name, there[to])


def html(tokens: list[Token]) -> str:
    """The page's body. A table, which may be wider than a phone, scrolls by itself; so does code."""
    body = READER.renderer.render(tokens, READER.options, {})
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    return body.replace("<pre>", '<pre tabindex="0">')
