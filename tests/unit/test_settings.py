"""Where NATS is: the order of the sources, contexts as the nats command writes them, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quicferry.bus.settings import DEFAULT_URL, NatsSettings
from quicferry.protocol.errors import FerryError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("NATS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "nats" / "context").mkdir(parents=True)
    return tmp_path / "nats"


def context(home: Path, name: str, **fields: object) -> None:
    (home / "context" / f"{name}.json").write_text(json.dumps(fields))


def refused(url: str | None = None, context: str | None = None) -> FerryError:
    with pytest.raises(FerryError) as caught:
        NatsSettings.load(url, context).connect_options()
    assert caught.value.code == "bad_settings"
    return caught.value


def test_each_source_gives_way_to_the_one_before(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NatsSettings.load().servers == [DEFAULT_URL]
    context(home, "selected", url="nats://selected:1")
    (home / "context.txt").write_text("selected\n")
    assert NatsSettings.load().servers == ["nats://selected:1"]
    context(home, "named", url="nats://named:2")
    monkeypatch.setenv("NATS_CONTEXT", "named")
    assert NatsSettings.load().servers == ["nats://named:2"]
    monkeypatch.setenv("NATS_URL", "nats://env:3")
    assert NatsSettings.load().servers == ["nats://env:3"]
    context(home, "flag", url="nats://flag:4")
    assert NatsSettings.load(context="flag").servers == ["nats://flag:4"]
    assert NatsSettings.load("nats://url:5", "flag").servers == ["nats://url:5"]


def test_a_file_in_the_home_of_nobody(home: Path) -> None:
    context(home, "c", url="nats://c:1", creds="~nobody-of-that-name/user.creds")
    assert "~nobody-of-that-name/user.creds can't be read" in refused(context="c").message


def test_without_xdg_the_home_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config" / "nats"
    (folder / "context").mkdir(parents=True)
    (folder / "context.txt").write_text("c")
    context(folder, "c", url="nats://c:1")
    assert NatsSettings.load().servers == ["nats://c:1"]


def test_a_context_as_the_nats_command_writes_it(home: Path, tmp_path: Path) -> None:
    creds = tmp_path / "user.creds"
    creds.write_text("x")
    context(
        home,
        "full",
        description="d",
        url="nats://one:1, two:2,tls://three:3",
        user="u",
        password="p",  # noqa: S106 - of nobody
        token="",
        creds=str(creds),
        nkey="",
        cert="",
        key="",
        ca="",
        nsc="",
        jetstream_domain="hub",
        jetstream_api_prefix="",
        jetstream_event_prefix="",
        inbox_prefix="_INBOX_me",
        user_jwt="",
        color_scheme="",
    )
    settings = NatsSettings.load(context="full")
    assert settings.servers == ["nats://one:1", "nats://two:2", "tls://three:3"]
    options = settings.connect_options()
    assert (options["user"], options["password"], options["user_credentials"]) == ("u", "p", str(creds))
    assert options["inbox_prefix"] == "_INBOX_me"
    assert "tls" in options
    assert "token" not in options
    assert settings.jetstream_prefix == "$JS.hub.API"


def test_credentials_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_USER", "u")
    monkeypatch.setenv("NATS_PASSWORD", "p")
    assert NatsSettings.load().connect_options()["user"] == "u"
    monkeypatch.delenv("NATS_PASSWORD")
    options = NatsSettings.load("host").connect_options()
    assert (options["servers"], options["token"]) == (["nats://host"], "u")
    assert "user" not in options


def test_a_context_brings_its_own_credentials(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_USER", "u")
    monkeypatch.setenv("NATS_PASSWORD", "p")
    context(home, "c", url="nats://c:1")
    assert "user" not in NatsSettings.load(context="c").connect_options()


def test_secrets_are_not_shown() -> None:
    settings = NatsSettings.load("nats://user:secret@host:1,tls://token@other:2")
    assert settings.shown == "nats://host:1,tls://other:2"
    assert "secret" not in str(refused("nats://user:secret@host:port"))


@pytest.mark.parametrize(
    "url", ["http://host", "nats://", "nats://host:99999", "nats://host:x", ",", " , ", "redis://x", "nats://[::1"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    assert "nats://127.0.0.1:4222" in refused(url).hint


def test_contexts_that_do_not_work_are_refused(home: Path, tmp_path: Path) -> None:
    assert "'missing'" in refused(context="missing").message
    (home / "context" / "broken.json").write_text("{")
    assert "broken" in refused(context="broken").message
    context(home, "typed", url=1)
    assert "$.url" in refused(context="typed").message
    (home / "context" / "binary.json").write_bytes(b"\xff\xfe")
    refused(context="binary")
    for name in ("../typed", "a/b", "a\0b", "x" * 300):
        refused(context=name)
    for field in ("nsc", "user_jwt", "socks_proxy"):
        context(home, "refused", **{field: "x"})
        assert field in refused(context="refused").message
    for field in ("creds", "nkey", "ca"):
        context(home, "nofile", **{field: str(tmp_path / "nothing")})
        assert "nofile" in str(refused(context="nofile")) or "nothing" in str(refused(context="nofile"))


def test_a_selection_that_is_unreadable_is_none(home: Path) -> None:
    (home / "context.txt").write_bytes(b"\xff")
    assert NatsSettings.load().servers == [DEFAULT_URL]
    (home / "context.txt").write_text("gone")
    assert "'gone'" in refused().message
