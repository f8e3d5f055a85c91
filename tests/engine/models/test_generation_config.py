"""generation_config.json: what is taken from it, what is named as not applied, what is refused."""

import json

import pytest

from vivace.engine.errors import ArtifactError
from vivace.engine.models.generation_config import read_generation_defaults

CONFIG = {"vocab_size": 260, "eos_token_id": 257}


@pytest.fixture
def write(tmp_path):
    """Write generation_config.json beside a config.json and return the directory."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def write(values):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_generation_defaults_and_the_end_tokens_of_both_files(write):
    settings = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "do_sample": False,
        "eos_token_id": [255, 257, 259],
    }
    got = read_generation_defaults(write(settings))
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (0.7, 0.9, 20, 0.05)
    assert got.repetition_penalty == 1.1
    assert (got.eos_token_ids, got.ignored) == ((255, 257, 259), ())


def test_without_a_generation_config_only_the_end_token_is_set(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    got = read_generation_defaults(tmp_path)
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (None,) * 4
    assert got.eos_token_ids == (257,)


def test_fields_that_are_not_applied_are_named(write):
    settings = {"no_repeat_ngram_size": 2, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": [3]}
    got = read_generation_defaults(write(settings))
    assert got.ignored == ("no_repeat_ngram_size", "suppress_tokens")


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": 1e-9},
        {"repetition_penalty": 0},
        {"repetition_penalty": 11.0},
        {"repetition_penalty": [1.1]},
        {"top_p": 0},
        {"top_p": float("nan")},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 2},
        {"eos_token_id": 260},
        {"eos_token_id": [1, -1]},
        {"eos_token_id": "</s>"},
    ],
)
def test_bad_generation_defaults_are_refused_by_key(write, change):
    [key] = change
    with pytest.raises(ArtifactError, match=rf"generation_config\.json: {key} is "):
        read_generation_defaults(write(change))
