"""Text from a trained model. It continues a prompt with the newest checkpoint, or with the one you name.

    python sample.py                                            # the newest checkpoint under logs/
    python sample.py --prompt="The old house" --num_samples=3
    python sample.py --checkpoint=logs/<run>/checkpoint/step_000900 --temperature=0
    python sample.py --prompts_file=prompts.txt --json --logprobs
    python sample.py --document=long.txt                        # continues the text of a file
    python sample.py --benchmark --compile                      # measures the speed
    python sample.py --checkpoint=logs/<run> --export_hf=DIR    # writes the model for Hugging Face's transformers

A checkpoint holds numbers and plain JSON. Its meta.json names the training script that made it. That script must be one
of the train_*.py files in the folder of sample.py. Other code runs only if you name it with --script=PATH.

The same seed gives the same text, whatever else is in the batch. (It does so on the same kind of machine with the same
number of threads, up to rounding.) docs/evaluation.md says more.
"""
import argparse
import base64
import codecs
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

# PyTorch takes seconds to import, so only the functions that need it import it: --help and errors come at once.

HERE = Path(__file__).resolve().parent
FORMAT = 1                               # of meta.json
# The largest files that are read, in bytes.
META_BYTES = 1 << 20
TOKENIZER_BYTES = 1 << 24
SCRIPT_BYTES = 1 << 24
LATEST_BYTES = 256
PROMPTS_BYTES = 1 << 26
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

def gpt4_pattern(digits: int, joined: bool = False) -> str:
    """GPT-4's pattern with at most `digits` digits in a piece. joined: words with one space between are one piece."""
    words = r"[^\r\n\p{L}\p{N}]?+\p{L}++" + r"(?: \p{L}++)*+" * joined
    return (r"'(?:[sdmtSDMT]|[lL]{2}|[vV][eE]|[rR][eE])|" + words + rf"|\p{{N}}{{1,{digits}}}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")

JOINED_PATTERNS = tuple(gpt4_pattern(digits, joined=True) for digits in (1, 2, 3))
# The ways in which the tokenizers of this project split text, as in data/text.py. Other patterns are refused: a regular
# expression can be written so that it never ends, and the engine behind tiktoken then ends the process.
PATTERNS = ("", GPT2_PATTERN, *(gpt4_pattern(digits) for digits in (1, 2, 3)), *JOINED_PATTERNS)
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"  # of its tokenizer.json
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"         # of GPT-2's encoder.json
ENCODER_CACHE_NAME = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"     # how tiktoken's cache names it: sha1 of its address
PIECE_CHARACTERS = 1_000_000             # encoded at one time; tiktoken's stack ends at 3 million blanks
COMPANIONS = ("harness", "triton_kernels")                          # modules that training scripts have beside them
TRAIN_FIRST = "train one with ./run.sh or python train_gpt.py --preset=tiny"
CHOOSE_ANOTHER = "choose another checkpoint with --checkpoint="
BYTES_PROMPT, WORDS_PROMPT = "def ", "The"                          # the tiny preset learns Python from bytes

class UserError(Exception):
    """A mistake that the user can correct. The text names the thing, the value and the remedy; the exit code is 2."""

    def __str__(self):
        line = one_line(super().__str__())
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"

def one_line(text: str) -> str:
    """The text in one line that is safe to show on a terminal: "?" stands for what cannot be printed."""
    line = re.sub(r"[^\S ]+", " ", text)
    return "".join(letter if letter.isprintable() else "?" for letter in line)

def lacks_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a CPU or a GPU is used up."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"        # PyTorch's, on a GPU
            or isinstance(error, RuntimeError) and "to allocate" in str(error))

# -----------------------------------------------------------------------------
# Command line

def command_line(argv: list[str] | None) -> list[str]:
    """The arguments, by default of this process; raises UserError for --name=--, which argparse misreads."""
    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        if re.fullmatch("--.*=--", argument, re.S):
            raise UserError(f"{argument} has no value; --help lists the flags")
    return argv

def path_flag(text: str) -> Path:
    """The path that a flag gives. ~ is the home folder, which shells leave alone in --name=~/folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))

def text_flag(name: str, text: str) -> str:
    """The text that a flag gives; raises UserError if it is not text.

    Python holds the bytes of an argument that the locale cannot read as surrogates. They are UTF-8 in most cases.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise UserError(f"--{name}={ascii(text)} is not UTF-8; give it as UTF-8 text") from None

def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser that raises UserError for a bad command line."""
    parser = argparse.ArgumentParser(prog=program, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=description, allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{message}; --help lists the flags")
    parser.error = refuse
    return parser

def add_model_flags(add, program: str):
    """Adds the flags that say how and where a model runs, the same for sample.py and evaluate.py."""
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto",
        help="(default: cuda if there is a GPU, else cpu)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="(default: bf16 on cuda, else fp32)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: try 1, 2, 4, ... and take the fastest "
        "(default: %(default)s)")
    add("--script", type=path_flag, metavar="PATH", help="run this training script to build the model; default: the "
        f"script of the same name in the folder of {program}")
    add("--vocab_dir", type=path_flag, metavar="FOLDER", help="folder with GPT-2's encoder.json and vocab.bpe, for a "
        "checkpoint that has no tokenizer.json; default: the cache of tiktoken")
    add("--out_dir", type=path_flag, default=Path("logs"), metavar="FOLDER", help="folder with the runs (default: "
        "%(default)s)")

def add_drawing_flags(add):
    """Adds the flags that say how tokens are drawn and where a text ends."""
    add("--max_tokens", type=int, default=400, metavar="N", help="longest text, in tokens after the prompt; a text "
        "ends sooner if the model ends the document (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1: likely tokens become likelier; above 1: the text is "
        "more surprising; 0: always the likeliest token (default: %(default)s)")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0: from all (default: "
        "%(default)s)")
    add("--top_p", type=float, default=0.95, metavar="P", help="draw from the likeliest tokens that together have "
        "probability P; 1: from all (default: %(default)s)")
    add("--min_p", type=float, default=0.0, metavar="P", help="draw from tokens that are at least P times as likely as "
        "the likeliest; 0: from all (default: %(default)s)")
    add("--repetition_penalty", type=float, default=1.0, metavar="R", help="make tokens of the prompt and the text "
        "less likely: divide positive logits by R and multiply negative ones by it; 1: off (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the text before TEXT; may be given several "
        "times (default: none)")
    add("--seed", type=int, default=0, help="seed of the first text of each prompt; the second text has the next seed "
        "(default: %(default)s)")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as possible without a model; raises UserError."""
    parser = make_parser("sample.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=path_flag, metavar="FOLDER", help="a checkpoint (step_...), or a run, whose latest "
        "checkpoint is taken; default: the newest run in --out_dir")
    add("--prompt", metavar="TEXT", help=f"text to continue; default: {BYTES_PROMPT!r} for a model that reads bytes, "
        f"like the tiny preset, and {WORDS_PROMPT!r} for others")
    add("--prompts_file", type=path_flag, metavar="FILE", help="UTF-8 file with one prompt a line; default: only "
        "--prompt")
    add("--document", type=path_flag, metavar="FILE", help="UTF-8 file whose whole text is the prompt, which may be "
        "long; default: only --prompt")
    add("--num_samples", type=int, default=1, metavar="N", help="number of texts for each prompt (default: "
        "%(default)s)")
    add_drawing_flags(add)
    add("--logprobs", action="store_true", help="also print the log-probability of each token, without temperature "
        "and filters (default: off)")
    add("--json", action="store_true", help="print one JSON object a line for each text, and nothing else (default: "
        "off)")
    add("--batch", type=int, default=64, metavar="N", help="number of texts made at the same time (default: "
        "%(default)s)")
    add("--benchmark", action="store_true", help="print no text, but speed and memory for 1, 8 and 64 texts at a time; "
        "the last line is JSON (default: off)")
    add("--compile", action="store_true", help="compile a step with torch.compile; this takes about a minute at the "
        "start (default: off)")
    add("--model", metavar="NAME", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with such a model, instead "
        "of a checkpoint (default: none)")
    add("--export_hf", type=path_flag, metavar="FOLDER", help="print no text, but write the model to a new folder in "
        "the layout of Hugging Face's transformers, in fp32; for checkpoints of train_gpt_simple.py that were trained "
        "with --mlp=swiglu (default: none)")
    add_model_flags(add, "sample.py")
    args = parser.parse_args(command_line(argv))
    check_args(args)
    return args

def check_args(args: argparse.Namespace):
    """Reads the texts of the flags as UTF-8; raises UserError for a value out of range."""
    def need(good, name, remedy):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} {remedy}")
    need(1 <= args.num_samples <= 1_000_000, "num_samples", "must be between 1 and 1000000")
    need(args.max_tokens >= 1, "max_tokens", "must be at least 1")
    need(0 <= args.temperature < math.inf, "temperature", "must be 0 or a positive number")
    need(args.top_k >= 0, "top_k", "must be 0 (all tokens) or a positive number")
    need(0 < args.top_p <= 1, "top_p", "must be above 0 and at most 1")
    need(0 <= args.min_p <= 1, "min_p", "must be between 0 and 1")
    need(0 < args.repetition_penalty < math.inf, "repetition_penalty", "must be a positive number")
    need("" not in args.stop, "stop", "contains an empty text, which would end every text at once; give it some text")
    need(0 <= args.seed < 1 << 63, "seed", "must be between 0 and 2^63 - 1")
    need(args.batch >= 1, "batch", "must be at least 1")
    need(0 <= args.threads <= 1024, "threads", "must be 0 (chosen by trying) or a number up to 1024")
    need(args.prompt != "", "prompt", "is empty; give it some text, or leave the flag out")
    need(args.prompt is None or not args.prompts_file, "prompts_file", "and --prompt are both given; give one of them")
    for name in ("prompt", "prompts_file"):
        need(getattr(args, name) is None or not args.document, "document", f"and --{name} are both given; give one of "
             "them")
    for name in ("checkpoint", "script", "vocab_dir"):
        need(not args.model or not getattr(args, name), "model", f"and --{name}={getattr(args, name)} are both given, "
             f"but --{name} is for checkpoints; give one of them")
    text_flags = "model", "prompt", "prompts_file", "document", "json", "logprobs", "benchmark"
    for name in text_flags if args.export_hf else ():
        need(not getattr(args, name), "export_hf", f"prints no text, so --{name} has no use; leave one of them out")
    if args.prompt is not None:
        args.prompt = text_flag("prompt", args.prompt)
    args.stop = [text_flag("stop", text) for text in args.stop]

# -----------------------------------------------------------------------------
# Files of a checkpoint

def check_plain(path: Path):
    """Raises UserError unless the path is a file. A link is refused: all of a checkpoint is in its folder."""
    if path.is_symlink():
        raise UserError(f"{path} is a link; put the file itself there")
    if not path.is_file():
        raise UserError(f"{path} is missing; {CHOOSE_ANOTHER}, or {TRAIN_FIRST}")

def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; raises UserError."""
    check_plain(path)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {CHOOSE_ANOTHER}") from None
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit} bytes, which is too large for such a file; {CHOOSE_ANOTHER}")
    return content

def read_json(path: Path, content: bytes) -> dict:
    """The JSON object in `content`, read from `path`; raises UserError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; {CHOOSE_ANOTHER}")
    return value

def follow_latest(folder: Path) -> Path:
    """The checkpoint that the file `latest` in `folder` names; raises UserError unless it names a folder beside it."""
    content = read_file(folder / "latest", LATEST_BYTES).decode(errors="replace").strip()
    named = folder / content
    if not re.fullmatch(r"\w[\w.-]*", content, re.ASCII) or named.is_symlink() or not named.is_dir():
        raise UserError(f"{folder / 'latest'} says {ascii(content)}, but there is no folder beside it of that name; "
                        "name a checkpoint with --checkpoint=")
    return named

def find_checkpoint(out_dir: Path | str, chat: bool | None = None) -> Path:
    """The newest checkpoint folder among the runs in `out_dir`, by the time of their `latest`; raises UserError.

    chat: prefer models that learned to chat (True) or that did not (False); None takes the newest of all.
    """
    latest = [path for path in Path(out_dir).glob("*/checkpoint/latest") if path.is_file()]
    if not latest:
        where = "" if Path(out_dir).is_absolute() else f", which is {Path(out_dir).absolute()},"
        raise UserError(f"--out_dir={out_dir}{where} has no run with a checkpoint; {TRAIN_FIRST}")
    latest.sort(key=lambda path: (path.stat().st_mtime_ns, path), reverse=True)
    for path in latest if chat is not None else ():
        try:
            folder = follow_latest(path.parent)
            if bool(read_meta(folder).get("chat")) == chat:
                return folder
        except UserError:                # a damaged checkpoint is none to prefer
            continue
    return follow_latest(latest[0].parent)

def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the latest one of that run; raises UserError."""
    if not path.is_dir():
        raise UserError(f"--checkpoint={path} is not a folder; leave the flag out to use the newest one, or "
                        f"{TRAIN_FIRST}")
    for folder in (path, path / "checkpoint"):
        if (folder / "latest").is_file():
            return follow_latest(folder)
    if not (path / "meta.json").exists():
        patterns = ("*/meta.json", "*/checkpoint/latest", "checkpoint/*/meta.json")
        inside = sorted({found.parent for pattern in patterns for found in path.glob(pattern)})
        if inside:
            more = f" and {len(inside) - 4} more" if len(inside) > 4 else ""
            raise UserError(f"--checkpoint={path} is not a checkpoint, but it holds {', '.join(map(str, inside[:4]))}"
                            f"{more}; name one of them")
    return path

def read_meta(path: Path) -> dict:
    """The meta.json of the checkpoint folder `path` with fields of the right types; raises UserError."""
    file = path / "meta.json"
    meta = read_json(file, read_file(file, META_BYTES))
    if meta.get("format") != FORMAT:
        raise UserError(f"{file} has format {str(meta.get('format'))[:80]!r}, but this sample.py reads {FORMAT}; "
                        "use the sample.py of the version that made it")
    kinds = {"script": str, "source_sha256": str, "config": dict, "step": int, "stage": int, "tokenizer_sha256": str}
    if "sources" in meta:                # absent in older checkpoints
        kinds["sources"] = dict
    for name, kind in kinds.items():
        if type(meta.get(name)) is not kind:
            raise UserError(f"{file} has {name} {str(meta.get(name))[:80]!r}, which should be of type "
                            f"{kind.__name__}; {CHOOSE_ANOTHER}")
    return meta

# -----------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """Text to token ids and back, from the plain data of a tokenizer.json.

    bos_id begins each document; ids run from 0 to vocab_size - 1. Raises KeyError, TypeError, ValueError or
    AttributeError for data that does not describe a tokenizer.
    """

    def __init__(self, data: dict):
        self.ranks = [base64.b64decode(text, validate=True) for text in data["ranks"]]
        self.ids = {text: token for token, text in enumerate(self.ranks)}
        self.bos_id = data["bos_id"]
        self.pattern = data["pattern"]
        special = data["special_tokens"]
        self.specials = dict(special)
        self.vocab_size = len(self.ranks) + len(special)
        if len(self.ids) != len(self.ranks) or any(bytes([byte]) not in self.ids for byte in range(256)):
            raise ValueError("its tokens are not distinct, or lack some of the 256 bytes")
        after = list(range(len(self.ranks), self.vocab_size))
        if sorted(special.values()) != after or self.bos_id not in after or type(self.bos_id) is not int:
            raise ValueError("its special tokens are not the last ones")
        self.encoding = None
        if self.pattern:
            import tiktoken
            self.encoding = tiktoken.Encoding(data["name"], pat_str=self.pattern, mergeable_ranks=self.ids,
                                              special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never special ones, even if the text spells one."""
        if self.encoding:
            pieces = (text[low:low + PIECE_CHARACTERS] for low in range(0, len(text), PIECE_CHARACTERS))
            return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]
        return [self.ids[bytes([byte])] for byte in text.encode()]

    def special(self, name: str) -> int:
        """The id of a special token, such as "<|assistant_end|>"; raises KeyError if the vocabulary has none."""
        return self.bos_id if name == "<|bos|>" else self.specials[name]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; b"" for a special one."""
        return self.ranks[token] if token < len(self.ranks) else b""

def gpt2_tokenizer(vocab_dir: Path | str | None = None) -> bytes:
    """The tokenizer.json of GPT-2, made from encoder.json in `vocab_dir`, else from the cache of tiktoken.

    Returns b"" if the cache does not have it. Never uses the network. Raises UserError if vocab_dir does not have it.
    """
    if vocab_dir:
        names = [Path(vocab_dir, "encoder.json"), Path(vocab_dir, "vocab.json")]    # the same file has two names
        path = next(filter(Path.is_file, names), names[0])
    else:
        cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        path = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"), ENCODER_CACHE_NAME)
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() == ENCODER_SHA256:
        return tokenizer_of_encoder(json.loads(content))
    if vocab_dir:
        fault = "is not GPT-2's (its sha256 is another)" if content else "cannot be read"
        raise UserError(f"{path} {fault}; name a folder with GPT-2's encoder.json and vocab.bpe with --vocab_dir=")
    return b""

def tokenizer_of_encoder(ids: dict[str, int]) -> bytes:
    """The tokenizer.json of GPT-2 from the content of encoder.json, which writes each byte as one visible character."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    invisible = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(invisible)}
    special = {"<|endoftext|>": 50256}
    tokens = sorted(ids.keys() - special.keys(), key=ids.get)
    ranks = [base64.b64encode(bytes(byte_of[letter] for letter in token)).decode() for token in tokens]
    data = {"name": "gpt2", "pattern": GPT2_PATTERN, "ranks": ranks, "special_tokens": special, "bos_id": 50256}
    return (json.dumps(data, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode()

def tokenizer_content(path: Path, meta: dict, vocab_dir: Path | None) -> bytes:
    """The tokenizer.json of the checkpoint folder `path`, or GPT-2's if the checkpoint has none; raises UserError."""
    file = path / "tokenizer.json"
    if os.path.lexists(file):
        return read_file(file, TOKENIZER_BYTES)
    if meta["tokenizer_sha256"] != GPT2_TOKENIZER_SHA256:
        raise UserError(f"{file} is missing; copy the tokenizer.json of the shards that the model was trained on there")
    content = gpt2_tokenizer(vocab_dir)
    if not content:
        raise UserError(f"{file} is missing, and the cache of tiktoken does not have GPT-2's vocabulary; name a folder "
                        "with GPT-2's encoder.json and vocab.bpe with --vocab_dir=, or run this once with a network: "
                        "python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"")
    return content

def read_tokenizer(path: Path, meta: dict, vocab_dir: Path | None = None) -> Tokenizer:
    """The tokenizer of the checkpoint folder `path`; raises UserError unless it is the one that meta.json names.

    vocab_dir: where GPT-2's vocabulary is, for a checkpoint without a tokenizer.json.
    """
    file = path / "tokenizer.json"
    content = tokenizer_content(path, meta, vocab_dir)
    if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(f"{file} is not the tokenizer that meta.json names by its sha256; copy the tokenizer.json of "
                        "the shards that the model was trained on there")
    data = read_json(file, content)
    pattern = data.get("pattern")
    if isinstance(pattern, str) and pattern not in PATTERNS:
        raise UserError(f"{file} splits text by {ascii(pattern)[:80]}, which is not among the PATTERNS of sample.py; "
                        "add it to them if you trust it")
    try:
        return Tokenizer(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a tokenizer ({error}); {CHOOSE_ANOTHER}") from None

# -----------------------------------------------------------------------------
# Model

def expected_source(meta: dict) -> str:
    """The sha256 of the training script that made a checkpoint."""
    return meta.get("sources", {}).get(f"{meta['script']}.py", meta["source_sha256"])

def kept_source(path: Path, meta: dict) -> Path | None:
    """The training script in the run folder of a checkpoint, if it is the one that made the checkpoint."""
    name = f"{meta['script']}.py"
    if name != os.path.basename(name):
        return None
    kept = Path(os.path.abspath(path)).parent.parent / name
    try:
        content = read_file(kept, SCRIPT_BYTES)
    except (UserError, OSError, ValueError):                        # absent, or a name that no file can have
        return None
    return kept if hashlib.sha256(content).hexdigest() == expected_source(meta) else None

def script_flag(kept: Path | None) -> str:
    """The flag that runs the script that a run folder holds, quoted for a shell."""
    return shlex.quote(f"--script={kept}") if kept else "--script=PATH"

def find_script(name: str, script: Path | None, kept: Path | None = None) -> Path:
    """The training script to import: `script` if given, else the train_*.py of that name beside this file.

    kept: the script in the run folder. It never runs unless the user names it, so the error says how. Raises UserError.
    """
    if script is not None:
        if script.suffix != ".py" or not script.is_file():
            raise UserError(f"--script={script} is not a Python file; name a training script, such as the one in the "
                            "run folder")
        return script.resolve()
    beside = {path.stem: path for path in sorted(HERE.glob("train_*.py"))}
    if name in beside:
        return beside[name]
    remedy = f"to run the copy in the run folder, add {script_flag(kept)}" if kept else (
        "name the script that made it with --script=PATH")
    raise UserError(f"the checkpoint was made by the script {ascii(name)[:80]}, which is not beside sample.py (there: "
                    f"{', '.join(beside) or 'none'}); {remedy}")

@contextlib.contextmanager
def companions_of(script: Path):
    """While it lasts, a script imports the companions in its own folder, and writes no bytecode there.

    Companions that another script has imported come back afterwards.
    """
    others = {}
    for name in COMPANIONS:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).parent != script.parent:
            others[name] = sys.modules.pop(name)
    bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = bytecode or script.parent != HERE     # run folders and records stay as they are
    sys.path.insert(0, str(script.parent))
    try:
        yield
    finally:
        sys.path.remove(str(script.parent))
        sys.dont_write_bytecode = bytecode
        sys.modules.update(others)

def import_script(path: Path, needs=("GPT", "config_from_dict", "UserError"), remedy="name another script with "
                  "--script=PATH"):
    """The module of the training script at `path`, wherever it is; each path is imported once.

    needs: names that the script must define; remedy: the end of an error's text. It prints nothing. Raises UserError if
    the script cannot be imported or lacks one of the names.
    """
    path = Path(path).resolve()
    # the scripts beside this file keep their names; no other script can be taken for one of them, or for a library
    ours = path.parent == HERE and (path.stem.startswith("train_") or path.stem == "gpt2")
    name = path.stem if ours else f"script {path}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None:
            raise UserError(f"{path} is not a Python file; {remedy}")
        sys.modules[name] = importlib.util.module_from_spec(spec)   # before it runs: dataclasses look their module up
        try:
            with companions_of(path):
                spec.loader.exec_module(sys.modules[name])
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, (Exception, SystemExit)):      # Ctrl-C
                raise
            raise UserError(f"{path} cannot be imported ({type(error).__name__}: {error}); {remedy}") from None
    missing = [part for part in needs if not hasattr(sys.modules[name], part)]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; {remedy}")
    return sys.modules[name]

def choose_device(device: str, precision: str) -> tuple[str, str]:
    """Device and precision with "auto" filled in; raises UserError for a device that is not there."""
    import torch
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
    if not there[device]:
        raise UserError(f"--device={device}, but PyTorch finds no such device here; leave the flag out")
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return device, precision

def time_calls(run, too_slow: float = math.inf) -> list[float]:
    """Seconds of run(), after one call that warms up: of five calls, or of fewer after a tenth of a second.

    If the first call takes more than `too_slow` seconds, its time is returned, and there are no others.
    """
    times = [time.perf_counter()]
    run()
    times.append(time.perf_counter())
    if times[1] - times[0] > too_slow:
        return [times[1] - times[0]]
    while len(times) < 7 and times[-1] - times[1] <= 0.1:
        run()
        times.append(time.perf_counter())
    return [end - begin for begin, end in zip(times[1:], times[2:])]

def choose_threads(run, most: int, given: int = 0) -> str:
    """Sets the number of CPU threads that run() is fastest with; returns a sentence that says so, "" without a choice.

    1, 2, 4, ... and `most` threads are tried in turn, until more threads save less than a fifth of the time. A call of
    less than 10 ms gets one thread at once. More would save it little, and would wait for each other whenever another
    program holds a core: a step of the tiny preset then takes three times as long with two threads as with one.
    given: use this number.
    """
    import torch
    if given or most < 2:
        torch.set_num_threads(given or most)
        return ""
    powers_of_two = [1 << n for n in range((most - 1).bit_length())]
    tried, best = {}, 1
    for threads in [*powers_of_two, most]:
        torch.set_num_threads(threads)
        # the first call with more threads also starts them
        times = time_calls(run, 4 * tried[best] if tried else math.inf)
        tried[threads] = sum(times) / len(times)
        if threads > 1 and tried[threads] > 0.8 * tried[best]:
            break
        best = threads
        if min(times) < 0.01:            # the fastest call, since another program may slow down the others
            break
    torch.set_num_threads(best)
    times = ", ".join(f"{1e3 * seconds:.1f} ms with {threads}" for threads, seconds in tried.items())
    return f"CPU threads: {best} (a step takes {times}; --threads=N sets the number)"

def build_model(module, meta: dict, precision: str, file_bytes: int):
    """The untrained model of a checkpoint's config on the CPU, uncompiled; raises UserError.

    file_bytes: size of the weights. A config that asks for many more parameters than that is refused.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Bounded(TorchFunctionMode):
        left = max(file_bytes // 2, 1 << 27)                        # numbers, of two bytes or more in the file

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.empty:
                shape = args if args and isinstance(args[0], int) else args[0] if args else (0,)
                self.left -= math.prod(shape)
                if self.left < 0:
                    raise ValueError(f"it asks for more parameters than {file_bytes} bytes of weights can hold")
            return function(*args, **(kwargs or {}))
    try:
        cfg = replace(module.config_from_dict(meta["config"]), precision=precision, attention="plain", compile=False)
        if not 0 <= meta["stage"] < len(cfg.stages):
            raise UserError(f"the checkpoint is at stage {meta['stage']} of {len(cfg.stages)}; {CHOOSE_ANOTHER}")
        with Bounded():
            return module.GPT(cfg).requires_grad_(False)
    except module.UserError as error:
        raise UserError(f"{Path(module.__file__).name}: {error}") from None
    except (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"no model can be made from the checkpoint's config ({error}); {CHOOSE_ANOTHER}") from None

def load_weights(model, file: Path, remedy: str):
    """Fills the model from a safetensors file; raises UserError that lists what is missing, extra or misshapen."""
    from safetensors import SafetensorError, safe_open
    check_plain(file)
    try:
        with safe_open(file, "pt") as found:                        # reads and checks the header, no tensor yet
            names = list(found.keys())
            wanted = model.state_dict()
            faults = [f"missing {name}" for name in wanted if name not in names]
            faults += [f"extra {ascii(name)[1:-1][:80]}" for name in names if name not in wanted]
            for name, want in wanted.items() if not faults else ():
                have = found.get_slice(name)
                kind = have.get_dtype()
                shape = tuple(have.get_shape())
                is_float = kind in ("F64", "F32", "F16", "BF16")
                if is_float != want.is_floating_point() or shape != want.shape:
                    faults.append(f"{name} is {kind} {shape}, not {tuple(want.shape)}")
            if not faults:
                model.load_state_dict({name: found.get_tensor(name) for name in names}, strict=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {CHOOSE_ANOTHER}") from None
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{file} does not fit the model: {', '.join(faults[:8])}{more}; {remedy}")

def load_checkpoint(path: Path | str, device: str = "auto", script: Path | None = None, precision: str = "auto",
                    vocab_dir: Path | None = None, needs_tokenizer: bool = True):
    """(model, tokenizer, meta) of a checkpoint folder; model(tokens) returns logits, on its device.

    device: auto, cpu, cuda or mps; script: run this source instead of the one beside this file that meta.json names;
    precision: auto, bf16 or fp32; vocab_dir: folder with GPT-2's vocabulary, for a checkpoint without tokenizer.json;
    needs_tokenizer: False returns None for a tokenizer that is absent. Prints a note on stderr if the source has
    changed since. Raises UserError.
    """
    path = Path(path)
    meta = read_meta(path)
    kept = kept_source(path, meta)
    tokenizer = None
    if needs_tokenizer or os.path.lexists(path / "tokenizer.json"):
        tokenizer = read_tokenizer(path, meta, vocab_dir)
    source = find_script(meta["script"], script, kept)
    device, precision = choose_device(device, precision)
    remedy = f"name the script that made it with {script_flag(kept)}"
    weights = path / "model.safetensors"
    check_plain(weights)
    model = build_model(import_script(source), meta, precision, weights.stat().st_size)
    if tokenizer and (tokenizer.bos_id != model.cfg.bos_id or tokenizer.vocab_size > model.cfg.vocab_size):
        raise UserError(f"{path} has a tokenizer of {tokenizer.vocab_size} ids that begins documents with "
                        f"{tokenizer.bos_id}, but a model of {model.cfg.vocab_size} ids that begins them with "
                        f"{model.cfg.bos_id}; {CHOOSE_ANOTHER}")
    load_weights(model, weights, remedy)
    model.set_stage(meta["stage"], final=True)
    if hashlib.sha256(source.read_bytes()).hexdigest() != expected_source(meta):
        print(f"sample.py: note: {source.name} has changed since it made this checkpoint; if the results look wrong, "
              f"{remedy}", file=sys.stderr)
    return model.to(device).eval(), tokenizer, meta

def load_model(name: str, device: str = "auto", precision: str = "auto"):
    """(model, tokenizer, meta) of a published GPT-2, or of a folder with one, by gpt2.py; raises UserError."""
    module = import_script(HERE / "gpt2.py", ("load", "UserError"), "use the gpt2.py that belongs to sample.py")
    try:
        model, content, meta = module.load(os.path.expanduser(name), *choose_device(device, precision))
    except module.UserError as error:
        raise UserError(str(error)) from None
    return model, Tokenizer(json.loads(content)), meta

# -----------------------------------------------------------------------------
# Drawing tokens (shapes: B rows, V tokens of the vocabulary)

@dataclass(frozen=True)
class Draw:
    """How the next token is drawn. The flags of the same names say what each field does."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

def nucleus(scores_BV, p: float):
    """(B, 1) the lowest score among the likeliest tokens that together have probability p, to 2e-6 below it.

    The highest score of a row is 0. On a GPU, sorting rows of 50,000 scores takes longer than a step of a small model.
    So the scores are counted in 4,096 bins, and those of the decisive bin in 4,096 smaller ones. The counts are
    integers, whose sum does not depend on the order.
    """
    weights = (scores_BV.exp() * 2.0 ** 40).long()
    top = scores_BV.new_zeros(len(scores_BV), 1)
    wanted = (p * weights.sum(1, keepdim=True)).long()
    for width in (2.0 ** -7, 2.0 ** -19):
        bins = ((top - scores_BV) / width).clamp(0, 4095).long()
        mass = weights.new_zeros(len(bins), 4096).scatter_add(1, bins, weights).cumsum(1)
        top = top - width * (mass < wanted).sum(1, keepdim=True)
    return top - width

def filter_logits(logits_BV, draw: Draw, seen_BV=None):
    """(B, V) scores whose softmax is the distribution to draw from; -inf for tokens that are filtered out.

    Applied in this order: repetition_penalty on tokens in seen_BV (bool), temperature, top_k, top_p of what top_k
    leaves, min_p. Tokens exactly as likely as the last one kept are kept.
    """
    if draw.repetition_penalty != 1:
        logits = logits_BV * draw.repetition_penalty
        logits_BV = logits_BV.where(~seen_BV, logits.where(logits_BV < 0, logits_BV / draw.repetition_penalty))
    scores = logits_BV - logits_BV.amax(1, keepdim=True)
    if draw.temperature == 0:
        return scores
    scores = scores / max(draw.temperature, 1e-6)                   # smaller ones become 0 in fp32
    if draw.top_k:
        scores = scores.masked_fill(scores < scores.topk(draw.top_k).values[:, -1:], -math.inf)
    if draw.top_p < 1:
        scores = scores.masked_fill(scores < nucleus(scores, draw.top_p), -math.inf)
    if draw.min_p:
        scores = scores.masked_fill(scores < math.log(draw.min_p), -math.inf)
    return scores

def hash32(x):
    """A hash of integers below 2^32, the same on every device; neighbours get unrelated values."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45d9f3b) & 0xffffffff
    return x ^ (x >> 16)

def gumbel_noise(seed_B, step, ids_V):
    """(B, V) Gumbel noise: the argmax of scores + noise is a token drawn with its probability.

    It depends only on the row's seed, the step and the token, not on the other rows.
    """
    key = hash32((seed_B + step * 0x9e3779b9) & 0xffffffff)
    bits = hash32((key[:, None] + ids_V * 0x9e3779b1) & 0xffffffff)
    uniform = ((bits >> 9).float() + 0.5) * 2.0 ** -23              # exact in fp32, never 0 or 1
    return -(-uniform.log()).log()

# -----------------------------------------------------------------------------
# Engine

def in_parts(x_BV):
    """(B, 64, V / 64) the same values in order, padded with -inf."""
    import torch
    fill = torch.nn.functional.pad(x_BV, (0, -x_BV.size(1) % 64), value=-math.inf)
    return fill.view(x_BV.size(0), 64, -1)

@functools.cache                         # so that all compiled code sees the same class
def product_sums():
    """A context class that computes a row times a matrix as products and sums, the fastest way in compiled code."""
    import torch
    from torch.overrides import TorchFunctionMode
    linear = torch.nn.functional.linear
    product = torch.Tensor.__matmul__

    class ProductSums(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            known = function in (linear, product) and not kwargs and args[1].dim() == 2
            if not known or args[0].numel() > args[0].size(-1):
                return function(*args, **(kwargs or {}))
            row, matrix, *bias = args
            weight = matrix if function is linear else matrix.T
            y = (row.reshape(1, -1).float() * weight.float()).sum(1)
            if bias and bias[0] is not None:
                y = y + bias[0]
            return y.to(row.dtype).view(*row.shape[:-1], -1)
    return ProductSums

class Engine:
    """Continues prompts: `batch` rows at a time, each of up to max_tokens tokens with its prompt.

    The model has cfg.bos_id, new_cache and decode, and its cache has fill and bytes_read, like train_gpt.GPT. On CUDA
    one step, from a token to the next, is captured as a graph, so the tensors that it works on are allocated once.
    compile: compile the step first, and on CUDA capture how a prompt is read too. forcing: `steps` can put given tokens
    in the place of drawn ones. Raises ValueError if the model cannot read max_tokens.
    """

    def __init__(self, model, vocab_size: int, draw: Draw = Draw(), batch: int = 1, max_tokens: int = 1024,
                 compile: bool = False, forcing: bool = False):
        import torch
        self.model = model
        self.vocab_size = vocab_size
        self.draw = draw
        self.batch = batch
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(batch, max_tokens, chunk=1)
        with torch.device(self.device):
            self.token = torch.zeros(batch, dtype=torch.int32)
            self.logprob = torch.zeros(batch)
            self.seed = torch.zeros(batch, dtype=torch.int64)
            self.count = torch.zeros(1, dtype=torch.int64)
            self.ids = torch.arange(vocab_size)
            self.seen = torch.zeros(batch, vocab_size, dtype=torch.bool) if draw.repetition_penalty != 1 else None
            self.forced = torch.full((batch,), -1) if forcing else None     # the next token of a row; -1: draw it
        self.step = self.advance
        if compile:
            step = torch.compile(self.advance, dynamic=False, fullgraph=True)

            def summing():
                with product_sums()():
                    step()
            self.step = step if batch > 1 else summing              # sums are faster only for a single row
        self.reading = None
        if self.device.type == "cuda":
            self.step = self.capture(self.step)
            if compile:
                self.reading = PromptGraphs(self, max_tokens)

    def choose(self, logits_BV):
        """Draws each row's next token from the model's logits, or takes the forced one; stores its log-probability."""
        logits = logits_BV[:, :self.vocab_size].float()
        scores = filter_logits(logits, self.draw, self.seen)
        if self.draw.temperature:
            scores = scores + gumbel_noise(self.seed, self.count, self.ids)
        # maximum and sum are taken in two steps, so that one row keeps the whole GPU busy
        parts = in_parts(scores)
        best, places = parts.max(2)
        part = best.argmax(1, keepdim=True)
        token = part * parts.size(2) + places.gather(1, part)
        if self.forced is not None:
            token = token.where(self.forced[:, None] < 0, self.forced[:, None])
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        total = in_parts(logits).logsumexp(2).logsumexp(1)
        self.logprob.copy_(logits.gather(1, token)[:, 0] - total)
        self.token.copy_(token[:, 0])
        self.count.add_(1)

    def advance(self):
        """One step: from the tokens drawn last to the next ones."""
        self.choose(self.model.decode(self.token[:, None], self.cache)[:, 0])

    def capture(self, run):
        """A function that replays what `run` does as a CUDA graph. `start` overwrites what trying it does to the cache.
        """
        import torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def start(self, prompts: list[list[int]], rows: list[tuple[int, int]]):
        """Reads each prompt that `rows` name once, and draws the first token of each row."""
        import torch
        used = sorted({prompt for prompt, _ in rows})
        rows = rows + rows[-1:] * (self.batch - len(rows))          # the last ones only fill the batch
        texts = {prompt: str(prompts[prompt]) for prompt in used}
        self.seed.copy_(torch.tensor([random.Random(f"{seed} {texts[prompt]}").getrandbits(32)
                                      for prompt, seed in rows]))
        self.count.zero_()
        if self.forced is not None:
            self.forced.fill_(-1)
        if self.seen is not None:
            self.seen.zero_()
            for line, (prompt, _) in zip(self.seen, rows):          # without the id that begins and ends a document
                line[[token for token in prompts[prompt] if token != self.model.cfg.bos_id]] = True
        if self.reading and len(used) == 1 and len(prompts[used[0]]) <= self.reading.most:
            self.reading.replay(prompts[used[0]])
            return
        lengths = torch.tensor([len(prompts[prompt]) for prompt in used])
        tokens = torch.zeros(len(used), int(lengths.max()), dtype=torch.int32)
        for line, prompt in zip(tokens, used):
            line[:len(prompts[prompt])] = torch.tensor(prompts[prompt])
        cache = self.model.new_cache(*tokens.shape)
        logits = self.model.decode(tokens.to(self.device), cache, lengths.to(self.device), last=True)[:, 0]
        index = torch.tensor([used.index(prompt) for prompt, _ in rows], device=self.device)
        self.cache.fill(cache, index)
        self.choose(logits[index])

    def read(self):
        """Starts to copy the last tokens to the host; returns a function that waits for (tokens, log-probabilities)."""
        import torch
        if self.device.type != "cuda":
            tokens = self.token.tolist()
            logprobs = self.logprob.tolist()
            return lambda: (tokens, logprobs)
        host = [torch.empty_like(x, device="cpu", pin_memory=True) for x in (self.token, self.logprob)]
        host[0].copy_(self.token, non_blocking=True)
        host[1].copy_(self.logprob, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait():
            copied.synchronize()
            return tuple(x.tolist() for x in host)
        return wait

    def steps(self, prompts: list[list[int]], rows: list[tuple[int, int]], count: int, force=None):
        """Yields (tokens, log-probabilities), two lists with one entry a row, `count` times.

        rows: (index of the prompt, seed), at most `batch`; a prompt and `count` tokens have to fit into max_tokens.
        force: a function of a row and its newest token that returns the token that must come next, or None to draw it;
        only for an engine made with forcing=True. The log-probability of a forced token is None, as it was not drawn.
        On CUDA the next step starts before a token is yielded, unless there is `force`. Raises UserError if logits are
        not finite.
        """
        assert len(rows) <= self.batch, "more rows than the engine was made for"
        assert force is None or self.forced is not None, "the engine was made without forcing"
        self.start(prompts, rows)
        waiting = deque()
        behind = self.device.type == "cuda" and force is None
        forced = [None] * len(rows)
        for n in range(count + behind):
            if n < count:
                if n:
                    self.step()
                waiting.append(self.read())
            if len(waiting) > behind or n >= count:
                tokens, logprobs = waiting.popleft()()
                if any(map(math.isnan, logprobs)):
                    raise UserError(f"the model's logits are not finite; {CHOOSE_ANOTHER}")
                tokens = tokens[:len(rows)]
                yield tokens, [x if token is None else None for x, token in zip(logprobs, forced)]
                if force:
                    forced = [force(row, token) for row, token in enumerate(tokens)]
                    self.put(forced)

    def put(self, forced: list[int | None]):
        """Makes the next step take these tokens; it draws one where there is None."""
        import torch
        ids = [-1 if token is None else token for token in forced]
        self.forced[:len(ids)] = torch.tensor(ids)

class PromptGraphs:
    """CUDA graphs that read one prompt of up to `most` tokens for all rows of an engine, and draw their first tokens.

    Reading a short prompt is many small kernels, and starting them from Python takes several times as long as their
    work. One graph reads the first PART tokens into an empty cache, one reads PART more, the last gives all rows what
    was read. A graph does not own the tensors that it works on, so they are kept here.
    """
    PART, MOST = 256, 1024

    def __init__(self, engine: Engine, max_tokens: int):
        import torch
        self.engine, self.model = engine, engine.model
        self.most = min(self.MOST, max_tokens)
        with torch.device(engine.device):
            self.tokens = torch.zeros(1, min(self.PART, self.most), dtype=torch.int32)
            self.real = torch.ones(1, dtype=torch.int64)            # how many of them are no padding
            self.first_row = torch.zeros(engine.batch, dtype=torch.int64)
        self.empty = self.model.new_cache(1, self.most)
        self.cache = self.model.new_cache(1, self.most)
        self.logits_1V = self.model.decode(self.tokens, self.cache, self.real, last=True)[:, 0]
        self.begin, self.go_on, self.end = map(engine.capture, (self.read_first, self.read_more, self.hand_out))

    def read_first(self):
        self.cache.fill(self.empty, self.first_row[:1])
        self.read_more()

    def read_more(self):
        self.logits_1V.copy_(self.model.decode(self.tokens, self.cache, self.real, last=True)[:, 0])

    def hand_out(self):
        self.engine.cache.fill(self.cache, self.first_row)
        self.engine.choose(self.logits_1V.expand(self.engine.batch, -1))

    def replay(self, prompt: list[int]):
        """Reads a prompt."""
        import torch
        size = self.tokens.size(1)
        for low in range(0, len(prompt), size):
            part = torch.tensor(prompt[low:low + size], dtype=torch.int32)
            self.tokens[0, :len(part)].copy_(part)
            self.real.fill_(len(part))
            if low:
                self.go_on()
            else:
                self.begin()
        self.end()

# -----------------------------------------------------------------------------
# Tools

class Tool:
    """What the model can call in the middle of a text: it writes an expression between two markers.

    run: a function of the expression that returns its result as text, or None if it has none. Raises KeyError if the
    vocabulary lacks the markers.
    """

    def __init__(self, tokenizer: Tokenizer, run):
        self.tokenizer = tokenizer
        self.run = run
        self.begin, self.end, self.output_begin, self.output_end = (
            tokenizer.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end"))

class ToolCalls:
    """The calls of a tool in one text. made: how many; answered: how many had a result."""

    def __init__(self, tool: Tool):
        self.tool = tool
        self.made = 0
        self.answered = 0
        self.expression = None           # bytes of the call that is open
        self.forced = deque()            # what is still to come of a result

    def follow(self, token: int) -> int | None:
        """Takes the next token of the text; returns the one that must come after it, or None if any may.

        After a call come the output markers with the result between them. A call without a result is left as it is.
        """
        tool = self.tool
        if self.forced:
            return self.forced.popleft()
        if token == tool.begin:
            self.expression = b""
        elif self.expression is None:
            return None
        elif token != tool.end:
            self.expression += tool.tokenizer.token_bytes(token)
        else:
            self.made += 1
            result = tool.run(self.expression.decode(errors="replace"))
            self.expression = None
            if result is not None:
                self.answered += 1
                self.forced.extend([tool.output_begin, *tool.tokenizer.encode(result), tool.output_end])
                return self.forced.popleft()
        return None

# -----------------------------------------------------------------------------
# Text

class Text:
    """One text as its tokens come, in whole characters (invalid bytes become U+FFFD) and up to a stop string.

    text: what is certain so far. unseen: the part of it, after `lead`, that is still to be printed. finish: "end" if
    the model ended the document, "stop" if a stop string came, "length" after the last token asked for, None before.
    tokens and logprobs belong to the text and to the stop string; the logprob of a tool's output is None. calls: the
    tool calls in the text, if it was generated with a tool.
    """

    def __init__(self, tokenizer: Tokenizer, stop=(), prompt: int = 0, seed: int = 0, lead: str = ""):
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt = prompt
        self.seed = seed
        self.text = ""
        self.unseen = lead
        self.held = ""                   # may be the beginning of a stop string
        self.finish = None
        self.tokens = []
        self.logprobs = []
        self.calls = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, logprob: float | None = 0.0):
        """Appends the next token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.append(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def close(self, finish: str):
        """Ends the text: no token follows."""
        self.append(self.decoder.decode(b"", final=True))
        if not self.finish:
            self.finish = finish
            self.text += self.held
            self.unseen += self.held

    def append(self, new: str):
        """Adds characters to the text, except those that may be the beginning of a stop string."""
        self.held += new
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        begun = [n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])]
        certain = min(found) if found else len(self.held) - max(begun, default=0)
        self.text += self.held[:certain]
        self.unseen += self.held[:certain]
        self.held = self.held[certain:]
        if found:
            self.finish = "stop"

def decode(tokenizer: Tokenizer, tokens):
    """Yields the text of an iterable of ids in whole characters; invalid bytes become U+FFFD."""
    text = Text(tokenizer)
    for token in tokens:
        text.add(token)
        if text.unseen:
            yield text.unseen
            text.unseen = ""
    text.close("end")
    if text.unseen:
        yield text.unseen

def generate(engine: Engine, prompts: list[list[int]], texts: list[Text], count: int, ends=None,
             tool: Tool | None = None):
    """Generates the texts, of up to `count` tokens each, `engine.batch` at a time; yields after every step.

    ends: ids that end a text, by default the model's bos_id; tool: what the texts can call, for an engine made with
    forcing=True. A result counts among the tokens of its text.
    """
    ends = {engine.model.cfg.bos_id} if ends is None else set(ends)
    for low in range(0, len(texts), engine.batch):
        group = texts[low:low + engine.batch]
        for text in group if tool else ():
            text.calls = ToolCalls(tool)

        def force(row, token, group=group):
            return None if group[row].finish else group[row].calls.follow(token)
        rows = [(text.prompt, text.seed) for text in group]
        for tokens, logprobs in engine.steps(prompts, rows, count, force if tool else None):
            for text, token, logprob in zip(group, tokens, logprobs):
                if not text.finish and token in ends:
                    text.close("end")
                elif not text.finish:
                    text.add(token, logprob)
            yield
            if all(text.finish for text in group):
                break
        for text in group:
            if not text.finish:
                text.close("length")
        yield

# -----------------------------------------------------------------------------
# The command

def read_text(flag: str, path: Path, content: str) -> str:
    """The text of a file of prompts without a byte order mark; raises UserError. content: what the file should hold."""
    try:
        with open(path, "rb") as file:
            raw = file.read(PROMPTS_BYTES + 1)
        if len(raw) > PROMPTS_BYTES:
            raise UserError(f"{flag} has more than {PROMPTS_BYTES} bytes; split it into several files")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} cannot be read ({error.strerror}); name a UTF-8 file with {content}") from None
    except UnicodeDecodeError as error:
        utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        reason = "it is UTF-16" if utf16 else f"byte {error.start} is invalid"
        raise UserError(f"{flag} is not UTF-8 ({reason}); save it as UTF-8") from None

def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[str]:
    """The prompts that the flags give; raises UserError.

    In a file of prompts only LF and CR LF end a prompt, and a byte order mark at the beginning is skipped.
    """
    if args.document:
        flag = f"--document={args.document}"
        text = read_text(flag, args.document, "a text to continue")
        if not text:
            raise UserError(f"{flag} is empty; write a text to continue")
        return [text]
    if not args.prompts_file:
        return [args.prompt or (WORDS_PROMPT if tokenizer.encoding else BYTES_PROMPT)]
    flag = f"--prompts_file={args.prompts_file}"
    lines = read_text(flag, args.prompts_file, "one prompt a line").replace("\r\n", "\n").split("\n")
    if lines[-1] == "":                                             # after the last line end
        lines.pop()
    if not lines:
        raise UserError(f"{flag} is empty; write one prompt a line")
    if "" in lines:
        raise UserError(f"{flag} has no prompt in line {lines.index('') + 1}; remove the empty line")
    return lines

def make_engine(args: argparse.Namespace, model, vocab_size: int, batch: int, longest: int) -> Engine:
    """The engine for prompts of up to `longest` tokens; raises UserError if the model cannot read that many."""
    draw = Draw(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    try:
        return Engine(model, vocab_size, draw, batch, longest + args.max_tokens, args.compile)
    except ValueError as error:
        raise UserError(f"a prompt of {longest - 1} tokens and --max_tokens={args.max_tokens} are too much for the "
                        f"model ({error}); shorten the prompt or lower --max_tokens") from None

def set_threads(args: argparse.Namespace, engine: Engine, most: int):
    """Sets the number of CPU threads for the engine's steps and prints a choice on stderr."""
    if engine.device.type == "cpu":
        choice = choose_threads(engine.advance, most, args.threads)
        if choice:
            print(f"sample.py: {choice}", file=sys.stderr)

def show(args: argparse.Namespace, prompts: list[str], texts: deque):
    """Prints what is new in the texts: the first one as it grows, the others in order once they are first."""
    while texts:
        text = texts[0]
        if text.unseen and not args.json:
            print(text.unseen, end="", flush=True)
            text.unseen = ""
        if not text.finish:
            return
        texts.popleft()
        if args.json:
            values = {"prompt": prompts[text.prompt], "seed": text.seed, "text": text.text, "finish": text.finish,
                      "tokens": text.tokens}
            if args.logprobs:
                values["logprobs"] = text.logprobs
            print(json.dumps(values), flush=True)
            continue
        print(flush=True)
        if args.logprobs:
            for token, logprob in zip(text.tokens, text.logprobs):
                print(f"{logprob:10.4f}  {text.tokenizer.token_bytes(token).decode(errors='replace')!r}")

def load(args: argparse.Namespace):
    """(model, tokenizer, its description in one line) that the flags name; raises UserError."""
    if args.model:
        model, tokenizer, _ = load_model(args.model, args.device, args.precision)
        return model, tokenizer, args.model
    path = resolve_checkpoint(args.checkpoint) if args.checkpoint else find_checkpoint(args.out_dir)
    model, tokenizer, meta = load_checkpoint(path, args.device, args.script, args.precision, args.vocab_dir)
    val_loss = f", validation loss {meta['val_loss']:.4f}" if isinstance(meta.get("val_loss"), float) else ""
    chat = ", a chat model: chat.py talks with it" if meta.get("chat") else ""
    return model, tokenizer, f"{path}, {meta['script']} after {meta['step']} steps{val_loss}{chat}"

def export_hf(args: argparse.Namespace):
    """Writes the checkpoint as a Hugging Face model folder; raises UserError."""
    path = resolve_checkpoint(args.checkpoint) if args.checkpoint else find_checkpoint(args.out_dir)
    tools = import_script(HERE / "export_hf.py", ("export", "UserError"), "use the one that belongs to sample.py")
    vocabulary = import_script(HERE / "data" / "tokenizer.py", ("huggingface_json",), "use the one that belongs to "
                               "sample.py, with the packages of requirements.txt")
    try:
        tools.check_meta(read_meta(path))
        tools.check_folder(args.export_hf)
        model, _, meta = load_checkpoint(path, "cpu", args.script, "fp32", args.vocab_dir)
        content = tokenizer_content(path, meta, args.vocab_dir)
        config = tools.export(model, content, meta, vocabulary.huggingface_json, args.export_hf)
    except tools.UserError as error:
        raise UserError(str(error)) from None
    except ModuleNotFoundError as error:
        raise UserError(f"the Python package {error.name} is missing; pip install -r requirements.txt") from None
    print(f"sample.py: wrote {one_line(str(args.export_hf))}, with the logits of {one_line(str(path))} in texts of up "
          f"to {config['max_position_embeddings']} tokens; its README.md says how to load it", file=sys.stderr)

def sample(args: argparse.Namespace):
    """Loads the model and prints the texts as they come, or the benchmark; raises UserError."""
    model, tokenizer, name = load(args)
    if args.top_k > tokenizer.vocab_size:
        raise UserError(f"--top_k={args.top_k} is more than the {tokenizer.vocab_size} tokens there are; lower it")
    prompts = read_prompts(args, tokenizer)
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    print(f"sample.py: {one_line(name)}", file=sys.stderr)
    if args.benchmark:
        benchmark(args, model, tokenizer.vocab_size, ids[0], name)
        return

    rows = [(prompt, args.seed + i) for prompt in range(len(prompts)) for i in range(args.num_samples)]
    texts = []
    for n, (prompt, seed) in enumerate(rows, 1):
        title = f"--- sample {n} of {len(rows)}, --seed={seed}\n" if len(rows) > 1 else ""
        texts.append(Text(tokenizer, args.stop, prompt, seed, title + prompts[prompt]))
    engine = make_engine(args, model, tokenizer.vocab_size, min(args.batch, len(texts)), max(map(len, ids)))
    import torch
    set_threads(args, engine, torch.get_num_threads())
    unfinished = deque(texts)
    show(args, prompts, unfinished)
    for _ in generate(engine, ids, texts, args.max_tokens):
        show(args, prompts, unfinished)

def copy_speed(device) -> float:
    """Bytes per second that a large copy reads and writes."""
    import torch
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), dtype=torch.int32, device=device)
    target = source.clone()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(10):
        wait()
        begin = time.perf_counter()
        target.copy_(source)
        wait()
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(times)

def time_steps(engine: Engine, ids: list[int], count: int) -> tuple[float, float]:
    """Seconds to the first token of every row, and seconds per step after it."""
    times = [time.perf_counter()]
    for _ in engine.steps([ids], [(0, seed) for seed in range(engine.batch)], count):
        times.append(time.perf_counter())
    return times[1] - times[0], (times[-1] - times[1]) / max(count - 1, 1)

def peak_memory(cuda: bool) -> int:
    """Bytes: of the tensors on a GPU since the last reset, elsewhere of the process since its start."""
    import resource

    import torch
    if cuda:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024                  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def benchmark(args: argparse.Namespace, model, vocab_size: int, ids: list[int], name: str):
    """Prints speed, memory and the share of the memory's speed for three batches; the last line is JSON."""
    import torch
    weight = next(model.parameters())
    cuda = weight.is_cuda
    precision = str(weight.dtype).removeprefix("torch.")
    if not args.prompt and not args.document:
        ids = ids[:1] + random.Random(0).choices(range(vocab_size - 1), k=127)
    weights = model.matmul_parameters * weight.element_size()
    most_threads = torch.get_num_threads()
    speed = copy_speed(weight.device)
    machine = torch.cuda.get_device_name(weight.device) if cuda else weight.device.type
    print(f"{machine}, torch {torch.__version__}, {precision}, a prompt of {len(ids)} tokens and {args.max_tokens} new "
          f"tokens\nlimit of a step = ({weights / 1e6:.1f} MB of weights + keys and values that a token reads half-way "
          f"through the text) / {speed / 1e9:.1f} GB/s, the speed of a large copy\n\n"
          "batch    first token         step  tokens/s     memory  read a step      limit  limit / step")
    results = []
    for batch in (1, 8, 64):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        engine = make_engine(args, model, vocab_size, batch, len(ids))
        set_threads(args, engine, most_threads)
        time_steps(engine, ids, 4)                                  # warm-up
        first, step = time_steps(engine, ids, args.max_tokens)
        read = weights + engine.cache.bytes_read(len(ids) + args.max_tokens // 2)
        result = {"batch": batch, "first_token_ms": 1e3 * first, "step_ms": 1e3 * step, "tokens_per_s": batch / step,
                  "memory_mb": peak_memory(cuda) / 1e6, "read_mb": read / 1e6, "limit_ms": 1e3 * read / speed,
                  "limit_share": read / speed / step}
        print("{:5d}  {:10.2f} ms  {:8.3f} ms  {:8.0f}  {:6.0f} MB  {:8.1f} MB  {:6.3f} ms  {:12.3f}".format(
            *result.values()), flush=True)
        results.append(result | {"threads": torch.get_num_threads()})
        del engine
    print(json.dumps({"model": name, "device": machine, "torch": torch.__version__, "precision": precision,
                      "compile": args.compile, "prompt_tokens": len(ids), "new_tokens": args.max_tokens,
                      "copy_gb_per_s": speed / 1e9, "batches": results}))

def prepare_stdout():
    """Writes UTF-8 to a file or a pipe, and "?" for what a terminal cannot show, whatever the locale is.

    PYTHONIOENCODING, if set, decides the encoding.
    """
    if hasattr(sys.stdout, "reconfigure"):
        as_it_is = sys.stdout.isatty() or os.environ.get("PYTHONIOENCODING")
        sys.stdout.reconfigure(encoding=None if as_it_is else "utf-8", errors="replace")

def close_stdout():
    """Lets the process end in silence after its reader has closed the pipe, as head does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 an error that the user can correct, 130 interrupted."""
    try:
        prepare_stdout()
        args = parse_args(argv)
        export_hf(args) if args.export_hf else sample(args)
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsample.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        close_stdout()
        return 0
    except OSError as error:                                        # a name that is too long, a folder without access
        print(f"sample.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        print(f"sample.py: the memory is used up ({UserError(error)}); use a smaller --batch, --max_tokens or "
              "--num_samples", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
