"""The pages under docs/reference are written from the code, and are those of this code."""

import sys

import pytest

from docs import generate


def test_the_reference_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, generate.help_of(name, command)) for name, command in generate.commands()],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_the_help_of_every_command_has_examples(name: str, text: str) -> None:
    if name in ("lydian bench", "lydian token", "lydian token join"):  # a program of its own; a group
        pytest.skip(f"{name} is shown by another page, or only a group")
    assert "Examples:" in text
    assert f"{name} " in text.partition("Examples:")[2] or name == "lydian"


def test_a_page_that_is_out_of_date_is_named_and_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path_factory.mktemp("reference"))
    assert generate.main(["--check"]) == 1
    assert "errors.md is out of date: run `make docs`" in capsys.readouterr().err
    assert not list(generate.FOLDER.iterdir())
    assert "server" in sys.modules  # the calls come from the application itself
