"""Titles and bodies of pull requests, in templates of the kinds that upstream has had."""

from __future__ import annotations

import pytest

from overlay.patches.patch import Mail
from overlay.staging.pull_request import Change, Evidence, body, title, unwrap

REPOSITORY = "https://example.org/vllm"
FREE = "FILL IN THE PR DESCRIPTION HERE\n\nFIX #xxxx (*link issues*)\n\n**READ <x>**\n"
CHECKLIST = """- [ ] The purpose of the PR.
- [ ] The test plan.
- [ ] (Optional) Documentation.
"""
HEADINGS = """## Purpose

## Test Plan

## Test Result

## (Optional) Documentation Update
"""
FILL = "PLEASE FILL IN THE PR DESCRIPTION HERE ENSURING ALL ITEMS HAVE BEEN CONSIDERED.\n"
FIRST = f"## Checklist\n{CHECKLIST}\n{FILL}\n{HEADINGS}\n**READ <x>**\n"
LAST = f"<!-- x -->\n{FILL}\n{HEADINGS}\n---\n<details>\n{CHECKLIST}</details>\n\n**READ <x>**\n"


def change(subject: str, bug: str, fixed: str = "") -> Change:
    text = f"It is broken,\nand this fixes it.\n\nOrigin: vendor\nBug: {bug}\n"
    text += f"Applied-Upstream: {fixed}\n" if fixed else ""
    return Change(Mail("A", "a@example.org", "x", subject, text, ""), ("tests/test_a.py",))


ONE = (change("[Bugfix] Fix it", f"{REPOSITORY}/issues/7"),)
TWO = (*ONE, change("[Core] Fix that", f"{REPOSITORY}/pull/8"))
NOT_RUN = Evidence({}, "Linters find nothing.")


@pytest.mark.parametrize("template", [FREE, FIRST, LAST])
def test_every_kind_of_template_is_filled_in(template: str) -> None:
    text = body(template, ONE, NOT_RUN, REPOSITORY)
    assert "FILL IN" not in text
    assert "## Purpose\n\nIt is broken, and this fixes it.\n" in text
    assert "## Test Plan\n\nTests that this adds or changes:" in text
    assert "## Test Result\n\nNot run.\n\nLinters find nothing.\n" in text
    assert text.count("FIX #7") == 1
    assert "xxxx" not in text
    assert "**READ <x>**" in text
    assert "Origin" not in text


@pytest.mark.parametrize("template", [FIRST, LAST])
def test_boxes_of_what_was_not_done_stay_empty(template: str) -> None:
    text = body(template, ONE, NOT_RUN, REPOSITORY)
    assert "- [x] The purpose" in text
    assert "- [ ] The test plan" in text
    assert "- [ ] (Optional)" in text


def test_each_commit_has_its_purpose_told() -> None:
    text = body(LAST, TWO, NOT_RUN, REPOSITORY)
    assert text.index("### 1. [Bugfix] Fix it") < text.index("### 2. [Core] Fix that")
    assert "FIX #7\nRelated to #8\n" in text


def test_an_issue_that_upstream_closed_is_not_closed_again() -> None:
    fixed = change("[Core] C", f"{REPOSITORY}/issues/9", f"v0.8.4, {REPOSITORY}/pull/10")
    other = change("[Core] D", "https://example.org/9", "v0.8.5, https://example.org/other/11")
    text = body(LAST, (*TWO, fixed, other), NOT_RUN, REPOSITORY)
    wanted = (
        "\n\nFIX #7\nRelated to #8\nRelated to #9 (upstream's own change: #10 in v0.8.4)\n"
        "Related to https://example.org/9\n"
    )
    assert wanted in text
    assert "FIX #9" not in text


@pytest.mark.parametrize(
    ("subjects", "wanted"),
    [
        (["[Bugfix] A"], "[Bugfix] A"),
        (["[Bugfix] A", "[Bugfix][Core] B"], "[Bugfix][Core] A; B"),
        (["A"], "A"),
    ],
)
def test_titles(subjects: list[str], wanted: str) -> None:
    assert title(subjects) == wanted


def test_paragraphs_are_unwrapped_and_lists_are_not() -> None:
    text = "One\ntwo.\n\n* a\n* b\n\n    code\n    more\n"
    assert unwrap(text) == "One two.\n\n* a\n* b\n\n    code\n    more"
