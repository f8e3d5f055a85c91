"""config.json to `ModelSpec`: what is read, and what is refused by name."""

import json
import os

import pytest
from transformers import AutoConfig

from vivace.engine.errors import ArtifactError
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.spec import Llama3Scaling, NormSpec, QkNorm, RopeSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": 260,
    "eos_token_id": 257,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.fixture
def write(tmp_path):
    """Write config.json (or another file) and return the directory."""

    def write(values, name="config.json"):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / name).write_text(text)
        return tmp_path

    return write


def attention_of(spec):
    assert len(set(spec.layers)) == 1
    return spec.layers[0].attention


def test_a_llama_is_read(write):
    spec = read_spec(write(LLAMA))
    assert spec.architecture == "LlamaForCausalLM"
    assert (spec.vocab_size, spec.model_size, len(spec.layers)) == (260, 64, 2)
    assert (spec.norm, spec.tied_embeddings) == (NormSpec(1e-5), False)
    assert spec.max_context_tokens == 512
    attention = attention_of(spec)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 16)
    assert (attention.qk_norm, attention.scale) == (QkNorm.NONE, 0.25)
    assert attention.rope == RopeSpec(10000.0, 16)
    assert spec.layers[0].mlp.hidden_size == 96


def test_a_qwen3_has_norms_of_q_and_k_and_heads_of_128_unless_it_says_otherwise(write):
    attention = attention_of(read_spec(write(QWEN3)))
    assert (attention.qk_norm, attention.head_dim) == (QkNorm.HEAD, 128)
    assert attention_of(read_spec(write(QWEN3 | {"head_dim": 32}))).head_dim == 32


@pytest.mark.parametrize("base", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_missing_fields_are_filled_in_as_transformers_does(write, base):
    sparse = {key: base[key] for key in base if key not in ("rms_norm_eps", "eos_token_id")}
    spec, theirs = read_spec(write(sparse)), AutoConfig.from_pretrained(write(sparse))
    attention = attention_of(spec)
    assert spec.norm.eps == theirs.rms_norm_eps
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert attention.head_dim == theirs.head_dim
    assert attention.rope.theta == theirs.rope_parameters["rope_theta"]


def test_without_kv_heads_every_head_has_its_own(write):
    config = {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}
    assert attention_of(read_spec(write(config))).num_kv_heads == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3"} | LLAMA3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA3},
    ],
    ids=["rope_type", "type", "rope_parameters"],
)
def test_llama_3_scaling_is_read_however_it_is_written(write, rope):
    got = attention_of(read_spec(write(LLAMA | rope))).rope
    assert got == RopeSpec(500000.0, 16, Llama3Scaling(8.0, 1.0, 4.0, 128))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 50000.0, "rope_scaling": None},
        {"rope_theta": 50000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}},
        {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 50000}},
    ],
)
def test_plain_rotation_is_read_however_it_is_written(write, rope):
    assert attention_of(read_spec(write(LLAMA | rope))).rope == RopeSpec(50000.0, 16)


def test_the_code_that_a_checkpoint_brings_is_never_looked_at(write, tmp_path):
    (tmp_path / "modeling_llama.py").write_text("raise SystemExit('this was run')")
    auto_map = {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}
    assert read_spec(write(LLAMA | auto_map)).architecture == "LlamaForCausalLM"
    with pytest.raises(ArtifactError, match="CustomForCausalLM is not supported"):
        read_spec(write(LLAMA | auto_map | {"architectures": ["CustomForCausalLM"]}))


REFUSED = [  # what is changed, and what the message must name
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, Mistral"),
    ({"architectures": None}, "architectures"),
    ({"architectures": []}, "architectures"),
    ({"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]}, "architectures"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config.*mxfp4"),
    ({"mlp_bias": 1}, "mlp_bias is 1"),
    ({"hidden_act": "relu"}, 'hidden_act is "relu".*silu'),
    ({"sliding_window": 256}, "sliding_window is 256.*this key is not supported"),
    ({"sliding_window": None}, "sliding_window is null.*this key is not supported"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types"),
    ({"rope_scaling": {"rope_type": "yarn", "beta": 2}}, "rope_scaling: beta is 2"),
    ({"rope_scaling": {"rope_type": "llama3", "beta_fast": 2}}, "rope_scaling: beta_fast is 2"),
    ({"rope_scaling": {"type": "ntk", "factor": 2}}, 'rope_scaling: type is "ntk"'),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, 'rope_parameters: rope_type is "dynamic"'),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_parameters": {"mrope_section": [8, 4, 4]}}, "mrope_section"),
    ({"rope_scaling": "llama3"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
    ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"factor": -8}}, "factor is -8"),
    ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"high_freq_factor": 1}}, "high_freq"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": float("inf")}, "rope_theta is Infinity"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": "64"}, 'hidden_size is "64"'),
    ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    ({"hidden_size": 66}, "hidden_size is 66.*head_dim is missing"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"head_dim": 15}, "head_dim is 15"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
    ({"max_position_embeddings": 1}, "max_position_embeddings is 1"),
    ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"'),
]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_what_is_not_supported_is_refused_by_key_and_value(write, change, named):
    with pytest.raises(ArtifactError, match=named) as caught:
        read_spec(write(LLAMA | change))
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_in_one_line(write, text):
    with pytest.raises(ArtifactError, match=r"config\.json") as caught:
        read_spec(write(text))
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        read_spec(tmp_path)
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        read_spec(tmp_path / "nowhere")


def test_gpt_nano_sort_is_refused_by_name(shared_data):
    with pytest.raises(ArtifactError, match="architecture GPT2LMHeadModel is not supported"):
        read_spec(shared_data / "models" / "gpt-nano-sort")


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["\ud800"]},
        {"architectures": ["\x1b[31mLlama\nproblem: none"]},
        {"\ud800": 1},
        {"\x1b[2J\n": 1},
        {"hidden_act": "\udfff"},
        {"rope_scaling": {"rope_type": "\x07"}},
        {"vocab_size": "\n" * 10**6},
    ],
)
def test_hostile_text_is_refused_in_one_printable_line(write, change):
    with pytest.raises(ArtifactError) as caught:
        read_spec(write(LLAMA | change))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1100


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ArtifactError, match=r"config\.json: is not a file"):
        read_spec(tmp_path)


def test_wild_numbers_of_layers_and_experts_are_refused_at_once(write):
    moe = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    with pytest.raises(ArtifactError, match=r"num_experts is 1025"):
        read_spec(write(moe | {"num_local_experts": 1025}))
    with pytest.raises(ArtifactError, match=r"num_experts is 1000"):
        read_spec(write(moe | {"num_local_experts": 1000, "num_hidden_layers": 4096}))
    qwen = moe | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    many = {"num_hidden_layers": 1000, "mlp_only_layers": list(range(300_000))}
    assert len(read_spec(write(qwen | many | {"num_key_value_heads": 4})).layers) == 1000


def test_the_model_type_must_be_that_of_the_architecture(write):
    with pytest.raises(ArtifactError, match='model_type is "mistral"; only "llama"'):
        read_spec(write(LLAMA | {"model_type": "mistral"}))
