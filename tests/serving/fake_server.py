"""An Inference service in this process that does as the test says, behind a real port."""

import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

FINISH = pb.Finish(
    reason=pb.Finish.REASON_STOP, stop_token_id=9, usage=pb.Usage(completion_tokens=2)
)
PLACE = pb.TokenLogprobs(token_id=5, logprob=-0.5, rank=1)


class FakeService(pb_grpc.InferenceServicer):
    """Notes what comes. The text of a prompt says how its call goes: `endless`, `breaks`, or well."""

    def __init__(self):
        self.refusals = []  # of the next calls: status, pushback in ms or None
        self.requests, self.times, self.left = [], [], []
        self.ended = threading.Semaphore(0)  # calls that are over
        self.batch_gate = None
        self.num_batches, self.most_batches = 0, 0
        self.lock = threading.Lock()

    def _meet(self, request, context):
        self.times.append(time.monotonic())
        self.requests.append(request)
        self.left.append(context.time_remaining())
        context.add_callback(self.ended.release)
        if self.refusals:
            code, pushback = self.refusals.pop(0)
            if pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback)),))
            context.abort(code, "not now")

    def Generate(self, request, context):
        self._meet(request, context)
        yield pb.GenerateResponse(request_id="r", index=1, text="a", token_ids=[5])
        if request.text == "breaks":
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
        while request.text == "endless" and context.is_active():
            time.sleep(0.01)
        yield pb.GenerateResponse(request_id="r", index=1, text="b", token_ids=[9], finish=FINISH)

    def Chat(self, request, context):
        return self.Generate(pb.GenerateRequest(text="chat"), context)

    def GenerateUnary(self, request, context):
        self._meet(request, context)
        while request.text == "endless" and context.is_active():
            time.sleep(0.01)
        return self._whole(request.text)

    def ChatUnary(self, request, context):
        self._meet(request, context)
        return self._whole("chat")

    def _whole(self, text):
        replies = [
            pb.Reply(index=i, text=f"{text}!", token_ids=[5, 9], logprobs=[PLACE], finish=FINISH)
            for i in range(2)
        ]
        first = pb.TokenLogprobs()
        return pb.GenerateUnaryResponse(
            request_id="r", replies=replies, prompt_logprobs=[first, PLACE]
        )

    def Batch(self, request, context):
        """The last item first. A prompt of `bad` fails alone, `breaks` ends the call, `silent` is left out."""
        with self.lock:
            self.num_batches += 1
            self.most_batches = max(self.most_batches, self.num_batches)
        self._meet(request, context)
        try:
            yield from self._answers(request, context)
        finally:
            with self.lock:
                self.num_batches -= 1

    def _answers(self, request, context):
        if self.batch_gate is not None:
            self.batch_gate.wait(10)
        for index, item in reversed(list(enumerate(request.items))):
            text = item.generate.text if item.HasField("generate") else "chat"
            if text == "breaks":
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            while text == "endless" and context.is_active():
                time.sleep(0.01)
            if text == "bad":
                error = pb.BatchError(code=3, message="temperature must be in [0, 2]")
                yield pb.BatchResponse(index=index, error=error)
            elif text != "silent":
                yield pb.BatchResponse(index=index, response=self._whole(text[:20]))

    def Embed(self, request, context):
        self._meet(request, context)
        found = [pb.Embedding(values=[0.5, 0.25], prompt_tokens=3) for _ in request.inputs]
        return pb.EmbedResponse(embeddings=found)

    def Score(self, request, context):
        self._meet(request, context)
        one = pb.ContinuationScore(
            sum_logprob=-1, mean_logprob=-0.5, token_ids=[5], logprobs=[PLACE]
        )
        return pb.ScoreResponse(
            scores=[one for _ in request.continuations], prompt_logprobs=[PLACE], prompt_tokens=4
        )

    def Tokenize(self, request, context):
        self._meet(request, context)
        return pb.TokenizeResponse(token_ids=[1, 2], tokens=["a", "b"], max_context_tokens=64)

    def Detokenize(self, request, context):
        self._meet(request, context)
        return pb.DetokenizeResponse(text="ab")

    def WatchLoads(self, request, context):
        self._meet(request, context)
        while context.is_active():
            yield pb.GetLoadsResponse(num_running=7)
            time.sleep(0.01)


@contextmanager
def fake_server(port=0):
    """The service and the address where it answers."""
    service = FakeService()
    server = grpc.server(futures.ThreadPoolExecutor(16))
    pb_grpc.add_InferenceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
