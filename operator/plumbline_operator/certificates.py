"""The certificate of the progress server: from a mounted Secret, or made at start."""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LIFETIME = timedelta(days=3650)
"""Longer than any process lives; trust ends with the process, because only its own pods are told of the authority."""


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What the server shows and what its clients trust."""

    context: ssl.SSLContext
    authority_pem: str


def load_certificate(folder: Path) -> ServerCertificate:
    """The certificate in a folder (tls.crt, tls.key, ca.crt).

    Raises:
        OSError, ssl.SSLError: if a file is missing or does not fit.
    """
    context = _context()
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return ServerCertificate(context, (folder / "ca.crt").read_text())


def reload_certificate(certificate: ServerCertificate, folder: Path) -> None:
    """Take a renewed certificate of the same authority for connections from now on."""
    certificate.context.load_cert_chain(folder / "tls.crt", folder / "tls.key")


def make_certificate(host: str) -> ServerCertificate:
    """A new self-signed certificate for a host name; its key never leaves this process."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "plumbline progress")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = _context()
    # Python's ssl reads certificates from files only; this one is gone again at once and is readable by us alone.
    with tempfile.NamedTemporaryFile() as file:
        file.write(pem + private)
        file.flush()
        context.load_cert_chain(file.name)
    return ServerCertificate(context, pem.decode())


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        names.append(x509.DNSName(host))
        if host.endswith(".svc"):
            names.append(x509.DNSName(f"{host}.cluster.local"))
    return names
