"""What both clients ask of gRPC: keepalive, sizes, reconnection. Retries are `retry`'s."""

import math
from collections.abc import Callable
from typing import Any

HEALTH = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
OPTIONS = (
    # A server that is gone without a word is noticed within 25 s. Vivace's allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # a unary call may be silent for minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
)


def seconds(timeout: float | None, default: float | None) -> float:
    """The time a call gets; `math.inf`: no end to it."""
    chosen = default if timeout is None else timeout
    return math.inf if chosen is None else chosen


def health_check(channel: Any) -> Callable[..., Any]:
    """The standard health check, without its package: the request is empty, the answer one small number."""
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=bytes,
        response_deserializer=lambda data: HEALTH[data[1] if len(data) == 2 else 0],
    )
