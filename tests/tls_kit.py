"""A server that speaks TLS, or does not, and counts what it is told; and certificates to show."""

import contextlib
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.pins import pin_of
from server.certificates import make

NAME = "coordinator.tailnet.test"
ANSWER = (
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 32\r\n\r\n{"version":"0.1.0","protocol":2}'
)


def written(folder: Path, name: str = "shown.pem") -> Path:
    """A certificate of its own, in a file."""
    path = folder / name
    path.write_text(make())
    return path


def pin_in(path: Path) -> str:
    pem = path.read_text()
    return pin_of(ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERTIFICATE") :]))


def issued(name: str = NAME, *, days: float = 90) -> tuple[str, str]:
    """Key and certificate for a name, as an authority would give them."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=900))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.test"), x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    kept = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return kept.decode(), certificate.public_bytes(pem).decode()


class Listener:
    """Answers every request with a version. A context manager."""

    def __init__(self, certificate: Path | None, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.maximum_version = newest
            self._context.load_cert_chain(certificate)
        self.heard = b""  # of all connections, what they said inside TLS
        self.connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="listener")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                line, _ = self._listening.accept()
                self.connections += 1
                line.settimeout(10.0)
                with contextlib.suppress(OSError), line:
                    self._talk(self._context.wrap_socket(line, server_side=True) if self._context else line)

    def _talk(self, line: socket.socket) -> None:
        with line:
            while said := line.recv(65_536):
                self.heard += said
                if b"\r\n\r\n" in said:
                    line.sendall(ANSWER)
