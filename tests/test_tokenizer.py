"""data/tokenizer.py: vocabularies are those that BPE gives, other programs read them the same way, and nothing is lost.

Proves: the tokens are those of a plain BPE; SuperBPE's go on from there and cross single spaces only; the same text
gives the same files bit for bit, whatever the order of files, the number of threads and the hash seed; a sample does
not depend on the order of its text; nine special tokens come last; text.py and sample.py take the result; the figures
of the report are right; a mistake gets one line and leaves no file.
Against: a BPE of a few lines, the tokenizers package reading the exported file, a count by hand, planted files.
Run: python -m pytest tests/test_tokenizer.py (one test needs ../shared/data and skips without it)
"""
import base64
import hashlib
import json
import lzma
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tiktoken")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "tokenizer.py"
SHARED = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import sample  # noqa: E402
import text  # noqa: E402
import tokenizer  # noqa: E402

WORDS = ("the of and in to a is that for it was on are as with his they be at one have this from or had by hot word but "
         "what some we can out other were all there when up use your how said an each she Größe naïve 東京 don't").split()
PHRASES = ["one of the", "at the", "it was not for", "there can be", "all of this", "as it is", "when they had"]
WORDS += ["".join(random.Random(i).choices("ba ne ri to lu sha men ders tion qui".split(), k=3)) for i in range(150)]
STRANGE = list(" \n\t\r.,!?-_='\"aABsé東😀ſ0123456789\u00a0\u2028\u0085") + ["  ", "\n\n", " the", "don't", "I'LL"]
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
           "<|python_end|>", "<|output_start|>", "<|output_end|>"]


def sentences(count, seed):
    """Texts of a few sentences, in which some words are more frequent than others and often follow each other."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) for i in range(len(WORDS))]
    texts = []
    for _ in range(count):
        words = rng.choices(WORDS, weights, k=rng.randint(5, 60)) + rng.choices(PHRASES, k=rng.randint(1, 20))
        rng.shuffle(words)
        words = [word + rng.choices(["", ",", ".\n", " 1234", "()"], [12, 1, 1, 1, 1])[0] for word in words]
        texts.append(" ".join(words))
    return texts


TEXTS = sentences(1500, seed=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with the texts, in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("a", TEXTS[:700]), ("b", TEXTS[700:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """name -> output folder: a plain vocabulary, one with GPT-2's pattern, and one whose tokens cross words."""
    folders = {}
    for name, flags in (("plain", []), ("gpt2", ["--pattern=gpt2"]), ("super", ["--superbpe=330", "--digits=3"])):
        folders[name] = tmp_path_factory.mktemp(name) / "new" / "folder"
        tokenizer.main([str(corpus), "--vocab_size=450", f"--out={folders[name]}", "--hf", *flags])
    return folders


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """GPT-2's vocabulary is not at hand, whatever the machine has."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nowhere"))


def spec_of(folder):
    return json.loads((folder / "tokenizer.json").read_text())


def tokens_of(folder):
    """The tokens as bytes, in the order of ids."""
    return [base64.b64decode(rank) for rank in spec_of(folder)["ranks"]]


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# Patterns


def test_both_readers_allow_the_same_patterns():
    assert sample.PATTERNS == text.PATTERNS and len(set(text.PATTERNS)) == 8
    assert set(sample.JOINED_PATTERNS) == {text.gpt4_pattern(digits, joined=True) for digits in (1, 2, 3)}


@pytest.mark.parametrize("written, plain, joined", [
    ("the old house", "the| old| house", "the old house"), ("the  old", "the| | old", None),
    ("don't STOP'S", "don|'t| STOP|'S", None), ("a 12345b", "a| |12|34|5|b", None),
    ("x = [1];\n\n  y", "x| =| [|1|];\n\n| | y", None), ("so, we go.\nYes we do", "so|,| we| go|.\n|Yes| we| do",
                                                         "so|,| we go|.\n|Yes we do"),
    ("(of it", "(of| it", "(of it"), ("end \n \n", "end| \n \n", None), ("한국 사람", "한국| 사람", "한국 사람")])
def test_where_a_text_is_split(written, plain, joined):
    for pattern, expected in ((text.gpt4_pattern(2), plain), (text.gpt4_pattern(2, True), joined or plain)):
        pieces = [piece for piece, _ in tokenizer.split_by(pattern).pre_tokenize_str(written)]
        assert pieces == expected.split("|")


# -----------------------------------------------------------------------------
# Learning


def plain_bpe(words, merges):
    """The pairs of bytes that BPE merges in a Counter of words; of equally frequent ones that with the lower ids."""
    letters = sorted(tokenizer.LETTER_OF, key=tokenizer.LETTER_OF.get)
    ids = {bytes([byte]): i for i, byte in enumerate(letters)}
    words = {word: [bytes([byte]) for byte in word] for word in words}, words
    for _ in range(merges):
        pairs = Counter()
        for word, parts in words[0].items():
            for pair in pairwise(parts):
                pairs[pair] += words[1][word]
        left, right = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids[left + right] = len(ids)
        yield left + right
        for parts in words[0].values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i:i + 2] = [left + right]
                i += 1


def test_tokens_are_those_of_plain_bpe(made):
    pieces = Counter(piece.encode() for line in TEXTS
                     for piece, _ in tokenizer.split_by(text.gpt4_pattern(2)).pre_tokenize_str(line))
    expected = list(plain_bpe(pieces, 100))
    assert tokens_of(made["plain"])[:356] == [*(bytes([byte]) for byte in range(256)), *expected]


def test_the_second_step_goes_on_where_the_first_ended(made):
    tokens = tokens_of(made["super"])
    assert len(tokens) == 450 - 9 and len(set(tokens)) == len(tokens)
    assert not any(re.search(rb"\w \w", token) for token in tokens[:330])
    joined = [token.decode() for token in tokens[330:] if b" " in token[1:]]
    assert len(joined) > 15
    for token in joined:                 # nothing but words and single spaces
        assert re.fullmatch(r"[^\r\n\w]?[^\W\d_]+( [^\W\d_]+)* ?", token), token
    assert max(token.strip().count(" ") for token in joined) >= 2


def test_pieces_are_written_in_the_tokens_of_the_first_step(made):
    """Each piece of the joined pattern becomes the ids that the first vocabulary gives it alone."""
    pattern, tokens = text.gpt4_pattern(3, joined=True), tokens_of(made["super"])[:330]
    splitter = tokenizer.split_by(pattern)
    first = sample.Tokenizer(json.loads(tokenizer.describe("", text.gpt4_pattern(3), tokens)))
    encoder = text.Encoder(tokenizer.describe("", text.gpt4_pattern(3), tokens))
    rng = random.Random(1)
    for line in [*TEXTS[:50], *("".join(rng.choices(STRANGE, k=80)) for _ in range(50))]:
        letters = tokenizer.as_letters(line, encoder, splitter)
        ids = [[ord(letter) - tokenizer.FIRST_LETTER for letter in word] for word in letters.split(" ")]
        assert ids.pop() == []
        assert ids == [first.encode(piece) for piece, _ in splitter.pre_tokenize_str(line)]


def test_a_longer_vocabulary_begins_with_a_shorter_one(corpus, made, tmp_path):
    tokenizer.main([str(corpus), "--vocab_size=400", f"--out={tmp_path}"])
    assert tokens_of(tmp_path) == tokens_of(made["plain"])[:400 - 9]


# -----------------------------------------------------------------------------
# The same everywhere


@pytest.mark.parametrize("name", ["plain", "gpt2", "super"])
def test_the_tokenizers_package_gives_the_same_ids(name, made):
    own = sample.Tokenizer(spec_of(made[name]))
    other = tokenizers.Tokenizer.from_file(str(made[name] / "huggingface" / "tokenizer.json"))
    rng = random.Random(0)
    texts = sentences(400, seed=1) + ["".join(rng.choices(STRANGE, k=rng.randint(1, 200))) for _ in range(600)]
    encoded = [encoding.ids for encoding in other.encode_batch(texts)]
    assert encoded == [own.encode(line) for line in texts]
    assert other.decode_batch(encoded) == texts
    assert other.get_vocab_size() == own.vocab_size == 450
    assert [other.token_to_id(token) for token in SPECIAL] == list(range(441, 450))


@pytest.mark.skipif(not SHARED.exists(), reason="no development data beside the project")
@pytest.mark.parametrize("flags", [[], ["--superbpe=1500"]])
def test_a_thousand_documents(flags, tmp_path):
    """2,048 tokens, learned from 300 of them, which have the same ids in the tokenizers package."""
    with lzma.open(SHARED / "text" / "val.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(1000))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in texts[:300]))
    tokenizer.main([str(tmp_path / "in.jsonl"), "--vocab_size=2048", f"--out={tmp_path / 'out'}", "--hf", *flags])
    own = sample.Tokenizer(spec_of(tmp_path / "out"))
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "huggingface" / "tokenizer.json"))
    ids = [own.encode(line) for line in texts]
    assert [encoding.ids for encoding in other.encode_batch(texts)] == ids


@pytest.mark.parametrize("name, flags", [("plain", []), ("super", ["--superbpe=330", "--digits=3"])])
def test_the_same_text_gives_the_same_files(name, flags, corpus, made, tmp_path):
    """In another process with one thread, another hash seed and the files in another order."""
    words = [str(corpus / "b.jsonl"), str(corpus / "a.jsonl"), "--vocab_size=450", f"--out={tmp_path / 'x'}", "--hf"]
    done = subprocess.run([sys.executable, SCRIPT, *words, *flags], capture_output=True, text=True, env=os.environ | {
        "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "x") == digests(made[name]) and len(digests(made[name])) == 3


def test_a_sample_does_not_depend_on_the_order():
    rng = random.Random(0)
    texts = [*TEXTS, *TEXTS[:100], "long " * 9000]
    expected = tokenizer.choose_sample(texts, 20_000)
    chars = sum(map(len, expected[0]))
    assert 20_000 <= chars < 20_000 + max(map(len, expected[0])) and len(set(expected[0])) == len(expected[0])
    assert expected[1] == sum(map(len, texts))
    rng.shuffle(texts)
    assert tokenizer.choose_sample(texts, 20_000) == expected
    assert tokenizer.choose_sample(texts, 25_000)[0][:len(expected[0])] == expected[0]      # more of the same order
    everything, _ = tokenizer.choose_sample(texts, 10**9)
    assert sorted(everything) == sorted({*TEXTS, *tokenizer.cut_pieces("long " * 9000)})


def test_long_documents_are_cut_where_words_end():
    for document in ("word " * 5000, "a line\n" * 5000, "x" * 25_000, "\n" + "x" * 25_000, " " + "x" * 25_000, "", "a"):
        pieces = list(tokenizer.cut_pieces(document))
        assert "".join(pieces) == document and max(map(len, pieces)) <= 10_000
        if document[1:2] != "x" and document:
            assert all(piece[-1] in " \n" for piece in pieces[:-1])


# -----------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ["plain", "gpt2", "super"])
def test_the_format(name, made):
    content = (made[name] / "tokenizer.json").read_bytes()
    spec = json.loads(content)
    assert content == text.canonical_json(spec) == text.tokenizer_file_json(made[name] / "tokenizer.json")
    assert sorted(spec) == ["bos_id", "name", "pattern", "ranks", "special_tokens"]
    assert sorted(spec["special_tokens"], key=spec["special_tokens"].get) == SPECIAL
    assert spec["bos_id"] == 441 == spec["special_tokens"]["<|bos|>"] and len(spec["ranks"]) == 441
    assert spec["pattern"] == {"plain": text.gpt4_pattern(2), "gpt2": text.GPT2_PATTERN,
                               "super": text.gpt4_pattern(3, joined=True)}[name]


def test_shards_are_made_with_it(corpus, made, tmp_path):
    manifest = text.build_shards([corpus], tmp_path, tokenizer=str(made["super"] / "tokenizer.json"), val_fraction=0)
    ids = np.fromfile(tmp_path / "train_000000.bin", "<u2")[512:]
    own = sample.Tokenizer(spec_of(made["super"]))
    documents = np.split(ids, np.flatnonzero(ids == own.bos_id))[1:]
    decoded = [b"".join(map(own.token_bytes, document.tolist())).decode() for document in documents]
    assert sorted(decoded) == sorted(TEXTS) and manifest["tokenizer"]["bos_id"] == 441


def test_the_report(corpus, made, tmp_path, capsys, monkeypatch):
    """--report's files are measured and not learned from, also inside the input folder."""
    inside = corpus / "b.jsonl"
    words = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens_of(made["gpt2"]))]
    data = "\n".join(words).encode()
    (tmp_path / "cl100k_base.tiktoken").write_bytes(data)
    monkeypatch.setattr(tokenizer, "CL100K_SHA256", hashlib.sha256(data).hexdigest())
    out = tmp_path / "out"
    tokenizer.main([str(corpus), "--vocab_size=400", f"--out={out}", f"--report={inside}",
                    f"--cl100k={tmp_path / 'cl100k_base.tiktoken'}"])
    report, own = json.loads((out / "report.json").read_text()), sample.Tokenizer(spec_of(out))
    rows = {row["text"]: row for row in report["texts"]}
    assert list(rows) == [*(f"sample: {kind}" for kind in tokenizer.TEXTS), "b.jsonl", "training text"]
    learned_from = {*TEXTS[:700]}
    assert report["characters_learned_from"] == sum(map(len, learned_from))
    code = [tokenizer.TEXTS["code"]]
    for title, texts in (("b.jsonl", {*TEXTS[700:]}), ("training text", learned_from), ("sample: code", code)):
        size, tokens = sum(len(line.encode()) for line in texts), sum(len(own.encode(line)) for line in texts)
        row = rows[title]
        assert row["bytes"] == size and row["tokens"]["own"] == tokens
        assert row["bytes_per_token"]["own"] == pytest.approx(size / tokens, abs=1e-4)
        other = row["tokens"]["cl100k"]
        assert row["gain_percent"] == {"cl100k": pytest.approx(100 * (1 - tokens / other), abs=0.01)}
    used = {token for line in learned_from for token in own.encode(line)}
    assert report["unused_ids"] == sorted({*range(391)} - used) and len(report["unused_ids"]) > 100
    assert report["token_bytes"] == [len(own.token_bytes(token)) for token in range(400)]
    assert report["token_bytes"][-9:] == [0] * 9
    output = capsys.readouterr().out
    assert "GPT-2's vocabulary is not compared" in output
    assert f"{rows['sample: news']['bytes_per_token']['own']:.3f}" in output
    assert output.splitlines()[-1].startswith("next: python ") and "--tokenizer=" in output.splitlines()[-1]


def test_a_text_that_changes_is_noticed(made):
    vocabulary = tokenizer.Vocabulary("own", (made["plain"] / "tokenizer.json").read_bytes())
    assert vocabulary.count(TEXTS[:10]) > 0
    vocabulary.tokens[300] = b"other"
    with pytest.raises(AssertionError, match="a text changes"):
        vocabulary.count(TEXTS)


def test_sample_texts_are_short_and_of_different_kinds():
    assert list(tokenizer.TEXTS) == ["news", "code", "maths", "korean", "science"]
    assert all(250 < len(line) < 1200 for line in tokenizer.TEXTS.values())


# -----------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size=264"], ["--vocab_size=264", "265"]), (["--vocab_size=1e9"], ["invalid int value"]),
    (["--vocab_size=300000"], ["262144"]), (["--digits=4"], ["--digits"]), (["--pattern=(a|a)*b"], ["--pattern"]),
    (["--pattern=gpt2", "--digits=2"], ["--digits is for --pattern=gpt4"]), (["--max_chars=0"], ["--max_chars=0"]),
    (["--pattern=gpt2", "--superbpe=300"], ["--superbpe is for --pattern=gpt4"]),
    (["--superbpe=441", "--vocab_size=450"], ["--superbpe=441", "440"]), (["--superbpe=200"], ["--superbpe=200"]),
    (["--vocab_size=9000"], ["too short", "--vocab_size"]), (["--superbpe=300", "--vocab_size=9000"], ["too short"]),
    (["--cl100k=@/a.jsonl"], ["not cl100k_base.tiktoken"]), (["--cl100k=@/nothing"], ["cannot be read"]),
    (["--vocab_dir=@"], ["--vocab_dir", "vocab.bpe"]), (["--text_column=other"], ["no text", "--text_column"]),
    (["--report=@/nothing"], ["no such file"]), (["--out=--"], ["has no value"]), (["--unknown"], ["--unknown"]),
    (["--report=@"], ["no file to read"])])
def test_a_mistake_gets_one_line_and_leaves_no_file(flags, words, corpus, tmp_path, fast_run):
    flags = [flag.replace("@", str(corpus)) for flag in flags]
    words_given = [str(corpus), "--vocab_size=450", f"--out={tmp_path / 'a' / 'b'}", *flags]
    done = fast_run([sys.executable, str(SCRIPT), *words_given], text=True, cwd=tmp_path, env={
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "nowhere")})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("tokenizer.py: ") and all(word in done.stderr for word in words), done.stderr
    assert not any(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(corpus, made, tmp_path):
    for name, problem in (("train_000000.bin", "holds shards"), ("tokenizer.json", "--force")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(text.InputError, match=problem):
            tokenizer.main([str(corpus), "--vocab_size=450", f"--out={tmp_path / name}"])
        assert (tmp_path / name / name).read_text() == "mine" and len(list((tmp_path / name).iterdir())) == 1
    with pytest.raises(text.InputError, match="not a folder"):
        tokenizer.main([str(corpus), "--vocab_size=450", f"--out={corpus / 'a.jsonl'}"])
    tokenizer.main([str(corpus), "--vocab_size=450", f"--out={tmp_path / 'tokenizer.json'}", "--force"])
    assert tokens_of(tmp_path / "tokenizer.json") == tokens_of(made["plain"])


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        tokenizer.write_files(tmp_path / "a" / "b", {"x": b"1", "c/y": b"2"})
    assert not any(tmp_path.iterdir())
