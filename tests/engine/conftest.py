"""Tiny random checkpoints that the engine's tests share."""

import pytest

from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """Two layers, context 512, with a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    """Where sockets are made. Short: the path of a Unix socket has at most 107 bytes."""
    directory = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory
