"""One laboratory for all tests of this folder."""

import tempfile
from pathlib import Path

import pytest

from tests.cluster.hosts import why_not
from tests.cluster.laboratory import Laboratory, why_no_services
from tests.cluster.screen import Screen


def pytest_collection_modifyitems(items):
    """Tests of this folder need a cluster; some of them minutes."""
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory):
    """Swift behind a fault proxy, MLflow on PostgreSQL, a Ray head and three nodes."""
    reason = why_not() or why_no_services()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("laboratory")
    made = Laboratory(folder, Path(tempfile.mkdtemp(prefix="cp2r", dir="/tmp")))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def screen(laboratory):
    """A screen of eight plates that went through every step on the laboratory's cluster."""
    made = Screen(laboratory)
    made.make()
    return made
