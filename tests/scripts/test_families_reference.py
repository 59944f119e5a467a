"""docs/families.md is what the families say."""

from __future__ import annotations

from moequant.families import FAMILIES
from scripts import build_families_reference as reference


def test_the_page_is_current() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()


def test_no_model_is_listed_without_its_family() -> None:
    assert {family.name for family in FAMILIES} <= reference.MODELS.keys()
