"""Templates and static files, read once; everything that a template is given is escaped."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common import __version__
from server.pages import words

HERE = Path(__file__).parent
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Headers of every answer to a page: only our own files run, nothing is framed, and no address is told to others."""


@dataclass(frozen=True)
class StaticFile:
    """A file that is served as it is."""

    data: bytes
    media_type: str
    version: str


@cache
def static_files() -> dict[str, StaticFile]:
    """Name -> file. Nothing else can be asked for, whatever a path says."""
    found = [path for path in (HERE / "static").rglob("*") if path.suffix in TYPES]
    return {path.name: _read(path) for path in found}


def _read(path: Path) -> StaticFile:
    data = path.read_bytes()
    return StaticFile(data, TYPES[path.suffix], hashlib.sha256(data).hexdigest()[:16])


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for name in ("size", "duration", "measure", "count", "several"):
        environment.filters[name] = getattr(words, name)
    environment.globals["version"] = __version__
    return environment


def render(template: str, **values: object) -> str:
    """A template, filled."""
    return _environment().get_template(template).render(**values)
