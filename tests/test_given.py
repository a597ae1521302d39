"""The options of a service: paths become absolute, tokens are refused, and nothing else changes."""

from pathlib import Path

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from client.service import given
from common.errors import LydianError

HERE = Path("/home/me")
JOIN = f"lyd_join_0123456789ab_{'A' * 43}"
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda text: not text.startswith("--"))
OTHERS = st.sampled_from(["--name", "--device", "--threads", "--verbose", "-v"])


@examples(st.lists(OTHERS | PLAIN, max_size=8))
def test_options_without_paths_stay_as_they_are(options: list[str]) -> None:
    assert given.absolute(options, HERE) == options


@pytest.mark.parametrize(
    ("options", "absolute"),
    [
        (["--allow", "t.py"], ["--allow", "/home/me/t.py"]),
        (["--allow=t.py", "x"], ["--allow=/home/me/t.py", "x"]),
        (["--data", "a=b/c", "t.py"], ["--data", "a=/home/me/b/c", "t.py"]),
        (["--data=a=/b"], ["--data=a=/b"]),
        (["--data", "a"], ["--data", "a"]),  # the program says what is wrong with it
        (["--verbose", "--state-dir", "s"], ["--verbose", "--state-dir", "/home/me/s"]),
        (["--name", "a=b"], ["--name", "a=b"]),
    ],
)
def test_a_path_becomes_absolute(options: list[str], absolute: list[str]) -> None:
    assert given.absolute(options, HERE) == absolute
    assert given.absolute(absolute, Path("/elsewhere")) == absolute


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/you")
    assert given.absolute(["--allow", "~/t.py"], HERE) == ["--allow", "/home/you/t.py"]


@examples(st.lists(PLAIN, max_size=4), st.lists(PLAIN, max_size=4), PLAIN)
def test_an_option_is_found_and_taken_out_wherever_it_stands(before: list[str], after: list[str], value: str) -> None:
    for option in ([f"--state-dir={value}"], ["--state-dir", value]):
        options = ["url", "-v", *before, *option, "--name", "n", *after]
        assert given.values(options, "--state-dir") == [value]
        assert given.without(options, "--state-dir") == ["url", "-v", *before, "--name", "n", *after]


@pytest.mark.parametrize("options", [["--token", "x"], ["--token=x"], ["--name", JOIN], [f"--name={JOIN}"]])
def test_a_token_is_refused_and_not_repeated(options: list[str]) -> None:
    with pytest.raises(LydianError, match="list of processes") as refused:
        given.check_no_secret(options)
    assert JOIN not in refused.value.lines()


def test_what_ends_at_once_is_no_service() -> None:
    given.check_no_secret(["--port", "1", "url"])
    with pytest.raises(LydianError, match="would end at once"):
        given.check_no_secret(["--version"])


@pytest.mark.parametrize("bad", ["", " ", "x", JOIN.replace("join", "admin"), f"{JOIN} {JOIN}", f"{JOIN}\nA=1"])
def test_what_is_no_join_token_is_refused_and_not_repeated(bad: str) -> None:
    with pytest.raises(LydianError, match="a worker joins with a join token") as refused:
        given.check_join_token(bad)
    assert JOIN[-40:] not in refused.value.lines()


def test_a_join_token_is_taken_without_its_line_end() -> None:
    assert given.check_join_token(f" {JOIN}\n") == JOIN


@pytest.mark.parametrize(
    ("options", "seconds"),
    [([], 60), (["--grace", "5"], 5), (["--grace=5", "--grace", "7"], 7), (["--grace", "x"], 60),
     (["--grace", "inf"], 60), (["--grace=-1"], 60)],
)  # fmt: skip
def test_the_grace_is_the_last_that_was_given_and_makes_sense(options: list[str], seconds: float) -> None:
    assert given.grace(options, 60) == seconds


def test_two_spellings_of_one_url_are_one_coordinator() -> None:
    assert given.same_coordinator("http://Box:80/", "http://box")
    assert given.same_coordinator("https://box:443/a", "https://box/a/")
    assert not given.same_coordinator("http://box:8470", "http://box:8471")
    assert not given.same_coordinator("http://box", "https://box")


LINES = st.lists(st.sampled_from(["# mine\x85\x0c", "A=1", "LYDIAN_TTL_S=3", "LYDIAN_TOKENS=x", ""]), max_size=6)


@examples(LINES, LINES, st.sampled_from(["", "LYDIAN_TOKEN=old", "  LYDIAN_TOKEN='old'", "LYDIAN_TOKEN="]))
def test_a_token_comes_and_goes_and_every_other_line_stays(before: list[str], after: list[str], old: str) -> None:
    text = "\n".join([*before, old, *after])
    kept = [line for line in text.removesuffix("\n").split("\n") if "LYDIAN_TOKEN=" not in line] if text else []
    assert given.token_in(text) == ("old" if "old" in old else None)
    with_one = given.settings_with(text, JOIN)
    assert given.token_in(with_one) == JOIN
    assert with_one == "".join(f"{line}\n" for line in [*kept, f"LYDIAN_TOKEN={JOIN}"])
    assert given.settings_with(with_one, None) == "".join(f"{line}\n" for line in kept)


def test_a_join_token_keeps_what_its_worker_must_find_and_paths_of_a_certificate_become_absolute() -> None:
    pins = f"@n0CNTRL@sha256.{'y' * 43}"
    assert given.check_join_token(f"{JOIN}{pins}\n") == f"{JOIN}{pins}"
    with pytest.raises(LydianError, match="behind the @"):
        given.check_join_token(f"{JOIN}@sha256.short")
    for words, done in (
        (["--tls", "self-made"], ["--tls", "self-made"]),
        (["--tls=tailscale"], ["--tls=tailscale"]),
        (["--tls", "chain.pem", "--tls-key=key.pem"], ["--tls", "/home/me/chain.pem", "--tls-key=/home/me/key.pem"]),
    ):
        assert given.absolute(words, Path("/home/me")) == done
