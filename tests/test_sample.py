"""sample.py: finding and loading checkpoints, drawing tokens, decoding text, and what bad input gets.

The model is train_gpt.py's tiny preset made smaller, with random weights, in checkpoint folders written by hand and by
save_checkpoint; where a test needs to know the next token, a scripted model stands in. Greedy text is compared with the
argmax of the training script's own forward, drawn tokens with their probabilities, streamed text with Python's decoder.

Run: python -m pytest tests/test_sample.py
"""
import base64
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHARED_VOCAB = ROOT.parent / "shared" / "data" / "gpt2_bpe"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import sample  # noqa: E402
import train_gpt  # noqa: E402

CFG = replace(train_gpt.PRESETS["tiny"], vocab_size=257, bos_id=256, attention="plain", compile=False, model_dim=96,
              mlp_dim=96, gate_dim=8, bigram_rows=64, bigram_signs=16, final_windows=(96, 512))
CONTEXT = 1024                           # longest max_doc_tokens of the tiny preset's stages
EMOJI = "é漢😀"                           # two, three and four bytes


def tokenizer_file(merges=(), pattern=""):
    """The bytes of a tokenizer.json: all bytes, then `merges`, then the begin-of-document id."""
    ranks = [base64.b64encode(text).decode() for text in [*(bytes([i]) for i in range(256)), *merges]]
    data = {"name": "bytes", "pattern": pattern, "ranks": ranks, "special_tokens": {"<|bos|>": len(ranks)},
            "bos_id": len(ranks)}
    return (json.dumps(data, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode()


def random_model(cfg=CFG, seed=0):
    """A model that is sure of itself, so that no two tokens are nearly as likely."""
    model = train_gpt.GPT(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param += 0.1 * torch.randn(param.shape, generator=generator)
    model.lm_head.copy_(torch.randn(model.lm_head.shape, generator=generator))
    return model


def write_checkpoint(run, model, step=7, tokenizer=tokenizer_file(), **changes):
    """Writes run/checkpoint/step_<n> and `latest`, with `changes` to meta.json; returns the checkpoint folder."""
    folder = run / "checkpoint" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    meta = {"format": 1, "script": "train_gpt", "source_sha256": source, "config": asdict(model.cfg), "step": step,
            "stage": 1, "val_loss": 1.5, "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()} | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    (run / "checkpoint" / "latest").write_text(folder.name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint folder that no test changes."""
    return write_checkpoint(tmp_path_factory.mktemp("logs") / "run", random_model())


@pytest.fixture
def broken(trained, tmp_path):
    """A copy of it, for a test to break."""
    run = tmp_path / "logs" / "run"
    shutil.copytree(trained.parent.parent, run)
    return run / "checkpoint" / trained.name


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps(meta))


def run_main(capsys, *flags):
    """(exit code, stdout, stderr) of the command line, run in this process, where PyTorch is imported already."""
    code = sample.main(["--device=cpu", *map(str, flags)])
    return code, *capsys.readouterr()


def start(*flags, **options):
    """The command as a user types it, in a process of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def assert_refused(outcome, *parts):
    """Exit code 2, nothing on stdout, and one line on stderr that holds all `parts`."""
    code, out, err = outcome
    assert (code, out, err.count("\n")) == (2, "", 1), outcome
    assert err.startswith("sample.py: ") and err.endswith("\n")
    assert [part for part in parts if str(part) not in err] == [], err


class Scripted(torch.nn.Module):
    """Stands in for a model: at each call the next id of `script` is by far the likeliest. Notes what it was shown."""

    def __init__(self, script, vocab_size=257, context=CONTEXT):
        super().__init__()
        self.cfg = SimpleNamespace(bos_id=256, stages=[SimpleNamespace(max_doc_tokens=context)])
        self.place, self.script, self.seen = torch.nn.Parameter(torch.zeros(1)), list(script), []
        self.vocab_size = vocab_size

    def forward(self, tokens):
        assert tokens.dtype == torch.int32                          # as in training
        logits = torch.zeros(tokens.numel(), self.vocab_size)
        logits[-1, self.script[len(self.seen)]] = 99.0
        self.seen.append(tokens.tolist())
        return logits


# -----------------------------------------------------------------------------
# Tokenizer and decoding

def test_bytes_tokenizer_is_utf8():
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file()))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)
    assert tokenizer.encode("a" + EMOJI) == list(("a" + EMOJI).encode())
    assert (tokenizer.token_bytes(240), tokenizer.token_bytes(256)) == (b"\xf0", b"")


def test_tokenizer_with_a_pattern_merges_within_its_pieces():
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file([b"ab", b"abc", b"c a"], pattern=r" ?[a-z]+|\s+")))
    assert tokenizer.encode("abc ab") == [257, 32, 256]             # "c a" would cross a border
    assert (tokenizer.bos_id, tokenizer.vocab_size, tokenizer.token_bytes(257)) == (259, 260, b"abc")


def test_gpt2_tokenizer():
    if not SHARED_VOCAB.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {SHARED_VOCAB.parent}")
    import text
    tokenizer = sample.Tokenizer(json.loads(text.gpt2_tokenizer_json(SHARED_VOCAB)))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert "".join(sample.decode(tokenizer, tokenizer.encode(EMOJI + " don't"))) == EMOJI + " don't"


@pytest.mark.parametrize("field, value", [("ranks", ["AA=="]), ("ranks", ["?"]), ("ranks", 3), ("bos_id", 7),
                                          ("special_tokens", {"<|bos|>": 300}), ("special_tokens", [])])
def test_tokenizer_refuses_what_is_none(field, value):
    data = json.loads(tokenizer_file()) | {field: value}
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        sample.Tokenizer(data)


def test_decode_gives_whole_characters_at_their_last_byte():
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file()))
    shown, pieces = [], []

    def feed():
        for byte in ("a" + EMOJI).encode():
            shown.append("".join(pieces))
            yield byte
    for piece in sample.decode(tokenizer, feed()):
        pieces.append(piece)
    assert pieces == ["a", "é", "漢", "😀"]
    assert shown == ["", "a", "a", "aé", "aé", "aé", "aé漢", "aé漢", "aé漢", "aé漢"]


def test_decode_replaces_only_what_cannot_become_valid():
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file()))
    assert list(sample.decode(tokenizer, b"\xf0\x9f\x98\x80")) == ["😀"]
    assert list(sample.decode(tokenizer, b"\xf0\x9fa")) == ["\ufffda"]
    assert list(sample.decode(tokenizer, b"a\xf0\x9f")) == ["a", "\ufffd"]      # the text ends in mid-character
    assert list(sample.decode(tokenizer, b"\xff\x80")) == ["\ufffd", "\ufffd"]
    rng = random.Random(0)
    for _ in range(200):
        noise = bytes(rng.choice((97, 128, 159, 195, 226, 240, 255)) for _ in range(20))
        assert "".join(sample.decode(tokenizer, noise)) == noise.decode("utf-8", "replace")


# -----------------------------------------------------------------------------
# Drawing tokens

def draws(probs, count=3000, temperature=1.0, top_k=0, top_p=1.0):
    """How often each token comes out, as fractions, when the probabilities are `probs`."""
    generator, counts = torch.Generator().manual_seed(0), [0] * len(probs)
    logits = torch.tensor(probs).log()
    for _ in range(count):
        counts[sample.next_token(logits, temperature, top_k, top_p, generator)] += 1
    return [n / count for n in counts]


@pytest.mark.parametrize("options, expected", [
    ({}, (0.15, 0.5, 0.05, 0.3)),
    ({"temperature": 0.5}, (0.0616, 0.6849, 0.0068, 0.2466)),       # squares, made to sum to 1
    ({"top_k": 2}, (0, 0.625, 0, 0.375)),
    ({"top_k": 4}, (0.15, 0.5, 0.05, 0.3)),
    ({"top_p": 0.7}, (0, 0.625, 0, 0.375)),
    ({"top_p": 0.9}, (0.1579, 0.5263, 0, 0.3158)),
    ({"top_p": 0.01}, (0, 1, 0, 0)),
    ({"top_k": 2, "top_p": 0.6}, (0, 1, 0, 0)),                     # 0.625 of what the two share is enough
])
def test_tokens_come_with_their_probabilities(options, expected):
    found = draws((0.15, 0.5, 0.05, 0.3), **options)
    assert [value == 0 for value in found] == [value == 0 for value in expected]
    assert found == pytest.approx(expected, abs=0.04)               # four standard errors of a fraction of 3000


def test_greedy_takes_the_first_of_the_likeliest():
    for options in ({"temperature": 0.0}, {"top_k": 1}):
        assert draws((0.1, 0.4, 0.4, 0.1), count=20, **options) == [0, 1, 0, 0]
    assert draws((0.1, 0.5, 0.3, 0.1), count=20, temperature=1e-320) == [0, 1, 0, 0]


def test_greedy_is_the_argmax_of_forward_and_top_k_1(trained):
    model, tokenizer, _ = sample.load_checkpoint(trained, "cpu")
    ids = [256, *b"def "]
    for _ in range(20):
        ids.append(model(torch.tensor(ids))[-1].argmax().item())
    greedy = list(sample.generate(model, [256, *b"def "], 257, 20, temperature=0))
    assert len(set(greedy)) > 3 and greedy == ids[5:]               # more than one token over and over
    assert list(sample.generate(model, [256, *b"def "], 257, 20, top_k=1, seed=5)) == greedy


def test_generation_stops_before_a_new_document_and_at_max_tokens():
    assert list(sample.generate(Scripted(b"abc" + b"d"), [256], 257, 3, 0)) == list(b"abc")
    assert list(sample.generate(Scripted([97, 98, 256, 99]), [256], 257, 10, 0)) == [97, 98]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model = Scripted([300] * 40, vocab_size=384)                    # all mass on an id that only pads the vocabulary
    assert max(sample.generate(model, [256], 256, 40, seed=1)) < 256


def test_the_model_sees_the_last_tokens_of_a_long_text():
    model, prompt = Scripted(b"abcdef", context=4), [256, 1]
    tokens = list(sample.generate(model, prompt, 257, 6, temperature=0))
    whole = prompt + tokens
    assert model.seen == [whole[max(0, n - 4):n] for n in range(2, 8)]
    assert prompt == [256, 1]                                       # the caller's list stays as it was


def test_logits_that_are_not_finite_are_reported():
    model = Scripted([97])
    model.forward = lambda tokens: torch.full((tokens.numel(), 257), float("nan"))
    with pytest.raises(sample.UserError, match="not finite"):
        next(sample.generate(model, [256], 257, 1))


# -----------------------------------------------------------------------------
# Loading

def test_loaded_weights_and_stage_are_the_saved_ones(trained):
    model, tokenizer, meta = sample.load_checkpoint(trained, "cpu")
    saved = random_model()
    saved.set_stage(1, final=True)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert (model.window_lengths, meta["step"]) == ({"short": 96, "long": 512}, 7)
    tokens = torch.tensor([256, *b"hello"])
    assert torch.equal(model(tokens), saved(tokens))


def test_what_save_checkpoint_writes_loads(tmp_path):
    model = random_model(replace(CFG, precision="bf16"))
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    run = SimpleNamespace(master=True, folder=tmp_path / "run", info={"source_sha256": source})
    folder = train_gpt.save_checkpoint(run, model, CFG.num_iterations, tokenizer_file())
    assert sample.find_checkpoint(tmp_path) == folder
    loaded, _, meta = sample.load_checkpoint(folder, "cpu")
    assert loaded.embed.dtype == torch.float32 and torch.equal(loaded.embed, model.embed.float())
    assert (meta["stage"], meta["val_loss"]) == (len(CFG.stages) - 1, None)
    assert sample.load_checkpoint(folder, "cpu", precision="bf16")[0].embed.dtype == torch.bfloat16


def test_the_newest_checkpoint_is_found(tmp_path, trained):
    for name, age in (("b", 30), ("a", 10), ("c", 20)):
        run = tmp_path / name
        shutil.copytree(trained.parent.parent, run)
        stamp = (run / "checkpoint" / "latest").stat().st_mtime - age
        os.utime(run / "checkpoint" / "latest", (stamp, stamp))
    (tmp_path / "d" / "checkpoint").mkdir(parents=True)             # a run that has not saved yet
    assert sample.find_checkpoint(tmp_path) == tmp_path / "a" / "checkpoint" / trained.name
    assert sample.resolve_checkpoint(tmp_path / "c") == tmp_path / "c" / "checkpoint" / trained.name
    assert sample.resolve_checkpoint(tmp_path / "c" / "checkpoint") == tmp_path / "c" / "checkpoint" / trained.name
    assert sample.resolve_checkpoint(trained) == trained


@pytest.mark.parametrize("latest", ["../step_000007", "step_000007/../../other", "/tmp", "..", ".", "", "step_000008",
                                    "step_000007\nstep_000008", "s" * 5000])
def test_latest_names_a_folder_beside_it_and_nothing_else(capsys, broken, latest):
    (broken.parent / "latest").write_text(latest)
    assert_refused(run_main(capsys, "--out_dir", broken.parents[2]), broken.parent / "latest")


@pytest.mark.parametrize("script", ["evil", "train_evil", "../train_evil", "/tmp/train_evil", "train_gpt.py", "sample",
                                    "", "os", "./train_gpt", "tests/test_sample"])
def test_a_checkpoint_names_no_code_of_its_own(capsys, broken, script, monkeypatch):
    for place in (broken, broken.parent):
        for name in ("evil", "train_evil"):
            (place / f"{name}.py").write_text(f"open({str(broken / 'ran')!r}, 'w')")
    monkeypatch.chdir(broken)
    change_meta(broken, script=script)
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), repr(script), "train_gpt", "--script=")
    assert not (broken / "ran").exists()


def test_weights_are_never_unpickled(capsys, broken):
    class Evil:
        def __reduce__(self):
            return open, (str(broken / "ran"), "w")
    (broken / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), "model.safetensors cannot be read")
    assert not (broken / "ran").exists()


def test_script_flag_uses_that_source(capsys, broken, tmp_path):
    kept = tmp_path / "train_gpt.py"                                # same name as the one beside sample.py, older text
    kept.write_text((ROOT / "train_gpt.py").read_text() + "\nMARK = 1\n")
    change_meta(broken, script="train_lost", source_sha256=hashlib.sha256(kept.read_bytes()).hexdigest())
    code, out, err = run_main(capsys, f"--checkpoint={broken}", f"--script={kept}", "--max_tokens=1")
    assert (code, err.count("\n")) == (0, 1) and "note" not in err
    model = sample.load_checkpoint(broken, "cpu", script=kept)[0]
    assert sys.modules[type(model).__module__].MARK == 1


def test_a_changed_source_is_noted(capsys, broken):
    change_meta(broken, source_sha256="0" * 64)
    kept = broken.parent.parent / "train_gpt.py"
    for expected in ("--script=PATH", f"--script={kept}"):
        code, out, err = run_main(capsys, f"--checkpoint={broken}", "--max_tokens=1")
        note, status = err.splitlines()
        assert code == 0 and "note: train_gpt.py" in note and expected in note and str(broken) in status
        kept.write_text("")                                         # from now on the run folder has the source


@pytest.mark.parametrize("change, parts", [
    (lambda weights: weights.pop("embed"), ["missing embed"]),
    (lambda weights: weights.update(wte=torch.zeros(2)), ["extra wte"]),
    (lambda weights: weights.update(mlp=torch.zeros(2, 3)), ["mlp is float32 (2, 3), not (10, 96, 96)"]),
    (lambda weights: weights.update(gate_bias=weights["gate_bias"].int()), ["gate_bias is int32"]),
    (lambda weights: weights.clear(), ["missing embed", " more; "]),
])
def test_weights_that_do_not_fit_are_named(capsys, broken, change, parts):
    weights = load_file(broken / "model.safetensors")
    change(weights)
    save_file(weights, broken / "model.safetensors")
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), *parts, "--script=")


@pytest.mark.parametrize("changes, part", [
    ({"format": 2}, "format '2'"), ({"format": None}, "format 'None'"), ({"step": "7"}, "step '7'"),
    ({"stage": 2}, "stage 2 of 2"), ({"stage": -1}, "stage -1"), ({"stage": True}, "stage"), ({"config": []}, "config"),
    ({"config": {}}, "config"), ({"config": asdict(CFG) | {"layers": 3}}, "config"),
    ({"config": asdict(CFG) | {"model_dim": 100}}, "model_dim=100"),
    ({"config": asdict(CFG) | {"vocab_size": 0}}, "config makes no model"),
    ({"config": asdict(CFG) | {"vocab_size": 10 ** 15}}, "config makes no model"),
    ({"config": asdict(CFG) | {"bos_id": 3}}, "a tokenizer of 257 ids"),
    ({"tokenizer_sha256": "0" * 64}, "tokenizer.json"),
])
def test_meta_with_bad_values_is_refused(capsys, broken, changes, part):
    change_meta(broken, **changes)
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), part)


@pytest.mark.parametrize("name, content, part", [
    ("meta.json", None, "is missing"), ("meta.json", b"", "not a JSON object"),
    ("meta.json", b"[1]", "not a JSON object"), ("meta.json", b"\xff\xfe{", "not a JSON object"),
    ("meta.json", b"[" * 100_000, "not a JSON object"),
    ("meta.json", b" " * ((1 << 20) + 1), "more than 1048576 bytes"), ("tokenizer.json", None, "is missing"),
    ("tokenizer.json", b"{}", "not the tokenizer"), ("model.safetensors", None, "cannot be read"),
    ("model.safetensors", b"", "cannot be read"), ("model.safetensors", b"\xff" * 100, "cannot be read"),
])
def test_files_that_are_absent_or_damaged_are_named(capsys, broken, name, content, part):
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), broken / name, part)


def test_tokenizer_that_is_none_is_refused_although_its_hash_fits(capsys, broken):
    (broken / "tokenizer.json").write_bytes(b"{}")
    change_meta(broken, tokenizer_sha256=hashlib.sha256(b"{}").hexdigest())
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), "tokenizer.json is not a tokenizer")


@pytest.mark.parametrize("source, part", [
    ("def GPT(:", "SyntaxError"), ("import no_such_module", "ModuleNotFoundError"),
    ("raise SystemExit(0)", "SystemExit"), ("GPT = 1", "has no config_from_dict, UserError"),
])
def test_script_that_is_no_training_script_is_refused(capsys, trained, tmp_path, source, part):
    bad = tmp_path / "bad.py"
    bad.write_text(source)
    assert_refused(run_main(capsys, f"--checkpoint={trained}", f"--script={bad}"), bad, part)


# -----------------------------------------------------------------------------
# Command line

def test_same_seed_same_text_and_the_next_seed_is_the_next_sample(capsys, trained):
    flags = f"--checkpoint={trained}", "--max_tokens=30", "--temperature", "1.5"
    code, first, err = run_main(capsys, *flags, "--prompt=def ", "--seed=3")
    assert code == 0 and first.startswith("def ") and first.endswith("\n") and "step_000007" in err and "1.5000" in err
    assert run_main(capsys, *flags, "--seed=3")[1] == first         # "def " is the default for a model of bytes
    second = run_main(capsys, *flags, "--seed=4")[1]
    assert second != first
    both = run_main(capsys, *flags, "--seed=3", "--num_samples=2")[1]
    assert both == f"--- sample 1 of 2, --seed=3\n{first}--- sample 2 of 2, --seed=4\n{second}"


def test_text_streams_in_whole_characters(capsys, monkeypatch):
    class Recorder(io.StringIO):
        """Notes what is there each time it is flushed, that is shown."""
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())

        def reconfigure(self, **options):
            pass
    text = f"x{EMOJI}y"
    model, tokenizer = Scripted([*text.encode(), 256]), sample.Tokenizer(json.loads(tokenizer_file()))
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: (model, tokenizer, {"script": "s", "step": 1}))
    monkeypatch.setattr(sample, "find_checkpoint", lambda *_: Path("c"))
    monkeypatch.setattr(sys, "stdout", Recorder())
    assert sample.main(["--prompt=é", "--temperature=0"]) == 0
    whole = f"é{text}\n"
    assert Recorder.shown[:len(whole)] == [whole[:n + 1] for n in range(len(whole))]


@pytest.mark.parametrize("flags, parts", [
    (["--num_samples=0"], ["--num_samples=0"]), (["--num_samples", "two"], ["--num_samples", "two"]),
    (["--max_tokens=0"], ["--max_tokens=0"]), (["--temperature=-0.5"], ["--temperature=-0.5"]),
    (["--temperature", "-1"], ["--temperature=-1"]), (["--temperature=nan"], ["--temperature=nan"]),
    (["--temperature=inf"], ["--temperature=inf"]), (["--top_k=-1"], ["--top_k=-1"]), (["--top_p=0"], ["--top_p=0"]),
    (["--top_p=1.01"], ["--top_p=1.01"]), (["--top_p=nan"], ["--top_p=nan"]), (["--seed=-1"], ["--seed=-1"]),
    (["--prompt="], ["--prompt=", "empty"]), (["--prompt", b"\xff\xfe"], ["--prompt=", "UTF-8"]),
    (["--temprature=1"], ["--temprature=1", "--help"]), (["--temp=1"], ["--temp=1"]), (["hello"], ["hello"]),
    (["--device=tpu"], ["--device", "tpu"]), (["--precision=fp8"], ["--precision", "fp8"]),
    (["--checkpoint=no/such"], ["--checkpoint=no/such", "python train_gpt.py --preset=tiny"]),
    (["--out_dir=no/such"], ["--out_dir=no/such", "./run.sh"]), ([], ["--out_dir=logs", "./run.sh"]),
])
def test_bad_flags_get_one_line_and_exit_code_2(tmp_path, flags, parts):
    process = start(*flags, cwd=tmp_path)
    out, err = process.communicate()
    assert_refused((process.returncode, out.decode(), err.decode()), *parts)


@pytest.mark.parametrize("flags, parts", [
    (["--top_k=258"], ["--top_k=258", "257"]), ([f"--prompt={'a' * CONTEXT}"], ["--prompt", "1024", "1023"]),
    (["--script=no/such.py"], ["--script=no/such.py"]), (["--device=cuda"], ["--device=cuda"]),
])
def test_flags_that_do_not_fit_the_model_get_one_line_and_exit_code_2(capsys, trained, flags, parts):
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert_refused(run_main(capsys, f"--checkpoint={trained}", *flags), *parts)


def test_limits_themselves_are_accepted(capsys, trained):
    flags = f"--prompt={'a' * (CONTEXT - 1)}", "--top_k=257", "--top_p=1", "--max_tokens=2"
    assert run_main(capsys, f"--checkpoint={trained}", *flags)[0] == 0


def test_help_lists_every_flag_and_its_default():
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("checkpoint", "prompt", "num_samples", "max_tokens", "temperature", "top_k", "top_p", "seed", "device",
                 "precision", "script", "out_dir"):
        described = done.stdout.split(f"  --{flag} ")[1].split("\n  --")[0]
        assert "default:" in described, flag


def test_import_has_no_side_effect():
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); before = dict(os.environ), list(sys.path), os.getcwd()\n"
            "import sample\n"
            "assert (dict(os.environ), list(sys.path), os.getcwd()) == before\n"
            "assert not {'torch', 'train_gpt', 'tiktoken'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_text_comes_while_it_is_made_and_ctrl_c_ends_it(trained):
    process = start(f"--checkpoint={trained}", "--prompt=def ", "--max_tokens=1000000", "--device=cpu", "--top_k=1")
    with contextlib.closing(process.stdout):
        begin = process.stdout.read(5)                              # the prompt and some of the model's text
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    error = process.stderr.read().decode()
    assert (process.wait(), begin[:4]) == (130, b"def ")
    assert error.endswith("\nsample.py: stopped\n") and "Traceback" not in error


def test_a_reader_that_leaves_is_no_error():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sample\n"
            "def endless(args):\n"
            "    while True: print('text', flush=True)\n"
            "sample.sample = endless; sys.exit(sample.main([]))")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(timeout=20), process.stderr.read()) == (0, b"")


def test_a_terminal_that_knows_fewer_characters_is_no_error():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sample\n"
            "sample.sample = lambda args: print('a\\U0001f600b')\n"
            "sys.exit(sample.main([]))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a?b\n", b"")
