"""The headers that every answer has, whoever asked for whatever.

An answer of the API is data: a browser that is brought to show it runs nothing of it, lets no page frame or embed it,
takes it for nothing but what its type says, and keeps no copy. A route that knows better (a model is named by its
digest, so a copy of it is never old) says so itself, and is left alone. There are no cookies and no CORS headers.
"""

from starlette.types import Message, Send

EVERYWHERE: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def secured(send: Send) -> Send:
    """An ASGI `send` whose answers have the headers that they do not set themselves."""

    async def send_secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            said = list(message.get("headers", ()))
            known = {name.lower() for name, _ in said}
            message = {**message, "headers": [*said, *(pair for pair in EVERYWHERE if pair[0] not in known)]}
        await send(message)

    return send_secured
