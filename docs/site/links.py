"""Whether everything that the pages point to is there: files, pictures, anchors. Nothing outside is asked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote

from markdown_it.token import Token

from docs.site.markdown import headings, targets

OUTSIDE = ("http://", "https://", "mailto:")


@dataclass(frozen=True)
class Place:
    """Where a link leads, within the repository."""

    path: str  # from the root
    anchor: str  # empty: the top


def place_of(page: str, to: str) -> Place | None:
    """What a link on a page means; None: something outside.

    Args:
        page: from the repository's root.
        to: as it is written there.
    """
    if to.startswith(OUTSIDE):
        return None
    path, _, anchor = unquote(to).partition("#")
    return Place(normpath(join(dirname(page), path)) if path else page, anchor)


def faults(pages: Mapping[str, list[Token]], root: Path) -> Iterator[str]:
    """One sentence for each link that leads nowhere.

    Args:
        pages: page -> its tokens; only these have anchors.
        root: of the repository.
    """
    anchors = {page: {heading.anchor for heading in headings(tokens)} for page, tokens in pages.items()}
    for page, tokens in pages.items():
        for target in targets(tokens):
            place = place_of(page, target.to)
            if place is not None and (why := _fault(place, anchors, root)):
                yield f"{page}:{target.line}: {'picture' if target.picture else 'link'} {target.to!r}: {why}"


def _fault(place: Place, anchors: Mapping[str, set[str]], root: Path) -> str:
    """What is wrong with it; empty: nothing."""
    if place.path.startswith("..") or not (root / place.path).exists():
        return f"there is no {place.path}"
    if (root / place.path).is_dir():
        return f"{place.path} is a folder, which has no page: point at a file in it"
    if not place.anchor:
        return ""
    if place.path not in anchors:
        return f"{place.path} has no headings to point at"
    return "" if place.anchor in anchors[place.path] else f"{place.path} has no heading #{place.anchor}"


def files_of(pages: Mapping[str, list[Token]], root: Path) -> Sequence[str]:
    """The files, not pages, that the pages point to, from the root: what a copy of the site needs."""
    places = {
        place.path
        for page, tokens in pages.items()
        for target in targets(tokens)
        if (place := place_of(page, target.to)) is not None
    }
    return sorted(path for path in places - set(pages) if (root / path).is_file())
