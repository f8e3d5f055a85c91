"""Text and ids as transformers has them; templates as the checkpoint wrote them, in a sandbox."""

import json
from pathlib import Path

import pytest
import zstandard
from transformers import AutoTokenizer

from tests.tiny_models import make_tokenizer
from vivace.engine.chat_template import ChatMessage
from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest
from vivace.engine.tokenizer import Tokenizer

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
CHAT = [
    ChatMessage("system", "Be brief. 请简短"),
    ChatMessage("user", "Where is my order? <b>&'\""),
    ChatMessage("assistant", "On its way."),
    ChatMessage("user", "谢谢"),
]


def with_template(directory, template):
    make_tokenizer(directory, template)
    return Tokenizer.load(directory)


@pytest.mark.parametrize("name", ["stories260K.dev", "aidreams260K.dev", "northstar-dense"])
def test_every_recorded_prompt_has_the_recorded_ids(shared_data, name):
    packed = (shared_data / "reference" / f"{name}.jsonl.zst").read_bytes()
    text = zstandard.ZstdDecompressor().stream_reader(packed).read().decode()
    tokenizer = Tokenizer.load(shared_data / "models" / name.removesuffix(".dev"))
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:  # a few were cut to the context
        assert tokenizer.encode(row["prompt"])[: len(row["prompt_ids"])] == row["prompt_ids"]


@pytest.mark.parametrize("wants_turn", [True, False])
def test_a_chat_is_rendered_and_encoded_as_transformers_does(wants_turn):
    ours, theirs = Tokenizer.load(NORTHSTAR), AutoTokenizer.from_pretrained(NORTHSTAR)
    text = ours.render_chat(CHAT, add_generation_prompt=wants_turn)
    messages = [{"role": one.role, "content": one.content} for one in CHAT]
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=wants_turn
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=wants_turn)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == ids


def test_a_checkpoint_without_a_template_says_so(tmp_path):
    tokenizer = with_template(tmp_path, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(FailedPrecondition, match="no chat template"):
        tokenizer.render_chat(CHAT)


def test_a_template_in_a_file_of_its_own_is_found(tmp_path):
    make_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    assert Tokenizer.load(tmp_path).render_chat([ChatMessage("user", "x")]) == "x<|end|>"


def test_no_messages_are_refused():
    with pytest.raises(InvalidRequest, match="messages must hold at least one"):
        Tokenizer.load(NORTHSTAR).render_chat([])


def test_what_the_template_complains_of_reaches_the_caller(tmp_path):
    tokenizer = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        tokenizer.render_chat(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% include 'tokenizer.json' %}",
        "{{ 1 // 0 }}",
        "{{ messages[99].content.x }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_get_out_of_its_sandbox(tmp_path, template):
    with pytest.raises(InvalidRequest, match="the chat template says"):
        with_template(tmp_path, template).render_chat(CHAT)


def test_what_the_sandbox_hides_is_empty(tmp_path):
    assert with_template(tmp_path, "{{ lipsum.__globals__ }}").render_chat(CHAT) == ""


def test_a_template_that_is_no_template_is_refused_at_the_start(tmp_path):
    with pytest.raises(ArtifactError, match="chat template"):
        with_template(tmp_path, "{% if %}")


@pytest.mark.parametrize("content", [None, "", "{", '{"model": 1}'])
def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
