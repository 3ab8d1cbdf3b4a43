"""The training scripts as a family: what is equal is equal byte for byte and says so, and all keep one contract.

Against: the sections between the banners of train_*.py, drifts planted in them, the list of flags in test_config.py.
A section tagged "same in every train_*.py" is edited in train_gpt.py and copied: python tests/test_family.py --write.
Run: python -m pytest tests/test_family.py
"""
import difflib
import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from conftest import BOS, ROOT, SCRIPTS, VOCAB


SOURCES = {f"{script}.py": (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
SIZE_VARIANTS = ["train_gpt_medium.py"]
BANNER, TAG = "# " + "-" * 77 + "\n# ", " (same in every train_*.py)"


def sections(source):
    """Title with its tag -> text. What comes before the first banner is the docstring and has no title."""
    parts = [part.split("\n", 1) for part in ("\n" + source).split(BANNER)]
    assert len(dict(parts)) == len(parts), "two sections have the same title"
    return dict(parts)


def problems(sources):
    """What breaks the rules of the family, as sentences."""
    first, *others = (sections(source) for source in sources.values())
    for name, other in zip(list(sources)[1:], others):
        if list(other) != list(first):
            yield f"the sections of {name} are {list(other)} instead of {list(first)}"
    for title, text in first.items():
        same = all(other.get(title) == text for other in others)
        if same != title.endswith(TAG):
            yield f"{title!r} is the same everywhere: tag it" if same else f"{title!r} is not the same everywhere"


def synced(source, other):
    """The script `other` with the tagged sections of `source`, and its own where there is no tag."""
    own = {title.removesuffix(TAG): text for title, text in sections(other).items()}
    return BANNER.join(f"{title}\n{text if title.endswith(TAG) else own[title]}"
                       for title, text in sections(source).items())[1:]


def test_sections_are_the_same_where_they_say_so_and_only_there():
    assert not list(problems(SOURCES)), "edit train_gpt.py, then: python tests/test_family.py --write"


@pytest.mark.parametrize("old, new, words", [
    ("longest other token", "longest token", ["Data", "not the same"]),
    ("import base64\n", "", ["Imports", "not the same"]),
    (f"# Model{TAG}", "# Model", ["sections", "'Model'"]),
    (f"{BANNER}Optimizer{TAG}\n", "", ["sections", "Optimizer"])])
def test_a_drift_of_one_script_is_named_and_undone(old, new, words):
    name = list(SOURCES)[-1]
    drifted = SOURCES | {name: SOURCES[name].replace(old, new)}
    assert all(word in next(problems(drifted)) for word in words)
    assert synced(SOURCES["train_gpt.py"], drifted[name]) == SOURCES[name] != drifted[name]


@pytest.mark.parametrize("old, new, words", [
    ("# Hyperparameters\n", f"# Hyperparameters{TAG}\n", ["Hyperparameters", "not the same"]),
    (f"# Decoding{TAG}\n", "# Decoding\n", ["Decoding", "tag it"])])
def test_a_tag_must_be_true(old, new, words):
    found, = problems({name: source.replace(old, new) for name, source in SOURCES.items()})
    assert all(word in found for word in words)


@pytest.mark.parametrize("name", SIZE_VARIANTS)
def test_a_size_variant_reads_as_a_short_difference(name):
    lines = difflib.unified_diff(*(SOURCES[name].splitlines() for name in ("train_gpt.py", name)), n=0)
    assert sum(line[0] in "+-" for line in list(lines)[2:]) < 200


# -----------------------------------------------------------------------------
# The contract

@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def test_flags_and_presets(script):
    from test_config import FLAGS
    assert {field.name for field in fields(script.Hyperparameters)} == FLAGS.keys()
    assert {"speedrun", "tiny"} <= script.PRESETS.keys()
    for cfg in script.PRESETS.values():
        train_gpt.check_config(cfg)
        assert script.stage_index(cfg, cfg.total_steps - 1) == len(cfg.stages) - 1
        assert script.config_from_dict(json.loads(json.dumps(asdict(cfg)))) == cfg
    for name in script.ATTENTION:
        assert script.parse_config([f"--attention={name}"]).attention == name


def test_logits_loss_and_decoding(script):
    import torch
    model = script.GPT(replace(script.PRESETS["tiny"], vocab_size=VOCAB, bos_id=BOS)).requires_grad_(False)
    tokens = torch.tensor([BOS, *b"The house by the river."])
    logits, targets = model(tokens), tokens.roll(-1)
    assert logits.shape == (24, VOCAB) and logits.dtype == torch.float32
    assert model(tokens, targets).item() == pytest.approx(24 * math.log(VOCAB), rel=1e-3)
    decoded = model.decode(tokens[None], model.new_cache(1, 24))
    torch.testing.assert_close(decoded[0], logits, atol=1e-4, rtol=1e-4)
    assert callable(script.main)


PROBE = """
import os, sys
before, files = dict(os.environ), set(os.listdir("."))
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
import {scripts}
assert dict(os.environ) == before, "the environment changed"
assert set(os.listdir(".")) == files, "a file appeared"
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32 and torch.get_float32_matmul_precision() == "highest"
"""


def test_importing_them_has_no_effect(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROBE.format(scripts=", ".join(SCRIPTS)), str(ROOT)], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_family.py --write    copies the tagged sections of train_gpt.py to the rest")
    for name, source in SOURCES.items():
        if (new := synced(SOURCES["train_gpt.py"], source)) != source:
            (ROOT / name).write_text(new)
            print(f"{name} has the tagged sections of train_gpt.py")
