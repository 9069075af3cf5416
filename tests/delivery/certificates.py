"""A certificate authority on loopback: certificates as good or as bad as a test wants."""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


class Authority:
    """Keeps its files in a folder. `certificate` is what somebody trusts who trusts it."""

    def __init__(self, folder: Path, name: str = "Test authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        public = self._key.public_key()
        made = (
            _builder(self._name, self._name, DAY)
            .public_key(public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, SHA256())
        )
        self.certificate = folder / f"{made.serial_number}.pem"
        self.certificate.write_bytes(made.public_bytes(Encoding.PEM))

    def server(self, name: str, *, ended: bool = False) -> ssl.SSLContext:
        """For a server that proves to be the host, or address, of that name. `ended`: until yesterday."""
        return _server(self._folder, name, self._name, self._key, -DAY if ended else DAY)


def self_signed(folder: Path, name: str) -> ssl.SSLContext:
    """For a server that nobody else vouches for."""
    return _server(folder, name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), None, DAY)


def _server(
    folder: Path, name: str, issuer: x509.Name, signer: ec.EllipticCurvePrivateKey | None, end: timedelta
) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = signer or key
    made = (
        _builder(issuer if signer is key else x509.Name([]), issuer, end)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName([_general(name)]), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .sign(signer, SHA256())
    )
    file = folder / f"{made.serial_number}.pem"
    file.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + made.public_bytes(Encoding.PEM)
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context


def _builder(subject: x509.Name, issuer: x509.Name, end: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now + end)
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
