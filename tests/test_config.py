"""The command line of train_gpt.py: every field is a flag, every bad value is one line.

Against: frozen lists of flags (a new knob is a decision, so it must be added here too), a bad value of each kind, a
table for each rule that it breaks, and copies of the script without a field.
Run: python -m pytest tests/test_config.py
"""
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, as_flags, only_folder, small_flags

import train_gpt
from train_gpt import PRESETS, Layer, Stage, parse_config

STAGE = {"until": 1.5, "batch_tokens": 32_768, "max_doc_tokens": 100, "short": 20, "long": 40, "lr": 0.5,
         "next_tokens": [[1, 0.5, 0], [1, 0, 0]], "prefix": [0.25, 0]}
LAYERS = [dataclasses.asdict(Layer()) | row for row in (
    {"ve": 0}, {"ve": 1, "xsa": True}, {"attention": False, "skip": 1},
    {"window": "long", "attn_input": 1, "ve": 2, "gate": True, "mudd": True})]

# The frozen lists, one a script: each flag, and for train_gpt.py a good value of it that is not its default.
FLAGS = {"train_gpt": {
    "train_files": "some where/a_*.bin", "val_files": "b=c_*.bin", "vocab_dir": "gpt 2", "val_tokens": 1000,
    "val_stream_tokens": 4096, "pack_tokens": 8192, "micro_batch_tokens": 32_768, "epochs": 3,
    "num_iterations": 300, "stop_after": 7, "val_every": 0, "stages": [STAGE], "final_windows": (100, 200),
    "cooldown": 0.5, "lr_floor": 0.0, "split_embed": 1.0,
    "layers": LAYERS, "model_dim": 1536, "head_dim": 64, "qk_dim": 32, "mlp_dim": 100, "gate_dim": 0,
    "bigram_rows": 77, "bigram_signs": 5, "sampled_vocab": 20_000, "vocab_size": 60_000, "vocab_multiple": 64,
    "bos_id": 3, "attn_scale": 0.2, "rope_base": 10_000.0, "earlier_windows": (64, 128),
    "lr": 0.3, "momentum": (0.5, 0.9), "momentum_warmup": 10, "momentum_cooldown": 0.2,
    "device": "cpu", "precision": "fp32", "attention": "plain", "kernels": False, "float8": False, "host_state": True,
    "compile": False, "graph_tokens": 8192, "compile_cache": "kept", "seed": 5, "out_dir": "else where",
    "init_from": "a/run", "save_every": "10min", "keep": 5, "resume": "a/run", "resume_override": "lr,seed",
}}
FLAGS["train_gpt_medium"] = set(FLAGS["train_gpt"])


def as_json(value):
    """Dataclass rows, tuples and lists as what JSON makes of them."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def test_the_list_of_flags_is_frozen():
    assert {field.name for field in dataclasses.fields(train_gpt.Hyperparameters)} == FLAGS["train_gpt"].keys()


@pytest.mark.parametrize("name", FLAGS["train_gpt"])
def test_every_field_can_be_set(name):
    flag, = as_flags({name: FLAGS["train_gpt"][name]})
    changed, default = parse_config([flag]), PRESETS["speedrun"]
    assert as_json(getattr(changed, name)) == as_json(FLAGS["train_gpt"][name]) != as_json(getattr(default, name))
    assert type(getattr(changed, name)) is type(getattr(default, name))
    assert dataclasses.replace(changed, **{name: getattr(default, name)}) == default  # and nothing else changed


def test_tables_may_be_rows_of_values_or_of_names():
    by_value = parse_config(as_flags({"stages": [list(STAGE.values())]}))
    by_name = parse_config(as_flags({"stages": [STAGE]}))
    assert as_json(by_value.stages) == as_json(by_name.stages) == [STAGE]
    assert isinstance(by_name.stages[0], Stage)
    assert all(isinstance(layer, Layer) for layer in parse_config(as_flags({"layers": LAYERS})).layers)


def test_numbers_may_be_grouped_and_the_last_of_two_flags_counts():
    assert parse_config(["--val_tokens=1_000", "--val_tokens=2_000"]).val_tokens == 2000
    assert parse_config(["--compile=True"]).compile is True
    assert parse_config(["--lr=1e-1"]).lr == 0.1


def test_a_preset_is_a_starting_point_for_the_other_flags():
    cfg = parse_config(["--seed=3", "--preset=tiny"])
    assert cfg == dataclasses.replace(PRESETS["tiny"], seed=3)
    assert parse_config([]) == PRESETS["speedrun"]


def test_presets_pass_their_own_check():
    for cfg in PRESETS.values():
        train_gpt.check_config(cfg)


@pytest.mark.parametrize("name", ["train_files", "val_files", "vocab_dir", "out_dir", "init_from", "resume",
                                  "compile_cache"])
def test_a_tilde_is_the_home_folder(monkeypatch, name):
    monkeypatch.setenv("HOME", "/the/home")
    monkeypatch.setenv("USERPROFILE", "/the/home")
    assert getattr(parse_config([f"--{name}=~/a b/c_*.bin"]), name) == "/the/home/a b/c_*.bin"


def test_an_empty_list_of_numbers_is_one():
    assert parse_config(["--earlier_windows="]).earlier_windows == ()


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].seed = 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_flag_with_its_default(run_main, flag):
    done = run_main(flag, "--nonsense")
    assert (done.code, done.err) == (0, "")
    lines = {match[1]: match[0] for match in re.finditer(r"^ +--(\w+)=.*$", done.out, re.M)}
    for name in ("num_iterations", "final_windows", "train_files"):
        value = getattr(PRESETS["speedrun"], name)
        assert f"--{name}={as_flags({name: value})[0].partition('=')[2]} " in lines[name]
    assert all(preset in done.out for preset in PRESETS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_each_flag_means(name):
    module = importlib.import_module(name)
    out = module.help_text()
    assert max(map(len, out.splitlines())) <= 190
    lines = {match[1]: match[2] for match in re.finditer(r"^ +--(\w+)=(.*)$", out, re.M)}
    assert list(lines) == [field.name for field in dataclasses.fields(module.Hyperparameters)]
    for flag, line in lines.items():
        assert re.search(r" [a-zA-Z0-9][^=]{9,}$", line), (flag, line)


# -----------------------------------------------------------------------------
# Paths

@pytest.mark.parametrize("folder", ["plain", "with blanks", "[brackets]", "a[0-9]*?"])
def test_files_are_found_in_a_folder_whatever_its_name(tmp_path, folder):
    (tmp_path / folder).mkdir()
    names = ["b_1.bin", "a [1].bin", "a_0.bin", "c?.txt"]
    paths = [str(tmp_path / folder / name) for name in names]
    for path in reversed(paths):
        Path(path).touch()
    assert train_gpt.match_files(f"{tmp_path / folder}/*.bin") == sorted(paths[:3])
    assert train_gpt.match_files(f"{tmp_path / folder}/[ab]_*") == [paths[2], paths[0]]
    assert train_gpt.match_files(f"{tmp_path / folder}/d*") == []
    for path in paths:                   # one that is there means itself
        assert train_gpt.match_files(path) == [path]


def test_a_folder_may_be_a_pattern_too(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.bin").touch()
    found = train_gpt.match_files(f"{tmp_path}/*/a.bin")
    assert found == [str(tmp_path / folder / "a.bin") for folder in ("one", "two")]


# -----------------------------------------------------------------------------
# A copy of the script without a field

# What only the model reads: (the field, its uses in the model, what stands there instead).
UNUSED = {
    "bigram_signs": [("        if cfg.bigram_rows and cfg.bigram_signs:\n", "        if False:\n"),
                     ("torch.empty(cfg.bigram_signs, C, dtype=dtype)", "None"),
                     ("        if self.cfg.bigram_signs:\n", "        if False:\n"),
                     (" % self.cfg.bigram_signs", "")],
    "attn_scale": [("self.cfg.attn_scale", "0.1")],
    "rope_base": [("self.cfg.rope_base", "1024.0")],
    "mlp_dim": [("cfg.mlp_dim", "96")],
    "qk_dim": [("self.qk_dim or self.head_dim", "self.head_dim")],
    "sampled_vocab": [("not 0 < self.cfg.sampled_vocab < self.cfg.vocab_size", "True"),
                      (", self.cfg.sampled_vocab)", ", 1)")],
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_field_that_only_the_model_reads_can_be_removed_with_its_uses(name, edited, run_main, data, tmp_path):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    declaration, = re.findall(rf"^    {name}: .*\n", source, re.M)
    presets = source[source.index("PRESETS = {"):source.index("# Data\n")]
    without = re.sub(rf"\b{name}=[^,)\n]+(, *|(?=\)))", "", presets)
    module = edited((declaration, ""), (presets, without), *UNUSED[name])
    flags = [flag for flag in small_flags(data, stop_after=2, out_dir=tmp_path / "logs")
             if not flag.startswith(f"--{name}=")]
    done = run_main(*flags, module=module)
    assert (done.code, done.err) == (0, "")
    run = only_folder(tmp_path / "logs")
    assert run_main(*flags, f"--init_from={run}", f"--out_dir={tmp_path / 'other'}", module=module).code == 0
    assert module.config_from_dict(json.loads((run / "run.json").read_text())["config"])
    refusal = run_main(f"--{name}=1", module=module)
    assert refusal.code == 2 and f"--{name} is not a flag" in refusal.err


def test_a_cell_that_only_the_model_reads_can_be_removed_with_its_uses(edited, run_main, data, tmp_path):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    tables = source[source.index("LAYERS = ("):source.index("PARAMETERS = {")]
    along = source[source.index("        if layer.xsa:\n            along"):]
    along = along[:along.index("        if layer.gate:\n")]
    declaration, = re.findall(r"^    xsa: bool = .*\n", source, re.M)
    module = edited((declaration, ""), (tables, re.sub(r"\bxsa=True(, )?", "", tables)), (along, ""),
                    ("            if layer.xsa:\n                net.append(((\"xsa\", i), H, 0.))\n", ""))
    layers = [{"ve": 0}, {"attention": False, "skip": 0}, {"mudd": True, "gate": True}]
    flags = small_flags(data, layers=layers, stop_after=2, out_dir=tmp_path / "logs")
    done = run_main(*flags, module=module)
    assert (done.code, done.err) == (0, "")
    refusal = run_main(*as_flags({"layers": [{}, {"attention": False, "gate": True}]}), module=module)
    assert refusal.code == 2 and "a layer without attention" in refusal.err


# -----------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("argv, words", [
    (["--nonsense=1"], ["nonsense", "--help"]),
    (["seed=1"], ["seed=1", "--help"]),
    (["--seed", "1"], ["--seed", "--help"]),
    (["--compile"], ["--compile", "--help"]),
    (["--"], ["--help"]),
    (["--Seed=1"], ["Seed"]),
    (["--num-iterations=3"], ["--num-iterations is not a flag; write --num_iterations="]),
    (["--preset=huge"], ["huge", "speedrun", "tiny"]),
])
def test_unknown_flags(refused, argv, words):
    refused(*argv, words=words)


@pytest.mark.parametrize("flag, words", [
    ("--seed=one", ["whole number"]), ("--seed=1.5", ["whole number"]), ("--seed=", ["whole number"]),
    ("--lr=fast", ["number"]), ("--compile=1", ["true or false"]), ("--compile=", ["true or false"]),
    ("--final_windows=a,b", ["commas"]), ("--final_windows=1.5,2", ["commas"]), ("--momentum=0.9;0.95", ["commas"]),
    ("--stages=[[1,", ["JSON", "Stage"]), ("--stages=7", ["JSON", "Stage"]), ("--stages=[[1, 2]]", ["JSON", "Stage"]),
    ('--stages=[{"until": 1}]', ["JSON", "Stage"]), ('--layers=[{"wings": 2}]', ["JSON", "Layer"]),
    ("--layers=plain", ["JSON", "Layer"]),
])
def test_values_of_the_wrong_type(refused, flag, words):
    refused(flag, words=[flag.split("=")[0], *words])


@pytest.mark.parametrize("flag", [
    "--num_iterations=0", "--num_iterations=-5", "--val_tokens=0", "--val_stream_tokens=0", "--pack_tokens=0",
    "--stop_after=-1", "--val_every=-1", "--micro_batch_tokens=-1", "--micro_batch_tokens=100", "--pack_tokens=1000",
    "--model_dim=0", "--model_dim=700", "--head_dim=0", "--head_dim=6", "--head_dim=256", "--mlp_dim=0",
    "--gate_dim=-1", "--bigram_rows=-1", "--bigram_signs=-1", "--qk_dim=-4", "--qk_dim=6", "--sampled_vocab=5",
    "--epochs=0", "--vocab_size=-1", "--vocab_multiple=0",
    "--cooldown=1.5", "--cooldown=-0.1", "--cooldown=nan", "--lr_floor=2", "--split_embed=-1", "--momentum_warmup=-7",
    "--momentum_cooldown=-1", "--lr=0", "--lr=-1", "--lr=nan", "--lr=inf", "--attn_scale=0", "--attn_scale=nan",
    "--rope_base=0", "--rope_base=inf", "--momentum=0.9", "--momentum=0.8,0.9,1", "--momentum=0.9,1.5",
    "--momentum=nan,nan", "--final_windows=0,5", "--final_windows=5", "--final_windows=5,0", "--final_windows=1,2,3",
    "--final_windows=", "--momentum=", "--earlier_windows=0", "--save_every=often", "--save_every=min",
    "--save_every=-3", "--keep=0", "--device=tpu", "--precision=fp8", "--attention=flash", "--seed=-1",
    "--seed=100000000000000000000",
])
def test_values_out_of_range(refused, flag):
    name, _, value = flag.partition("=")
    refused(flag, words=[name.removeprefix("--"), value.split(",")[0]])


def stage(**changes):
    return as_flags({"stages": [STAGE | changes]})[0]


def layers(**changes):
    """The layer table with some rows changed; names are row<n>."""
    return as_flags({"layers": [row | changes.get(f"row{i}", {}) for i, row in enumerate(LAYERS)]})[0]


@pytest.mark.parametrize("flag", [
    "--stages=[]", stage(until=0.5), stage(until=float("nan")), stage(until="x"), stage(batch_tokens=0),
    stage(batch_tokens=100), stage(batch_tokens=-32_768), stage(max_doc_tokens=0), stage(short=0), stage(long=0),
    stage(next_tokens=[[1], [1]]), stage(next_tokens=5), stage(prefix=[1, 2, 3]),
    as_flags({"stages": [STAGE, STAGE | {"until": 1.2}]})[0],  # the second stage ends before the first
])
def test_stage_tables_that_make_no_sense(refused, flag):
    refused(flag, words=["stage"])


# Rules of the layer table, as the message names them, with a table that breaks no other rule.
BROKEN = [
    ("there is a layer", "--layers=[]"),
    ("the first one has attention", as_flags({"layers": [{"attention": False}]})[0]),
    ("every window is short or long", layers(row1={"window": "huge"})),
    ("name an earlier layer", layers(row3={"attn_input": 9})), ("name an earlier layer", layers(row2={"skip": 2})),
    ("a layer without attention has no", layers(row2={"xsa": True})),
    ("a layer without attention has no", layers(row2={"attn_input": 0})),
    ("without a gap", layers(row0={"ve": 1})), ("without a gap", layers(row1={"ve": 7})),
    ("only the last layer has mudd", layers(row0={"mudd": True})),
    ("only the last layer has mudd", as_flags({"layers": [{"mudd": True}]})[0]),
]


@pytest.mark.parametrize("rule, flag", BROKEN)
def test_layer_tables_that_make_no_sense(refused, rule, flag):
    refused(flag, words=["the layer table breaks a rule", rule, "--layers"])


def test_all_broken_rules_are_named_in_one_line(refused):
    rows = [{"attention": False, "gate": True}, {"window": "wide", "ve": 3}, {"mudd": True, "skip": 5}, {}]
    refused(*as_flags({"layers": rows}), words=["breaks 6 rules", *{rule for rule, _ in BROKEN[1:]}])


@pytest.mark.parametrize("row", [{"ve": "x"}, {"xsa": 1}, {"skip": None}, {"attention": "no"}])
def test_layers_of_the_wrong_type(refused, row):
    refused(*as_flags({"layers": [row]}), words=["JSON", "Layer"])


@pytest.mark.parametrize("changes, words", [
    ({"vocab_size": 100}, ["257", "100"]), ({"bos_id": 5}, ["256", "bos_id"]),
    ({"attention": "flex"}, ["flex", "plain"]),
])
def test_flags_that_contradict_the_shards_or_the_machine(refused, data, changes, words):
    refused(*small_flags(data, **changes), words=words)


def test_a_device_that_is_not_there(refused, data, monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    refused(*small_flags(data, device="cuda"), words=["--device=cuda", "cpu"])


# -----------------------------------------------------------------------------
# As a program

def test_as_a_program_it_refuses_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "train_gpt.py", "--seed=one"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train_gpt\.py: [^\n]*--seed=one[^\n]*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
