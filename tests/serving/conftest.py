"""One server for all tests that do not end it, and a fake one for each test that wants one of its own."""

import signal

import pytest

from tests.serving.fake_server import fake_server
from tests.serving.server_process import serving
from vivace.serving.client import Client


@pytest.fixture(scope="session", autouse=True)
def _sigint():
    """Processes that tests start get it, also when whoever runs the tests ignores it (as a shell does for its jobs).

    Not by a `preexec_fn`: that forks, and gRPC may abort a process that forks while a client is in use.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
