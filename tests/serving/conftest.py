"""One server for all tests that do not end it, and a fake one for each test that wants one of its own."""

import pytest

from tests.serving.fake_server import fake_server
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


@pytest.fixture
def fake():
    with fake_server() as (service, target):
        service.target = target
        yield service
