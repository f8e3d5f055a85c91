"""What comes back, as plain values: protobuf to dataclasses. Decides nothing."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

REASONS = {
    number: name.removeprefix("REASON_").lower() for name, number in pb.Finish.Reason.items()
}


@dataclass(frozen=True, slots=True)
class Logprob:
    """One place: the token that stands there, and the best ones (id, logprob). A prompt's first place is empty."""

    token_id: int | None
    logprob: float | None
    rank: int | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took, in tokens and seconds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    num_preemptions: int
    sparse_tokens: int = 0  # decode steps that attended to a part of the context
    kept_mass: float | None = None  # share of attention that the part had, mean of those measured
    num_measured: int = 0
    returned_to_dense: bool = False  # for good, since less was kept than the server's bound


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of a reply. The last one of each reply has `finish_reason` and `usage`."""

    request_id: str
    index: int  # which of the `n` replies
    text: str  # the new piece only
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    prompt_logprobs: tuple[Logprob, ...]
    finish_reason: str | None  # `stop` or `length`
    stop_reason: int | str | None  # the stop token or stop string
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: str  # `stop` or `length`
    stop_reason: int | str | None  # the stop token or stop string
    usage: Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """All replies to one request."""

    request_id: str
    replies: tuple[Reply, ...]
    prompt_logprobs: tuple[Logprob, ...]

    @property
    def text(self) -> str:
        """The first reply's."""
        return self.replies[0].text


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text or conversation as the model reads it."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]  # what each shows, where it was asked for
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class Embedding:
    """Of one input."""

    values: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How probable one continuation is; natural logarithms."""

    sum_logprob: float
    mean_logprob: float  # a token
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of all continuations, in their order."""

    scores: tuple[ContinuationScore, ...]
    prompt_logprobs: tuple[Logprob, ...]
    prompt_tokens: int


def event(message: pb.GenerateResponse) -> Event:
    """A message of a stream."""
    finish = message.finish if message.HasField("finish") else None
    return Event(
        request_id=message.request_id,
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        finish_reason=None if finish is None else _reason(finish),
        stop_reason=None if finish is None else _stop_reason(finish),
        usage=None if finish is None else _usage(finish.usage),
    )


def completion(message: pb.GenerateUnaryResponse) -> Completion:
    """The answer of a unary call."""
    replies = (
        Reply(
            index=reply.index,
            text=reply.text,
            token_ids=tuple(reply.token_ids),
            logprobs=_logprobs(reply.logprobs),
            finish_reason=_reason(reply.finish),
            stop_reason=_stop_reason(reply.finish),
            usage=_usage(reply.finish.usage),
        )
        for reply in message.replies
    )
    return Completion(message.request_id, tuple(replies), _logprobs(message.prompt_logprobs))


def tokens(message: pb.TokenizeResponse) -> Tokens:
    """The answer of Tokenize."""
    return Tokens(tuple(message.token_ids), tuple(message.tokens), message.max_context_tokens)


def embeddings(message: pb.EmbedResponse) -> tuple[Embedding, ...]:
    """The answer of Embed."""
    return tuple(Embedding(tuple(one.values), one.prompt_tokens) for one in message.embeddings)


def scores(message: pb.ScoreResponse) -> Scores:
    """The answer of Score."""
    found = (
        ContinuationScore(
            one.sum_logprob, one.mean_logprob, tuple(one.token_ids), _logprobs(one.logprobs)
        )
        for one in message.scores
    )
    return Scores(tuple(found), _logprobs(message.prompt_logprobs), message.prompt_tokens)


def _reason(finish: pb.Finish) -> str:
    """Its name; the number of one that only a newer server knows."""
    return REASONS.get(finish.reason, str(finish.reason))


def _stop_reason(finish: pb.Finish) -> int | str | None:
    match finish.WhichOneof("stop"):
        case "stop_token_id":
            return finish.stop_token_id
        case "stop_string":
            return finish.stop_string
    return None


def _logprobs(places: Iterable[pb.TokenLogprobs]) -> tuple[Logprob, ...]:
    return tuple(map(_logprob, places))


def _logprob(place: pb.TokenLogprobs) -> Logprob:
    is_empty = not place.HasField("token_id")
    return Logprob(
        token_id=None if is_empty else place.token_id,
        logprob=None if is_empty else place.logprob,
        rank=None if is_empty else place.rank,
        top=tuple((one.token_id, one.logprob) for one in place.top),
    )


def _usage(usage: pb.Usage) -> Usage:
    found = {field.name: getattr(usage, field.name) for field in fields(Usage)}
    return Usage(**found | ({} if usage.HasField("kept_mass") else {"kept_mass": None}))
