"""harness.py beside the training scripts: who imports whom, and that a script gets the one in its own folder.

Against: the import statements of the sources, copies of script and harness with a planted difference in one process.
Run: python -m pytest tests/test_harness.py
"""
import ast
import importlib
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

import sample
import train_gpt

sys.path.insert(0, str(ROOT / "records"))
guard = importlib.import_module("guard")
OURS = {path.stem for folder in (ROOT, ROOT / "data", ROOT / "records") for path in folder.glob("*.py")}


@pytest.mark.parametrize("name, allowed", [("harness", set()), ("triton_kernels", set()), *(
    (script, {"harness", "triton_kernels"}) for script in SCRIPTS)])
def test_what_is_imported_of_the_project(name, allowed):
    imports = [node for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert OURS & modules == allowed


@pytest.mark.parametrize("load", [sample.import_script, guard.load_script])
def test_each_script_works_with_the_harness_beside_it(load, tmp_path):
    """One of them allows short streams only, the other longer ones than usual."""
    before, loaded = sys.modules["harness"], []
    text, line = (ROOT / "harness.py").read_text(), "MAX_TOKENS = 1 << 24 "
    assert text.count(line) == 1
    for bits in (10, 30):
        folder = tmp_path / str(bits)
        folder.mkdir()
        (folder / "harness.py").write_text(text.replace(line, f"MAX_TOKENS = 1 << {bits} "))
        loaded.append(load(Path(shutil.copy(ROOT / "train_gpt.py", folder))))
    strict, lax = loaded
    assert sys.modules["harness"] is before is harness and train_gpt.MAX_TOKENS == 1 << 24
    assert (strict.train_gpt.MAX_TOKENS, lax.train_gpt.MAX_TOKENS) == (1 << 10, 1 << 30)
    with pytest.raises(strict.UserError, match="must be at most 1024"):
        strict.parse_config(["--preset=tiny"])
    values = asdict(lax.parse_config(["--preset=tiny", f"--final_windows=64,{1 << 25}"]))
    with pytest.raises(train_gpt.UserError, match=f"1..{1 << 24}"):
        train_gpt.config_from_dict(values)
    assert asdict(lax.config_from_dict(values)) == values


def test_the_probing_process_takes_the_harness_beside_the_script(tmp_path):
    """Which writes one backend more than it is asked for."""
    text = (ROOT / "harness.py").read_text().replace('order["names"]:', 'order["names"] + ["planted"]:')
    (tmp_path / "harness.py").write_text(text)
    script = tmp_path / "my idea.py"
    shutil.copy(ROOT / "train_gpt.py", script)
    cfg = train_gpt.PRESETS["tiny"]
    assert train_gpt.try_backends(script, cfg, ["plain"], train_gpt.torch.device("cpu")).keys() == {"plain", "planted"}
