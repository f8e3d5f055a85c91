"""What each RPC answers, through the real port, against transformers and the library."""

import math
import threading

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.server_process import CHAT, MODEL, PROMPT, serving, wait_until
from vivace import LLM, SamplingParams
from vivace.serving.client import Client
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

TEXTS = ["How many days does delivery take?", "谢谢", "Where is my order? " * 40]


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.target) as channel:
        yield pb_grpc.InferenceStub(channel)


@pytest.fixture(scope="module")
def llm():
    return LLM(MODEL)


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def ids_of(stub, text):
    return list(stub.Tokenize(pb.TokenizeRequest(text=text)).token_ids)


@pytest.mark.parametrize("pooling", ["MEAN", "LAST"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_those_of_transformers(stub, theirs, pooling, normalize):
    found = stub.Embed(
        pb.EmbedRequest(
            inputs=[pb.Prompt(text=text) for text in TEXTS],
            pooling=f"POOLING_{pooling}",
            normalize=normalize,
        )
    )
    for text, one in zip(TEXTS, found.embeddings, strict=True):
        ids = ids_of(stub, text)
        with torch.no_grad():
            hidden = theirs.base_model(torch.tensor([ids])).last_hidden_state[0].double()
        want = hidden.mean(0) if pooling == "MEAN" else hidden[-1]
        if normalize:
            want = want / want.norm()
        got = torch.tensor(one.values, dtype=torch.float64)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert one.prompt_tokens == len(ids)


def test_embeddings_default_to_the_mean_at_length_1(stub):
    inputs = [pb.Prompt(text="Hello")]
    plain = stub.Embed(pb.EmbedRequest(inputs=inputs)).embeddings[0].values
    said = stub.Embed(
        pb.EmbedRequest(inputs=inputs, pooling=pb.EmbedRequest.POOLING_MEAN, normalize=True)
    )
    assert list(plain) == list(said.embeddings[0].values)
    assert math.fsum(value * value for value in plain) == pytest.approx(1, abs=1e-5)


def test_scores_are_the_logprobs_of_transformers(stub, theirs):
    prompt, continuations = "Your refund takes", [" 3 days", " a while, sorry", "!"]
    found = stub.Score(
        pb.ScoreRequest(
            prompt=pb.Prompt(text=prompt),
            continuations=[pb.Prompt(text=text) for text in continuations],
            logprobs=2,
            prompt_logprobs=1,
        )
    )
    prompt_ids = ids_of(stub, prompt)
    assert found.prompt_tokens == len(prompt_ids) == len(found.prompt_logprobs)
    assert not found.prompt_logprobs[0].HasField("logprob")
    for text, score in zip(continuations, found.scores, strict=True):
        ids = [*prompt_ids, *score.token_ids]
        assert ids == ids_of(stub, prompt + text)
        with torch.no_grad():
            table = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        want = [float(table[i - 1, ids[i]]) for i in range(len(prompt_ids), len(ids))]
        assert score.sum_logprob == pytest.approx(sum(want), abs=1e-3)
        assert score.mean_logprob == pytest.approx(sum(want) / len(want), abs=1e-3)
        assert [place.logprob for place in score.logprobs] == pytest.approx(want, abs=1e-4)
        assert all(len(place.top) == 2 for place in score.logprobs)
    of_prompt = [float(table[i - 1, prompt_ids[i]]) for i in range(1, len(prompt_ids))]
    got = [place.logprob for place in found.prompt_logprobs[1:]]
    assert got == pytest.approx(of_prompt, abs=1e-4)


def test_continuations_of_token_ids_are_taken_as_they_are(stub):
    request = pb.ScoreRequest(
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5, 6, 7])),
        continuations=[pb.Prompt(token_ids=pb.TokenIds(ids=ids)) for ids in ([8], [9, 10])],
    )
    found = stub.Score(request)
    assert [list(score.token_ids) for score in found.scores] == [[8], [9, 10]]
    assert not found.scores[0].logprobs and not found.prompt_logprobs


def test_a_unary_call_has_what_the_stream_has(stub):
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(**message) for message in CHAT],
        sampling=pb.SamplingParams(seed=4, n=3, max_tokens=12),
        response=pb.ResponseOptions(logprobs=1, prompt_logprobs=0),
    )
    whole = stub.ChatUnary(request)
    pieces = list(stub.Chat(request))
    assert [reply.index for reply in whole.replies] == [0, 1, 2]
    for reply in whole.replies:
        mine = [piece for piece in pieces if piece.index == reply.index]
        assert reply.text == "".join(piece.text for piece in mine)
        assert list(reply.token_ids) == [token for piece in mine for token in piece.token_ids]
        assert len(reply.logprobs) == len(reply.token_ids)
        assert [piece.HasField("finish") for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert reply.finish.reason == mine[-1].finish.reason
    streamed = [place for piece in pieces for place in piece.prompt_logprobs]
    assert list(whole.prompt_logprobs) == streamed
    assert len(streamed) == whole.replies[0].finish.usage.prompt_tokens


def test_replies_share_the_blocks_of_their_prompt(stub, client):
    prompt = pb.TokenIds(ids=[77, *range(100, 1000)])
    before = client.loads()
    reply = stub.GenerateUnary(
        pb.GenerateRequest(
            token_ids=prompt, sampling=pb.SamplingParams(n=8, max_tokens=2, ignore_eos=True)
        )
    )
    assert len(reply.replies) == 8
    computed = client.loads().num_tokens_computed - before.num_tokens_computed
    assert computed < 901 + 8 * 40


def test_the_best_of_several_is_what_the_library_finds(stub, llm):
    sampling = {"seed": 9, "n": 2, "best_of": 5, "max_tokens": 10, "temperature": 1.0}
    got = stub.GenerateUnary(
        pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(**sampling))
    )
    [want] = llm.generate([PROMPT], SamplingParams(**sampling))
    assert [tuple(reply.token_ids) for reply in got.replies] == [
        output.token_ids for output in want.outputs
    ]
    assert not got.replies[0].logprobs


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {300: 100.0}},
        {"allowed_token_ids": [300, 301, 302]},
        {"bad_token_ids": list(range(300, 3000))},
    ],
)
def test_parameters_do_what_they_do_in_the_library(stub, llm, params):
    common = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    got = stub.GenerateUnary(
        pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(**common, **params))
    )
    [want] = llm.generate([PROMPT], SamplingParams(**common, **params))
    [plain] = llm.generate([PROMPT], SamplingParams(**common))
    assert tuple(got.replies[0].token_ids) == want.outputs[0].token_ids
    assert want.outputs[0].token_ids != plain.outputs[0].token_ids


def test_a_batch_answers_each_item_and_fails_the_bad_ones_alone(stub):
    good = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(temperature=0, max_tokens=4))
    items = [
        pb.BatchItem(generate=good),
        pb.BatchItem(),
        pb.BatchItem(generate=pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_p=2))),
        pb.BatchItem(chat=pb.ChatRequest(messages=[pb.ChatMessage(**CHAT[0])], model="another")),
        *(
            pb.BatchItem(
                chat=pb.ChatRequest(
                    messages=[pb.ChatMessage(**CHAT[0])],
                    sampling=pb.SamplingParams(temperature=0, max_tokens=3),
                )
            )
            for _ in range(100)
        ),
    ]
    found = {one.index: one for one in stub.Batch(pb.BatchRequest(items=items))}
    assert sorted(found) == list(range(104))
    alone = stub.GenerateUnary(good)
    assert found[0].response.replies[0].text == alone.replies[0].text
    codes = {index: one.error.code for index, one in found.items() if one.HasField("error")}
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    assert codes == {1: invalid.value[0], 2: invalid.value[0], 3: missing.value[0]}
    assert "items[1]" in found[1].error.message and "top_p" in found[2].error.message
    assert len({found[i].response.replies[0].text for i in range(4, 104)}) == 1


def test_loads_are_watched_until_the_caller_hangs_up(stub):
    watch = stub.WatchLoads(pb.WatchLoadsRequest(interval_ms=10))
    seen = [next(watch).num_blocks for _ in range(5)]
    assert len(set(seen)) == 1 and seen[0] > 0
    watch.cancel()


def test_watchers_are_told_of_the_drain():
    with serving() as server, Client(server.target) as client:
        busy = client.generate(PROMPT, max_tokens=300, ignore_eos=True)
        next(busy)
        with grpc.insecure_channel(server.target) as channel:
            watch = pb_grpc.InferenceStub(channel).WatchLoads(
                pb.WatchLoadsRequest(interval_ms=60_000)
            )
            next(watch)
            server.process.terminate()
            with pytest.raises(grpc.RpcError) as error:
                next(watch)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert list(busy)[-1].finish_reason == "length"


def test_only_so_many_may_watch(stub):
    watches = [stub.WatchLoads(pb.WatchLoadsRequest()) for _ in range(64)]
    for watch in watches:
        next(watch)
    with pytest.raises(grpc.RpcError) as error:
        next(stub.WatchLoads(pb.WatchLoadsRequest()))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for watch in watches:
        watch.cancel()

    def is_free():
        try:
            next(stub.WatchLoads(pb.WatchLoadsRequest()))
        except grpc.RpcError:
            return False
        return True

    wait_until(is_free)


@pytest.mark.parametrize("text", ["Hello, world", "你好 👍🏽", " leading and trailing "])
def test_text_goes_to_tokens_and_back(stub, text):
    found = stub.Tokenize(pb.TokenizeRequest(text=text, return_tokens=True))
    assert len(found.tokens) == len(found.token_ids) > 0
    assert found.max_context_tokens == 2048
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=found.token_ids)).text == text


def test_special_tokens_are_shown_where_asked_for(stub):
    ids = ids_of(stub, "<|im_start|>user")
    for skips, text in ((True, "user"), (False, "<|im_start|>user")):
        request = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=skips)
        assert stub.Detokenize(request).text == text


def test_a_higher_priority_starts_first():
    with serving("--max-running", "1") as server, Client(server.target) as client:
        first = client.generate(PROMPT, max_tokens=300, ignore_eos=True)
        next(first)
        order = []

        def ask(name, priority):
            call = client.generate(
                PROMPT, max_tokens=2, ignore_eos=True, priority=priority, request_id=name
            )
            next(call)
            order.append(name)
            list(call)

        asked = [("low", -1), ("plain-1", 0), ("plain-2", 0), ("high", 5)]
        threads = []
        for number, (name, priority) in enumerate(asked, 1):
            threads.append(threading.Thread(target=ask, args=(name, priority)))
            threads[-1].start()
            wait_until(lambda number=number: client.loads().num_waiting == number)
        first.close()
        for thread in threads:
            thread.join()
        assert order == ["high", "plain-1", "plain-2", "low"]


def test_an_echo_is_the_begin_of_the_first_message(stub):
    """By itself it would be out before the engine may refuse, and gRPC tries nothing again of which a message came."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, n=2)
    events = {}
    for echo in (False, True):
        response = pb.ResponseOptions(echo=echo)
        request = pb.GenerateRequest(text=PROMPT, sampling=sampling, response=response)
        events[echo] = list(stub.Generate(request))
    for index in range(2):
        plain, echoed = (
            [one for one in events[echo] if one.index == index] for echo in (False, True)
        )
        assert echoed[0].token_ids and echoed[0].text.startswith(PROMPT)
        assert "".join(one.text for one in echoed) == PROMPT + "".join(one.text for one in plain)


def test_echo_and_continuing(stub):
    greedy = pb.SamplingParams(temperature=0, max_tokens=4)
    echo = pb.ResponseOptions(echo=True)
    request = pb.GenerateRequest(text=PROMPT, sampling=greedy, response=echo)
    assert next(stub.Generate(request)).text.startswith(PROMPT)
    messages = [pb.ChatMessage(**CHAT[0]), pb.ChatMessage(role="assistant", content="Delivery ")]
    request = pb.ChatRequest(messages=messages, sampling=greedy, response=echo)
    with pytest.raises(grpc.RpcError) as error:
        stub.ChatUnary(request)
    assert "continue_final_message" in error.value.details()
    request.continue_final_message = True
    said = stub.ChatUnary(request).replies[0].text
    request.response.echo = False
    assert said == "Delivery " + stub.ChatUnary(request).replies[0].text


def test_what_fits_an_idle_engine_alone_is_served_however_short_its_queue():
    """Replies, texts and items take turns: none of them is refused because of the others of its call."""
    two = pb.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    many = pb.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, n=7, best_of=9)
    request, requests = (pb.GenerateRequest(text=PROMPT, sampling=one) for one in (two, many))
    prompts = [pb.Prompt(text=f" {number}") for number in range(9)]
    with serving("--max-waiting", "2") as server, grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.InferenceStub(channel)
        whole = stub.GenerateUnary(requests)
        assert len(whole.replies) == 7
        requests.sampling.best_of = 7
        ends = [one.index for one in stub.Generate(requests) if one.HasField("finish")]
        assert sorted(ends) == list(range(7))
        assert len(stub.Embed(pb.EmbedRequest(inputs=prompts)).embeddings) == 9
        scores = stub.Score(pb.ScoreRequest(prompt=prompts[0], continuations=prompts)).scores
        assert len(scores) == 9
        items = [pb.BatchItem(generate=one) for one in (requests, request, requests, request)]
        outcomes = {one.index: one for one in stub.Batch(pb.BatchRequest(items=items))}
        assert [len(outcomes[i].response.replies) for i in range(4)] == [7, 1, 7, 1]
