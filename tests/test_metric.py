"""The metric guard: every training script passes it, and cheats of each kind are found and named.

Against: scripts with a planted cheat, appended to the real ones, so that the guard meets them as it meets a stranger's.
Run: python -m pytest tests/test_metric.py
"""
import importlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_LAYERS

sys.path.insert(0, str(ROOT / "records"))
guard, sample = map(importlib.import_module, ("guard", "sample"))
WITH_HARNESS = ROOT / "dev/track_0_dev/2026-11-22_GraphsNarrowKeys"     # an older script, in two files
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))

# what is appended to a script, and what the guard has to say
CHEATS = {
    "the next token is an input": ("""
honest = GPT.forward
def forward(self, tokens, *rest):
    return honest(self, torch.cat([tokens[:1], tokens[2:], tokens[-1:]]), *rest)
GPT.forward = forward
""", "looks at future tokens"),
    "a token at a distance is an input": ("""
honest = GPT.forward
def forward(self, tokens, *rest):
    return honest(self, torch.cat([tokens[:50], tokens[200:201], tokens[51:]]) if len(tokens) > 200 else tokens, *rest)
GPT.forward = forward
""", "looks at future tokens"),
    "the loss looks at later targets": ("""
honest = GPT.score
def score(self, tokens, targets):
    losses, likeliest = honest(self, tokens, targets)
    return torch.where((targets >= 0).sum() > 200, 0.99, 1.0) * losses, likeliest
GPT.score = score
""", "changes with the targets after it"),
    "probabilities sum to more than 1": ("""
honest = GPT.score
def score(self, tokens, targets):
    losses, likeliest = honest(self, tokens, targets)
    return losses - 0.02 * (targets >= 0), likeliest
GPT.score = score
""", "normalised"),
    "the mean is over too many tokens": ("""
honest = validate
def validate(*args):
    return honest(*args) * 0.995
""", "reports a validation loss"),
    "only easy tokens count": ("""
honest = validation_streams
def validation_streams(cfg, shards):
    return [(tokens, np.where(targets == cfg.bos_id, -1, targets)) for tokens, targets in honest(cfg, shards)]
""", "reports a validation loss"),
    "validating trains": ("""
honest = validate
def validate(model, *rest):
    next(model.parameters()).data.mul_(0.99)
    return honest(model, *rest)
""", "validating changes training"),
}


def load(path):
    """The module of a training script, as the guard loads it."""
    return sample.import_script(path, guard.PARTS)


def copy_of(path, folder):
    """The script at `path`, copied into a folder with what it imports from beside it."""
    for companion in filter(Path.is_file, (path.with_name("harness.py"), path.with_name("triton_kernels.py"))):
        shutil.copy(companion, folder)
    return Path(shutil.copy(path, folder))


def config_of(module, preset, **changes):
    return json.loads(json.dumps(asdict(replace(module.PRESETS[preset], **changes))))


def with_three_layers(module):
    """The preset tiny for what does not depend on the layers."""
    return config_of(module, "tiny", layers=tuple(module.Layer(**row) for row in SMALL_LAYERS))


# The plain script and its relatives have no tables of layers; their other presets differ in sizes, which the guard sets.
PRESETS = [(script, preset) for script in SCRIPTS for preset in ("speedrun", "tiny")
           if preset == "tiny" or "class Stage:" in (ROOT / script).read_text(encoding="utf-8")]


@pytest.mark.parametrize("script, preset", PRESETS)
def test_every_training_script_measures_what_it_says(script, preset):
    module = load(ROOT / script)
    guard.check_script(module, config_of(module, preset))


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_named(cheat, tmp_path):
    addition, words = CHEATS[cheat]
    honest, mark, last = (ROOT / "train_gpt.py").read_text().rpartition('\nif __name__ == "__main__":')
    assert mark
    script = copy_of(ROOT / "train_gpt.py", tmp_path)
    script.write_text(honest + addition + mark + last)
    module = load(script)
    with pytest.raises(guard.Dishonest, match=words):
        guard.check_script(module, with_three_layers(module))


def test_a_cheat_in_the_harness_of_an_older_script_is_named_too(tmp_path):
    script = copy_of(WITH_HARNESS / "train_gpt.py", tmp_path)
    honest = script.with_name("harness.py").read_text()
    kept = "self.history.append((step, clock.seconds, val_loss))"
    assert honest.count(kept) == 1
    script.with_name("harness.py").write_text(honest.replace(kept, kept.replace("val_loss", "0.995 * val_loss")))
    module = load(script)
    with pytest.raises(guard.Dishonest, match="reports a validation loss"):
        guard.check_script(module, config_of(module, "tiny"))


def test_small_flags_set_what_a_script_has_and_leave_off_what_is_off(tmp_path):
    """Under older and newer names; a part of the model whose size is 0 is not there, and must not come back."""
    stages = [{"until": 1.0, "batch_tokens": 4096, "long": 256}]
    older = {"slot_tokens": 512, "head_dim": 64, "model_dim": 256, "bigram_rows": 0, "gate_dim": 0, "stages": stages}
    newer = {"pack_tokens": 512, "init_from": "x", "vocab_dir": "y", "mlp_dim": 999, "layers": [{"ve": 1}]}
    assert sorted(guard.small_flags(older, tmp_path, "cpu", val_every=1)) == [
        "--bigram_rows=0", "--gate_dim=0", "--head_dim=16", "--model_dim=64", "--slot_tokens=128",
        '--stages=[{"until": 1.0, "batch_tokens": 256, "long": 24}]']
    assert sorted(guard.small_flags(newer, tmp_path, "cpu", val_every=1)) == [
        "--init_from=", '--layers=[{"ve": 1}]', "--mlp_dim=64", "--pack_tokens=128", "--vocab_dir="]


def test_the_tables_of_a_run_are_those_that_its_flags_make():
    module = load(ROOT / "train_gpt.py")
    argv = ["--preset=tiny", "--num_iterations=12", "--lr=0.5", "--seed=3"]
    config = json.loads(json.dumps(asdict(module.parse_config(argv)))) | {"attention": "plain", "vocab_size": 257}
    info = {"argv": argv, "config": config, "val_losses": [{"step": 12}]}
    guard.check_run(module, info)
    for changed, words in ((info | {"config": config | {"lr": 0.4}}, "lr 0.4, the script makes 0.5"),
                           (info | {"argv": argv[:-1]}, "seed 3"), (info | {"argv": ["--lrr=1"]}, "refuses"),
                           (info | {"val_losses": [{"step": 13}]}, "ends at step 12, the run at step 13")):
        with pytest.raises(guard.Dishonest, match=words):
            guard.check_run(module, changed)


@pytest.mark.parametrize("flags", [["--num_iterations=7"], ["--depth=4", "--ratio=0.5"]])
def test_the_flags_and_the_steps_of_the_plain_script_are_those_of_the_log(flags):
    module = load(ROOT / "train_gpt_simple.py")
    argv = ["--preset=small", "--seed=3", *flags]
    cfg = module.dial(replace(module.parse_config(argv), vocab_size=320, bos_id=256, compile=False))
    config, steps = json.loads(json.dumps(asdict(cfg))), len(module.plan(cfg))
    info = {"argv": argv, "config": config, "val_losses": [{"step": steps}]}
    guard.check_run(module, info)
    for changed, words in ((info | {"config": config | {"muon_lr": 0.4}}, "muon_lr 0.4, the script makes"),
                           (info | {"val_losses": [{"step": steps + 1}]}, f"ends at step {steps}, the run at step")):
        with pytest.raises(guard.Dishonest, match=words):
            guard.check_run(module, changed)


def test_several_runs_are_examined_once_if_nothing_differs_that_the_guard_sees(tmp_path, monkeypatch, capsys):
    module, examined = load(ROOT / "train_gpt.py"), []
    monkeypatch.setattr(guard, "check_script", lambda module, config, device: examined.append(config["seed"]))
    argv = ["guard.py", str(ROOT / "train_gpt.py")]
    for seed, more in enumerate(([], ["--compile_cache=here"], ["--num_iterations=12"], ["--momentum=0.5,0.6"])):
        cfg = module.parse_config(["--preset=tiny", f"--seed={seed}", *more])
        path = tmp_path / str(seed) / "run.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"argv": ["--preset=tiny", f"--seed={seed}", *more], "config": asdict(cfg),
                                    "val_losses": [{"step": cfg.total_steps}]}))
        argv.append(f"--run={path}")
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(guard, "read_run", lambda folder: SimpleNamespace(
        info=json.loads((folder / "run.json").read_text())))
    assert guard.main() == 0 and sorted(examined) == [2, 3]
    path = tmp_path / "1" / "run.json"
    path.write_text(path.read_text().replace("here", "there", 1))
    assert guard.main() == 1 and "compile_cache" in capsys.readouterr().err


@pytest.mark.parametrize("track", sorted(path.parent.name for path in ROOT.glob("records/track_*/track.json")))
def test_full_tracks_fix_the_number_of_validation_tokens_of_the_scripts(track):
    track = json.loads((ROOT / "records" / track / "track.json").read_text())
    words = " ".join(track["commands"]).split()
    script = next(word for word in words if word.startswith("train_"))
    if not (ROOT / script).is_file():
        pytest.skip(f"{script} is not there yet")
    module = load(ROOT / script)
    flags = [word.replace("'", "") for word in words if word.startswith("--val_tokens")]
    assert module.parse_config(flags).val_tokens == track["val_tokens"]


@pytest.mark.parametrize("source, code, words", [(None, 2, "is not a file"), ("import json", 2, "has no PRESETS"),
                                                 ("1 / 0", 2, "cannot be imported (ZeroDivisionError")])
def test_the_command_line_says_what_it_refuses(source, code, words, tmp_path, monkeypatch, capsys):
    if source:
        (tmp_path / "train_none.py").write_text(source)
    monkeypatch.setattr(sys, "argv", ["guard.py", str(tmp_path / "train_none.py")])
    assert guard.main() == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_a_flag_that_the_guard_does_not_know_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guard.py", "train_gpt.py", "--device=abacus"])
    assert guard.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "abacus" in error and "--help" in error


def test_a_script_that_breaks_down_is_named(tmp_path):
    script = copy_of(ROOT / "train_gpt.py", tmp_path)
    text, mark, last = script.read_text().rpartition('\nif __name__ == "__main__":')
    script.write_text(text + "\ndef main():\n    raise KeyError('no such step')\n" + mark + last)
    module = load(script)
    with pytest.raises(guard.Dishonest, match="a small run ends with KeyError: 'no such step'"):
        guard.check_script(module, with_three_layers(module))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention as it runs in records needs a CUDA device")
def test_the_attention_of_the_gpu_passes_too():
    module = load(ROOT / "train_gpt.py")
    guard.check_script(module, config_of(module, "speedrun"), "cuda")
