"""Python clients: one that blocks, one for asyncio. Needs grpcio and protobuf alone. Checks no values: the server does.

    with Client("127.0.0.1:50051", timeout=60) as client:
        for event in client.chat([{"role": "user", "content": "Hello"}], temperature=0):
            print(event.text, end="")
        print(client.complete("Once upon a time", max_tokens=16).text)

What fails raises a `VivaceError`, which is a `grpc.RpcError` with the server's status and details.
"""

from vivace.serving.client.aio import AsyncClient, AsyncStream
from vivace.serving.client.batch import Outcome
from vivace.serving.client.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Overloaded,
    Unavailable,
    Unimplemented,
    VivaceError,
)
from vivace.serving.client.requests import (
    BatchItem,
    EmbedParams,
    Message,
    Params,
    Prompt,
    ScoreParams,
    TokenizeParams,
)
from vivace.serving.client.results import (
    Completion,
    ContinuationScore,
    Embedding,
    Event,
    Logprob,
    Reply,
    Scores,
    Tokens,
    Usage,
)
from vivace.serving.client.sync import Client, Stream

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "BatchItem",
    "Cancelled",
    "Client",
    "Completion",
    "ContinuationScore",
    "DeadlineExceeded",
    "EmbedParams",
    "Embedding",
    "Event",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "Logprob",
    "Message",
    "NotFound",
    "Outcome",
    "Overloaded",
    "Params",
    "Prompt",
    "Reply",
    "ScoreParams",
    "Scores",
    "Stream",
    "TokenizeParams",
    "Tokens",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "VivaceError",
]
