"""Tokens: only the right one passes, and its secret is nowhere but with its holder."""

import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequestError, ForbiddenError, LydianError, NotFoundError, UnauthenticatedError
from common.messages import Hardware, Registration, TorchBuild
from server.auth import Principal, RedactTokens, Tokens, guard_logs, redact, require, token_file
from server.store import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal.open(tmp_path / "journal.sqlite")) as opened:
        torch = TorchBuild(version="2.14.1", device="cpu", threads=2)
        hardware = Hardware(hostname="h", system="Linux", python="3.11", cpu="x", cores=2, memory=1, torch=torch)
        opened.worker_put("w1", Registration(name="w", protocol=1, version="1", start_id="s", hardware=hardware))
        yield opened


@pytest.fixture
def tokens(journal: Journal) -> Tokens:
    return Tokens(journal)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokens]:
    """With one token of the kinds that need no worker, for all examples of a property."""
    with closing(Journal.open(tmp_path_factory.mktemp("lasting") / "journal.sqlite")) as opened:
        tokens = Tokens(opened)
        tokens.issue("admin")
        tokens.issue("join")
        yield tokens


def secret_of(token: str) -> str:
    return token.split("_", maxsplit=3)[3]


def id_of(token: str) -> str:
    return token.split("_", maxsplit=3)[2]


# ---------------------------------------------------------------- issue and check


def test_an_issued_token_says_who_calls_also_after_a_restart(journal: Journal, tokens: Tokens) -> None:
    join, work = tokens.issue("join"), tokens.issue("work", worker="w1")
    for known in (tokens, Tokens(journal)):
        assert known.check(f"Bearer {join}") == Principal("join", id_of(join), None)
        assert known.check(f"Bearer {work}") == Principal("work", id_of(work), "w1")


def test_a_token_has_the_documented_form_and_is_new_each_time(tokens: Tokens) -> None:
    issued = {tokens.issue("admin") for _ in range(20)}
    assert len({secret_of(token) for token in issued}) == 20
    assert all(re.fullmatch(r"lyd_admin_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", token) for token in issued)


def test_the_scheme_is_read_in_any_case(tokens: Tokens) -> None:
    token = tokens.issue("join")
    assert tokens.check(f" bEARER  {token} \t").scope == "join"


@pytest.mark.parametrize("header", [None, ""])
def test_a_call_without_a_token_is_told_so(tokens: Tokens, header: str | None) -> None:
    with pytest.raises(UnauthenticatedError, match="came without a token") as refused:
        tokens.check(header)
    assert refused.value.code == "no_token"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token,
        lambda token: f"Basic {token}",
        lambda token: f"Bearer {token} {token}",
        lambda token: f"Bearer {token[:-1]}",
        lambda token: f"Bearer {token}x",
        lambda token: f"Bearer {token[:-1]}{'A' if token[-1] != 'A' else 'B'}",
        lambda token: f"Bearer {token.replace('join', 'admin', 1)}",
        lambda token: f"Bearer {token.replace(id_of(token), '0' * 12, 1)}",
        lambda token: f"Bearer {token.swapcase()}",
    ],
)
def test_anything_but_the_token_itself_is_refused_without_repeating_it(
    tokens: Tokens, spoil: Callable[[str], str]
) -> None:
    token = tokens.issue("join")
    with pytest.raises(UnauthenticatedError) as refused:
        tokens.check(spoil(token))
    assert refused.value.code == "bad_token"
    assert secret_of(token)[:20] not in str(refused.value.answer())


def test_two_tokens_cannot_be_crossed(tokens: Tokens) -> None:
    one, two = tokens.issue("join"), tokens.issue("admin")
    with pytest.raises(UnauthenticatedError, match=f"lyd_admin_{id_of(two)}_… is not known"):
        tokens.check(f"Bearer lyd_admin_{id_of(two)}_{secret_of(one)}")


@given(st.text(max_size=120))
def test_no_header_made_up_passes(lasting: Tokens, header: str) -> None:
    with pytest.raises(UnauthenticatedError):
        lasting.check(header)


def test_a_revoked_token_counts_no_more_from_the_next_call_on(journal: Journal, tokens: Tokens) -> None:
    token, other = tokens.issue("join"), tokens.issue("join")
    tokens.revoke(id_of(token))
    tokens.revoke(id_of(token))
    for known in (tokens, Tokens(journal)):
        with pytest.raises(UnauthenticatedError, match="was revoked at 20") as refused:
            known.check(f"Bearer {token}")
        assert refused.value.code == "bad_token"
        assert known.check(f"Bearer {other}").scope == "join"


def test_what_is_not_there_cannot_be_revoked(tokens: Tokens) -> None:
    with pytest.raises(NotFoundError, match="no token '0123'"):
        tokens.revoke("0123")


def test_a_work_token_is_a_workers_and_no_other_is(tokens: Tokens) -> None:
    with pytest.raises(BadRequestError):
        tokens.issue("work")
    with pytest.raises(BadRequestError):
        tokens.issue("admin", worker="w1")
    with pytest.raises(NotFoundError, match="no worker 'w9'"):
        tokens.issue("work", worker="w9")


def test_no_secret_is_in_any_file_of_the_journal(journal: Journal, tokens: Tokens) -> None:
    issued = [tokens.issue("admin"), tokens.issue("join"), tokens.issue("work", worker="w1")]
    files = list(journal.path.parent.glob("journal.sqlite*"))
    content = b"".join(file.read_bytes() for file in files)
    assert len(files) > 1
    assert [id_of(token).encode() in content for token in issued] == [True] * 3
    assert [secret_of(token).encode() in content for token in issued] == [False] * 3


# ---------------------------------------------------------------- scopes


def test_a_scope_that_is_asked_for_passes() -> None:
    require(Principal("work", "0123", "w1"), "join", "work")


def test_another_scope_is_refused_by_what_is_needed_and_what_came() -> None:
    with pytest.raises(ForbiddenError, match="of scope join or work; lyd_admin_0123_… has scope admin"):
        require(Principal("admin", "0123", None), "join", "work")


# ---------------------------------------------------------------- files


def test_a_token_file_is_made_once_and_read_ever_after(journal: Journal, tokens: Tokens, tmp_path: Path) -> None:
    token = token_file(tmp_path, "admin.token", "admin", tokens)
    assert tokens.check(f"Bearer {token}").scope == "admin"
    assert (tmp_path / "admin.token").read_text() == f"{token}\n"
    assert token_file(tmp_path, "admin.token", "admin", Tokens(journal)) == token
    assert len(journal.tokens()) == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_token_file_is_never_readable_by_others(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, opened = list[int](), os.open

    def watched(path: str | Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        if flags & os.O_CREAT:
            modes.append(os.fstat(descriptor).st_mode & 0o777)
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    mask = os.umask(0)
    try:
        token_file(tmp_path, "admin.token", "admin", tokens)
    finally:
        os.umask(mask)
    assert modes == [0o600]
    assert (tmp_path / "admin.token").stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_could_read_is_tightened_with_a_warning(
    tokens: Tokens, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = token_file(tmp_path, "admin.token", "admin", tokens)
    (tmp_path / "admin.token").chmod(0o644)
    assert token_file(tmp_path, "admin.token", "admin", tokens) == token
    assert (tmp_path / "admin.token").stat().st_mode & 0o777 == 0o600
    assert "could be read by others (mode 0644)" in caplog.text


@pytest.mark.parametrize("held", ["", "lyd_admin_000000000000_" + "x" * 43, "no token\n", "\xff\xfe", "lyd"])
def test_a_file_whose_token_does_not_count_here_gets_a_new_one(
    tokens: Tokens, tmp_path: Path, caplog: pytest.LogCaptureFixture, held: str
) -> None:
    (tmp_path / "admin.token").write_text(held, encoding="latin-1")
    token = token_file(tmp_path, "admin.token", "admin", tokens)
    assert tokens.check(f"Bearer {token}").scope == "admin"
    assert (tmp_path / "admin.token").read_text() == f"{token}\n"
    assert "not known here as one of scope admin: a new one takes its place" in caplog.text


def test_a_token_of_another_scope_in_a_file_is_not_handed_out(tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text(tokens.issue("join"))
    token = token_file(tmp_path, "admin.token", "admin", tokens)
    assert tokens.check(f"Bearer {token}").scope == "admin"


def test_a_revoked_token_in_a_file_is_replaced(tokens: Tokens, tmp_path: Path) -> None:
    old = token_file(tmp_path, "join.token", "join", tokens)
    tokens.revoke(id_of(old))
    new = token_file(tmp_path, "join.token", "join", tokens)
    assert new != old
    assert tokens.check(f"Bearer {new}").scope == "join"


def test_what_a_process_left_that_died_in_writing_is_no_obstacle(tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "admin.token.part").write_text("half")
    token = token_file(tmp_path, "admin.token", "admin", tokens)
    assert (tmp_path / "admin.token").read_text() == f"{token}\n"


def test_a_file_that_cannot_be_read_is_named(tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "admin.token").mkdir(mode=0o700)
    with pytest.raises(LydianError, match=r"admin\.token can be neither read nor written") as refused:
        token_file(tmp_path, "admin.token", "admin", tokens)
    assert refused.value.code == "token_file_unusable"


# ---------------------------------------------------------------- logs

TOKEN = "lyd_join_0123456789ab_" + "aB-_" * 10 + "xyz"
SECRET = TOKEN.split("_", maxsplit=3)[3]


class Said(Exception):
    """Says of itself what it was made with, like any error of a library may."""


@pytest.fixture
def said() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactTokens())
    logger = logging.Logger("lydian.test")
    logger.addHandler(handler)
    yield logger, stream
    handler.close()


def test_a_token_in_a_log_is_cut_to_what_is_public(said: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = said
    logger.warning(f"a {TOKEN}, twice: {TOKEN}.")
    logger.warning("b %s %d", TOKEN, 7)
    logger.warning("c %(token)s", {"token": TOKEN})
    logger.warning("d %s", Said(TOKEN))
    logger.warning("e lyd_join_%s", TOKEN.removeprefix("lyd_join_"))
    short = "lyd_join_0123456789ab_…"
    assert stream.getvalue() == f"a {short}, twice: {short}.\nb {short} 7\nc {short}\nd {short}\ne {short}\n"


def test_a_token_in_a_traceback_or_stack_is_cut_too(said: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = said
    try:
        raise Said(TOKEN)
    except Said:
        logger.exception("failed", stack_info=True)  # lyd_work_0123456789ab_shown-with-this-line
    assert "Said: lyd_join_0123456789ab_…" in stream.getvalue()
    assert "Stack (most recent call last)" in stream.getvalue()
    assert "# lyd_work_0123456789ab_…" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_arguments_stay_arguments_for_formatters_that_want_them() -> None:
    access = ("127.0.0.1:5", "GET", f"/v1/jobs?token={TOKEN}", "1.1", 200)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', access, None)
    assert RedactTokens().filter(record)
    assert record.args == ("127.0.0.1:5", "GET", "/v1/jobs?token=lyd_join_0123456789ab_…", "1.1", 200)


def test_a_message_with_arguments_that_do_not_fit_is_passed_on_redacted() -> None:
    record = logging.LogRecord("lydian", logging.INFO, "", 0, "%d workers", (TOKEN,), None)
    assert RedactTokens().filter(record)
    assert record.args == ("lyd_join_0123456789ab_…",)


def test_guarded_logs_keep_the_secret_from_every_logger_below() -> None:
    stream = io.StringIO()
    handler, parent = logging.StreamHandler(stream), logging.getLogger("lydian.test_auth")
    parent.addHandler(handler)
    try:
        guard_logs()
        guard_logs()
        logging.getLogger("lydian.test_auth.child").warning("joined with %s", TOKEN)
        assert [type(each) for each in handler.filters] == [RedactTokens]
    finally:
        parent.removeHandler(handler)
    assert stream.getvalue() == "joined with lyd_join_0123456789ab_…\n"


@given(st.text(max_size=20), st.from_regex(r"\A[A-Za-z0-9_-]{43}\Z"), st.text(max_size=20))
def test_no_surroundings_hide_a_token_from_redaction(before: str, secret: str, after: str) -> None:
    text = redact(f"{before}lyd_work_0123456789ab_{secret}{after}")
    assert secret not in text
    assert redact(text) == text


@given(st.text())
def test_a_text_without_a_token_is_left_alone(text: str) -> None:
    assert "lyd_" in text or redact(text) == text
