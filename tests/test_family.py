"""The training scripts as a family: what is equal is equal byte for byte and says so, and all keep one contract.

Against: the sections between the banners of train_*.py, drifts planted in them, the flags listed in test_config.py, and
limits on lines. A section tagged "as in train_gpt.py" is edited there and copied: python tests/test_family.py --write.
The relatives of train_gpt_simple.py have no tags. They share its functions and classes by name, except those in OWN.
Run: python -m pytest tests/test_family.py
"""
import ast
import difflib
import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from conftest import ALL_SCRIPTS, BOS, ROOT, SCRIPTS, VOCAB, assert_close

SOURCES = {f"{script}.py": (ROOT / f"{script}.py").read_text(encoding="utf-8") for script in ALL_SCRIPTS}
WITH_TABLES = [f"{script}.py" for script in SCRIPTS]
SIZE_VARIANTS = ["train_gpt_medium.py"]
BANNER, TAG = "# " + "-" * 77 + "\n# ", " (as in train_gpt.py)"
EXPERIMENT, WHOLE, FUNCTION = 1450, 2870, 70     # lines at most: down to the first appendix, of a script, of a function
PLAIN, PLAIN_FUNCTION = 600, 60                  # the same of the script to read first; blank lines are not counted
RELATIVE = {"train_gpt_moe.py": 925, "train_gpt_long.py": 730}   # of its relatives likewise; the first can be resumed
# relative of train_gpt_simple.py -> the functions and classes that it shares by name, but not by text
OWN = {"train_gpt_moe.py": {"Block", "GPT", "Hyperparameters", "make_optimizers", "train", "training_step"},
       "train_gpt_long.py": {"Block", "Cache", "GPT", "Hyperparameters", "Stream", "parse_config", "streams"}}
# What sample.py, evaluate.py, records/ and dev/ use of an imported training script.
INTERFACE = ("GPT Hyperparameters Machine PRESETS UserError config_from_dict main open_shards parse_config read_header "
             "read_tokenizer setup_machine to_device validate validation_streams").split()


def sections(source):
    """Title without its tag -> (whether it is tagged, text). The docstring, before the first banner, has no title."""
    parts = [part.split("\n", 1) for part in ("\n" + source).split(BANNER)]
    found = {title.removesuffix(TAG): (title.endswith(TAG), text.rstrip("\n")) for title, text in parts}
    assert len(found) == len(parts), "two sections have the same title"
    return found


def problems(sources):
    """What breaks the rules of the family, as sentences. Each sibling is compared with train_gpt.py alone."""
    first = sections(sources["train_gpt.py"])
    for title, (tagged, _) in first.items():
        if tagged:
            yield f"train_gpt.py: {title!r} is tagged, but tags belong in the other scripts"
    for name, source in sources.items():
        if name == "train_gpt.py":
            continue
        mine = sections(source)
        both = [title for title in mine if title in first]
        if both != [title for title in first if title in mine]:
            yield f"{name}: the sections are in another order than in train_gpt.py: {both}"
        for title, (tagged, text) in mine.items():
            if tagged and title not in first:
                yield f"{name}: {title!r} is tagged, but train_gpt.py has no such section"
            elif title in first and tagged != (text == first[title][1]):
                yield f"{name}: {title!r} " + ("differs from train_gpt.py: write it again, or remove the tag" if tagged
                                               else "equals train_gpt.py's: tag it")


def synced(source, other):
    """The script `other`, whose tagged sections have the text that they have in `source`."""
    if BANNER not in other:
        return other                    # a relative of the plain script
    first = sections(source)
    parts = [f"{title}{TAG * tagged}\n{first[title][1] if tagged and title in first else text}"
             for title, (tagged, text) in sections(other).items()]
    # the docstring's section ends with one newline, the others with a blank line, the last one with the file
    return (parts[0][1:] + "\n" + BANNER + ("\n\n" + BANNER).join(parts[1:])) + "\n"


def definitions(source):
    """Name -> text of the functions and classes at the top level of a script, with their decorators."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1:node.end_lineno])
    return found


def shared_definitions(simple, relative, own):
    """Name -> (text in train_gpt_simple.py, text in its relative) of what both have, except `own`."""
    first, mine = definitions(simple), definitions(relative)
    return {name: (first[name], mine[name]) for name in mine if name in first and name not in own}


def copied(simple, relative, own):
    """The script `relative`, whose shared functions and classes have the text that they have in train_gpt_simple.py."""
    for right, text in shared_definitions(simple, relative, own).values():
        assert relative.count(text) == 1
        relative = relative.replace(text, right)
    return relative


@pytest.mark.parametrize("name", OWN)
def test_a_relative_of_the_plain_script_shares_its_functions(name):
    shared = shared_definitions(SOURCES["train_gpt_simple.py"], SOURCES[name], OWN[name])
    assert [key for key, (right, text) in shared.items() if text != right] == [], "python tests/test_family.py --write"
    equal = definitions(SOURCES["train_gpt_simple.py"]).items() & definitions(SOURCES[name]).items()
    assert OWN[name].isdisjoint(dict(equal)), "it is equal: take its name out of OWN"
    assert OWN[name] <= definitions(SOURCES[name]).keys() & definitions(SOURCES["train_gpt_simple.py"]).keys()
    assert len(shared) > 10


def test_a_drift_of_a_relative_is_found_and_written_again():
    simple = SOURCES["train_gpt_simple.py"]
    drifted = simple.replace("F.rms_norm(x, (x.size(-1),))", "x").replace("total = torch.zeros(", "total = torch.ones(")
    shared = shared_definitions(simple, drifted, {"validate"})
    assert [name for name, (right, text) in shared.items() if text != right] == ["norm"]
    assert copied(simple, drifted, {"validate"}) == simple.replace("total = torch.zeros(", "total = torch.ones(")


def test_sections_are_the_same_where_they_say_so_and_only_there():
    assert list(problems(SOURCES)) == [], "edit train_gpt.py, then: python tests/test_family.py --write"


def test_writing_changes_nothing_else():
    for source in SOURCES.values():
        assert synced(SOURCES["train_gpt.py"], source) == source


@pytest.mark.parametrize("old, new, words", [
    ("longest other token", "longest token", ["'Data'", "write it again"]),
    ("import base64\n", "", ["'Imports'", "write it again"]),
    (f"# Model{TAG}", "# Model", ["'Model'", "tag it"]),
    ("# Hyperparameters\n", f"# Hyperparameters{TAG}\n", ["'Hyperparameters'", "write it again"]),
    (f"# Decoding{TAG}", f"# Sampling{TAG}", ["'Sampling'", "no such section"]),
])
def test_a_drift_of_one_script_is_named(old, new, words):
    name = "train_gpt_medium.py"
    assert SOURCES[name].count(old) == 1
    drifted = SOURCES | {name: SOURCES[name].replace(old, new)}
    found, = problems(drifted)
    assert all(word in found for word in [name, *words])
    if "longest" in old or "import" in old:
        assert synced(SOURCES["train_gpt.py"], drifted[name]) == SOURCES[name]


@pytest.fixture
def sibling():
    """Function of pairs of a title and a text that makes a script; train_gpt.py has A, B and C of the same texts."""
    def make(docstring, *parts):
        return docstring + "".join(f"\n{BANNER}{title}\n{text}\n" for title, text in parts)
    first = make("first", ("A", "a"), ("B", "b"), ("C", "c"))
    return lambda *parts: list(problems({"train_gpt.py": first, "train_other.py": make("other", *parts)}))


def test_a_sibling_may_lack_sections_have_others_and_have_its_own(sibling):
    assert sibling(("A" + TAG, "a"), ("C", "mine"), ("D", "d")) == []
    assert sibling(("Z", "z"), ("C" + TAG, "c")) == []


@pytest.mark.parametrize("parts, word", [
    ([("B" + TAG, "b"), ("A" + TAG, "a")], "order"), ([("A" + TAG, "b")], "differs"), ([("A", "a")], "tag it"),
    ([("D" + TAG, "d")], "no such section")])
def test_what_a_sibling_may_not_do(sibling, parts, word):
    found, = sibling(*parts)
    assert word in found


def test_train_gpt_itself_has_no_tags():
    found = list(problems({"train_gpt.py": SOURCES["train_gpt.py"].replace("# Model\n", f"# Model{TAG}\n")}))
    assert len(found) == 1 and "'Model'" in found[0]


@pytest.mark.parametrize("name", SIZE_VARIANTS)
def test_a_size_variant_reads_as_a_short_difference(name):
    lines = difflib.unified_diff(*(SOURCES[name].splitlines() for name in ("train_gpt.py", name)), n=0)
    assert sum(line[0] in "+-" for line in list(lines)[2:]) < 200


# -----------------------------------------------------------------------------
# Size, and what a script needs

@pytest.mark.parametrize("name", SOURCES)
def test_lines(name):
    """Of the experiment, which ends at the first appendix, and of the whole script."""
    lines = SOURCES[name].splitlines()
    if name in WITH_TABLES:
        assert next(i for i, line in enumerate(lines) if line.startswith("# Appendix: kernels")) - 1 <= EXPERIMENT
        assert len(lines) <= WHOLE
    else:
        assert sum(map(bool, lines)) <= RELATIVE.get(name, PLAIN)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", SOURCES)
def test_every_function_can_be_read_on_one_screen(name):
    functions = [node for node in ast.walk(ast.parse(SOURCES[name])) if isinstance(node, ast.FunctionDef)]
    assert "train" in {node.name for node in functions}
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    limit = FUNCTION if name in WITH_TABLES else PLAIN_FUNCTION
    assert {name: lines for name, lines in long.items() if lines > limit} == {}


def imported_modules(source):
    """Top-level names of the modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", [*SOURCES, "triton_kernels.py"])
def test_what_is_imported_of_the_project(name):
    ours = {path.stem for folder in ("", "data", "records", "dev", "tests") for path in (ROOT / folder).glob("*.py")}
    found = ours & set(imported_modules((ROOT / name).read_text(encoding="utf-8")))
    assert found == ({"triton_kernels"} if name in WITH_TABLES else set())


# -----------------------------------------------------------------------------
# The contract

@pytest.fixture(params=ALL_SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def test_configs_survive_json(script):
    for cfg in script.PRESETS.values():
        assert script.config_from_dict(json.loads(json.dumps(asdict(cfg)))) == cfg


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_flags_and_presets(script):
    from test_config import FLAGS
    assert {field.name for field in fields(script.Hyperparameters)} == set(FLAGS[script.__name__])
    assert {"speedrun", "tiny"} <= script.PRESETS.keys()
    for cfg in script.PRESETS.values():
        script.check_config(cfg)
        assert script.stage_index(cfg, cfg.total_steps - 1) == len(cfg.stages) - 1
    for name in script.ATTENTION:
        assert script.parse_config([f"--attention={name}"]).attention == name


def test_what_other_tools_use_of_a_script_is_there(script):
    assert [name for name in INTERFACE if not hasattr(script, name)] == []


def test_logits_loss_and_decoding(script):
    import torch
    model = script.GPT(replace(script.PRESETS["tiny"], vocab_size=VOCAB, bos_id=BOS)).requires_grad_(False)
    tokens = torch.tensor([BOS, *b"The house by the river."])
    logits, targets = model(tokens), tokens.roll(-1)
    assert logits.shape == (24, VOCAB) and logits.dtype == torch.float32
    assert model(tokens, targets).item() == pytest.approx(24 * math.log(VOCAB), rel=1e-3)
    decoded = model.decode(tokens[None], model.new_cache(1, 24))
    assert_close(decoded[0], logits)


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_want_of_memory_is_one_line_and_a_mistake_in_the_code_a_traceback(script, monkeypatch, capsys):
    import torch

    def on_a_cpu(cfg, argv):
        torch.empty(2**50)

    def on_a_gpu(cfg, argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    def mistake(cfg, argv):
        torch.zeros(2) @ torch.zeros(3)
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    for train in (on_a_cpu, on_a_gpu):
        monkeypatch.setattr(module, "train", train)
        assert module.main() == 2
        line, = capsys.readouterr().err.splitlines()
        assert "to allocate" in line and "smaller model" in line and "--pack_tokens" in line
    monkeypatch.setattr(module, "train", mistake)
    with pytest.raises(RuntimeError, match="size"):
        module.main()


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
    done = subprocess.run([sys.executable, "-c", PROBE.format(scripts=", ".join(ALL_SCRIPTS)), str(ROOT)], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_family.py --write    copies what is tagged from train_gpt.py to the others")
    for name, source in SOURCES.items():
        if name != "train_gpt.py" and (new := synced(SOURCES["train_gpt.py"], source)) != source:
            (ROOT / name).write_text(new, encoding="utf-8")
            SOURCES[name] = new
            print(f"{name}: the tagged sections are now those of train_gpt.py")
    for name, own in OWN.items():
        if (new := copied(SOURCES["train_gpt_simple.py"], SOURCES[name], own)) != SOURCES[name]:
            (ROOT / name).write_text(new, encoding="utf-8")
            print(f"{name}: the functions and classes that it shares are now those of train_gpt_simple.py")
    sys.exit("\n".join(problems(SOURCES)) or 0)
