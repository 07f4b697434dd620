from __future__ import annotations

import pytest

from oneplusn.loadtest.fixtures import SHAPES, Fixtures, build


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    """The tiny model with five LoRAs and two clusters, as a benchmark of five requests has them."""
    made = Fixtures(tmp_path_factory.mktemp("fixtures"), requests=5)
    build(made, SHAPES["tiny"])
    return made
