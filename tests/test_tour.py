"""The notebook docs/tour.ipynb runs from top to bottom, is a valid notebook without outputs, and holds no copy of code.

Its cells are plain Python, so a process of Python can run them one after the other, without a notebook server.
Run: python -m pytest tests/test_tour.py
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
# Runs the code cells of the notebook on stdin in one namespace, and saves its pictures in the current folder.
RUNNER = """
import json, os, sys, types
sys.dont_write_bytecode = True
sys.stdin.reconfigure(encoding="utf-8")
cells = [cell for cell in json.load(sys.stdin)["cells"] if cell["cell_type"] == "code"]
pictures = os.getcwd()
namespace = types.ModuleType("__main__").__dict__
for cell in cells:
    print("cell", cell["id"], flush=True)
    exec(compile("".join(cell["source"]), "cell " + cell["id"], "exec"), namespace)
    if "matplotlib.pyplot" in sys.modules:
        plt = sys.modules["matplotlib.pyplot"]
        if plt.get_fignums():
            plt.savefig(os.path.join(pictures, cell["id"] + ".png"), dpi=80)
        plt.close("all")
"""
TINY = ["--depth=2", "--model_dim=32", "--head_dim=16", "--windows=8,24", "--pack_tokens=256", "--batch_tokens=256",
        "--val_tokens=500", "--val_stream_tokens=256", "--device=cpu"]


def source(cell):
    return "".join(cell["source"])


def code_cells():
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def with_settings(**values):
    """The notebook with other values in its cell of settings."""
    notebook = json.loads(json.dumps(NOTEBOOK))
    cell, = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    text = source(cell)
    for name, value in values.items():
        text, count = re.subn(rf"^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text, flags=re.M)
        assert count == 1, name
    cell["source"] = text.splitlines(True)
    return notebook


def execute(notebook, folder):
    return subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps(notebook), cwd=folder, text=True,
                          encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                          env=os.environ | {"MPLBACKEND": "Agg", "PYTHONUTF8": "1"})


def test_all_cells_run(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (texts / page.name).write_bytes(page.read_bytes())
    out = tmp_path / "out"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    notebook = with_settings(TEXT=[str(texts)], STEPS=4, MODEL=TINY, ROUNDS=1, COMPARE_STEPS=1, OUT=str(out))
    # the cell `clone` looks for the repository in the current folder and those above it
    first = {"cell_type": "code", "id": "test", "metadata": {}, "source": [f"import os\nos.chdir({str(ROOT)!r})\n"]}
    notebook["cells"].insert(0, first)
    done = execute(notebook, pictures)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.findall(r"^cell (.*)$", done.stdout, re.M) == ["test", *(cell["id"] for cell in code_cells())]
    assert re.search(r"^step:4/4 val_loss:\d", done.stdout, re.M)                               # it trained,
    assert re.search(r"^\+ .*F\.gelu\(h\)$", done.stdout, re.M)                                 # changed one line,
    assert {path.name for path in out.iterdir()} == {"data", "runs", "gelu.py", "compare_gelu"}  # and compared
    assert {path.stem for path in pictures.iterdir()} == {"curve", "mask", "muon-example", "plan-picture",
                                                          "compare-picture"}


def test_a_cell_that_raises_is_seen(tmp_path):
    cells = [{"cell_type": "code", "id": f"c{i}", "source": [line]} for i, line in enumerate(("x = 1", "1 / 0", "x"))]
    done = execute({"cells": cells}, tmp_path)
    assert done.returncode == 1
    assert "cell c1" in done.stdout and "ZeroDivisionError" in done.stdout and "cell c2" not in done.stdout


def test_it_is_a_notebook_of_version_4_5_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    for cell in NOTEBOOK["cells"]:
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | more
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert isinstance(cell["source"], list) and all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"clear the outputs of {cell['id']}"
        else:
            assert cell["cell_type"] == "markdown"
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def runs_of_four(text):
    """All runs of four lines of a text, without blank lines and blanks around lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(lines[i:i + 4]) for i in range(len(lines) - 3)}


def test_it_holds_no_copy_of_code_of_the_project():
    files = [path for pattern in ("*.py", "*.sh", "data/*.py", "records/*.py", "dev/*.py") for path in ROOT.glob(pattern)]
    known = set().union(*(runs_of_four(path.read_text(encoding="utf-8")) for path in files))
    for cell in code_cells():
        assert not runs_of_four(source(cell)) & known, cell["id"]


def test_a_copy_is_seen():
    text = (ROOT / "train_gpt_simple.py").read_text(encoding="utf-8")
    start = text.index("def norm(")
    assert runs_of_four("x = 1\n\n" + text[start:start + 400]) & runs_of_four(text)


@pytest.mark.parametrize("cell", NOTEBOOK["cells"], ids=lambda cell: cell["id"])
def test_links_and_lines(cell):
    for link in re.findall(r"\]\(([^)\s]+)\)", source(cell)) if cell["cell_type"] == "markdown" else []:
        assert (ROOT / "docs" / link).exists(), link
    assert max(map(len, source(cell).splitlines())) <= 120
