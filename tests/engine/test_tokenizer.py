"""Text and ids as transformers has them; templates as the checkpoint wrote them, in a sandbox."""

import json
import threading
from pathlib import Path

import pytest
import zstandard
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny_models import make_tokenizer
from vivace.engine.conversation import ChatMessage, Conversation
from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest
from vivace.engine.tokenizer import Tokenizer

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two  spaces\n\n\ttab",
    "नमस्ते, मेरा ऑर्डर कहाँ है?",
    "多少天内可以退货？",
    "أين طلبي؟",
    "สวัสดี 👩‍👩‍👧‍👦 é",
    "<s> </s><|im_start|>user<|im_end|>",
]
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
    text = ours.render_chat(Conversation(CHAT, add_generation_prompt=wants_turn))
    messages = [{"role": one.role, "content": one.content} for one in CHAT]
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=wants_turn
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=wants_turn)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("name", ["stories260K", "aidreams260K", "northstar-dense"])
def test_a_checkpoint_encodes_and_decodes_as_transformers_does(shared_data, name):
    directory = shared_data / "models" / name
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for adds in (True, False):
            ids = ours.encode(text, add_special_tokens=adds)
            assert ids == theirs.encode(text, add_special_tokens=adds)
            for skips in (True, False):
                want = theirs.decode(ids, skip_special_tokens=skips)
                assert ours.decode(ids, skip_special_tokens=skips) == want


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none or documents is not none %}tools{% else %}none{% endif %}",
        "{% for m in messages %}{{ m.role }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        "a {%- generation -%} b {{ eos_token }} {%- endgeneration %} c",
        "x\n  {% generation %}\n  {{ bos_token }}\n  {% endgeneration %}\ny",
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
        "{{ messages[0] | tojson(false, 1) }}{{ missing }}{{ sep_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_a_template_renders_as_in_transformers(tmp_path, template):
    ours = with_template(tmp_path, template)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|begin|>", eos_token="<|end|>"
    )
    messages = [{"role": one.role, "content": one.content} for one in CHAT]
    want = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert ours.render_chat(Conversation(CHAT, add_generation_prompt=False)) == want


def test_a_template_sees_the_checkpoints_special_tokens(tmp_path):
    make_tokenizer(tmp_path)
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    settings = {f"{name}_token": f"[{name}]" for name in names}
    settings["bos_token"] = {"content": "[bos]", "special": True}
    settings["chat_template"] = "".join("{{ " + name + "_token }}" for name in names)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    rendered = Tokenizer.load(tmp_path).render_chat(Conversation(CHAT))
    assert rendered == "[bos][eos][unk][sep][pad][cls][mask]"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    assert with_template(tmp_path, named).render_chat(Conversation(CHAT)) == "D"
    assert not with_template(tmp_path, named[:1]).has_chat_template


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        "[]",
        '{"chat_template": 5}',
        '{"chat_template": [{"x": 1}]}',
        '{"chat_template": [1]}',
        '{"chat_template": "x", "bos_token": {"id": 1}}',
        '{"chat_template": "x", "bos_token": 1}',
    ],
)
def test_broken_settings_are_one_line(tmp_path, settings):
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    make_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja"):
        Tokenizer.load(tmp_path)


def test_a_checkpoint_without_a_template_says_so(tmp_path):
    tokenizer = with_template(tmp_path, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(FailedPrecondition, match="no chat template"):
        tokenizer.render_chat(Conversation(CHAT))


def test_a_template_in_a_file_of_its_own_is_found(tmp_path):
    make_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    assert (
        Tokenizer.load(tmp_path).render_chat(Conversation([ChatMessage("user", "x")])) == "x<|end|>"
    )


def test_no_messages_are_refused():
    with pytest.raises(InvalidRequest, match="messages must hold at least one"):
        Tokenizer.load(NORTHSTAR).render_chat(Conversation([]))


def test_what_the_template_complains_of_reaches_the_caller(tmp_path):
    tokenizer = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        tokenizer.render_chat(Conversation(CHAT))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% include 'tokenizer.json' %}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[99].content.x }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_get_out_of_its_sandbox(tmp_path, template):
    with pytest.raises(InvalidRequest, match="the chat template says"):
        with_template(tmp_path, template).render_chat(Conversation(CHAT))


def test_what_the_sandbox_hides_is_empty(tmp_path):
    assert with_template(tmp_path, "{{ lipsum.__globals__ }}").render_chat(Conversation(CHAT)) == ""


def test_a_template_that_is_no_template_is_refused_at_the_start(tmp_path):
    with pytest.raises(ArtifactError, match="chat template"):
        with_template(tmp_path, "{% if %}").render_chat(Conversation(CHAT))


@pytest.mark.parametrize("content", [None, "", "{", '{"model": 1}'])
def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequest, match="surrogates not allowed"):
        Tokenizer.load(NORTHSTAR).encode("a\ud83d")


def test_a_long_text_is_tokenized_beside_others():
    """Not while it holds all of Python: who waits in another thread has many turns."""
    tokenizer = Tokenizer.load(NORTHSTAR)
    text = "How many days does delivery take? " * 20_000
    turns, done = 0, threading.Event()
    found = []

    def work():
        found.append(tokenizer.encode(text))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns >= 20
    assert found[0] == tokenizer.library.encode(text).ids
    assert tokenizer.decode(found[0]) == text
