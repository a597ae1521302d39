"""`python -m server.health HOST:PORT`: whether a coordinator answers there, for a container's health check.

    plain HTTP ──▶ answered                         0
        └─ cut off, since it speaks TLS ──▶ TLS ──▶ 0
    nothing, or another answer than 200             1, and a sentence

Asks /healthz of its own machine and brings no token, so that it matters to nobody who answers: no certificate is looked
at. Standard library alone: it runs every few seconds beside the coordinator.
"""

import http.client
import ssl
import sys

WAIT_S = 4.0  # for an answer; Docker's own limit is above that


def ask(host: str, port: int, *, encrypted: bool) -> int:
    """The status of /healthz.

    Raises:
        OSError, http.client.HTTPException: there is none.
    """
    if encrypted:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        line: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=WAIT_S, context=context)
    else:
        line = http.client.HTTPConnection(host, port, timeout=WAIT_S)
    try:
        line.request("GET", "/healthz")
        return line.getresponse().status
    finally:
        line.close()


def trouble(host: str, port: int) -> str:
    """What is wrong with the coordinator at this address; empty: nothing."""
    why = ""
    for encrypted in (False, True):
        try:
            status = ask(host, port, encrypted=encrypted)
        except ConnectionRefusedError as error:
            return f"nobody listens on {host}:{port}: {error}"
        except (OSError, http.client.HTTPException) as error:
            why = f"{host}:{port} does not answer: {error or type(error).__name__}"
            continue
        return "" if status == http.HTTPStatus.OK else f"{host}:{port} answers /healthz with {status}"
    return why


def main(arguments: list[str]) -> int:
    """The exit code."""
    host, _, port = (arguments or ["127.0.0.1:8470"])[0].rpartition(":")
    why = trouble(host.strip("[]"), int(port))
    if why:
        sys.stderr.write(f"{why}\n")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
