"""Certificates and keys of a kit: a CA of its own, the server's certificate, a key pair per device."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lamina.errors import UserError

CA_DAYS, SERVER_DAYS = 3650, 825
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PEM, _SSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH


def authority() -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    """A new CA, P-256, for `CA_DAYS`; it may sign certificates, not other CAs."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named("lamina kit CA")
    uses = _uses(key_cert_sign=True, crl_sign=True)
    made = _certificate(name, name, key.public_key(), key.public_key(), CA_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return made.add_extension(uses, critical=True).sign(key, hashes.SHA256()), key


def load_authority(folder: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    """The CA in ca.crt and ca.key of a folder.

    Raises:
        UserError: They are not a certificate and its key.
    """
    try:
        ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"ca.crt or ca.key in {folder} is damaged: take it from where it was kept") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise UserError(f"ca.key in {folder} is not the key of ca.crt: take it from where it was kept")
    return ca, key


def server(host: str, ca: x509.Certificate, ca_key: EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    """The server's certificate and private key, PEM, P-256, for `SERVER_DAYS`.

    Args:
        host: Name or address that devices connect to; loopback is covered besides.
        ca: Who vouches for it.
        ca_key: Of the CA.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(each) for each in dict.fromkeys((host, *_LOOPBACK))]
    made = (
        _certificate(_named(host), ca.subject, key.public_key(), ca_key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_uses(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return pem(made), private_pem(key)


def device() -> tuple[bytes, bytes]:
    """A new P-384 key pair as Flower's SuperNode authentication takes it: OpenSSH, private and public."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(_SSH, serialization.PublicFormat.OpenSSH)
    return private, public + b"\n"


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as text."""
    return certificate.public_bytes(_PEM)


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    """A private key as text, not encrypted."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: EllipticCurvePublicKey,
    signer: EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    """Valid from yesterday on, since the clocks of boards are late."""
    begin = datetime.now(UTC) - timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _uses(**given: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**(dict.fromkeys(names.split(), False) | given))
