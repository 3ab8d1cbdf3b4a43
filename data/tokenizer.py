"""Makes a vocabulary of your own from text: `tokenizer.json`, and `report.json` with what it is worth.

    python data/tokenizer.py my.jsonl --vocab_size=32768 --out=data/tok32k
    python data/tokenizer.py my.jsonl --out=data/super32k --superbpe=26000       # tokens may span words
    python data/text.py my.jsonl --tokenizer=data/tok32k/tokenizer.json          # then: shards with it

It reads the files and folders that data/text.py reads. It learns byte pair encoding (BPE) from a random sample of
--max_chars characters, so memory does not grow with the input. Long documents are cut into pieces of at most 10,000
characters first. Pieces are chosen and ordered by their sha256, and identical ones count once. So the same text and
options give the same files, bit for bit.

Nine special tokens always come last: <|bos|>, which begins each document, and eight for conversations. A model that is
trained with such a vocabulary can learn to chat later.

SuperBPE (Liu et al. 2025) learns in two steps: --superbpe=N entries within words, then the others across the spaces
between words. Punctuation, digits and line ends still separate pieces. It needs fewer tokens for the same text.

The table it prints shows the bytes per token on sample texts and on the files of --report, beside those of GPT-2's
vocabulary if that is at hand (--vocab_dir or tiktoken's cache). It never uses the network.
Needs tokenizers, tiktoken, numpy, tqdm.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports needs no traceback

import argparse
import base64
import contextlib
import hashlib
import heapq
import json
import re
import shlex
import sys
import tempfile
import time
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import numpy as np
import text
from text import InputError
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
SMALLEST, LARGEST = 256 + len(SPECIAL_TOKENS), 1 << 18  # --vocab_size; the largest file still fits text.JSON_BYTES
PIECE_CHARS = 10_000  # longer documents are cut, so that one long book cannot be most of a sample
JOINED_CHARS = 30_000_000  # learned from in the second step of SuperBPE: pieces are long, so memory would grow
REPORT_CHARS = 4_000_000  # measured of the training text and of each --report
MIN_COUNT = 2  # a pair of tokens that occurs once is not learned
FIRST_LETTER = 0x10000  # the second step of SuperBPE writes token i as the character FIRST_LETTER + i
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"  # of cl100k_base.tiktoken
CL100K_BYTES = 1 << 22
# How the tokenizers package and GPT-2's files write bytes: visible ones as themselves, the others from chr(256) on.
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
LETTER_OF = {byte: chr(byte) for byte in VISIBLE} | {
    byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*VISIBLE}))}
BYTE_OF = {letter: bytes([byte]) for byte, letter in LETTER_OF.items()}

Sample = namedtuple("Sample", "texts chars read skipped")  # texts: list[str]; chars of them, and of all that was read


# -----------------------------------------------------------------------------
# Text


def cut_pieces(document):
    """Yields the document in pieces of at most PIECE_CHARS characters, cut after a line or else after a space."""
    start = 0
    while len(document) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        cut = max(document.rfind("\n", start, end), 0) or document.rfind(" ", start, end)
        end = cut + 1 if cut > start else end
        yield document[start:end]
        start = end
    yield document[start:]


def choose_sample(documents, limit):
    """(sample, characters read): the pieces with the lowest sha256, at least `limit` characters of them if there are.

    They come in the order of their sha256. So only the set of pieces decides the sample, and not the order in which
    they are read. No more than the sample is held in memory.
    """
    heap, keys, chars, read = [], set(), 0, 0  # the heap has the highest sha256 first
    for document in documents:
        for piece in cut_pieces(document):
            read += len(piece)
            key = int.from_bytes(hashlib.sha256(piece.encode()).digest()[:8], "big")
            if key in keys or chars >= limit and key > -heap[0][0]:
                continue
            heapq.heappush(heap, (-key, piece))
            keys.add(key)
            chars += len(piece)
            while chars - len(heap[0][1]) >= limit:
                key, piece = heapq.heappop(heap)
                keys.remove(-key)
                chars -= len(piece)
    return [piece for _, piece in sorted(heap, reverse=True)], read


def read_sample(sources, limit, text_column, title):
    """The Sample of the Sources of text.py, with a progress bar."""
    skipped = {}

    def documents():
        with tqdm(total=sum(source.size for source in sources), desc=title, unit="B", unit_scale=True, leave=False,
                  disable=None) as bar:
            for size, units in text.plan_tasks(sources, text_column):
                for unit in units:
                    for _, document in text.read_documents(unit, text_column, skipped):
                        yield document
                bar.update(size)
    texts, read = choose_sample(documents(), limit)
    return Sample(texts, sum(map(len, texts)), read, skipped)


def first_chars(texts, limit):
    """Yields texts from the beginning of the list until they have `limit` characters."""
    for piece in texts:
        if limit <= 0:
            return
        yield piece
        limit -= len(piece)


# -----------------------------------------------------------------------------
# Learning


def learn_merges(texts, pre_tokenizers, alphabet, entries):
    """Pairs of strings that BPE merges, in order, a few more than make the alphabet grow to `entries` entries."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import Sequence

    spare = entries // 50 + 50  # two pairs may give the same token
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Sequence(pre_tokenizers)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=entries + spare, min_frequency=MIN_COUNT, initial_alphabet=alphabet, show_progress=False))
    return json.loads(bpe.to_str())["model"]["merges"]


def split_by(pattern):
    """The pre-tokenizer that splits text by a pattern."""
    from tokenizers import Regex, pre_tokenizers
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def add_tokens(tokens, merges, bytes_of, entries):
    """`tokens` and what the merges give (list of bytes), each once, `entries` in all; InputError if there are fewer."""
    known = dict.fromkeys(tokens)
    for left, right in merges:
        if len(known) == entries:
            break
        known[bytes_of(left) + bytes_of(right)] = None
    if len(known) < entries:
        most = len(known) + len(SPECIAL_TOKENS)
        raise InputError(f"the text is too short: it gives a vocabulary of {most:,} tokens at most; give more text or "
                         f"lower --vocab_size")
    return list(known)


def learn_words(texts, pattern, entries):
    """The tokens (bytes) that BPE learns within the pieces of a pattern: 256 single bytes, then what they merge to."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(BYTE_OF)
    merges = learn_merges(texts, [split_by(pattern), ByteLevel(add_prefix_space=False, use_regex=False)], alphabet,
                          entries)
    return add_tokens([bytes([byte]) for byte in range(256)], merges,
                      lambda letters: b"".join(BYTE_OF[letter] for letter in letters), entries)


def learn_across_words(texts, tokens, words, joined, entries):
    """`tokens`, learned with the pattern `words`, and what BPE learns from there within the pieces of `joined`.

    Each piece is written in the tokens that there are, one character a token. So ordinary BPE over characters goes on
    where the first step ended.
    """
    from tokenizers.pre_tokenizers import WhitespaceSplit

    encoder, splitter = text.Encoder(describe("", words, tokens)), split_by(joined)
    letters = [chr(FIRST_LETTER + i) for i in range(len(tokens))]
    merges = learn_merges((as_letters(piece, encoder, splitter) for piece in first_chars(texts, JOINED_CHARS)),
                          [WhitespaceSplit()], letters, entries)
    return add_tokens(tokens, merges, lambda pair: b"".join(tokens[ord(letter) - FIRST_LETTER] for letter in pair),
                      entries)


def as_letters(document, encoder, splitter):
    """The document with each token as one character, and a space after the last token of each piece of `splitter`."""
    raw = document.encode()
    ids = encoder.encode(raw, document)
    ends = np.array([end for _, (_, end) in splitter.pre_tokenize_str(document)], np.int64)
    if len(raw) != len(document):  # from characters to bytes
        codes = np.frombuffer(document.encode("utf-32-le"), "<u4")
        sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
        ends = np.cumsum(sizes)[ends - 1]
    last = np.flatnonzero(np.isin(encoder.ends(ids), ends))
    codes = np.insert(ids.astype("<u4") + FIRST_LETTER, last + 1, ord(" "))
    return codes.tobytes().decode("utf-32-le")


def learn(texts, pattern, digits, superbpe, entries):
    """(name of the pattern, pattern, tokens): the vocabulary (list of bytes) without special tokens."""
    if pattern == "gpt2":
        return "gpt2", text.GPT2_PATTERN, learn_words(texts, text.GPT2_PATTERN, entries)
    words, joined = (text.gpt4_pattern(digits, joined) for joined in (False, True))
    if not superbpe:
        return f"gpt4, {digits} digits", words, learn_words(texts, words, entries)
    tokens = learn_across_words(texts, learn_words(texts, words, superbpe), words, joined, entries)
    return f"gpt4 with joined words, {digits} digits", joined, tokens


# -----------------------------------------------------------------------------
# Files


def describe(name, pattern, tokens):
    """tokenizer.json (bytes) of a vocabulary; its special tokens follow on the tokens."""
    special = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return text.canonical_json({"name": name, "pattern": pattern, "special_tokens": special,
                                "ranks": [base64.b64encode(token).decode() for token in tokens],
                                "bos_id": special[SPECIAL_TOKENS[0]]})


def huggingface_json(tokenizer_json):
    """The file tokenizer.json (bytes) of Hugging Face's tokenizers package for a tokenizer.json of this project.

    tiktoken merges any two neighbours that make a token. So every way to make a token of two others is a merge there,
    and a piece that is a token is taken as it is.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spec = json.loads(tokenizer_json)
    tokens = ["".join(LETTER_OF[byte] for byte in base64.b64decode(rank)) for rank in spec["ranks"]]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))
              if token[:i] in ids and token[i:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split_by(spec["pattern"]), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(spec["special_tokens"], key=spec["special_tokens"].get)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer.to_str().encode()


def check_out_dir(out_dir, force):
    """Raises InputError if the result may not be written to `out_dir`."""
    if os.path.lexists(out_dir) and not out_dir.is_dir():
        raise InputError(f"--out={out_dir}: not a folder; choose another")
    if any(out_dir.glob("*.bin")):
        raise InputError(f"--out={out_dir}: it holds shards, whose tokenizer.json would be replaced; choose another")
    if (out_dir / "tokenizer.json").exists() and not force:
        raise InputError(f"--out={out_dir}: it holds a tokenizer.json; choose another folder, or --force replaces it")


def write_files(out_dir, files):
    """Writes `files` (name -> bytes) into a folder. If writing fails, none of them is there; the last one comes last."""
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=out_dir) as building:
            for name, content in files.items():
                Path(building, name).parent.mkdir(exist_ok=True)
                with open(Path(building, name), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for name in files:
                (out_dir / name).parent.mkdir(exist_ok=True)
                os.replace(Path(building, name), out_dir / name)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


# -----------------------------------------------------------------------------
# Report


class Vocabulary:
    """A tokenizer.json to be measured. name: heading of its column; size: entries with special tokens."""

    def __init__(self, name, tokenizer_json):
        spec = json.loads(tokenizer_json)
        self.name = name
        self.tokens = [base64.b64decode(rank) for rank in spec["ranks"]]
        self.size = len(self.tokens) + len(spec["special_tokens"])
        self.encoder = text.Encoder(tokenizer_json)

    def count(self, documents):
        """How many tokens the documents have; AssertionError unless each is the same after encoding and decoding."""
        total = 0
        for document in documents:
            raw = document.encode()
            ids = self.encoder.encode(raw, document)
            assert b"".join(map(self.tokens.__getitem__, ids.tolist())) == raw, "a text changes when it is encoded"
            total += len(ids)
        return total

    def uses(self, documents):
        """How often each token occurs in the documents, (entries without special tokens,) int64."""
        uses = np.zeros(len(self.tokens), np.int64)
        for document in documents:
            uses += np.bincount(self.encoder.encode(document.encode(), document), minlength=len(uses))
        return uses


def read_cl100k(path):
    """tokenizer.json (bytes) of GPT-4's vocabulary from the file cl100k_base.tiktoken; InputError for another file."""
    try:
        with open(path, "rb") as file:
            data = file.read(CL100K_BYTES)
    except OSError as e:
        raise InputError(f"--cl100k={path}: it cannot be read ({e.strerror}); name the file cl100k_base.tiktoken, or "
                         "leave the flag out") from None
    if hashlib.sha256(data).hexdigest() != CL100K_SHA256:
        raise InputError(f"--cl100k={path}: it is not cl100k_base.tiktoken (its sha256 is another); name that file, or "
                         "leave the flag out")
    return describe("cl100k", text.gpt4_pattern(3), [base64.b64decode(line.split()[0]) for line in data.splitlines()])


def find_baselines(vocab_dir, cl100k):
    """(Vocabularies to compare with, why GPT-2's is not among them or "")."""
    found, why = [], ""
    try:
        found.append(Vocabulary("gpt2", text.gpt2_tokenizer_json(vocab_dir)))
    except LookupError as e:
        if vocab_dir:
            raise InputError(f"--vocab_dir={vocab_dir}: {e}; name a folder with GPT-2's vocab.bpe and encoder.json, or "
                             "leave the flag out") from None
        why = str(e)
    return found + ([Vocabulary("cl100k", read_cl100k(cl100k))] if cl100k else []), why


def measure(vocabularies, texts):
    """A row of the report for each of `texts` (title -> list of texts); the first vocabulary is the new one."""
    rows = []
    for title, documents in texts.items():
        size = sum(len(document.encode()) for document in documents)
        tokens = {vocabulary.name: vocabulary.count(documents) for vocabulary in vocabularies}
        own = tokens[vocabularies[0].name]
        rows.append({"text": title, "bytes": size, "tokens": tokens,
                     "bytes_per_token": {name: round(size / count, 4) for name, count in tokens.items()},
                     "gain_percent": {name: round(100 * (count - own) / count, 2) for name, count in tokens.items()
                                      if name != vocabularies[0].name}})
    return rows


def table(rows):
    """The lines of the table of bytes per token."""
    names = list(rows[0]["tokens"])
    width = max(len(row["text"]) for row in rows)
    heading = f"{'bytes per token':{max(width, 15)}}       bytes  {names[0]:>7}"
    lines = [heading + "".join(f"  {name:>7}     gain" for name in names[1:])]
    for row in rows:
        line = f"{row['text']:{max(width, 15)}}  {row['bytes']:>10,}  {row['bytes_per_token'][names[0]]:7.3f}"
        for name in names[1:]:
            line += f"  {row['bytes_per_token'][name]:7.3f}  {row['gain_percent'][name]:+6.1f}%"
        lines.append(line)
    return lines


def make_report(tokenizer_json, options, sample, reported, baselines):
    """The content of report.json (dict). reported: title -> Sample, of the files of --report."""
    own = Vocabulary("own", tokenizer_json)
    texts = {f"sample: {title}": [document] for title, document in TEXTS.items()}
    texts |= {title: list(first_chars(found.texts, REPORT_CHARS)) for title, found in reported.items()}
    texts["training text"] = list(first_chars(sample.texts, REPORT_CHARS))
    rows = measure([own, *baselines], texts)
    unused = np.flatnonzero(own.uses(sample.texts) == 0).tolist()
    return {"format": 1, "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(), "vocab_size": own.size,
            "options": options, "characters_read": sample.read, "characters_learned_from": sample.chars,
            "vocab_sizes": {vocabulary.name: vocabulary.size for vocabulary in baselines}, "texts": rows,
            "unused_ids": unused,
            "token_bytes": [*map(len, own.tokens), *[0] * len(SPECIAL_TOKENS)]}


def summary(report, sample, missing):
    """The lines that say what was read, the table, and what is unused."""
    lines = [f"{sample.read:,} characters read, {sample.chars:,} learned from"]
    lines += [f"  skipped or repaired: {line}" for line in text.tell(sample.skipped)]
    lines += ["", *table(report["texts"]), "gain: how many percent fewer tokens the new vocabulary needs",
              "every text above is the same after encoding and decoding"]
    if missing:
        lines.append(f"GPT-2's vocabulary is not compared: {missing}; --vocab_dir=FOLDER names one")
    lines.append(f"{len(report['unused_ids']):,} of {report['vocab_size'] - len(SPECIAL_TOKENS):,} tokens do not occur "
                 "in the text they were learned from: they are parts of longer ones, or bytes that it lacks")
    return lines


# -----------------------------------------------------------------------------
# Command line


def fail(message):
    """Prints one line to stderr and ends with exit code 2."""
    print(f"tokenizer.py: {text.one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    """The checked command line as a namespace; a mistake ends in `fail`."""
    parser = argparse.ArgumentParser(prog="tokenizer.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists the options")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="PATH", type=text.path_argument, help="files and folders with the text")
    add("--vocab_size", type=int, default=32_768,
        help="tokens in all, with the 256 single bytes and the nine special ones (default: %(default)s)")
    add("--out", type=text.path_argument, help="folder to write to; default: data/tok<vocab_size>")
    add("--pattern", choices=("gpt4", "gpt2"), default="gpt4",
        help="what no token crosses: the borders of GPT-4's or of GPT-2's pattern (default: %(default)s)")
    add("--digits", type=int, choices=(1, 2, 3), help="at most this many digits in a token, for gpt4 (default: 2)")
    add("--superbpe", type=int, metavar="N", default=0,
        help="tokens learned within words, the single bytes among them; the others may span words. "
             "0: all within words (default)")
    add("--report", type=text.path_argument, metavar="PATH", action="append", default=[],
        help="file or folder to measure on; may be given several times. Its files are not learned from")
    add("--hf", action="store_true",
        help="also write huggingface/tokenizer.json, which Hugging Face's tokenizers package reads")
    add("--max_chars", type=int, default=60_000_000, help="characters to learn from (default: %(default)s)")
    add("--text_column", default="text", help="column of .jsonl and .parquet to read (default: %(default)s)")
    add("--vocab_dir", type=text.path_argument,
        help="folder with GPT-2's vocab.bpe and encoder.json, to compare with; default: tiktoken's cache")
    add("--cl100k", type=text.path_argument, metavar="FILE",
        help="cl100k_base.tiktoken, GPT-4's vocabulary, to compare with")
    add("--force", action="store_true", help="replace the tokenizer.json in --out")
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--.*=--", arg, re.S)]:  # argparse may read it as a list
        fail(f"{empty[0]} has no value")
    args = parser.parse_args(argv)
    check_args(args)
    args.digits = args.digits or 2
    args.out = args.out or HERE / f"tok{args.vocab_size}"
    return args


def check_args(args):
    """Ends in `fail` for a value out of range and for flags that contradict each other."""
    entries = args.vocab_size - len(SPECIAL_TOKENS)
    if not SMALLEST <= args.vocab_size <= LARGEST:
        fail(f"--vocab_size={args.vocab_size}: must be {SMALLEST} (256 bytes and nine special tokens) to {LARGEST}")
    if not 1 <= args.max_chars <= 10**10:
        fail(f"--max_chars={args.max_chars}: must be 1 to {10**10}")
    if args.pattern == "gpt2" and (args.digits or args.superbpe):
        fail(f"--{'digits' if args.digits else 'superbpe'} is for --pattern=gpt4; leave out one of them")
    if args.superbpe and not 256 <= args.superbpe < entries:
        fail(f"--superbpe={args.superbpe}: must be 256 to {entries - 1}, fewer than the {entries} tokens of "
             f"--vocab_size={args.vocab_size}; 0 turns it off")
    if args.out and not text.shown(args.out).isprintable():
        fail(f"--out={args.out}: the name holds characters that cannot be typed; choose another folder")


def find_input(args):
    """(Sources to learn from, title -> Sources to measure); no file is in two of them."""
    finder = text.Finder()
    reported = {}
    for path in args.report:
        finder.add(path)
        title = text.one_line(text.label(path))
        reported.setdefault(title, []).extend(finder.take([path]))
    for path in args.inputs:
        finder.add(path)
    sources = finder.take(args.inputs)
    for line in text.tell(finder.left_out) + text.tell(finder.folders):
        print(f"  left out: {line}")
    return sources, reported


def main(argv=None):
    args = parse_args(argv)
    check_out_dir(args.out, args.force)
    baselines, missing = find_baselines(args.vocab_dir, args.cl100k)
    sources, reported = find_input(args)
    sample = read_sample(sources, args.max_chars, args.text_column, "reading")
    reported = {title: read_sample(found, REPORT_CHARS, args.text_column, title) for title, found in reported.items()}
    for title, found in (*reported.items(), ("the input", sample)):
        if not found.chars:
            raise InputError(f"{title} holds no text ({'; '.join(text.tell(found.skipped)) or 'empty'}); name other "
                             "files, or the right --text_column")
    start = time.perf_counter()
    print(f"learning {args.vocab_size:,} tokens from {sample.chars:,} characters", flush=True)
    pattern_name, pattern, tokens = learn(sample.texts, args.pattern, args.digits, args.superbpe,
                                          args.vocab_size - len(SPECIAL_TOKENS))
    print(f"learned in {time.perf_counter() - start:.1f} s", flush=True)
    name = f"{args.pattern}{'_super' * bool(args.superbpe)}_{args.vocab_size}"
    tokenizer_json = describe(name, pattern, tokens)
    options = {"pattern": pattern_name, "superbpe": args.superbpe, "max_chars": args.max_chars,
               "tokenizers_version": version("tokenizers")}
    report = make_report(tokenizer_json, options, sample, reported, baselines)
    files = {"report.json": text.canonical_json(report)}
    if args.hf:
        files["huggingface/tokenizer.json"] = huggingface_json(tokenizer_json)
    write_files(args.out, files | {"tokenizer.json": tokenizer_json})
    print("\n".join(summary(report, sample, missing)))
    print(text.one_line(f"wrote {text.shown(args.out)}/: tokenizer.json, {', '.join(files)}"))
    words = [*map(text.shown, args.inputs), f"--tokenizer={text.shown(args.out / 'tokenizer.json')}"]
    print("next: python " + " ".join(shlex.quote(text.one_line(word)) for word in
                                      (text.shown(HERE / "text.py"), *words)))


# -----------------------------------------------------------------------------
# Texts of different kinds to measure on. They were written for this file and are part of no training set.

TEXTS = {
    "news": """\
The city council voted on Tuesday to keep the old harbour ferry running for another five years, after weeks of protest
from residents of the northern islands. "For many of us this is not a trip, it is the way to school, to work and to the
doctor," said Maria Olsen, 54, who has crossed the bay almost every morning since 1989. The new contract will cost about
$12.4 million a year, some 8% more than the last one, and most of the difference will be paid by the region. Officials
said that ticket prices would not rise before the autumn of 2027. A bridge, first proposed in the 1970s, remains too
expensive: engineers now put its cost at 1.9 billion. The ferry company, which employs 140 people, welcomed the decision
and promised two electric boats by the end of next year. Opponents on the council called the vote a missed chance.
""",
    "code": '''\
class Inventory:
    """Counts the items of a shop."""

    def __init__(self, path=None, limit=1000):
        self.items = {}
        self.limit = limit
        if path is not None:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    name, _, count = line.strip().partition(",")
                    if not count.isdigit():
                        raise ValueError(f"line {number}: {count!r} is not a number")
                    self.add(name, int(count))

    def add(self, name, count=1):
        total = self.items.get(name, 0) + count
        if total > self.limit:
            return False
        self.items[name] = total
        return True


for (int i = 0; i < n; i++) {
    if (values[i] != NULL && strcmp(values[i]->key, key) == 0) {
        return values[i]->data;   // found
    }
}
''',
    "maths": r"""
\begin{theorem}
Let $f\colon [a,b] \to \mathbb{R}$ be continuous and let $F(x) = \int_a^x f(t)\,dt$. Then $F$ is differentiable on
$(a,b)$ and $F'(x) = f(x)$.
\end{theorem}
\begin{proof}
For $h > 0$ we have
\[ \left| \frac{F(x+h) - F(x)}{h} - f(x) \right| = \left| \frac{1}{h} \int_x^{x+h} \bigl( f(t) - f(x) \bigr)\,dt \right|
   \le \max_{x \le t \le x+h} |f(t) - f(x)|, \]
and the right-hand side tends to $0$ as $h \to 0$, since $f$ is continuous. The case $h < 0$ is the same.
\end{proof}
For example, $\sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}$, so that $\int_0^1 x^2\,dx = \frac{1}{3} \approx 0.3333$.
""",
    "korean": """\
오늘 아침 시장에는 일찍부터 사람들이 모여들었다. 비가 그친 뒤라 공기는 맑았고, 바다에서 불어오는 바람은 아직 조금 차가웠다.
생선을 파는 할머니는 웃으면서 손님에게 값을 깎아 주었고, 옆 가게에서는 갓 구운 빵 냄새가 골목 끝까지 퍼졌다. 나는 사과 세 개와
따뜻한 두유를 사서 작은 의자에 앉아 지나가는 사람들을 바라보았다. 학교에 가는 아이들은 서로 이름을 부르며 뛰어갔고, 자전거를 탄
우체부는 천천히 언덕을 올라갔다. 이 도시에 온 지 벌써 삼 년이 되었지만, 이런 아침은 언제나 새롭게 느껴진다.
""",
    "science": """\
Coral reefs cover less than 1% of the ocean floor, yet they shelter about a quarter of all marine species. When the
temperature of the water stays 1 to 2 degrees Celsius above the usual summer maximum for several weeks, the polyps expel
the photosynthetic algae (zooxanthellae) that live in their tissue, a process known as bleaching. We measured the
chlorophyll fluorescence of 36 colonies of Acropora millepora before, during and after a heat wave, together with the
concentration of dissolved oxygen and the pH of the surrounding water. Colonies that had been exposed to moderate stress
two years earlier kept 64% of their symbionts, compared with 41% in the control group (p < 0.01). These results suggest
that acclimatization, rather than selection alone, contributes to thermal tolerance, although the mechanism, possibly
the expression of heat-shock proteins or a change in the community of bacteria, remains to be determined.
""",
}

if __name__ == "__main__":
    text.run_command(main, fail, "nothing was written")
