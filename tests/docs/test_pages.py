"""What the pages say about the code can be looked up: links, paths, invariants, refused options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpcray import options

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"),
                *(ROOT / "benchmarks").glob("*.md")])
ARCHITECTURE = ROOT / "ARCHITECTURE.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """As the forges make them: lower case, no punctuation, hyphens for blanks."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}: no such title"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    """`node/tasks.py`, `tests/api`, `slurm/`: backticked paths of this repository."""
    tops = {p.name for p in ROOT.iterdir() if p.is_dir()} | {
        p.name for p in (ROOT / "hpcray").iterdir() if p.is_dir()}
    not_yet = {"recovery", "collective", "gpu"}
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", prose(page)):
        top = path.split("/")[0]
        if top in tops and top not in not_yet:
            found = any((base / path).exists() for base in (ROOT, ROOT / "hpcray"))
            assert found, f"{name_of(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page: Path) -> None:
    """`api/test_get.py::test_single`, below tests/."""
    for path, test in re.findall(r"`([\w/]+\.py)::(test_\w+)`", prose(page)):
        text = (ROOT / "tests" / path).read_text()
        assert re.search(rf"^(?:async )?def {test}\(", text, flags=re.M), (
            f"{name_of(page)} names {path}::{test}")


def test_the_index_of_what_ray_documents_has_all_pages() -> None:
    folder = ROOT / "docs" / "ray"
    index = (folder / "README.md").read_text()
    pages = [page.name for page in sorted(folder.glob("*.md")) if page.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []


def defined_invariants() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "hpcray").rglob("*.py"):
        text = path.read_text()
        found |= set(re.findall(r"^([A-Z]{2}-\d)  ", text, flags=re.M))
        found |= set(re.findall(r"\((RS-\d):", text))  # stated in a sentence
    return found


def test_architecture_lists_every_invariant() -> None:
    listed: dict[str, str] = {}
    for prefix, first, last, kept in re.findall(
        r"^\| ([A-Z]{2})-(\d)(?:\.\.(\d))? \|.*?\| `([\w/.]+)` \|", ARCHITECTURE.read_text(),
        flags=re.M,
    ):
        for number in range(int(first), int(last or first) + 1):
            listed[f"{prefix}-{number}"] = kept
    assert set(listed) == defined_invariants()
    for name, kept in listed.items():
        assert name in (ROOT / "hpcray" / kept).read_text(), f"{name} is not kept in {kept}"


def test_architecture_is_short() -> None:
    assert len(ARCHITECTURE.read_text().splitlines()) <= 200


def test_architecture_names_every_room() -> None:
    text = ARCHITECTURE.read_text()
    rooms = [p.name for p in (ROOT / "hpcray").iterdir() if (p / "__init__.py").exists()]
    assert not [room for room in rooms if f"`{room}/`" not in text]


def test_differences_name_every_refused_option() -> None:
    text = (ROOT / "docs" / "differences.md").read_text()
    refused = [name for name, option in options.TABLE.items() if option.unsupported]
    assert not [name for name in refused if f"`{name}`" not in text]
    table = text.split("## Refused", 1)[1].split("Values of options", 1)[0]
    first_cells = "".join(re.findall(r"^\| ([^|]+) \|", table, flags=re.M))
    accepted = set(re.findall(r"`(\w+)`", first_cells)) - set(refused)
    assert not accepted, f"{accepted} are not refused (any more)"


def test_decisions_have_one_form() -> None:
    folder = ROOT / "docs" / "decisions"
    records = sorted(p for p in folder.glob("*.md") if p.name != "README.md")
    index = (folder / "README.md").read_text()
    numbers = [int(record.name[:4]) for record in records]
    assert len(set(numbers)) == len(numbers)
    for number, record in zip(numbers, records, strict=True):
        text = record.read_text()
        assert record.name.startswith(f"{number:04d}-") and text.startswith(f"# {number}. ")
        assert re.findall(r"^## (.+)$", text, flags=re.M) == [
            "Context", "Rejected", "Choice", "Consequences"], record.name
        assert f"({record.name})" in index, f"{record.name} is not in the index"
