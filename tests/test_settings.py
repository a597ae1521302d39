"""Settings: only what is named is read, and what is not allowed is refused in words."""

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import LydianError
from common.places import coordinator_folder
from server.settings import Settings


def test_nothing_set_gives_the_documented_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Settings.from_environment({}) == Settings(
        state_dir=tmp_path / "lydian" / "coordinator",
        host="127.0.0.1",
        port=8470,
        ttl_s=40.0,
        heartbeat_s=10.0,
        poll_s=25.0,
        reserve_bytes=67_108_864,
        max_model_bytes=68_719_476_736,
        max_attempts=5,
        max_expiries=20,
        strikes=3,
        keep_models=5,
        insecure=False,
    )


def test_every_setting_is_read_from_its_own_variable() -> None:
    values = {
        "STATE_DIR": "/srv/lydian",
        "HOST": "100.64.0.1",
        "PORT": "0",
        "TTL_S": "2.5",
        "HEARTBEAT_S": "0.5",
        "POLL_S": "1",
        "RESERVE_BYTES": "0",
        "BODY_IDLE_S": "2.5",
        "BODY_MIN_RATE": "100",
        "MAX_MODEL_BYTES": "1000",
        "MAX_ATTEMPTS": "1",
        "MAX_EXPIRIES": "2",
        "STRIKES": "4",
        "KEEP_MODELS": "6",
        "TAILSCALED": "/run/ts.sock",
        "TAILNET_S": "5",
        "NODE_PIN": "warn",
        "LOGIN": "alice@example.com=submit, tag:screen=read",
        "LOGIN_CAPABILITY": "example.com/cap/lydian",
        "INSECURE": "true",
    }
    assert {field.name.upper() for field in fields(Settings)} == values.keys()
    read = Settings.from_environment({f"LYDIAN_{name}": value for name, value in values.items()})
    assert read == Settings(
        state_dir=Path("/srv/lydian"),
        host="100.64.0.1",
        port=0,
        ttl_s=2.5,
        heartbeat_s=0.5,
        poll_s=1.0,
        reserve_bytes=0,
        body_idle_s=2.5,
        body_min_rate=100,
        max_model_bytes=1000,
        max_attempts=1,
        max_expiries=2,
        strikes=4,
        keep_models=6,
        tailscaled=Path("/run/ts.sock"),
        login="alice@example.com=submit, tag:screen=read",
        login_capability="example.com/cap/lydian",
        tailnet_s=5.0,
        node_pin="warn",
        insecure=True,
    )


def test_the_processs_own_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYDIAN_PORT", "1234")
    assert Settings.from_environment().port == 1234


def test_an_empty_value_is_none_and_the_state_folder_never_the_current_one() -> None:
    read = Settings.from_environment({"LYDIAN_STATE_DIR": "", "LYDIAN_PORT": ""})
    assert (read.state_dir, read.port) == (coordinator_folder(), 8470)


def test_a_tilde_is_the_home_folder() -> None:
    assert Settings.from_environment({"LYDIAN_STATE_DIR": "~/lydian"}).state_dir == Path.home() / "lydian"


def test_the_variables_of_workers_clients_and_others_are_not_looked_at() -> None:
    others = {
        "LYDIAN_URL": "http://x",
        "LYDIAN_TOKEN": "lyd_x",
        "LYDIAN_SERVER_PORT": "x",
        "PORT": "x",
        "lydian_port": "1",
    }
    assert Settings.from_environment(others) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("LYDIAN_PORT", "http", "it is a port from 1 to 65535, or 0 for any that is free"),
        ("LYDIAN_PORT", "65536", "it is a port from 1 to 65535"),
        ("LYDIAN_PORT", "80.5", "it is a port from 1 to 65535"),
        ("LYDIAN_TTL_S", "0", "it is seconds above 0"),
        ("LYDIAN_TTL_S", "inf", "it is seconds above 0"),
        ("LYDIAN_POLL_S", "nan", "it is seconds above 0"),
        ("LYDIAN_RESERVE_BYTES", "64MiB", "it is bytes of disk, 0 or more"),
        ("LYDIAN_RESERVE_BYTES", "-1", "it is bytes of disk, 0 or more"),
        ("LYDIAN_STRIKES", "0", "it is a number from 1 on"),
        ("LYDIAN_KEEP_MODELS", "all", "it is a number from 1 on"),
        ("LYDIAN_LOGIN", "alice", "it is WHO=SCOPE, …"),
        ("LYDIAN_LOGIN", "alice=root", "it is WHO=SCOPE, …"),
        ("LYDIAN_LOGIN_CAPABILITY", "no domain", "it is the name of grants"),
        ("LYDIAN_INSECURE", "maybe", "it is true or false"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_variable_and_what_is(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(LydianError) as refused:
        Settings.from_environment({name: value})
    assert refused.value.code == "bad_setting"
    assert str(refused.value).startswith(f"{name}={value!r} is not allowed: {allowed}")


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(LydianError, match=r"LYDIAN_PORT='x' .*; LYDIAN_STRIKES='y' "):
        Settings.from_environment({"LYDIAN_PORT": "x", "LYDIAN_STRIKES": "y"})


def test_leases_shorter_than_two_heartbeats_are_refused_by_both_names() -> None:
    with pytest.raises(
        LydianError, match=r"every 10 s .* leases of 19 s.* LYDIAN_HEARTBEAT_S .* half of LYDIAN_TTL_S"
    ) as refused:
        Settings.from_environment({"LYDIAN_TTL_S": "19"})
    assert refused.value.code == "bad_setting"
    assert Settings.from_environment({"LYDIAN_TTL_S": "20"}).ttl_s == 20


def test_settings_neither_change_nor_take_what_is_not_allowed() -> None:
    chosen = Settings(port=1)
    with pytest.raises(FrozenInstanceError):
        chosen.port = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        replace(chosen, port=-1)
    assert replace(chosen, port=2) == Settings(port=2)


@given(
    st.dictionaries(
        st.sampled_from([f"LYDIAN_{field.name.upper()}" for field in fields(Settings)]), st.text(max_size=8)
    )
)
def test_any_environment_gives_settings_or_a_refusal_that_names_what_was_set(environment: dict[str, str]) -> None:
    refused, read = "", Settings()
    try:
        read = Settings.from_environment(environment)
    except LydianError as error:
        refused = str(error)
    assert not refused or any(name in refused for name in environment)
    assert 0 <= read.port <= 65_535
    assert 0 < read.heartbeat_s <= read.ttl_s / 2
