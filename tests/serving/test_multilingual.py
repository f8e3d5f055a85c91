"""Chat in many scripts over the real model: the test chooses the tokens, the model their order."""

import pytest

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

TEXTS = {
    "Latin": "Größe, façade, niño, Łódź",
    "Greek": "Καλημέρα, πού είναι",
    "Cyrillic": "Здравствуйте, где мой",
    "Hebrew": "שלום, איפה ההזמנה",
    "Arabic": "مرحبا، أين طلبي",
    "Devanagari": "नमस्ते, मेरा ऑर्डर",
    "Thai": "สวัสดีครับ อยู่ไหน",
    "Han": "你好,我的订单在哪里",
    "Hangul": "안녕하세요, 제 주문은",
    "emoji": "👍🏽👩‍👩‍👧🇩🇪😀",
}
MESSAGES = [pb.ChatMessage(role="user", content="Hello")]


@pytest.fixture
def stub(client):
    return client._stub


def chat(stub, ids, stop=()):
    """Pieces, token ids and end of a reply that is made of these tokens."""
    sampling = pb.SamplingParams(
        allowed_token_ids=ids, temperature=2, seed=3, max_tokens=60, ignore_eos=True, stop=stop
    )
    responses = list(stub.Chat(pb.ChatRequest(messages=MESSAGES, sampling=sampling)))
    tokens = [token for response in responses for token in response.token_ids]
    return [response.text for response in responses], tokens, responses[-1].finish


@pytest.mark.parametrize("script", TEXTS)
def test_the_pieces_of_a_reply_join_to_the_whole(stub, script):
    ids = stub.Tokenize(pb.TokenizeRequest(text=TEXTS[script], add_special_tokens=False)).token_ids
    pieces, tokens, finish = chat(stub, ids)
    assert len(tokens) == 60 and set(tokens) <= set(ids) and len(set(tokens)) > 3
    whole = stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens)).text
    assert "".join(pieces).encode() == whole.encode()
    assert len(pieces) > 5
    assert finish.reason == pb.Finish.REASON_LENGTH


@pytest.mark.parametrize("script", TEXTS)
def test_a_stop_string_ends_a_reply_where_it_begins(stub, script):
    ids = stub.Tokenize(pb.TokenizeRequest(text=TEXTS[script], add_special_tokens=False)).token_ids
    whole = "".join(chat(stub, ids)[0])
    for start in (len(whole) // 5, len(whole) // 2):
        for length in (1, 2, 5):
            stop = whole[start : start + length]
            if "\ufffd" in stop:
                continue  # bytes that are no character are not what somebody stops at
            pieces, _, finish = chat(stub, ids, [stop, "never said"])
            assert "".join(pieces) == whole[: whole.index(stop)]
            assert finish.reason == pb.Finish.REASON_STOP and finish.stop_string == stop
