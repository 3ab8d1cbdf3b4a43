"""Shards of others, text read more often, weights of another run, and starts in an odd environment.

Proves: published GPT-2 shards without tokenizer.json train, sample and are scored; check_tokens counts exactly what
training reads, over several epochs too; --init_from goes on with the weights and the rotary frequencies of a run; what
the shell, the locale, the umask or a notebook left in the environment changes nothing.
Run: python -m pytest tests/test_published.py
"""
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, make_data, only_folder, small_flags, write_shard
from safetensors.torch import load_file

import evaluate
import sample
import train_gpt

GPT2_BPE = ROOT.parent / "shared" / "data" / "gpt2_bpe"
NO_PREFIX = [[1 / 3, 512, 96, 16, 32, 1.0, [[1, 0.5, 0.25], [1, 0.5, 0]], [0, 0]],
             [1.0, 1024, 120, 16, 64, 1.4, [[1, 0.5, 0], [1, 0, 0]], [0, 0]]]


# -----------------------------------------------------------------------------
# Published shards

@pytest.fixture
def published(tmp_path, monkeypatch):
    """Flags of a run on shards as kjj0/fineweb10B-gpt2 has them: all header words after the third are zero."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no cache"))
    folder = tmp_path / "fineweb"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, documents in (("train_000001", 300), ("val_000000", 40)):
        tokens = np.concatenate([[50256, *rng.integers(0, 5000, rng.integers(20, 120))] for _ in range(documents)])
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        (folder / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())

    def flags(**changes):
        small = {"model_dim": 24, "mlp_dim": 24, "gate_dim": 4, "stop_after": 2, "val_every": 0, "vocab_multiple": 1,
                 "train_files": f"{folder}/fineweb_train_*.bin", "val_files": f"{folder}/fineweb_val_*.bin"}
        return small_flags(folder, **small | {"out_dir": tmp_path / "logs"} | changes)
    return flags


def need_vocabulary():
    if not (GPT2_BPE / "encoder.json").exists():
        pytest.skip("needs GPT-2's vocabulary in ../shared/data/gpt2_bpe")


def put_into_cache(folder):
    url = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
    folder.mkdir()
    shutil.copyfile(GPT2_BPE / "encoder.json", folder / hashlib.sha1(url).hexdigest())


@pytest.mark.parametrize("where", ["vocab_dir", "cache"])
def test_published_shards_train_with_the_vocabulary_that_is_here(published, run_main, tmp_path, where):
    need_vocabulary()
    if where == "cache":
        put_into_cache(tmp_path / "no cache")
    done = run_main(*published(vocab_dir=GPT2_BPE if where == "vocab_dir" else ""))
    assert done.code == 0, done.err
    content = (only_folder(tmp_path / "logs") / "checkpoint" / "step_000002" / "tokenizer.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == train_gpt.GPT2_TOKENIZER_SHA256


def test_prefix_targets_without_a_vocabulary_are_refused_with_a_remedy_that_works(published, refused):
    line = refused(*[flag for flag in published() if not flag.startswith("--out_dir")], words=["--vocab_dir"])
    assert "encoder.json" in line and "prefix" in line


def test_published_shards_train_and_are_sampled_and_scored_without_a_vocabulary(published, run_main, tmp_path, capsys):
    done = run_main(*published(stages=NO_PREFIX))
    assert done.code == 0, done.err
    checkpoint = only_folder(tmp_path / "logs") / "checkpoint" / "step_000002"
    assert not (checkpoint / "tokenizer.json").exists()
    assert json.loads((checkpoint / "meta.json").read_text())["tokenizer_sha256"] == train_gpt.GPT2_TOKENIZER_SHA256
    flags = [f"--checkpoint={checkpoint}", "--device=cpu"]
    assert sample.main([*flags, "--max_tokens=3"]) == 2
    assert "--vocab_dir" in capsys.readouterr().err
    assert evaluate.main([*flags, "--tasks=val", "--threads=1"] if "--threads" in evaluate.__doc__
                         else [*flags, "--tasks=val"]) == 0
    assert "val" in capsys.readouterr().out
    need_vocabulary()
    assert sample.main([*flags, "--max_tokens=3", f"--vocab_dir={GPT2_BPE}"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_folder_without_the_vocabulary_is_named(published, refused, tmp_path):
    refused(*[flag for flag in published(vocab_dir=tmp_path) if not flag.startswith("--out_dir")],
            words=[f"--vocab_dir={tmp_path}", "encoder.json"])


# -----------------------------------------------------------------------------
# What training reads

@pytest.mark.parametrize("seed", range(12))
def test_what_is_counted_before_training_is_what_training_reads(small_config, tmp_path, seed):
    """The loader reaches the last step exactly when check_tokens accepts the text."""
    rng = np.random.default_rng(seed)
    longest = int(rng.choice([3, 40, 400]))
    sizes = rng.integers(1, longest + 1, rng.integers(20, 60_000 // longest))
    cut = rng.integers(0, len(sizes) + 1)
    shards = []
    for i, part in enumerate(filter(len, (sizes[:cut], sizes[cut:]))):
        tokens = np.concatenate([[BOS] + [1] * (size - 1) for size in part])
        shards.append(train_gpt.read_header(write_shard(tmp_path / f"{i}.bin", tokens)))
    cfg = small_config(num_iterations=int(rng.integers(4, 40)), epochs=int(rng.integers(1, 4)))
    try:
        train_gpt.check_tokens(cfg, shards, cfg.total_steps)
        enough = True
    except train_gpt.UserError as error:
        enough = False
        assert "--epochs=" in str(error) and "add text" in str(error)
    steps = 0
    try:
        for _ in train_gpt.training_batches(cfg, shards, 0, 1, 1):
            steps += 1
    except (AssertionError, train_gpt.UserError):
        pass
    assert enough == (steps == cfg.total_steps)


def test_each_epoch_reads_every_document_once_in_another_order(small_config, tmp_path):
    texts = [[[BOS, i, i + 1, i + 2] for i in range(50)], [[BOS, i, i + 1, i + 2] for i in range(100, 130)]]
    shards = [train_gpt.read_header(write_shard(tmp_path / f"{i}.bin", np.concatenate(part)))
              for i, part in enumerate(texts)]
    cfg = small_config(epochs=3)
    start = train_gpt.LoaderPosition()
    found = [(ids[low:high].tolist(), place) for (ids, low, high), place in
             train_gpt.training_documents(cfg, shards, start)]
    epochs = [[document for document, _ in found[i:i + 80]] for i in (0, 80, 160)]
    assert len(found) == 240 and epochs[0] == texts[0] + texts[1]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[1] != epochs[0] and epochs[2] not in epochs[:2]
    for n in (0, 30, 79, 80, 100, 200):         # going on at any place reads the rest
        assert [place for _, place in train_gpt.training_documents(cfg, shards, found[n][1])] == \
            [place for _, place in found[n + 1:]]


# -----------------------------------------------------------------------------
# Weights of another run

@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a short run whose last windows are those of its last stage."""
    logs, patch = tmp_path_factory.mktemp("trained"), pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["train_gpt.py", *small_flags(data, out_dir=logs, num_iterations=6, val_every=0)])
    patch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    try:
        assert train_gpt.main() == 0
    finally:
        patch.undo()
    return only_folder(logs)


@pytest.mark.parametrize("which", ["", "checkpoint", "checkpoint/step_000006"])
def test_a_new_run_starts_with_the_weights(trained, data, run_main, tmp_path, which):
    last = [[1.0, 1024, 120, 16, 64, 1.4, [[1, 0.5, 0], [1, 0, 0]], [0, 0]]]
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", init_from=trained / which, split_embed=0.0,
                                 stages=last, num_iterations=2, val_every=0))
    assert done.code == 0, done.err
    before, after = (json.loads((folder / "run.json").read_text()) for folder in
                     (trained, only_folder(tmp_path / "logs")))
    assert after["val_losses"][0]["val_loss"] == pytest.approx(before["val_losses"][-1]["val_loss"], abs=2e-5)
    assert after["config"]["earlier_windows"] == [32, 64]
    old, new = (load_file(folder / "checkpoint" / (folder / "checkpoint" / "latest").read_text() / "model.safetensors")
                for folder in (trained, only_folder(tmp_path / "logs")))
    assert torch.allclose(old["inv_freq"], new["inv_freq"], rtol=1e-5) and not torch.equal(new["embed"], new["lm_head"])
    model, _, _ = sample.load_checkpoint(only_folder(tmp_path / "logs") / "checkpoint" / "step_000002", "cpu")
    assert torch.allclose(model.inv_freq, new["inv_freq"], rtol=1e-5)


@pytest.mark.parametrize("changes, words", [
    ({"init_from": "nowhere"}, ["--init_from=nowhere"]), ({"model_dim": 96}, ["does not fit"]),
    ({"rope_base": 500.0}, ["rope_base=1024.0"])])
def test_weights_that_do_not_fit_are_refused(trained, data, refused, changes, words):
    refused(*small_flags(data, **{"init_from": trained} | changes), words=["--init_from", *words])


# -----------------------------------------------------------------------------
# The environment

@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "-1"])
def test_variables_of_torchrun_that_were_left_over(data, run_main, monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", stop_after=1, val_every=0, val_tokens=300))
    if value:
        assert done.code == 2 and re.fullmatch(rf"train_gpt\.py: [^\n]*{name}='{value}'[^\n]*unset[^\n]*\n", done.err)
    else:
        assert done.code == 0, done.err


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_modes_that_the_umask_leaves(data, run_main, tmp_path, umask):
    before = os.umask(umask)
    try:
        done = run_main(*small_flags(data, out_dir=tmp_path / "logs", stop_after=2, save_every=2, val_every=0))
    finally:
        os.umask(before)
    assert done.code == 0, done.err
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "logs").rglob("*") if path.is_file()}
    assert {"model.safetensors", "run.json", "log.txt", "latest"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_run_that_fails_says_so(data, run_main, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("planted")
    monkeypatch.setattr(train_gpt, "training_step", broken)
    with pytest.raises(ZeroDivisionError):
        run_main(*small_flags(data, out_dir=tmp_path / "logs"))
    info = json.loads((only_folder(tmp_path / "logs") / "run.json").read_text())
    assert info["status"] == "failed" and "planted" in info["error"]


def test_any_locale_and_a_notebooks_backend(data, tmp_path):
    """A copy with a comment in Korean, in a shell of another language, with what a notebook leaves behind."""
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    script = tmp_path / "내 생각.py"
    script.write_text(text + "# 다른 생각\n", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                                "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, script, *small_flags(data, out_dir=tmp_path / "logs", stop_after=1,
                                                                val_every=0, val_tokens=300)],
                          env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = only_folder(tmp_path / "logs")
    assert "# 다른 생각" in (folder / "log.txt").read_text(encoding="utf-8")
    assert (folder / "curve.svg").exists() and b"Traceback" not in done.stderr


def test_folders_with_odd_names_match_themselves(run_main, tmp_path):
    folder = make_data(tmp_path / "my [data] *x", train_tokens=20_000)
    done = run_main(*small_flags(folder, out_dir=tmp_path / "logs [1]", stop_after=1, val_every=0))
    assert done.code == 0, done.err


def test_a_curve_of_three_validations_claims_no_line_between_them(tmp_path):
    pytest.importorskip("matplotlib")

    def plot(points):
        run = object.__new__(train_gpt.Run)
        run.train_losses = [(i, i / 10, 5 - i / 50) for i in range(1, 101)]
        run.history = [(i, i / 10, 5 - i / 50) for i in range(0, 101, 100 // points)]
        run.folder = tmp_path
        run.plot()
        return len(re.findall(r'<g id="line2d_', (tmp_path / "curve.svg").read_text())), (
            tmp_path / "curve.svg").read_text().count("stroke-linecap: square")
    few, many = plot(2), plot(20)
    assert few[0] == many[0] and few[1] < many[1]       # the same artists, one path less in each of the two panels


def test_the_time_left_is_the_tokens_left_over_the_rate(data, run_main, tmp_path, monkeypatch):
    """Steps get larger along a run; the time left does not jump when they do."""
    monkeypatch.setattr(train_gpt.Clock, "seconds", property(lambda self: next(clock)))
    clock = iter(np.arange(1, 1_000_000) * 20.0)
    monkeypatch.setattr(train_gpt.time, "time", lambda: next(clock))
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", stop_after=10, val_every=0))
    total, seen = 7 * 512 + 3 * 1024, 0
    found = re.findall(r"^step:(\d+)/20 .*train_time:(\d+)ms .* (\d+) s left", done.out, re.M)
    assert len(found) > 3
    for step, milliseconds, left in found:
        seen = min(int(step), 7) * 512 + max(int(step) - 7, 0) * 1024
        assert int(left) == pytest.approx((total - seen) * int(milliseconds) / 1000 / seen, abs=1)




def test_a_curve_that_cannot_be_drawn_ends_nothing(data, run_main, tmp_path, monkeypatch):
    def broken(self):
        raise ValueError("planted")
    monkeypatch.setattr(train_gpt.Run, "plot", broken)
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", stop_after=1, val_every=0, val_tokens=300))
    assert done.code == 0 and "no curve.svg (ValueError: planted)" in done.out
    assert json.loads((only_folder(tmp_path / "logs") / "run.json").read_text())["status"] == "finished"
