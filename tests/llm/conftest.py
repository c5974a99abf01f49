"""The fault server for the length of a test."""

import pytest
from llm_faults import FaultServer


@pytest.fixture
def server():
    """A `FaultServer` that answers well until a test scripts its faults."""
    with FaultServer() as running:
        yield running
