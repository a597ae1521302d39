"""Unit files as systemd reads them: as strict, and written from its manual, not from the code that writes them."""

import re

SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, '"': 34, "'": 39, "s": 32}


def read_words(line: str) -> list[str]:
    """The words of a line as systemd.syntax(7) has them, without specifiers; ValueError for what it warns about."""
    words: list[bytearray] = []
    at, quoted, inside = 0, "", False
    while at < len(line):
        c = line[at]
        if not quoted and c in " \t":
            inside = False
            at += 1
            continue
        if not inside:
            words.append(bytearray())
            inside = True
        if c == quoted:
            quoted = ""
        elif not quoted and c in "\"'":
            quoted = c
        elif c == "\\":
            at += 1
            if line[at] == "x":
                words[-1].append(int(line[at + 1 : at + 3], 16))
                at += 2
            else:
                words[-1].append(SIMPLE[line[at]])
        elif c == "%":
            at += 1
            if line[at] != "%":
                raise ValueError(f"specifier %{line[at]}")
            words[-1] += b"%"
        else:
            words[-1] += c.encode()
        at += 1
    if quoted:
        raise ValueError("an open quote")
    return [word.decode() for word in words]


def read_unit(text: str) -> dict[str, list[str]]:
    """key -> values, as systemd reads a unit; ValueError for a line that is none."""
    found: dict[str, list[str]] = {}
    for line in re.split(r"[\n\r\0]", text):
        if not line or line[0] in "#;[":
            continue
        assert not line.endswith("\\")  # it would swallow the next line
        key, sign, value = line.partition("=")
        if not sign or not re.fullmatch(r"[A-Z][A-Za-z]+", key):
            raise ValueError(line)
        found.setdefault(key, []).append(value)
    return found
