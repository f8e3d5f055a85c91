"""These tests compile: in processes of their own, as `make test` runs them, since interpreted kernels cannot be compiled."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ["TRITON_INTERPRET"] == "1":
        for item in items:
            if item.get_closest_marker("aot"):
                item.add_marker(pytest.mark.skip("TRITON_INTERPRET=0 pytest -m aot"))
