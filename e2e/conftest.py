"""The cluster, once for all tests, and what tests do with it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

import pytest

from e2e.cluster import cache, programs
from e2e.cluster.cluster import Cluster, remove
from e2e.cluster.settings import Settings
from e2e.images.build import build_all
from e2e.namespaces import Namespaces
from e2e.release import Release
from e2e.service import Service, Services

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.cluster.kubectl import Kubectl


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cluster")
    group.addoption("--keep", action="store_true", help="keep the cluster for the next run")
    group.addoption("--as-is", action="store_true", help="keep, and build no images before")
    group.addoption("--nodes", type=int, default=2, help="how many nodes (default 2)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "e2e: needs the cluster")
    config.addinivalue_line("markers", "smoke: belongs to the short part of the suite")
    # So that the cluster is removed then, too.
    signal.signal(signal.SIGTERM, _end)


def _end(signal_number: int, _frame: object) -> NoReturn:
    pytest.exit(f"ended by signal {signal_number}", returncode=128 + signal_number)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running cluster with the images of this tree."""
    settings = Settings(nodes=request.config.getoption("--nodes"))
    programs.require_root()
    with cache.locked("cluster"):
        programs.require_debian_packages()
        cluster = Cluster(settings, programs.build())
        as_is = request.config.getoption("--as-is")
        if not (as_is and cluster.is_up()):
            cluster.up_to_date(build_all())
        try:
            yield cluster
        finally:
            if not (as_is or request.config.getoption("--keep")):
                remove(settings)


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """kubectl(*arguments, stdin=None, check=True) as the cluster's administrator."""
    return cluster.kubectl


@pytest.fixture(scope="session")
def operator_installed(cluster: Cluster) -> Iterator[Release]:
    """The operator, installed by the chart."""
    release = Release(cluster)
    release.install()
    yield release
    release.uninstall()


@pytest.fixture(scope="module")
def namespaces(kubectl: Kubectl) -> Iterator[Namespaces]:
    """Makes namespaces that are deleted after the last test of the module."""
    with Namespaces(kubectl) as namespaces:
        yield namespaces


@pytest.fixture
def namespace(kubectl: Kubectl, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a new namespace, deleted after the test."""
    with Namespaces(kubectl) as namespaces:
        yield namespaces.create(request.node.name)


@pytest.fixture(scope="module")
def services(
    cluster: Cluster, operator_installed: Release, namespaces: Namespaces
) -> Iterator[Services]:
    """Makes InferenceServices of the demo model."""
    with Services(cluster, operator_installed, namespaces) as services:
        yield services


@pytest.fixture
def service(services: Services, request: pytest.FixtureRequest) -> Iterator[Service]:
    """An InferenceService of the demo model in a namespace of its own, not yet applied.

    It is deleted after the test, so that its workers do not slow the next one down.
    """
    service = services.create(request.node.name)
    yield service
    services.remove(service)
