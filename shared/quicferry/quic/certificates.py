"""A self-signed certificate for a server that was given none."""

from __future__ import annotations

import datetime
import ipaddress
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from cryptography import x509

NAMES: Final = ("localhost", "127.0.0.1", "::1")
MAKING_SECONDS: Final = 30.0
SEPARATOR: Final = b"\0"
VALID: Final = datetime.timedelta(days=365)


def ensure(certificate: str | Path, private_key: str | Path, names: Sequence[str] = ()) -> bool:
    """Make both files if neither exists; whether they were made. Clients pass the certificate as ``cafile``.

    ``names`` are DNS names and IP literals beside localhost. Raises FerryError ``bad_settings`` if only one
    of the files exists or the directory can't be written.
    """
    certificate, private_key = Path(certificate), Path(private_key)
    if certificate.exists() and private_key.exists():
        return False
    if certificate.exists() or private_key.exists():
        there, missing = (certificate, private_key) if certificate.exists() else (private_key, certificate)
        raise FerryError("bad_settings", f"{there} is there but {missing} is not.", hint="Give both or neither.")
    pem, key_pem = _made_elsewhere([*NAMES, *names])
    try:
        for path, data, mode in ((private_key, key_pem, 0o600), (certificate, pem, 0o644)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except OSError as error:
        raise FerryError(
            "bad_settings", f"No certificate can be written to {certificate}: {error.strerror}."
        ) from None
    return True


def _made_elsewhere(names: Sequence[str]) -> tuple[bytes, bytes]:
    """:func:`self_signed` in a process of its own: what it takes is no part of a server that is dumped later."""
    main = f"from {__name__} import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", main, *names],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=MAKING_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise FerryError("bad_settings", f"No certificate can be made for {', '.join(names)}: {why}.") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FerryError("bad_settings", f"No certificate can be made: {error}.") from None
    pem, _, key_pem = done.stdout.partition(SEPARATOR)
    return pem, key_pem


def main() -> None:
    """In that process: both on standard output, for the names that are its arguments."""
    sys.stdout.buffer.write(SEPARATOR.join(self_signed(sys.argv[1:])))


def self_signed(names: Sequence[str]) -> tuple[bytes, bytes]:
    """A certificate that is its own authority (RFC 5280, 4.2.1.9), and its key; both PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "quicferry")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys(names)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
