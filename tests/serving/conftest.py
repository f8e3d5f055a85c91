"""One server for all tests that do not end it."""

import pytest

from tests.serving.server_process import serving
from vivace.serving.client import Client


@pytest.fixture(scope="session")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.target) as client:
        yield client
