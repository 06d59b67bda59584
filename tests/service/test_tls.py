import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from service import tls
from service.errors import SettingsError

PEM = serialization.Encoding.PEM
DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)


class Certificate:
    """A key and its certificate, signed by another or by itself, as PEM files."""

    def __init__(self, folder, name, *, begins=-DAY, ends=DAY, signer=None, authority=False):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.cert, self.key_file = folder / f"{name}.pem", folder / f"{name}.key"
        self.ends = NOW + ends
        signer = signer or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + begins)
            .not_valid_after(self.ends)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            use = (
                ExtendedKeyUsageOID.CLIENT_AUTH
                if name == "client"
                else ExtendedKeyUsageOID.SERVER_AUTH
            )
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        self.cert.write_bytes(builder.sign(signer.key, SHA256()).public_bytes(PEM))
        self.write_key(serialization.NoEncryption())

    def write_key(self, encryption):
        form = serialization.PrivateFormat.PKCS8
        self.key_file.write_bytes(self.key.private_bytes(PEM, form, encryption))


@pytest.fixture
def make(tmp_path):
    return lambda name, **about: Certificate(tmp_path, name, **about)


def refused(cert: Path, key: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        tls.certificate_ends_s(cert, key)
    return str(caught.value)


def test_certificate_is_told_when_it_ends(make):
    one = make("one", ends=40 * DAY)

    assert tls.certificate_ends_s(one.cert, one.key_file) == one.ends.timestamp()


def test_certificate_of_an_authority_that_is_not_known_here_will_do(make):
    authority = make("authority", authority=True)
    server = make("server", signer=authority)
    alone = tls.certificate_ends_s(server.cert, server.key_file)
    server.cert.write_bytes(server.cert.read_bytes() + authority.cert.read_bytes())

    assert tls.certificate_ends_s(server.cert, server.key_file) == alone
    assert alone == server.ends.timestamp()


def test_key_of_another_certificate_is_refused(make):
    one, other = make("one"), make("other")

    sentence = refused(one.cert, other.key_file)
    assert "key values mismatch" in sentence
    assert str(one.cert) in sentence
    assert str(other.key_file) in sentence


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"begins": -2 * DAY, "ends": -DAY}, "certificate has expired"),
        ({"begins": DAY, "ends": 2 * DAY}, "certificate is not yet valid"),
    ],
)
def test_certificate_that_does_not_hold_now_is_refused(make, about, reason):
    one = make("one", **about)

    assert f"would be refused by clients: {reason}" in refused(one.cert, one.key_file)


def test_certificate_that_is_not_for_servers_is_refused(make):
    one = make("client")

    assert "would be refused by clients: " in refused(one.cert, one.key_file)


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
@pytest.mark.parametrize("which", ["cert", "key_file"])
def test_file_that_is_not_pem_is_refused(make, which, content):
    one = make("one")
    getattr(one, which).write_bytes(content)

    assert "cannot be used: " in refused(one.cert, one.key_file)


@pytest.mark.parametrize("which", ["cert", "key_file"])
def test_file_that_is_not_there_is_refused(make, which):
    one = make("one")
    getattr(one, which).unlink()

    assert "cannot be used: No such file or directory; " in refused(one.cert, one.key_file)


def test_key_that_is_encrypted_is_refused_and_nobody_is_asked_for_its_password(make):
    one = make("one")
    one.write_key(serialization.BestAvailableEncryption(b"secret"))

    assert "not encrypted" in refused(one.cert, one.key_file)


def test_authorities_are_told_when_the_first_of_them_ends(make, tmp_path):
    first = make("first", ends=2 * DAY, authority=True)
    second = make("second", ends=9 * DAY, authority=True)
    both = tmp_path / "both.pem"
    both.write_bytes(second.cert.read_bytes() + first.cert.read_bytes())

    assert tls.authorities_end_s(second.cert) == second.ends.timestamp()
    assert tls.authorities_end_s(both) == first.ends.timestamp()


def test_certificate_that_can_sign_nothing_is_no_authority(make):
    with pytest.raises(SettingsError, match="has no authority's certificate; give the one"):
        tls.authorities_end_s(make("server").cert)


def test_file_without_certificates_is_no_authority(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")

    for name in ("ca.pem", "not-there.pem"):
        with pytest.raises(SettingsError, match="give the PEM file of an authority"):
            tls.authorities_end_s(tmp_path / name)
