"""The pages say nothing that is not there: links, files and flags exist, README stays short, the log is complete.

Against: the files of the project, the flags that its sources define, the 70 rows of the table that dev/LOG.md replaced.
Run: python -m pytest tests/test_docs.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "dev/LOG.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
# flags of other programs that the pages show
FOREIGN = {"standalone", "nproc_per_node", "nnodes", "max-restarts", "rdzv_id", "rdzv_backend", "rdzv_endpoint",
           "nodes", "ntasks-per-node", "gpus-per-node", "signal",
           "no-binary", "no-deps", "outfile", "outtype"}


def anchors(page):
    """What a link can name after `#`: the headings of a page, as GitHub writes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.M)}


def broken_links(page):
    """The relative links of a page that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            yield link


def known_flags():
    """Every flag that a source defines: fields of dataclasses, arguments of a parser, options of run.sh."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("records/*.py"), *ROOT.glob("dev/*.py")]
    sources = "\n".join(file.read_text(encoding="utf-8") for file in [*files, ROOT / "run.sh"])
    fields = re.findall(r"^    (\w+): [\w\[\], .]+ = ", sources, re.M)
    return {*fields, *re.findall(r"""["' ]--(\w+)""", sources), "help"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert not list(broken_links(ROOT / name))


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The clock\n[a](#the-clock) [b](#nowhere) [c](other.md) [d](https://example.org) [e](page.md#x)\n")
    assert list(broken_links(page)) == ["#nowhere", "other.md", "page.md#x"]


@pytest.mark.parametrize("name", ["README.md", "docs/running.md", "docs/formats.md", "docs/chat.md"])
def test_flags_exist(name):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", (ROOT / name).read_text(encoding="utf-8")))
    assert sorted(named - known_flags() - FOREIGN) == []


def test_readme_is_short_and_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    tree = text.split("## Files")[1].split("```")[1]
    names = [name for line in tree.strip().splitlines() for name in re.split(r",? ", line.split("  ")[0])]
    assert len(names) > 10 and [name for name in names if not list(ROOT.glob(name))] == []


def test_the_log_has_every_row_once_newest_first():
    text = (ROOT / "dev/LOG.md").read_text(encoding="utf-8")
    assert [int(row) for row in re.findall(r"^### .*\(row (\d+)\)$", text, re.M)] == list(range(70, 0, -1))
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)$", text, re.M)
    assert dates and dates == sorted(set(dates), reverse=True)
