"""What is left out stays out, comes when it is used, and leaves no trace for others."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

from quicferry import lean

NEVER_IN_A_SERVER = [
    "OpenSSL",
    "attr",
    "certifi",
    "importlib.metadata",
    "lzma",
    "quicferry.quic.client",
    "quicferry.quic.meter",
    "rich",
    "service_identity",
    "typing_extensions",
    "zipfile",
]


def fresh(code: str) -> object:
    """What ``code`` prints as JSON, in an interpreter where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return json.loads(done.stdout)


def test_a_server_loads_nothing_that_only_clients_and_terminals_need() -> None:
    code = (
        "import json, sys; before = set(sys.modules)\n"
        "import quicferry, quicferry.logging; quicferry.logging.configure(); quicferry.serve\n"
        "import quicferry.bus.settings, quicferry.bus.log, quicferry.bus.endpoints\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = fresh(code)
    assert isinstance(loaded, list)
    assert "aioquic.tls" in loaded
    assert "nats" in loaded
    assert not set(NEVER_IN_A_SERVER) & set(loaded)


def test_what_aioquic_was_not_given_comes_when_it_is_used() -> None:
    code = (
        "import json, sys; import quicferry.quic; import aioquic.tls as tls\n"
        "said = [tls.crypto.X509Store.__module__, tls.certifi.where().rpartition('.')[2]]\n"
        "said += [tls.service_identity.CertificateError.__name__, tls.service_identity.cryptography.__name__]\n"
        "import OpenSSL.SSL, certifi, service_identity, rich, typing_extensions\n"
        "said += [OpenSSL.crypto is sys.modules['OpenSSL.crypto'], bool(certifi.__file__), bool(rich.__file__)]\n"
        "print(json.dumps(said))"
    )
    said = ["OpenSSL.crypto", "pem", "CertificateError", "service_identity.cryptography", True, True, True]
    assert fresh(code) == said


def test_what_was_imported_before_is_left_alone() -> None:
    with lean.without("json"), lean.later("json", "importlib.metadata"):
        import json as inside

        assert inside is json
        assert sys.modules["importlib.metadata"] is importlib.metadata
    assert sys.modules["json"] is json


def test_hidden_modules_can_be_imported_afterwards_even_when_the_block_fails() -> None:
    code = (
        "import json; from quicferry import lean\n"
        "try:\n"
        "    with lean.without('colorsys'): import colorsys\n"
        "except ImportError: hidden = True\n"
        "import colorsys\n"
        "print(json.dumps([hidden, colorsys.rgb_to_hsv(0, 0, 0)[2]]))"
    )
    assert fresh(code) == [True, 0]


@pytest.mark.parametrize("name", ["nats-py", "aioquic", "cryptography", "quicferry"])
def test_versions_are_those_that_are_installed(name: str) -> None:
    assert lean.version(name) == importlib.metadata.version(name)


def test_a_version_of_nothing() -> None:
    assert lean.version("no-such-thing") == "0.0.0"
