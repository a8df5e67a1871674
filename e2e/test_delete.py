"""Deleting: everything goes, whoever is there to see to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e2e.release import Release
    from e2e.service import Service


def test_a_service_is_deleted_with_the_operator_down(
    service: Service, operator_installed: Release
) -> None:
    service.apply()
    service.wait_for("Ready")
    with operator_installed.down():
        service.delete()
        service.wait_until_gone()


def test_a_namespace_is_deleted_with_the_operator_down(
    service: Service, operator_installed: Release
) -> None:
    service.apply()
    service.wait_for("Ready")
    with operator_installed.down():
        # Kubernetes looks again only after half of what pods may take to drain: five minutes.
        service.kubectl("delete", "namespace", service.namespace, "--timeout=400s", seconds=420)


def test_deleting_during_the_start_leaves_nothing(service: Service) -> None:
    service.apply()
    service.wait_for("Progressing")
    service.delete()
    service.wait_until_gone()


def test_a_service_of_the_same_name_is_new(service: Service) -> None:
    """Nothing of the old one is taken over, above all not its keys."""
    service.apply()
    service.wait_for("Progressing")
    old = service.run("get", "secret", f"{service.name}-keys", "-o", "jsonpath={.data}")
    service.delete()
    service.wait_until_gone()
    service.apply()
    service.wait_for("Ready")
    new = service.run("get", "secret", f"{service.name}-keys", "-o", "jsonpath={.data}")
    assert new
    assert new != old
