"""The pages for users against the code: every reason has its heading, and nothing else is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from penstock_operator.observed import Fault
from penstock_operator.status import _FAULTS, NEEDED

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = {
    *NEEDED,
    *("Ready", "Progressing", "Degraded"),
    *("InferenceService", "RoleScaler", "ClusterRole", "ImageVolume"),
}
"""Names in this style that are no reasons."""


def reasons() -> set[str]:
    """Every reason that the operator can give: faults, and (status, "Reason", message) in code."""
    found = {fault for fault in get_args(Fault) if fault}
    for path in (ROOT / "operator" / "penstock_operator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple) and len(node.elts) == 3:
                first, second = node.elts[:2]
                if (
                    isinstance(first, ast.Constant)
                    and first.value in {"True", "False", "Unknown"}
                    and isinstance(second, ast.Constant)
                    and second.value not in {"True", "False", "Unknown"}
                ):
                    found.add(str(second.value))
    return found


def test_every_reason_has_a_heading_and_every_heading_of_a_reason_one_that_exists() -> None:
    text = (ROOT / "docs" / "troubleshoot.md").read_text()
    headings = re.findall(r"^### (\S+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(headings) == reasons()


def test_faults_are_listed_in_the_order_in_which_they_are_told() -> None:
    text = (ROOT / "docs" / "troubleshoot.md").read_text()
    listed = re.findall(r"\[(\w+)\]\(#\w+\)", text.partition("## ")[0])
    assert tuple(listed) == _FAULTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_reason_that_does_not_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`([A-Z][a-z]*(?:[A-Z][A-Za-z]*)+)`", text))
    named |= set(re.findall(r"troubleshoot\.md#(\w+)", text))
    lower = {reason.lower() for reason in reasons()}
    unknown = {n for n in named if n not in reasons() | OTHERS and n.lower() not in lower}
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, target
