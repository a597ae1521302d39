"""The commands that README and docs tell people to type, read off the Markdown.

A command is a line of a code block that begins, after a `$`, with a program of ours or one that we ask for. Examples in
the help of commands (docs/reference/cli.md) are indented below `Examples:`; what stands indented elsewhere is output.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.site.markdown import READER
from docs.site.navigation import HOME, PARTS, ROOT

PROGRAMS = (
    "lydian", "submit_job", "make", "python", "python3", "pip", "uvicorn", "git", "curl", "docker", "sudo", "tailscale",
    "apt", "apt-get", "systemctl", "journalctl",
)  # fmt: skip
LANGUAGES = ("", "sh", "bash", "console", "text")
COMMAND = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S* )*(?:{'|'.join(PROGRAMS)})(?: |$)")
INLINE = re.compile(r"lydian [a-z](?:(?!/ |\[[a-z])[^…|<>⇥])*")
EXAMPLE = re.compile(r" {2,6}(?:sudo \S*/)?lydian .*")


@dataclass(frozen=True)
class Command:
    """A command as a page has it."""

    page: str  # from the root
    line: int  # from 1
    words: tuple[str, ...]  # without comment, redirection, prompt and variables; what is optional is in it
    settings: tuple[str, ...] = ()  # NAME=VALUE before it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def commands(root: Path = ROOT) -> list[Command]:
    """Every command of every page."""
    pages = [HOME, *(page for part in PARTS for page in part.pages)]
    return [found for page in pages if (root / page).is_file() for found in of_page(page, (root / page).read_text())]


def of_page(page: str, text: str) -> Iterator[Command]:
    """The commands of one page."""
    for block in READER.parse(text):
        if block.type not in ("fence", "code_block") or block.info not in LANGUAGES or block.map is None:
            continue
        first = block.map[0] + (2 if block.type == "fence" else 1)
        for at, line in joined(block.content):
            is_example = page.endswith("reference/cli.md") and EXAMPLE.fullmatch(line)
            if COMMAND.match(line) or is_example:
                yield command(page, first + at, line)


def joined(block: str) -> Iterator[tuple[int, str]]:
    r"""(number, line) of a block; a line that ends with \ and the next ones are one."""
    held, began = "", 0
    for at, line in enumerate(block.splitlines()):
        began, held = (began, held + line.lstrip()) if held else (at, line)
        if not held.endswith("\\"):
            yield began, held
            held = ""
        else:
            held = held[:-1]


def command(page: str, line: int, text: str) -> Command:
    """A line as the words of a command: without prompt, comment and what the shell does with its output."""
    bare = re.split(r"\s#|\s{2,}|\s(?:\d?>>?\S*|\|)(?:\s|$)", text.strip().removeprefix("$ "))[0]
    whole = re.sub(r"(?<=\s)\[(?=-)|(?<=\w)\](?=\s|$)", "", bare)  # [--round N]: what may be left out is tried
    words = shlex.split(whole)
    at = next(number for number, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    return Command(page, line, tuple(words[at:]), tuple(words[:at]))


def inline(page: str, text: str) -> Iterator[Command]:
    """Whole commands within a sentence: `lydian submit digits --rounds 5`. One with … or a choice is none."""
    for block in READER.parse(text):
        for child in block.children or []:
            if child.type == "code_inline" and INLINE.fullmatch(child.content):
                yield command(page, (block.map or [0])[0] + 1, child.content)
