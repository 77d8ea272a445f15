"""Where NATS is and how to get in: flags, environment and NATS contexts.

A context is a JSON file that the ``nats`` command line keeps in ``~/.config/nats/context``
(NATS ADR-21); ``context.txt`` beside that folder names the selected one.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec

from quicferry.protocol.errors import FerryError

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
SCHEMES: Final = ("nats", "tls", "ws", "wss")

_SECRET = re.compile(r"//[^/@]*@")
_CONTEXT_NAME = Annotated[str, msgspec.Meta(pattern=r"^[^/\\\0]{1,255}$")]


class _Context(msgspec.Struct, kw_only=True):
    """The fields of a context file that we can honour; the rest is ignored, three are refused."""

    url: str = ""
    token: str = ""
    user: str = ""
    password: str = ""
    creds: str = ""
    nkey: str = ""
    cert: str = ""
    key: str = ""
    ca: str = ""
    jetstream_domain: str = ""
    jetstream_api_prefix: str = ""
    inbox_prefix: str = ""
    tls_first: bool = False
    nsc: str = ""
    user_jwt: str = ""
    socks_proxy: str = ""


class NatsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to connect; empty means not given."""

    servers: list[str]
    user: str = ""
    password: str = ""
    token: str = ""
    creds: str = ""
    """Path of a credentials file (JWT and seed)."""
    nkey: str = ""
    """Path of an nkey seed file."""
    ca: str = ""
    cert: str = ""
    key: str = ""
    tls_first: bool = False
    jetstream_domain: str = ""
    jetstream_api_prefix: str = ""
    inbox_prefix: str = ""
    origin: str = "default"
    """Which of the sources gave the servers; for messages to a person."""

    @classmethod
    def load(cls, url: str | None = None, context: str | None = None) -> NatsSettings:
        """``url`` before ``context`` before ``NATS_URL`` before ``NATS_CONTEXT`` before the selected context.

        Credentials come from the same source as the servers; for ``url``, ``NATS_URL`` and the default they
        are those in the URL itself or in NATS_USER, NATS_PASSWORD, NATS_TOKEN, NATS_CREDS, NATS_NKEY,
        NATS_CA, NATS_CERT and NATS_KEY. Raises FerryError ``bad_settings``.
        """
        if url:
            return cls._from_environment(url, "the given URL")
        if context:
            return cls._from_context(context)
        if from_environment := os.environ.get("NATS_URL"):
            return cls._from_environment(from_environment, "NATS_URL")
        if selected := os.environ.get("NATS_CONTEXT") or _selected_context():
            return cls._from_context(selected)
        return cls._from_environment(DEFAULT_URL, "default")

    @classmethod
    def _from_environment(cls, url: str, origin: str) -> NatsSettings:
        def env(name: str) -> str:
            return os.environ.get(f"NATS_{name}", "")

        user, password, token = env("USER"), env("PASSWORD"), env("TOKEN")
        if user and not password:  # the nats command line takes a lone user for a token
            user, token = "", token or user
        return cls(
            servers=_servers(url, origin),
            user=user,
            password=password,
            token=token,
            creds=env("CREDS"),
            nkey=env("NKEY"),
            ca=env("CA"),
            cert=env("CERT"),
            key=env("KEY"),
            origin=origin,
        )

    @classmethod
    def _from_context(cls, name: str) -> NatsSettings:
        found = _read_context(name)
        for refused in ("nsc", "user_jwt", "socks_proxy"):
            if getattr(found, refused):
                raise FerryError(
                    "bad_settings",
                    f"The NATS context {name!r} uses {refused!r}, which is not supported.",
                    hint="Use a credentials file ('creds') in the context instead.",
                )
        user, token = found.user, found.token
        if user and not found.password:
            user, token = "", token or user
        return cls(
            servers=_servers(found.url or DEFAULT_URL, f"context {name}"),
            user=user,
            password=found.password,
            token=token,
            creds=_expand(found.creds),
            nkey=_expand(found.nkey),
            ca=_expand(found.ca),
            cert=_expand(found.cert),
            key=_expand(found.key),
            tls_first=found.tls_first,
            jetstream_domain=found.jetstream_domain,
            jetstream_api_prefix=found.jetstream_api_prefix,
            inbox_prefix=found.inbox_prefix,
            origin=f"context {name}",
        )

    @property
    def shown(self) -> str:
        """The servers without their secrets, for logs and messages."""
        return ",".join(_without_secret(server) for server in self.servers)

    def connect_options(self) -> dict[str, Any]:
        """Keyword arguments for nats-py's ``connect``. Raises FerryError ``bad_settings``."""
        options: dict[str, Any] = {"servers": list(self.servers)}
        if self.user:
            options["user"], options["password"] = self.user, self.password
        if self.token:
            options["token"] = self.token
        if self.creds:
            options["user_credentials"] = _readable(self.creds, "credentials file")
        if self.nkey:
            options["nkeys_seed"] = _readable(self.nkey, "nkey seed file")
        if self.inbox_prefix:
            options["inbox_prefix"] = self.inbox_prefix
        if self.ca or self.cert or any(server.startswith(("tls:", "wss:")) for server in self.servers):
            options["tls"] = self._tls()
            options["tls_handshake_first"] = self.tls_first
        return options

    @property
    def jetstream_prefix(self) -> str:
        """What the subjects of JetStream's API begin with."""
        if self.jetstream_domain:
            return f"$JS.{self.jetstream_domain}.API"
        return self.jetstream_api_prefix or "$JS.API"

    def jetstream_options(self) -> dict[str, Any]:
        """Keyword arguments for nats-py's ``jetstream``."""
        if self.jetstream_domain:
            return {"domain": self.jetstream_domain}
        if self.jetstream_api_prefix:
            return {"prefix": self.jetstream_api_prefix}
        return {}

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            if self.cert:
                context.load_cert_chain(self.cert, self.key or None)
        except OSError as error:  # ssl.SSLError is one
            raise FerryError(
                "bad_settings",
                f"The TLS files of {self.origin} can't be used: {error}.",
                hint="Check the paths ca, cert and key.",
            ) from None
        return context


def _servers(urls: str, origin: str) -> list[str]:
    servers = [url.strip() for url in urls.split(",") if url.strip()]
    full = [server if "://" in server else f"nats://{server}" for server in servers]
    for server in full:
        try:
            parts = urlsplit(server)
            fit = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, a bracket left open
            fit = False
        if not fit:
            raise FerryError(
                "bad_settings",
                f"{_without_secret(server)!r} from {origin} is not a NATS URL.",
                hint=f"It looks like {DEFAULT_URL}; several are separated by commas.",
            )
    if not full:
        raise FerryError("bad_settings", f"No NATS URL in {origin}.", hint=f"It looks like {DEFAULT_URL}.")
    return full


def _without_secret(url: str) -> str:
    return _SECRET.sub("//", url)


def _config_home() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "nats"


def _selected_context() -> str:
    try:
        return (_config_home() / "context.txt").read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: no home directory
        return ""


def _read_context(name: str) -> _Context:
    try:
        msgspec.convert(name, _CONTEXT_NAME)
        path = _config_home() / "context" / f"{name}.json"
        return msgspec.json.decode(path.read_bytes(), type=_Context)
    except FileNotFoundError:
        raise FerryError(
            "bad_settings", f"There is no NATS context {name!r}.", hint="'nats context ls' lists them."
        ) from None
    except (OSError, RuntimeError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FerryError("bad_settings", f"The NATS context {name!r} can't be read: {error}.") from None


def _expand(path: str) -> str:
    return os.path.expanduser(path)  # pathlib's raises where there is no such user; this leaves the path as it is


def _readable(path: str, what: str) -> str:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise FerryError(
            "bad_settings", f"The {what} {path} can't be read: {error.strerror}.", hint="Is the path right?"
        ) from None
    return path
