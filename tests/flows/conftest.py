"""What tests of this folder share: a machine with everything up, as ``switchyard up`` leaves it."""

from collections.abc import Iterator

import pytest
from machine import Up


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    machine = Up(tmp_path_factory.mktemp("up"))
    try:
        yield machine
    finally:
        machine.switchyard("down")
