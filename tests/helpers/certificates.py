"""Certificates that are valid for an hour or expired, of authorities unknown to the system."""

import shutil
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_PEM: Final = serialization.Encoding.PEM
_HOUR: Final = timedelta(hours=1)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def authority(cls, name: str) -> Self:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _for(name, key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        # Python requires the key usage extension of an authority.
        signs = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(signs, critical=True).issuer_name(_name(name))
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def self_signed(cls, host: str) -> Self:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _for_server(host, key).issuer_name(_name(host))
        return cls(builder.sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(_PEM)

    def issue(
        self, host: str, *, ended: bool = False, names_its_authority: bool = True
    ) -> "Certificate":
        """Sign a server's certificate; without the name of its authority, as old ones are."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _for_server(host, key, ended=ended).issuer_name(self.certificate.subject)
        if names_its_authority:
            # Python requires the identifier of the issuer's key from all other certificates.
            signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
            builder = builder.add_extension(signer, critical=False)
        return Certificate(builder.sign(self.key, hashes.SHA256()), key)

    def write(self, folder: Path, *, owner: str | None = None) -> tuple[Path, Path]:
        """Write certificate and key into files that only `owner` may read."""
        secret = self.key.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        files = folder / "certificate.pem", folder / "key.pem"
        for file, content in zip(files, (self.pem, secret), strict=True):
            file.touch(mode=0o600)
            file.write_bytes(content)
            if owner is not None:
                shutil.chown(file, owner)
        return files

    def context(self) -> ssl.SSLContext:
        """Return a server's SSL context with this certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["postgresql"])
        # No session tickets, as in PostgreSQL: a ticket would be an unexpected message.
        context.num_tickets = 0
        with TemporaryDirectory() as folder:
            context.load_cert_chain(*self.write(Path(folder)))
        return context


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _for(
    name: str, key: ec.EllipticCurvePrivateKey, *, ended: bool = False
) -> x509.CertificateBuilder:
    end = datetime.now(UTC) + (-_HOUR if ended else _HOUR)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - 3 * _HOUR)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _for_server(
    host: str, key: ec.EllipticCurvePrivateKey, *, ended: bool = False
) -> x509.CertificateBuilder:
    names = x509.SubjectAlternativeName([x509.DNSName(host)])
    return _for(host, key, ended=ended).add_extension(names, critical=False)
