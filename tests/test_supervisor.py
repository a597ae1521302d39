"""The coordinator and the service manager that started it, over a real Unix socket."""

import logging
import socket
from pathlib import Path

import pytest

from server.supervisor import tell_ready


@pytest.mark.parametrize("abstract", [False, True])
def test_a_manager_that_waits_is_told(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"lydian-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(60)
        manager.bind(f"\0{name}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        tell_ready()
        assert manager.recv(100) == b"READY=1"


def test_a_manager_that_cannot_be_told_is_a_warning_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with caplog.at_level(logging.WARNING):
        tell_ready()
    assert "could not be told that this is ready" in caplog.text


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell_ready()
    assert caplog.text == ""
