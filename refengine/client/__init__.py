"""The Python client of the worker: `from refengine.client import Client, Token`. Needs the extra `client`."""

from refengine.errors import needs_extra

with needs_extra("client", "the client of a worker"):
    from refengine.client.client import (
        AsyncClient,
        Candidate,
        ChatEnd,
        Client,
        ClientError,
        ConnectionFailed,
        End,
        Generated,
        Metrics,
        Piece,
        ProtocolError,
        Sampling,
        Started,
        Token,
        WorkerError,
    )

__all__ = [
    "AsyncClient",
    "Candidate",
    "ChatEnd",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "End",
    "Generated",
    "Metrics",
    "Piece",
    "ProtocolError",
    "Sampling",
    "Started",
    "Token",
    "WorkerError",
]
