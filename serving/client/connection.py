"""What both clients ask of gRPC: retries, keepalive, sizes, deadlines. gRPC itself retries (gRFC A6), as these options say.

It retries a call that ended RESOURCE_EXHAUSTED or UNAVAILABLE before its first message came, after the time that the
server's `grpc-retry-pushback-ms` names (negative: not at all), else with exponential backoff and jitter, within the deadline.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
MAX_RETRIES = 4  # gRPC's own bound is 5 attempts
OPTIONS = (
    # A server that is gone without a word is noticed within 25 s. Vivace's allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # a unary call may be silent for minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    # Longer messages are not kept for a retry; the server refuses them for their length, with a status that is retried.
    ("grpc.per_rpc_retry_buffer_size", 4 << 20),
)


def options_for(max_retries: int) -> tuple[tuple[str, int | str], ...]:
    """Channel options. Raises ValueError if `max_retries` is not in 0..4."""
    if not 0 <= max_retries <= MAX_RETRIES:
        raise ValueError(f"max_retries must be in 0..{MAX_RETRIES}, got {max_retries}")
    if not max_retries:
        return OPTIONS
    policy = {
        "maxAttempts": max_retries + 1,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE"],
    }
    methods = [
        {"name": [{"service": SERVICE}], "retryPolicy": policy}
    ]  # not health: it tells of now
    return (*OPTIONS, ("grpc.service_config", json.dumps({"methodConfig": methods})))


def seconds(timeout: float | None, default: float | None) -> float | None:
    """The time a call gets; None: no end to it."""
    chosen = default if timeout is None else timeout
    return None if chosen == math.inf else chosen


def health_check(channel: Any) -> Callable[..., Any]:
    """The standard health check, without its package: the request is empty, the answer one small number."""
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=bytes,
        response_deserializer=lambda data: HEALTH[data[1] if len(data) == 2 else 0],
    )
