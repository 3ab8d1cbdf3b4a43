"""sample.py: finding and loading checkpoints, drawing tokens, decoding text, and what bad input gets.

The model is train_gpt.py's tiny preset made smaller, with random weights, in checkpoint folders written by hand and by
save_checkpoint; where a test needs to know the next token, a scripted model stands in. Greedy text is compared with the
argmax of the training script's own forward, filters with sorted lists, drawn tokens with their probabilities, streamed
text with Python's decoder. What decoding itself gives is the matter of test_decode.py.

Run: python -m pytest tests/test_sample.py
"""
import argparse
import base64
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import only_folder, small_flags
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHARED_VOCAB = ROOT.parent / "shared" / "data" / "gpt2_bpe"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import sample  # noqa: E402
import train_gpt  # noqa: E402

CFG = replace(train_gpt.PRESETS["tiny"], vocab_size=257, bos_id=256, attention="plain", compile=False, model_dim=96,
              head_dim=48, mlp_dim=96, gate_dim=8, bigram_rows=64, bigram_signs=16, final_windows=(96, 512))
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
    code = sample.main(["--device=cpu", "--threads=1", *map(str, flags)])
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
    """Stands in for a model: at each call the next id of `script` is by far the likeliest in every row."""

    def __init__(self, script, vocab_size=257, longest=10_000):
        super().__init__()
        self.cfg, self.vocab_size, self.longest = SimpleNamespace(bos_id=256), vocab_size, longest
        self.place, self.script, self.calls = torch.nn.Parameter(torch.zeros(1)), list(script), 0

    def new_cache(self, batch, max_tokens, chunk=256):
        if max_tokens > self.longest:
            raise ValueError(f"it has {self.longest} positions")
        return SimpleNamespace(fill=lambda other, rows: None)

    def decode(self, tokens, cache, lengths=None, last=False):
        logits = torch.zeros(len(tokens), 1, self.vocab_size)
        logits[:, :, self.script[self.calls]] = 99.0
        self.calls += 1
        return logits


def scripted_texts(script, count=100, stop=(), num_texts=1, batch=1, **options):
    """The Texts that a scripted model writes."""
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file()))
    engine = sample.Engine(Scripted(script, **options), 257, sample.Draw(temperature=0), batch)
    texts = [sample.Text(tokenizer, stop) for _ in range(num_texts)]
    list(sample.generate(engine, [[256]], texts, count))
    return texts


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
# GPT-2's vocabulary for checkpoints without a tokenizer.json

@pytest.fixture
def vocabulary(monkeypatch, tmp_path):
    """A made-up encoder.json that is taken for GPT-2's, in a folder of its own; no cache of tiktoken has it yet."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    tokens = letters + [f"{first}{second}" for first in letters for second in letters][:50_000]
    content = json.dumps({token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}).encode()
    made = sample.tokenizer_of_encoder(json.loads(content))
    monkeypatch.setattr(sample, "ENCODER_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sample, "GPT2_TOKENIZER_SHA256", hashlib.sha256(made).hexdigest())
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sample.tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "encoder.json").write_bytes(content)
    return folder


@pytest.mark.parametrize("place", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", ""])
def test_the_vocabulary_comes_from_the_cache_of_tiktoken(vocabulary, monkeypatch, tmp_path, place):
    cache = tmp_path / "temporary" / "data-gym-cache"
    if place:
        cache = tmp_path / "cache"
        monkeypatch.setenv(place, str(cache))
    cache.mkdir(parents=True)
    assert sample.gpt2_tokenizer() == b""
    cached = cache / sample.ENCODER_CACHE_NAME
    cached.write_bytes(b"damaged")
    assert sample.gpt2_tokenizer() == b""
    shutil.copy(vocabulary / "encoder.json", cached)
    content = sample.gpt2_tokenizer()
    assert hashlib.sha256(content).hexdigest() == sample.GPT2_TOKENIZER_SHA256
    assert sample.Tokenizer(json.loads(content)).bos_id == 50256


def test_the_vocabulary_comes_from_vocab_dir(vocabulary):
    content = sample.gpt2_tokenizer(vocabulary)
    tokenizer = sample.Tokenizer(json.loads(content))
    assert (tokenizer.vocab_size, tokenizer.token_bytes(0), len(tokenizer.token_bytes(300))) == (50257, b"!", 2)
    assert sorted(tokenizer.ranks[:256]) == [bytes([byte]) for byte in range(256)]
    (vocabulary / "encoder.json").rename(vocabulary / "vocab.json")  # as other publishers call it
    assert sample.gpt2_tokenizer(vocabulary) == content
    (vocabulary / "vocab.json").write_text("{}")
    for folder, part in ((vocabulary, "is not GPT-2's"), (vocabulary / "none", "cannot be read")):
        with pytest.raises(sample.UserError, match=f"{part}.*name a folder with .*--vocab_dir="):
            sample.gpt2_tokenizer(folder)


def test_the_vocabulary_is_that_of_data():
    """The real one, in the same bytes; and tiktoken's name for it."""
    import text
    assert sample.ENCODER_CACHE_NAME == hashlib.sha1(text.ENCODER_JSON_URL).hexdigest()
    assert (sample.ENCODER_SHA256, sample.GPT2_TOKENIZER_SHA256) == (
        text.ENCODER_JSON_SHA256, text.GPT2_TOKENIZER_SHA256)
    if not SHARED_VOCAB.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {SHARED_VOCAB.parent}")
    assert sample.gpt2_tokenizer(SHARED_VOCAB) == text.gpt2_tokenizer_json(SHARED_VOCAB)


def test_a_checkpoint_without_a_tokenizer_finds_the_vocabulary_or_says_what_to_do(capsys, vocabulary, trained, tmp_path,
                                                                                  monkeypatch):
    import tiktoken.load
    monkeypatch.setattr(tiktoken.load, "read_file", lambda *_: pytest.fail("it asks the network"))
    model = Scripted([15, 31, 50256], vocab_size=50304)
    model.cfg = SimpleNamespace(bos_id=50256, vocab_size=50304)
    model.set_stage = lambda *_, **__: None
    model.matmul_parameters = 1
    monkeypatch.setattr(sample, "build_model", lambda *_: model)
    monkeypatch.setattr(sample, "load_weights", lambda *_: None)
    run = tmp_path / "run"
    shutil.copytree(trained.parents[1], run)
    folder = sample.resolve_checkpoint(run)
    (folder / "tokenizer.json").unlink()
    assert_refused(run_main(capsys, f"--checkpoint={run}"), "tokenizer.json is missing; copy the tokenizer.json of")
    change_meta(folder, tokenizer_sha256=sample.GPT2_TOKENIZER_SHA256)
    flags = f"--checkpoint={run}", "--prompt=A", "--temperature=0"
    assert_refused(run_main(capsys, *flags), folder / "tokenizer.json", "is missing", "--vocab_dir=", "tiktoken")
    assert_refused(run_main(capsys, *flags, f"--vocab_dir={tmp_path}"), tmp_path / "encoder.json", "cannot be read")
    assert run_main(capsys, *flags, f"--vocab_dir={vocabulary}")[:2] == (0, "A0@\n")
    assert sample.load_checkpoint(folder, "cpu", needs_tokenizer=False)[1] is None


# -----------------------------------------------------------------------------
# Drawing tokens

FILTERS = [{}, {"temperature": 0.5}, {"top_k": 1}, {"top_k": 3}, {"top_k": 50}, {"top_p": 0.01}, {"top_p": 0.7},
           {"top_p": 0.999}, {"min_p": 0.2}, {"min_p": 1.0}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.5},
           {"top_k": 5, "top_p": 0.8}, {"temperature": 2.0, "top_p": 0.5, "min_p": 0.05},
           {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 2.0}]


def reference_probs(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The distribution of the next token from a list of logits: lists, sorting and float64."""
    logits = [z if not s else z / repetition_penalty if z > 0 else z * repetition_penalty for z, s in zip(logits, seen)]
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k or None]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass / total < top_p and weights[i] >= min_p:
            kept.append(i)
        mass += weights[i]
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_against_sorted_lists(options):
    generator = torch.Generator().manual_seed(0)
    logits, seen = 3 * torch.randn(6, 50, generator=generator), torch.rand(6, 50, generator=generator) < 0.3
    found = sample.filter_logits(logits, sample.Draw(**options), seen).softmax(1)
    for row in range(6):
        expected = reference_probs(logits[row].tolist(), seen[row].tolist(), **options)
        assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_nucleus_of_a_large_vocabulary():
    logits = 4 * torch.randn(3, 50_257, generator=torch.Generator().manual_seed(0))
    for p in (0.5, 0.95, 0.999):
        kept = sample.filter_logits(logits, sample.Draw(top_p=p)).isfinite()
        probs = logits.double().softmax(1)
        ranked, order = probs.sort(descending=True)
        expected = torch.zeros_like(kept).scatter(1, order, ranked.cumsum(1) - ranked < p)
        assert expected.sum() > 3 and probs.where(kept != expected, 0).sum() < 3e-6     # what rounding decides


def test_equal_tokens_stay_together():
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert sample.filter_logits(logits, sample.Draw(**options)).isfinite().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("temperature", [1e-320, 1e-7])
def test_a_tiny_temperature_is_greedy(temperature):
    scores = sample.filter_logits(torch.tensor([[1.0, 5.0, 4.999, 2.0]]), sample.Draw(temperature))
    assert scores.softmax(1).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_tokens_come_with_their_probabilities(vary):
    probs, count, ids = torch.tensor((0.15, 0.5, 0.05, 0.3)), 20_000, torch.arange(4)
    seed, step = (torch.arange(count) if vary == name else torch.tensor([7]) for name in ("seed", "step"))
    noise = sample.gumbel_noise(seed, step, ids)
    found = (probs.log() + noise).argmax(1).bincount(minlength=4) / count
    assert found.tolist() == pytest.approx(probs.tolist(), abs=0.014)   # four standard errors


def test_noise_is_gumbels_and_depends_on_seed_step_and_token_alone():
    seeds, ids = torch.tensor([0, 1, 2 ** 32 - 1]), torch.arange(50_257)
    noise = sample.gumbel_noise(seeds, torch.tensor([5]), ids)
    assert torch.equal(noise[1:2], sample.gumbel_noise(seeds[1:2], torch.tensor([5]), ids))
    assert torch.equal(noise[:, 7:9], sample.gumbel_noise(seeds, torch.tensor([5]), ids[7:9]))
    for other in (noise[1], sample.gumbel_noise(seeds[:1], torch.tensor([6]), ids)[0], noise[0].roll(1)):
        assert abs(torch.corrcoef(torch.stack([noise[0], other]))[0, 1]) < 0.02
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.015)
    assert float(noise.var()) == pytest.approx(math.pi ** 2 / 6, abs=0.04)


# -----------------------------------------------------------------------------
# Engine

PROMPTS = [[256, *b"def "], [256], [256, *bytes(range(97, 122)) * 12], [256, *b"for x in range(10):"]]


def write(model, rows, count=16, batch=None, **options):
    """[(prompt, seed) -> its tokens and log-probabilities] of an engine with so many rows."""
    engine = sample.Engine(model, 257, sample.Draw(**options), batch or len(rows), 400)
    steps = list(engine.steps(PROMPTS, rows, count))
    return [([tokens[b] for tokens, _ in steps], [logprobs[b] for _, logprobs in steps]) for b in range(len(rows))]


def test_greedy_is_the_argmax_of_forward_with_its_log_probability():
    model = random_model()
    model.set_stage(1, final=True)                                  # windows of 96 and 512: the long prompt passes one
    for prompt, (tokens, logprobs) in zip(PROMPTS, write(model, [(n, 0) for n in range(4)], temperature=0)):
        logits = model(torch.tensor(prompt + tokens))[len(prompt) - 1:-1]
        assert tokens == logits.argmax(1).tolist()
        expected = logits.log_softmax(1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert len(set(tokens)) > 3                                     # more than one token over and over


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"top_p": 0.9, "repetition_penalty": 1.2}], ids=str)
def test_a_seed_gives_the_same_text_whatever_the_batch(options):
    model, rows = random_model(), [(0, 1), (2, 1), (0, 2), (1, 5), (3, 1), (0, 1)]
    together = write(model, rows, **options)
    for row, (tokens, logprobs) in zip(rows, together):
        alone_tokens, alone_logprobs = write(model, [row], batch=2, **options)[0]
        assert tokens == alone_tokens
        assert logprobs == pytest.approx(alone_logprobs, abs=1e-4)
    assert together[0] == together[5]
    assert len({tuple(tokens) for tokens, _ in together}) == 5      # another seed or prompt, another text


def test_texts_beyond_the_batch_follow_and_fewer_tokens_are_the_first_ones():
    model, tokenizer = random_model(), sample.Tokenizer(json.loads(tokenizer_file()))
    written = []
    for batch, count in ((5, 12), (2, 12), (3, 8)):
        engine = sample.Engine(model, 257, sample.Draw(), batch, 400)
        texts = [sample.Text(tokenizer, prompt=n % 4, seed=n) for n in range(5)]
        list(sample.generate(engine, PROMPTS, texts, count))
        written.append([text.tokens[:8] for text in texts])
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("forcing", [False, True])
def test_a_compiled_step_gives_the_same_text_from_one_graph(monkeypatch, forcing):
    """By torch.compile's front end alone, with every filter; test_decode.py has the model's part."""
    graphs, real = [], torch.compile

    def compile(function, **how):
        return real(function, backend=lambda graph, _: graphs.append(graph) or graph, **how)
    monkeypatch.setattr(torch, "compile", compile)
    model, written = Scripted(()), []
    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(0))
    model.decode = lambda tokens, *_, **__: table[tokens[:, -1:]]
    for compiled in (False, True):
        engine = sample.Engine(model, 257, sample.Draw(1.2, 50, 0.9, 0.01, 1.1), 2, 400, compiled, forcing)
        written.append([tokens for tokens, _ in engine.steps([[256]], [(0, 1), (0, 2)], 30)])
    assert written[0] == written[1] and len(graphs) == 1
    assert len({token for tokens in written[0] for token in tokens}) > 20


def test_repeated_tokens_are_penalised_in_prompt_and_text():
    model = Scripted([97] * 8)
    model.decode = lambda tokens, *_, **__: torch.linspace(1, 2, 257).repeat(len(tokens), 1, 1)
    engine = sample.Engine(model, 257, sample.Draw(0, repetition_penalty=3), 2)
    steps = [tokens for tokens, _ in engine.steps([[256, 255, 253], [256]], [(0, 0), (1, 0)], 4)]
    assert steps == [[256, 256], [254, 255], [252, 254], [251, 253]]


def test_a_text_ends_with_its_document_and_at_the_most_tokens():
    assert [(text.text, text.finish) for text in scripted_texts(b"abcd", 3)] == [("abc", "length")]
    text, = scripted_texts([97, 98, 256, 99])
    assert (text.text, text.finish, text.tokens) == ("ab", "end", [97, 98])


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model = Scripted([300] * 40, vocab_size=384)                    # all mass on an id that only pads the vocabulary
    engine = sample.Engine(model, 256, batch=2)
    assert max(max(tokens) for tokens, _ in engine.steps([[256]], [(0, 1), (0, 2)], 40)) < 256


def test_logits_that_are_not_finite_are_reported():
    model = Scripted([97])
    model.decode = lambda tokens, *_, **__: torch.full((len(tokens), 1, 257), float("nan"))
    with pytest.raises(sample.UserError, match="not finite"):
        next(sample.Engine(model, 257).steps([[256]], [(0, 0)], 1))


@pytest.mark.parametrize("script, stop, expected", [
    (b"one, two", [", "], "one"), (b"one, two", ["w", "e, t"], "on"), (b"a\n\nb", ["\n\n"], "a"),
    (b"aab", ["ab"], "a"), (b"abcabd", ["abd"], "abc"), ("x漢y".encode(), ["漢"], "x"), (b"stop", ["stop"], ""),
])
def test_stop_strings_end_the_text_before_them(script, stop, expected):
    text, = scripted_texts(script, stop=stop)
    assert (text.text, text.finish) == (expected, "stop")
    assert bytes(text.tokens) == script[:len(text.tokens)] and len(text.tokens) < len(script) + 1


@pytest.mark.parametrize("script, stop", [(b"one,", [", "]), (b"ababab", ["abc", "babx"]), (b"st", ["stop"])])
def test_what_only_begins_like_a_stop_string_is_text(script, stop):
    text, = scripted_texts([*script, 256], stop=stop)
    assert (text.text, text.finish) == (script.decode(), "end")


def test_nothing_of_a_stop_string_is_ever_shown():
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file()))
    text, shown = sample.Text(tokenizer, ["cde"]), []
    for token in b"abccdcd":
        text.add(token)
        shown.append(text.text)
    assert shown == ["a", "ab", "ab", "abc", "abc", "abccd", "abccd"]


# -----------------------------------------------------------------------------
# Tools

CHAT = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
        "<|python_end|>", "<|output_start|>", "<|output_end|>"]
ASSISTANT_END, CALL, CALLED, OUTPUT, SHOWN = range(260, 265)


def chat_tokenizer():
    """Bytes and the nine special tokens, from id 256."""
    special = {name: 256 + n for n, name in enumerate(CHAT)}
    return sample.Tokenizer(json.loads(tokenizer_file()) | {"special_tokens": special})


def add(expression):
    """Stands in for the calculator: sums of whole numbers."""
    return str(sum(map(int, expression.split("+")))) if re.fullmatch(r"\d+(\+\d+)*", expression) else None


def scripted_calls(script, count=100, forcing=True, ends=(256, ASSISTANT_END)):
    """The Text that a scripted model writes with a tool; it reads every token that stands in the text."""
    model, tokenizer, read = Scripted(script, vocab_size=265), chat_tokenizer(), []
    decode = model.decode
    model.decode = lambda tokens, *rest, **more: read.append(int(tokens[0, -1])) or decode(tokens, *rest, **more)
    text = sample.Text(tokenizer)
    engine = sample.Engine(model, 265, sample.Draw(temperature=0), forcing=forcing)
    list(sample.generate(engine, [[256]], [text], count, ends, sample.Tool(tokenizer, add) if forcing else None))
    assert read[1:] == text.tokens[:len(read) - 1]
    return text


def test_special_tokens_have_names():
    tokenizer = chat_tokenizer()
    assert [tokenizer.special(name) for name in CHAT] == list(range(256, 265))
    assert tokenizer.encode("<|assistant_end|>") == [*b"<|assistant_end|>"]
    data = json.loads(tokenizer_file()) | {"special_tokens": {"<|endoftext|>": 256}}
    assert sample.Tokenizer(data).special("<|bos|>") == 256           # GPT-2 has another name for it
    with pytest.raises(KeyError, match="user_start"):
        sample.Tokenizer(data).special("<|user_start|>")
    with pytest.raises(KeyError, match="python_start"):
        sample.Tool(sample.Tokenizer(data), add)


def test_the_result_of_a_call_comes_after_it_whatever_the_model_draws():
    text = scripted_calls([*b"so ", CALL, *b"12+30", CALLED, *b"xxxx", *b".", ASSISTANT_END, *b"never"])
    assert text.tokens == [*b"so ", CALL, *b"12+30", CALLED, OUTPUT, *b"42", SHOWN, *b"."]
    assert [logprob is None for logprob in text.logprobs] == [False] * 10 + [True] * 4 + [False]
    assert (text.text, text.finish, text.calls.made, text.calls.answered) == ("so 12+3042.", "end", 1, 1)


def test_calls_follow_each_other_and_one_may_begin_again():
    text = scripted_calls([CALL, *b"1+", CALL, *b"1+1", CALLED, *b"xxx", CALL, *b"2", CALLED, *b"xxx", 256])
    assert text.tokens == [CALL, *b"1+", CALL, *b"1+1", CALLED, OUTPUT, *b"2", SHOWN,
                           CALL, *b"2", CALLED, OUTPUT, *b"2", SHOWN]
    assert (text.calls.made, text.calls.answered) == (2, 2)


@pytest.mark.parametrize("script", [[CALL, *b"1+one", CALLED, *b"abc"], [CALL, CALLED, *b"abc"], [CALLED, *b"abc"],
                                    [OUTPUT, *b"42", SHOWN], [CALL, *b"1+1", OUTPUT, *b"abc"], [SHOWN, CALLED]],
                         ids=str)
def test_what_has_no_result_stays_as_the_model_wrote_it(script):
    text = scripted_calls([*script, ASSISTANT_END])
    assert text.tokens == script and text.calls.answered == 0 and None not in text.logprobs


def test_a_result_is_cut_at_the_most_tokens():
    text = scripted_calls([CALL, *b"1+1", CALLED, *b"xxxxxx"], count=6)
    assert (text.tokens, text.finish) == ([CALL, *b"1+1", CALLED, OUTPUT], "length")


def test_without_a_tool_markers_do_nothing():
    script = [CALL, *b"1+1", CALLED, *b"abc", 256]
    text = scripted_calls(script, forcing=False)
    assert (text.tokens, text.calls) == (script[:-1], None)
    with pytest.raises(AssertionError, match="forcing"):
        engine = sample.Engine(Scripted(script, vocab_size=265), 265)
        list(engine.steps([[256]], [(0, 0)], 3, lambda row, token: None))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9, "repetition_penalty": 1.2}], ids=str)
def test_without_a_call_a_tool_changes_nothing(options):
    model, written = random_model(), []
    for forcing in (False, True):
        engine = sample.Engine(model, 257, sample.Draw(**options), 2, 400, forcing=forcing)
        force = (lambda row, token: None) if forcing else None
        written.append(list(engine.steps(PROMPTS, [(0, 1), (2, 3)], 20, force)))
    assert written[0] == written[1]


def test_forced_tokens_are_read_and_the_next_ones_are_those_of_forward():
    """In one row of the batch; the other is as it would be alone."""
    model = random_model()
    engine = sample.Engine(model, 257, sample.Draw(temperature=0), 3, 400, forcing=True)
    queue = {5: 120, 6: 121, 9: 122}                                # token number -> what it must be
    seen = [0, 0]

    def force(row, token):
        seen[row] += 1
        return queue.get(seen[row]) if row == 0 else None
    steps = list(engine.steps(PROMPTS, [(0, 0), (3, 0)], 14, force))
    tokens, logprobs = ([step[part][0] for step in steps] for part in (0, 1))
    likeliest = model(torch.tensor(PROMPTS[0] + tokens))[len(PROMPTS[0]) - 1:-1].argmax(1).tolist()
    assert tokens == [queue.get(n, token) for n, token in enumerate(likeliest)]
    assert [n for n, logprob in enumerate(logprobs) if logprob is None] == [5, 6, 9]
    assert [step[0][1] for step in steps] == write(model, [(3, 0)], count=14, temperature=0)[0][0]
    steps = engine.steps(PROMPTS, [(0, 0)], 9, lambda row, token: 120)
    assert [next(steps)[0][0] for _ in range(3)][1:] == [120, 120]
    steps.close()                                                   # nothing is left of it
    again = list(engine.steps(PROMPTS, [(0, 0)], 3, lambda row, token: None))
    assert [step[0][0] for step in again] == write(model, [(0, 0)], count=3, temperature=0)[0][0]


def test_rows_end_and_call_on_their_own():
    """Of five texts in batches of two some call the tool; each is as it would be alone."""
    model, tokenizer = Scripted((), vocab_size=265), chat_tokenizer()
    table = torch.full((265, 265), -9.0)                            # what follows what: a letter begins a chain
    for chain in ([97, CALL, 49, 43, 50, CALLED, 120], [SHOWN, 33, ASSISTANT_END], [98, 99, 100, 101, ASSISTANT_END],
                  [102, 256], [OUTPUT, 120], [120, 120], [51, 120], [ASSISTANT_END, CALL], [256, CALL]):
        for left, right in zip(chain, chain[1:]):
            table[left, right] = 9
    model.decode = lambda tokens, *_, **__: table[tokens[:, -1:].long()]
    prompts = [[256, letter] for letter in b"abf"]

    def texts(numbers, batch):
        made = [sample.Text(tokenizer, prompt=number) for number in numbers]
        engine = sample.Engine(model, 265, sample.Draw(temperature=0), batch, forcing=True)
        list(sample.generate(engine, prompts, made, 12, (256, ASSISTANT_END), sample.Tool(tokenizer, add)))
        return [(text.tokens, text.finish, text.calls.made) for text in made]       # no calls after the end
    together = texts([0, 1, 2, 0, 1], 2)
    assert together == [texts([number], 1)[0] for number in (0, 1, 2, 0, 1)]
    assert together[0] == ([CALL, *b"1+2", CALLED, OUTPUT, *b"3", SHOWN, *b"!"], "end", 1)
    assert [calls for *_, calls in together] == [1, 0, 0, 1, 0]


# -----------------------------------------------------------------------------
# CPU threads

@pytest.fixture
def timed(monkeypatch):
    """Function (seconds of a step by number of threads, most, given) -> (threads that are set, sentence, calls)."""
    before = torch.get_num_threads()
    now, set_to, calls = [0.0], [before], []
    monkeypatch.setattr(sample.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: set_to.append(threads))

    def choose(seconds, most, given=0):
        def run():
            calls.append(set_to[-1])
            now[0] += seconds[set_to[-1]]
        calls.clear()
        sentence = sample.choose_threads(run, most, given)
        return set_to[-1], sentence, calls
    return choose


@pytest.mark.parametrize("seconds, most, expected", [
    ({1: 0.004}, 64, 1), ({1: 0.04, 2: 0.008}, 64, 2),              # so fast that more threads save little
    ({1: 0.04, 2: 0.036}, 2, 1), ({1: 0.04, 2: 0.14}, 2, 1),        # the second: another program holds a core
    ({1: 0.4, 2: 0.21}, 2, 2), ({1: 0.4, 2: 0.21, 3: 0.15}, 3, 3), ({1: 0.4, 2: 0.21, 3: 0.2}, 3, 2),
    ({1: 8, 2: 4, 4: 2, 8: 1, 12: 0.7}, 12, 12), ({1: 8, 2: 4, 4: 3.9}, 64, 2)])
def test_the_fewest_threads_that_are_fast_are_taken(timed, seconds, most, expected):
    threads, sentence, calls = timed(seconds, most)
    assert threads == expected and sentence.startswith(f"CPU threads: {expected} (")
    assert sorted(set(calls)) == sorted(seconds)                    # and no larger number is tried
    assert all(f"{1e3 * time:.1f} ms with {n}" in sentence for n, time in seconds.items())


def test_trying_threads_takes_few_calls(timed):
    assert len(timed({1: 0.015, 2: 0.015}, 2)[2]) == 12
    assert len(timed({1: 9, 2: 9}, 2)[2]) == 4
    assert timed({1: 0.015, 2: 0.2}, 2)[2] == [1] * 6 + [2]         # another program holds a core


def test_threads_that_are_given_are_not_tried(timed):
    assert timed({}, 16, 3) == (3, "", []) and timed({}, 1) == (1, "", [])


def test_the_choice_is_printed_apart_from_the_text(capsys, trained, monkeypatch):
    monkeypatch.setattr(sample, "choose_threads", lambda run, most, given: run() or f"CPU threads: {given}")
    flags = f"--checkpoint={trained}", "--max_tokens=5", "--json", "--device=cpu"
    assert sample.main([*flags, "--threads=7"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["finish"] == "length" and "sample.py: CPU threads: 7\n" in err
    monkeypatch.undo()
    assert run_main(capsys, *flags)[1] == out                       # a step that was tried leaves nothing behind


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


def test_what_training_saves_loads(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *small_flags(data, out_dir=tmp_path, num_iterations=4)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)            # no curve, which takes longer than the steps
    assert train_gpt.main() == 0
    capsys.readouterr()
    folder = sample.find_checkpoint(tmp_path)
    assert folder == sample.resolve_checkpoint(only_folder(tmp_path))
    loaded, _, meta = sample.load_checkpoint(folder, "cpu")
    saved = load_file(folder / "model.safetensors")
    assert loaded.embed.dtype == torch.float32 and torch.equal(loaded.embed, saved["embed"].float())
    assert (meta["script"], meta["step"]) == ("train_gpt", 4) and capsys.readouterr().err == ""     # no note
    assert sample.kept_source(folder, meta) == only_folder(tmp_path) / "train_gpt.py"
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


def test_chat_models_and_base_models_are_told_apart(tmp_path, trained, monkeypatch):
    assert "a chat model" not in sample.load(sample.parse_args([f"--checkpoint={trained}"]))[2]
    for age, (name, chat) in enumerate({"newer": False, "chat": True, "base": False}.items()):
        shutil.copytree(trained.parent.parent, tmp_path / name)
        folder = tmp_path / name / "checkpoint"
        change_meta(folder / trained.name, chat=chat)
        os.utime(folder / "latest", (1e9 - age, 1e9 - age))
    for chat, name in ((None, "newer"), (False, "newer"), (True, "chat")):
        assert sample.find_checkpoint(tmp_path, chat) == tmp_path / name / "checkpoint" / trained.name
    (tmp_path / "newer" / "checkpoint" / trained.name / "meta.json").write_text("{")
    assert sample.find_checkpoint(tmp_path, False).parents[1].name == "base"        # a damaged one is passed over
    shutil.rmtree(tmp_path / "chat")
    assert sample.find_checkpoint(tmp_path, True).parents[1].name == "newer"        # and there the error is seen
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sample.UserError, match=re.escape(f"--out_dir=logs, which is {tmp_path / 'logs'}, has no run")):
        sample.find_checkpoint("logs")
    folder = tmp_path / "base" / "checkpoint" / trained.name
    change_meta(folder, chat=True)
    assert sample.load(sample.parse_args([f"--checkpoint={folder}"]))[2].endswith("a chat model: chat.py talks with it")


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


@pytest.mark.parametrize("sources", [False, True])
def test_a_changed_source_is_noted(capsys, broken, sources):
    """With `sources` the hash of the script alone counts, and source_sha256 is that of several files."""
    kept = broken.parent.parent / "train_gpt.py"
    content = b"# another version"
    said = hashlib.sha256(content).hexdigest()
    change_meta(broken, **({"sources": {"train_gpt.py": said}, "source_sha256": "0" * 64} if sources
                           else {"source_sha256": said}))
    for now, expected in ((None, "--script=PATH"), (b"a third version", "--script=PATH"),
                          (content, shlex.quote(f"--script={kept}"))):
        if now is not None:
            kept.write_bytes(now)
        code, out, err = run_main(capsys, f"--checkpoint={broken}", "--max_tokens=1")
        note, status = err.splitlines()
        assert code == 0 and "note: train_gpt.py has changed" in note and str(broken) in status
        assert note.endswith(f"name the script that made it with {expected}")


def test_no_note_if_the_script_itself_is_the_same(capsys, broken):
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    change_meta(broken, source_sha256="0" * 64, sources={"train_gpt.py": source, "triton_kernels.py": "1" * 64})
    assert "sample.py: note" not in run_main(capsys, f"--checkpoint={broken}", "--max_tokens=1")[2]


@pytest.mark.parametrize("name", ["my_idea", "my idea [2]"])
def test_a_script_that_has_moved_is_named_and_runs_only_then(capsys, broken, name):
    """The line says exactly what to type; the copy in the run folder runs only after that."""
    kept = broken.parent.parent / f"{name}.py"
    kept.write_text((ROOT / "train_gpt.py").read_text() + f"\nopen({str(broken / 'ran')!r}, 'w').close()\n")
    change_meta(broken, script=name, source_sha256=hashlib.sha256(kept.read_bytes()).hexdigest())
    code, out, err = run_main(capsys, f"--checkpoint={broken}")
    assert_refused((code, out, err), "was made by the script", repr(name), "is not beside sample.py", "train_gpt")
    typed = shlex.split(err.split("in the run folder, add ")[1])
    assert typed == [f"--script={kept}"] and not (broken / "ran").exists()
    assert run_main(capsys, f"--checkpoint={broken}", *typed, "--max_tokens=1")[0] == 0
    assert (broken / "ran").exists() and not (broken.parents[1] / "__pycache__").exists()


@pytest.mark.parametrize("make", [
    lambda kept: None, lambda kept: kept.write_text("other text"), lambda kept: kept.mkdir(),
    lambda kept: kept.symlink_to(ROOT / "train_gpt.py")], ids=["absent", "changed", "folder", "link"])
def test_a_script_in_the_run_folder_is_not_named_unless_it_is_the_one(capsys, broken, make):
    kept = broken.parent.parent / "my_idea.py"
    make(kept)
    change_meta(broken, script="my_idea")
    assert_refused(run_main(capsys, f"--checkpoint={broken}"), "name the script that made it with --script=PATH")


@pytest.mark.parametrize("change, parts", [
    (lambda weights: weights.pop("embed"), ["missing embed"]),
    (lambda weights: weights.update(wte=torch.zeros(2)), ["extra wte"]),
    (lambda weights: weights.update(mlp=torch.zeros(2, 3)), ["mlp is F32 (2, 3), not (10, 96, 96)"]),
    (lambda weights: weights.update(gate_bias=weights["gate_bias"].int()), ["gate_bias is I32"]),
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
    ({"config": asdict(CFG) | {"vocab_size": 0}}, "no model can be made from the checkpoint's config"),
    ({"config": asdict(CFG) | {"vocab_size": 10 ** 15}}, "no model can be made from the checkpoint's config"),
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
    ("tokenizer.json", b"{}", "not the tokenizer"), ("model.safetensors", None, "is missing"),
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


def test_scripts_are_imported_from_anywhere_without_a_trace(tmp_path, capsys, monkeypatch):
    """A library's name is no obstacle, and each script gets the companion beside it."""
    path, modules = list(sys.path), {name: sys.modules.get(name) for name in ("json", *sample.COMPANIONS)}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "triton_kernels.py").write_text(f"NAME = {folder!r}")
        (tmp_path / folder / "json.py").write_text("import triton_kernels\nGPT = triton_kernels.NAME")
    monkeypatch.chdir(tmp_path / "one")
    found = [sample.import_script(Path(name), needs=["GPT"]) for name in ("json.py", "../two/json.py")]
    assert [module.GPT for module in found] == ["one", "two"]
    assert sample.import_script(tmp_path / "one" / "json.py", needs=()) is found[0]
    assert capsys.readouterr() == ("", "") and sys.path == path and sys.modules["json"] is json
    kept = {name: module for name, module in modules.items() if module}
    assert {name: sys.modules[name] for name in kept} == kept
    assert not list(tmp_path.rglob("__pycache__"))
    for module in found:
        del sys.modules[module.__name__]
    for name in modules.keys() - kept.keys():                       # other tests import the one in the project
        sys.modules.pop(name, None)


def test_a_script_that_is_interrupted_is_not_half_imported(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("GPT = 1\nraise KeyboardInterrupt")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sample.import_script(script, needs=["GPT"])
    with pytest.raises(sample.UserError, match="is not a Python file"):
        sample.import_script(tmp_path / "notes.txt")


def test_scripts_of_old_records_are_imported_with_what_is_beside_them(capsys):
    folders = sorted(path.parent for path in (ROOT / "records").glob("track_*/*/harness.py"))
    if not folders:
        pytest.skip("no record with a harness.py in this checkout")
    script = sample.import_script(folders[0] / "train_gpt.py")
    assert Path(script.harness.__file__).parent == folders[0] and script.PRESETS["tiny"]
    assert capsys.readouterr() == ("", "")


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
    assert sample.main(["--prompt=é", "--temperature=0", "--threads=1"]) == 0
    whole = f"é{text}\n"
    assert Recorder.shown[:len(whole)] == [whole[:n + 1] for n in range(len(whole))]


@pytest.mark.parametrize("flags, parts", [
    (["--num_samples=0"], ["--num_samples=0"]), (["--num_samples", "two"], ["--num_samples", "two"]),
    (["--num_samples=1000001"], ["--num_samples=1000001", "1000000"]),
    (["--max_tokens=0"], ["--max_tokens=0"]), (["--temperature=-0.5"], ["--temperature=-0.5"]),
    (["--temperature", "-1"], ["--temperature=-1"]), (["--temperature=nan"], ["--temperature=nan"]),
    (["--temperature=inf"], ["--temperature=inf"]), (["--top_k=-1"], ["--top_k=-1"]), (["--top_p=0"], ["--top_p=0"]),
    (["--top_p=1.01"], ["--top_p=1.01"]), (["--top_p=nan"], ["--top_p=nan"]), (["--seed=-1"], ["--seed=-1"]),
    (["--min_p=1.5"], ["--min_p=1.5"]), (["--min_p=-0.1"], ["--min_p=-0.1"]),
    (["--repetition_penalty=0"], ["--repetition_penalty=0"]), (["--batch=0"], ["--batch=0"]),
    (["--threads=-1"], ["--threads=-1"]), (["--checkpoint="], ["--checkpoint", "path is empty"]),
    (["--stop", b"\xff"], ["--stop=", "UTF-8"]), (["--model=gpt2", "--vocab_dir=a"], ["--model=gpt2", "--vocab_dir=a"]),
    (["--stop="], ["--stop=", "empty"]), (["--stop=a", "--stop", ""], ["--stop=", "empty"]),
    (["--prompt=a", "--prompts_file=b"], ["--prompts_file=b", "--prompt"]),
    (["--prompt=a", "--document=b"], ["--document=b", "--prompt"]),
    (["--prompts_file=a", "--document=b"], ["--document=b", "--prompts_file"]),
    (["--model=gpt2", "--checkpoint=a"], ["--model=gpt2", "--checkpoint"]),
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
    (["--top_k=258"], ["--top_k=258", "257"]), (["--prompts_file=no/such"], ["--prompts_file=no/such", "No such file"]),
    (["--script=no/such.py"], ["--script=no/such.py"]), (["--device=cuda"], ["--device=cuda"]),
])
def test_flags_that_do_not_fit_the_model_get_one_line_and_exit_code_2(capsys, trained, flags, parts):
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert_refused(run_main(capsys, f"--checkpoint={trained}", *flags), *parts)


def test_limits_themselves_are_accepted(capsys, trained):
    flags = f"--prompt={'a' * 1500}", "--top_k=257", "--top_p=1", "--min_p=1", "--max_tokens=2", "--batch=1"
    assert run_main(capsys, f"--checkpoint={trained}", *flags)[0] == 0


def test_a_prompt_longer_than_the_models_cache_is_refused(capsys, monkeypatch):
    tokenizer = sample.Tokenizer(json.loads(tokenizer_file()))
    loaded = Scripted(b"abc", longest=20), tokenizer, {"script": "s", "step": 1}
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: loaded)
    monkeypatch.setattr(sample, "find_checkpoint", lambda *_: Path("c"))
    code, out, err = run_main(capsys, "--prompt=" + "a" * 18, "--max_tokens=2")
    assert (code, out, err.splitlines()[1:]) == (2, "", [
        "sample.py: a prompt of 18 tokens and --max_tokens=2 are too much for the model (it has 20 positions); shorten "
        "the prompt or lower --max_tokens"])
    assert run_main(capsys, "--prompt=" + "a" * 17, "--max_tokens=2")[0] == 0


@pytest.mark.parametrize("content, parts", [
    (b"one\n\ntwo\n", ["line 2"]), (b"one\r\n\r\ntwo", ["line 2"]), (b"", ["is empty"]), (b"\n", ["line 1"]),
    (b"a\xff\n", ["is not UTF-8 (byte 1 is invalid)"]), ("né\n".encode("utf-16"), ["it is UTF-16", "as UTF-8"])])
def test_prompts_files_that_are_none_are_refused(capsys, trained, tmp_path, content, parts):
    (tmp_path / "prompts").write_bytes(content)
    assert_refused(run_main(capsys, f"--checkpoint={trained}", f"--prompts_file={tmp_path / 'prompts'}"),
                   tmp_path / "prompts", *parts)


@pytest.mark.parametrize("content, parts", [
    (None, ["No such file"]), (b"", ["is empty"]), (b"a\xff\n", ["is not UTF-8 (byte 1 is invalid)"])])
def test_documents_that_are_none_are_refused(capsys, trained, tmp_path, content, parts):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    done = run_main(capsys, f"--checkpoint={trained}", f"--document={tmp_path / 'text'}")
    assert_refused(done, "--document=", *parts)


def test_a_document_is_one_prompt_with_its_line_ends(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffone\n\ntwo\r\n".encode())
    args = argparse.Namespace(document=tmp_path / "text", prompts_file=None, prompt=None)
    assert sample.read_prompts(args, None) == ["one\n\ntwo\r\n"]


ODD = "\x0b\x0c\x1c\x85\u2028\u2029"                           # str.splitlines ends a line at each


@pytest.mark.parametrize("content, prompts", [
    ("one\ntwo\n", ["one", "two"]), ("one\r\ntwo", ["one", "two"]), ("\ufeffone\r\n", ["one"]),
    ("one\rtwo\n", ["one\rtwo"]), (f"a{ODD}b\n", [f"a{ODD}b"]), ("a\ufeffb\n é \n", ["a\ufeffb", " é "])])
def test_only_line_ends_separate_prompts(tmp_path, content, prompts):
    (tmp_path / "prompts").write_bytes(content.encode())
    args = argparse.Namespace(prompts_file=tmp_path / "prompts", prompt=None, document=None)
    assert sample.read_prompts(args, None) == prompts


def test_paths_may_have_brackets_blanks_and_a_home_folder(capsys, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    logs = tmp_path / "my [lo]gs*"
    (tmp_path / "logs").rename(logs)
    (logs / "run").rename(logs / "r [1] 漢")
    (tmp_path / "prompts [a] b").write_text("x\n")
    flags = "--max_tokens=1", "--prompts_file=~/prompts [a] b"
    expected = run_main(capsys, "--out_dir=~/my [lo]gs*", *flags)
    assert expected[0] == 0 and expected[1].startswith("x")
    assert run_main(capsys, "--checkpoint=~/my [lo]gs*/r [1] 漢", *flags) == expected
    assert run_main(capsys, "--checkpoint", f"{logs}/r [1] 漢/checkpoint/{broken.name}", *flags) == expected


@pytest.mark.parametrize("place", [".", "run/checkpoint"])
def test_several_sampled_vocab_are_named(capsys, broken, place):
    shutil.copytree(broken.parents[1], broken.parents[2] / "other")
    shutil.copytree(broken, broken.parent / "step_000009")
    (broken.parent / "latest").unlink()
    folder = broken.parents[2] / place
    second = "other/checkpoint" if place == "." else "step_000009"
    assert_refused(run_main(capsys, f"--checkpoint={folder}"), f"--checkpoint={folder}", folder / second, "name one")


def test_prompts_of_a_file_are_continued_as_each_alone_in_order(capsys, trained, tmp_path):
    prompts = ["def f(", "é", "class Long(" + "x" * 200]
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n")
    flags = f"--checkpoint={trained}", "--max_tokens=12", "--num_samples=2", "--temperature=1.3", "--json"
    code, out, _ = run_main(capsys, *flags, f"--prompts_file={tmp_path / 'prompts'}", "--batch=4")
    texts = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(text["prompt"], text["seed"]) for text in texts] == [(p, s) for p in prompts for s in (0, 1)]
    alone = [json.loads(line) for p in prompts for line in run_main(capsys, *flags, f"--prompt={p}")[1].splitlines()]
    assert texts == alone


def test_json_and_log_probabilities(capsys, trained):
    flags = f"--checkpoint={trained}", "--max_tokens=9", "--prompt=def ", "--temperature=1.2", "--stop=\n", "--logprobs"
    text, = map(json.loads, run_main(capsys, *flags, "--json")[1].splitlines())
    assert text.keys() == {"prompt", "seed", "text", "finish", "tokens", "logprobs"}
    assert (text["prompt"], text["seed"], text["finish"]) == ("def ", 0, "length")
    assert text["text"] == bytes(text["tokens"]).decode(errors="replace")
    tokens = [256, *b"def ", *text["tokens"]]
    logits = sample.load_checkpoint(trained, "cpu")[0](torch.tensor(tokens))[4:-1]
    expected = logits.log_softmax(1).gather(1, torch.tensor(text["tokens"])[:, None])[:, 0].tolist()
    assert text["logprobs"] == pytest.approx(expected, abs=1e-4)
    whole, *lines = run_main(capsys, *flags)[1].split("\n")[:-1]     # and for people
    assert whole == f"def {text['text']}"
    assert [float(line.split()[0]) for line in lines] == pytest.approx(expected, abs=1e-4)


def test_benchmark_ends_with_its_figures_as_json(capsys, trained):
    code, out, _ = run_main(capsys, f"--checkpoint={trained}", "--benchmark", "--max_tokens=3")
    *table, last = out.splitlines()
    figures = json.loads(last)
    assert code == 0 and [row["batch"] for row in figures["batches"]] == [1, 8, 64]
    weights = 4 * sample.load_checkpoint(trained, "cpu")[0].matmul_parameters
    for line, row in zip(table[-3:], figures["batches"]):
        assert line.split()[0] == str(row["batch"]) and f"{row['step_ms']:.3f} ms" in line
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1000)
        # two layers with long and two with short windows; keys and values in fp32 of 128 + 3 // 2 tokens, or of 97
        assert row["read_mb"] * 1e6 == pytest.approx(weights + row["batch"] * 4 * 2 * 96 * (2 * 129 + 2 * 97))
        assert row["limit_share"] == pytest.approx(
            row["read_mb"] / 1e3 / figures["copy_gb_per_s"] / (row["step_ms"] / 1e3), rel=1e-6)


def test_model_comes_from_gpt2(capsys, monkeypatch):
    model, asked = Scripted([*b"hi", 256]), []

    def load(*arguments):
        asked.append(arguments)
        return model, tokenizer_file(), {}
    module = SimpleNamespace(load=load, UserError=KeyError)
    monkeypatch.setattr(sample, "import_script", lambda path, *_: {"gpt2.py": module}[path.name])
    assert run_main(capsys, "--model=gpt2-xl", "--prompt=Oh ")[:2] == (0, "Oh hi\n")
    assert asked == [("gpt2-xl", "cpu", "fp32")]
    module.load = lambda *_: {}["no such model"]
    assert_refused(run_main(capsys, "--model=none"), "no such model")


def test_help_lists_every_flag_and_its_default():
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("checkpoint", "model", "prompt", "prompts_file", "document", "num_samples", "max_tokens",
                 "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "logprobs", "json",
                 "batch", "benchmark",
                 "compile", "device", "precision", "threads", "script", "vocab_dir", "out_dir"):
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


def test_the_locale_changes_nothing(trained, tmp_path):
    """C without Python's UTF-8 mode, a MPLBACKEND that does not exist, names and prompts beyond ASCII."""
    run = tmp_path / "漢 [1]"
    shutil.copytree(trained.parents[1], run)
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "nonsense"}
    env.pop("PYTHONIOENCODING", None)
    process = start(f"--checkpoint={run}", "--prompt=é漢", "--stop=漢", "--max_tokens=3", "--device=cpu", env=env)
    out, err = process.communicate()
    assert process.returncode == 0 and out.decode().startswith("é漢"), err
    assert b"Traceback" not in err


def test_an_argument_of_another_locale_is_read_as_utf8():
    assert sample.parse_args(["--prompt", "é".encode().decode("ascii", "surrogateescape")]).prompt == "é"


@pytest.mark.parametrize("terminal, variable, expected", [
    (True, "", "é漢?"), (False, "", "é漢😀"), (False, "gbk", "é漢?")])
def test_stdout_is_utf8_unless_it_is_a_terminal_or_told_otherwise(monkeypatch, terminal, variable, expected):
    stream = io.BytesIO()
    out = io.TextIOWrapper(stream, encoding="gbk")
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("PYTHONIOENCODING", variable)
    sample.prepare_stdout()
    print("é漢😀", end="", flush=True)
    assert stream.getvalue() == expected.encode("utf-8" if expected.endswith("😀") else "gbk")


@pytest.mark.parametrize("module, function", [("sample", "sample"), ("evaluate", "evaluate")])
def test_a_reader_that_leaves_is_no_error(module, function):
    code = (f"import sys; sys.path.insert(0, sys.argv[1]); import {module}\n"
            "def endless(args):\n"
            "    while True: print('text', flush=True)\n"
            f"{module}.{function} = endless; sys.exit({module}.main([]))")
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


@pytest.mark.parametrize("command", ["sample", "evaluate", "chat", "chat_sft", "chat_rl"])
def test_want_of_memory_is_one_line_and_a_mistake_in_the_code_a_traceback(command, capsys, monkeypatch):
    # data/chat.py has the same name as chat.py
    module = sample.import_script(ROOT / "chat.py", ["main"]) if command == "chat" else importlib.import_module(command)

    def on_a_cpu(argv):
        torch.empty(2**50)

    def on_a_gpu(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    def in_python(argv):
        raise MemoryError

    def mistake(argv):
        torch.zeros(2) @ torch.zeros(3)
    for parse_args in (on_a_cpu, on_a_gpu, in_python):
        monkeypatch.setattr(module, "parse_args", parse_args)
        assert module.main([]) == 2
        assert re.fullmatch(rf"{command}\.py: the memory is used up [^\n]+\n", capsys.readouterr().err)
    monkeypatch.setattr(module, "parse_args", mistake)
    with pytest.raises(RuntimeError, match="size"):
        module.main([])
