"""Settings: only what is named is read, and what is not allowed is refused in words."""

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import LydianError
from common.places import coordinator_folder
from server.settings import OPTIONS, Settings, in_words


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
        allow_host=(),
        calls_per_s=200.0,
        calls_burst=2_000.0,
        stranger_calls_per_s=20.0,
        stranger_calls_burst=100.0,
        connections=4_096,
        uploads=2,
        streams=100,
        jobs=1_000,
        jobs_each=100,
        workers=10_000,
        report_bytes=4_194_304,
        tls="",
        tls_key=None,
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
        "ALLOW_HOST": "gpu-box, 192.0.2.1 ::1",
        "CALLS_PER_S": "1.5",
        "CALLS_BURST": "7",
        "STRANGER_CALLS_PER_S": "2.5",
        "STRANGER_CALLS_BURST": "8",
        "CONNECTIONS": "9",
        "UPLOADS": "10",
        "STREAMS": "11",
        "JOBS": "12",
        "JOBS_EACH": "13",
        "WORKERS": "14",
        "REPORT_BYTES": "1000",
        "TLS": "/etc/ssl/chain.pem",
        "TLS_KEY": "/etc/ssl/key.pem",
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
        allow_host=("gpu-box", "192.0.2.1", "::1"),
        calls_per_s=1.5,
        calls_burst=7.0,
        stranger_calls_per_s=2.5,
        stranger_calls_burst=8.0,
        connections=9,
        uploads=10,
        streams=11,
        jobs=12,
        jobs_each=13,
        workers=14,
        report_bytes=1000,
        tls="/etc/ssl/chain.pem",
        tls_key=Path("/etc/ssl/key.pem"),
    )


@pytest.mark.parametrize("tls", ["", "self-made", "tailscale"])
def test_a_key_without_the_file_of_its_certificate_is_refused(tls: str) -> None:
    with pytest.raises(LydianError, match="--tls-key") as refused:
        Settings.from_environment({"LYDIAN_TLS": tls, "LYDIAN_TLS_KEY": "/etc/ssl/key.pem"})
    assert refused.value.code == "bad_setting"


def test_what_was_told_goes_before_the_environment_and_nothing_told_does_not() -> None:
    given = {"LYDIAN_TLS": "tailscale", "LYDIAN_INSECURE": "true"}
    read = Settings.from_environment(given, told={"tls": "self-made", "tls_key": None, "insecure": False})
    assert (read.tls, read.insecure) == ("self-made", True)


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
        ("LYDIAN_ALLOW_HOST", "http://gpu-box", "it is names or addresses without a port"),
        ("LYDIAN_CALLS_PER_S", "0", "it is a number from 1 on"),
        ("LYDIAN_REPORT_BYTES", "999", "it is bytes, 1000 or more"),
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


def test_names_of_the_command_line_come_on_top_of_those_of_the_environment_and_are_looked_at() -> None:
    settings = Settings(allow_host=("a.example",)).allowing(["b.example", "[::1]"])
    assert settings.allow_host == ("a.example", "b.example", "[::1]")
    for name in ("http://a.example", "a b", "", "a.example:80:80", "\u212aelvin.example"):
        with pytest.raises(LydianError, match=r"--allow-host .* is neither a name nor an address") as refused:
            settings.allowing([name])
        assert refused.value.code == "bad_setting"


def test_the_help_says_every_setting_that_has_no_option_with_what_is_allowed_and_its_default() -> None:
    told = in_words().split("\n\n")
    assert len(told) == len(fields(Settings)) - len(OPTIONS)
    assert "`LYDIAN_UPLOADS`: a number from 1 on: uploads at once, and half-sent ones, of a worker (2)" in told


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
