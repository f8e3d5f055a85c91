"""The data files: what each architecture reads of config.json, against transformers' own config classes."""

import json
import tomllib
from importlib import resources

import pytest
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures import MODELS
from tests.tiny_models import SHAPE
from vivace.engine.errors import ArtifactError
from vivace.engine.models.architecture import read_architecture, supported
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Kind, values_of
from vivace.engine.models.rope import attention_factor
from vivace.engine.models.spec import Activation, MlpSpec, MoeSpec, QkNorm
from vivace.engine.models.weights import generic_name

MODEL_TYPES = {  # architecture -> transformers' model_type
    name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in supported()
}
ARCHITECTURES = resources.files("vivace.engine.models") / "architectures"
# Values under which a key that is read only sometimes is read.
NEEDED = {
    "max_window_layers": {"use_sliding_window": True, "layer_types": None},
    "sliding_window": {"use_sliding_window": True},
    "sliding_window_pattern": {"layer_types": None},
    "rope_theta": {"rope_parameters": None, "rope_scaling": None},
    "no_rope_layer_interval": {"no_rope_layers": None},
    "intermediate_size": {"mlp_only_layers": [0]},
}


def own_weights(name):
    """Names of the weights that an architecture's own file lists."""
    return tomllib.loads((ARCHITECTURES / f"{name}.toml").read_text()).get("weights", {}).keys()


def minimal(name, **changes):
    """The least that a config.json of an architecture must hold, with changes; None takes a key away."""
    config = {
        "architectures": [name],
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "vocab_size": 260,
        "max_position_embeddings": 512,
    }
    config |= changes
    return {key: value for key, value in config.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    """Write config.json and return the directory."""

    def write(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_every_architecture_is_tested_for_parity_by_three_configs_or_more():
    kinds = [kind for kind, _ in MODELS.values()]
    assert set(supported()) == MODEL_TYPES.keys()
    assert all(kinds.count(kind) >= 3 for kind in MODEL_TYPES.values())
    fields = [SHAPE | overrides for _, overrides in MODELS.values()]
    groups = {one["num_attention_heads"] // one["num_key_value_heads"] for one in fields}
    head_dims = {
        one["head_dim"] or one["hidden_size"] // one["num_attention_heads"] for one in fields
    }
    experts = {one.get("num_experts", one.get("num_local_experts")) for one in fields}
    assert {1, 2, 4, 8} <= groups
    assert {8, 16, 64, 80, 96, 128, 256} <= head_dims
    assert {1, 64} <= experts


@pytest.mark.parametrize("name", supported())
def test_absent_keys_mean_what_they_mean_to_transformers(write, name):
    """Every default, and what follows from them layer by layer."""
    config_class = CONFIG_MAPPING[MODEL_TYPES[name]]
    theirs = config_class(**minimal(name))
    assert read_architecture(name).model_type == MODEL_TYPES[name]
    elsewhere = {"rope_theta", "rope_local_base_freq", "sliding_window_pattern"}
    for key, value in read_architecture(name).defaults.items():
        if key == "num_experts" and not hasattr(config_class, key):
            key = "num_local_experts"
        if key not in elsewhere:
            assert getattr(config_class, key) == value, key
    spec = read_spec(write(minimal(name)))
    attention = spec.layers[0].attention
    assert attention.num_kv_heads == theirs.num_key_value_heads
    assert attention.head_dim == (getattr(theirs, "head_dim", None) or 128 // 32)
    assert spec.norm.eps == theirs.rms_norm_eps
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    kinds = getattr(theirs, "layer_types", None)
    has_window = [layer.attention.window is not None for layer in spec.layers]
    if kinds is None:
        assert has_window == [getattr(theirs, "sliding_window", None) is not None] * 6
    else:
        assert has_window == [kind == "sliding_attention" for kind in kinds]
    parameters = theirs.rope_parameters
    for layer, windowed in zip(spec.layers, has_window, strict=True):
        kind = "sliding_attention" if windowed else "full_attention"
        theta = parameters.get(kind, parameters)["rope_theta"]
        assert layer.attention.rope.rotary_dim == 0 or layer.attention.rope.theta == theta


@pytest.mark.parametrize("name", supported())
def test_every_key_that_is_listed_is_read(write, name):
    """A value of the wrong type is refused by name, or would have been ignored."""
    architecture = read_architecture(name)
    moe = {"num_experts": 4, "num_experts_per_tok": 2} if architecture.moe else {}
    elsewhere = {"architectures", "eos_token_id"}
    for key in sorted(architecture.reads):
        if key in elsewhere:
            continue
        context = {k: v for k, v in NEEDED.get(key, {}).items() if k in architecture.reads}
        config = minimal(name, **moe) | context
        read_spec(write(config))
        for wrong in ({"wrong": 1}, "wrong"):
            with pytest.raises(ArtifactError, match=key):
                read_spec(write(config | {key: wrong}))


@pytest.mark.parametrize("name", supported())
def test_any_other_key_is_refused_by_name_and_harmless_ones_are_not(write, name):
    for value in (1, None):
        with pytest.raises(ArtifactError, match=r"mystery is (1|null); this key is not supported"):
            read_spec(write(minimal(name) | {"mystery": value}))
    plain = read_spec(write(minimal(name)))
    architecture = read_architecture(name)
    assert not architecture.harmless & (architecture.reads | architecture.refused)
    noise = dict.fromkeys([*architecture.harmless, "_name_or_path", "_mystery"], "anything")
    assert read_spec(write(minimal(name) | noise)) == plain


@pytest.mark.parametrize("model", MODELS)
def test_the_config_that_transformers_writes_is_read(write, model):
    """With all the keys that its class has, of which none may be unknown to us."""
    kind, overrides = MODELS[model]
    fields = {key: value for key, value in (SHAPE | overrides).items() if key != "dtype"}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    [name] = [name for name, one in MODEL_TYPES.items() if one == kind]
    config = json.loads(CONFIG_MAPPING[kind](**fields).to_json_string())
    directory = write(config | {"architectures": [name]})
    assert len(read_spec(directory).layers) == fields["num_hidden_layers"]
    assert AutoConfig.from_pretrained(directory).model_type == kind


@pytest.mark.parametrize("name", supported())
def test_every_tensor_name_is_of_a_weight_that_some_program_has(write, name):
    """And every weight of a program has its tensors."""
    architecture = read_architecture(name)
    programs = []
    for model, (kind, overrides) in MODELS.items():
        if kind == MODEL_TYPES[name]:
            fields = {
                k: v for k, v in (SHAPE | overrides).items() if k != "dtype" and v is not None
            }
            config = json.loads(CONFIG_MAPPING[kind](**fields).to_json_string())
            programs.append((model, emit(read_spec(write(config | {"architectures": [name]})))))
    used = {
        generic_name(value.name)[0]
        for _, program in programs
        for value in values_of(program)
        if value.kind is Kind.WEIGHT
    }
    assert used <= architecture.weights.keys()
    assert own_weights(name) <= used
    assert architecture.transposed | architecture.interleaved <= used


def test_a_null_window_is_no_window(write):
    for name in ("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"):
        spec = read_spec(write(minimal(name) | {"sliding_window": None}))
        assert [layer.attention.window for layer in spec.layers] == [None] * 6
        assert spec.window is None
    spec = read_spec(write(minimal("MistralForCausalLM", sliding_window=100)))
    assert [layer.attention.window for layer in spec.layers] == [100] * 6
    assert spec.window == 100


def test_a_window_that_is_switched_off_is_no_window(write):
    for name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM"):
        for window in (0, 256):
            off = {"sliding_window": window, "use_sliding_window": False}
            assert read_spec(write(minimal(name) | off)).window is None
    on = {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 4}
    spec = read_spec(write(minimal("Qwen2ForCausalLM") | on))
    assert [layer.attention.window for layer in spec.layers] == [None] * 4 + [256] * 2


def test_layer_types_come_before_the_rule(write):
    types = ["full_attention", *["sliding_attention"] * 5]
    spec = read_spec(write(minimal("Gemma2ForCausalLM", layer_types=types, sliding_window=9)))
    assert [layer.attention.window for layer in spec.layers] == [None] + [9] * 5
    assert spec.window is None  # one layer sees everything


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma2ForCausalLM", {"layer_types": ["local"] * 6}, "layer_types"),
        ("Gemma2ForCausalLM", {"layer_types": [["full_attention"]] * 6}, "layer_types"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [2] * 6}, "no_rope_layers"),
        ("MixtralForCausalLM", {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        (
            "MixtralForCausalLM",
            {"num_experts": 2, "num_local_experts": 3},
            "num_local_experts is 3",
        ),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope"}}, "short_factor is missing"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0, 1.0]}},
            r"short_factor is \[1\.0\].*2 numbers",
        ),
        ("GptOssForCausalLM", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
)
def test_what_is_not_supported_is_refused_by_key(write, name, change, named):
    with pytest.raises(ArtifactError, match=named):
        read_spec(write(minimal(name) | change))


def test_gemma_2_bends_the_spec_in_every_way_it_can(write):
    spec = read_spec(write(minimal("Gemma2ForCausalLM", query_pre_attn_scalar=144)))
    attention = spec.layers[0].attention
    assert (spec.embed_scale, spec.final_softcap, spec.norm.offset) == (128**0.5, 30.0, 1.0)
    assert (attention.softcap, attention.scale, attention.head_dim) == (50.0, 1 / 12, 256)
    assert [layer.attention.window for layer in spec.layers] == [4096, None] * 3
    assert all(layer.norms_before and layer.norms_after for layer in spec.layers)
    assert spec.layers[0].mlp == MlpSpec(96, Activation.GELU_TANH)


def test_gemma_3_rotates_windowed_layers_by_a_base_of_their_own(write):
    older = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for config in (
        older,
        {"rope_parameters": {"full_attention": {**older["rope_scaling"], "rope_theta": 5e5}}},
    ):
        spec = read_spec(write(minimal("Gemma3ForCausalLM") | config))
        assert [layer.attention.rope.theta for layer in spec.layers] == [1e4] * 5 + [5e5]
        assert [layer.attention.rope.scaling is None for layer in spec.layers] == [True] * 5 + [
            False
        ]
    assert spec.layers[0].attention.qk_norm is QkNorm.HEAD


def test_qwen2_moe_mixes_dense_and_sparse_layers(write):
    config = minimal("Qwen2MoeForCausalLM", decoder_sparse_step=2, mlp_only_layers=[3])
    spec = read_spec(write(config | {"shared_expert_intermediate_size": 40}))
    assert [isinstance(layer.mlp, MoeSpec) for layer in spec.layers] == [
        *(False, True, False, False, False, True)
    ]
    moe = spec.layers[1].mlp
    assert (moe.num_experts, moe.top_k, moe.hidden_size) == (60, 4, 1408)
    assert (moe.renormalize, moe.shared) == (False, MlpSpec(40))


def test_only_the_layers_that_say_so_rotate(write):
    spec = read_spec(write(minimal("SmolLM3ForCausalLM")))
    assert [layer.attention.rope.rotary_dim for layer in spec.layers] == [4, 4, 4, 0, 4, 4]


GPT_OSS_FACTOR = 1.3465735902799727  # 0.1 ln 32 + 1


def test_gpt_oss_has_a_rotation_of_its_own_where_config_json_has_none(write):
    for nothing in ({}, {"rope_parameters": None}, {"rope_scaling": None}):
        rope = read_spec(write(minimal("GptOssForCausalLM") | nothing)).layers[0].attention.rope
        assert attention_factor(rope) == pytest.approx(GPT_OSS_FACTOR)
    plain = minimal("GptOssForCausalLM") | {"rope_parameters": {"rope_type": "default"}}
    assert read_spec(write(plain)).layers[0].attention.rope.scaling is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_type"),
        (
            {
                "rope_parameters": {"full_attention": {"rope_type": "default"}},
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "rope_scaling is .*rope_parameters is there too",
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type"),
    ],
)
def test_gemma_3_refuses_rotations_that_transformers_would_read_otherwise(write, change, named):
    with pytest.raises(ArtifactError, match=named):
        read_spec(write(minimal("Gemma3ForCausalLM") | change))


def test_flags_of_the_data_files_are_keys_that_are_read():
    for name in supported():
        architecture = read_architecture(name)
        blocks, moe = architecture.blocks, architecture.moe
        keys = [blocks.qkv_bias, blocks.out_bias, blocks.mlp_bias]
        if moe is None or moe.activation is None:
            keys.append(blocks.activation_key)
        if moe is not None:
            keys += [moe.hidden_size, moe.renormalize, moe.shared_hidden_size]
        assert {key for key in keys if isinstance(key, str)} <= architecture.reads


def test_a_mistake_in_a_data_file_is_found_when_it_is_read(tmp_path, monkeypatch):
    text = (ARCHITECTURES / "Olmo2ForCausalLM.toml").read_text()
    (tmp_path / "common.toml").write_text((ARCHITECTURES / "common.toml").read_text())
    monkeypatch.setattr("vivace.engine.models.architecture.FOLDER", tmp_path)
    for wrong in (
        text.replace('norms = "after"', 'norms = "aftr"'),
        text.replace("norms =", "normes ="),
        text.replace("reads =", "reeds ="),
    ):
        assert wrong != text
        (tmp_path / "Wrong.toml").write_text(wrong)
        with pytest.raises((ValueError, TypeError, KeyError)):
            read_architecture.__wrapped__("Wrong")
