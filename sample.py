"""Text from a trained model: goes on from a prompt with the newest checkpoint, or with the one you name.

    python sample.py                                            # the newest checkpoint under logs/
    python sample.py --prompt="The old house" --num_samples=3
    python sample.py --checkpoint=logs/<run>/checkpoint/step_000900 --temperature=0
    python sample.py --prompts_file=prompts.txt --json --logprobs
    python sample.py --benchmark --compile                      # how fast, and how fast it could be

A checkpoint is numbers and plain JSON. Its meta.json names the training script that made it, which must be one of the
train_*.py beside this file; other code runs only if you name it with --script=PATH. A prompt is read once; then each
new token costs one step, which looks back as far as the model's windows reach. Texts are made together in batches; the
same seed gives the same text whatever else is in the batch (on the same kind of machine, up to rounding in bf16).
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
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

# PyTorch takes seconds to import, so the functions that need it do it: --help and mistakes are answered at once

HERE = Path(__file__).resolve().parent
FORMAT = 1                                                          # of meta.json
META_BYTES, TOKENIZER_BYTES, LATEST_BYTES, PROMPTS_BYTES = 1 << 20, 1 << 24, 256, 1 << 26     # larger files are none
# How the tokenizers of this project split text. Other patterns are refused: a regular expression can be made to run
# for ever, and the engine behind tiktoken then ends the process.
PATTERNS = ("", r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
PIECE = 1_000_000                                                   # letters; its stack ends at 3 million blanks
COMPANIONS = ("harness", "triton_kernels")                          # what training scripts import from their folder
TRAIN_FIRST = "train one with ./run.sh or python train_gpt.py --preset=tiny"
OTHER = "choose another checkpoint with --checkpoint="
BYTES_PROMPT, WORDS_PROMPT = "def ", "The"                          # the tiny preset learns Python, byte by byte

class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""

    def __str__(self):                                              # a line that a terminal only shows
        line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(super().__str__().split()))
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"

# -----------------------------------------------------------------------------
# Command line

def words(argv: list[str] | None) -> list[str]:
    """The command line, by default this process's; raises UserError for --name=--, which argparse reads as a list."""
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--.*=--", arg, re.S)]:
        raise UserError(f"{empty[0]} has no value; --help lists the flags")
    return argv

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as it goes without a model; raises UserError."""
    parser = argparse.ArgumentParser(prog="sample.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{message}; --help lists the flags")
    parser.error = refuse
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint (step_...), or a run: then its latest one; "
        "default: the newest under --out_dir")
    add("--prompt", metavar="TEXT", help=f"text to go on from; default: {BYTES_PROMPT!r} for a model that reads bytes, "
        f"as the tiny preset, {WORDS_PROMPT!r} for others")
    add("--prompts_file", type=Path, metavar="FILE", help="prompts to go on from, one a line; default: --prompt alone")
    add("--num_samples", type=int, default=1, metavar="N", help="number of texts a prompt (default: %(default)s)")
    add("--max_tokens", type=int, default=400, metavar="N", help="longest text, in tokens after the prompt; it ends "
        "sooner where the model ends the document (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1: more likely tokens, above 1: more surprising ones, "
        "0: always the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=0, metavar="K", help="choose among the K likeliest tokens, 0: all "
        "(default: %(default)s)")
    add("--top_p", type=float, default=0.95, metavar="P", help="choose among the likeliest tokens that together have "
        "probability P, 1: all (default: %(default)s)")
    add("--min_p", type=float, default=0.0, metavar="P", help="choose among tokens at least P times as likely as the "
        "likeliest, 0: all (default: %(default)s)")
    add("--repetition_penalty", type=float, default=1.0, metavar="R", help="divides the logits of tokens that prompt "
        "and text have, 1: off (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times "
        "(default: none)")
    add("--seed", type=int, default=0, help="of a prompt's first text; the second has the next one (default: "
        "%(default)s)")
    add("--logprobs", action="store_true", help="also the log-probability of each token, before temperature and "
        "choice (default: off)")
    add("--json", action="store_true", help="a JSON object a line for each text, nothing else (default: off)")
    add("--batch", type=int, default=64, metavar="N", help="texts made at the same time (default: %(default)s)")
    add("--benchmark", action="store_true", help="no text: speed and memory for 1, 8 and 64 texts at a time, the last "
        "line as JSON (default: off)")
    add("--compile", action="store_true", help="fuse a step's operations with torch.compile, which takes a minute at "
        "the start (default: off)")
    add("--model", metavar="NAME", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with such a model, instead "
        "of a checkpoint (default: none)")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="(default: cuda where there is one)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="(default: bf16 on cuda, fp32 elsewhere)")
    add("--script", type=Path, metavar="PATH", help="training script with the model, run as it is; default: the one of "
        "that name beside sample.py")
    add("--out_dir", type=Path, default=Path("logs"), metavar="FOLDER",
        help="where the runs are (default: %(default)s)")
    args = parser.parse_args(words(argv))
    check_args(args)
    return args

def check_args(args: argparse.Namespace):
    """Raises UserError for a value out of range."""
    def need(good, name, remedy):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} {remedy}")
    need(args.num_samples >= 1, "num_samples", "must be at least 1")
    need(args.max_tokens >= 1, "max_tokens", "must be at least 1")
    need(0 <= args.temperature < math.inf, "temperature", "must be 0 or a positive number")
    need(args.top_k >= 0, "top_k", "must be 0 (all tokens) or a positive number")
    need(0 < args.top_p <= 1, "top_p", "must be above 0 and at most 1")
    need(0 <= args.min_p <= 1, "min_p", "must be between 0 and 1")
    need(0 < args.repetition_penalty < math.inf, "repetition_penalty", "must be a positive number")
    need("" not in args.stop, "stop", "has an empty string, which stands everywhere; give it some text")
    need(0 <= args.seed < 1 << 63, "seed", "must lie between 0 and 2^63 - 1")
    need(args.batch >= 1, "batch", "must be at least 1")
    need(args.prompt != "", "prompt", "is empty; give it some text, or leave the flag away")
    need(args.prompt is None or not args.prompts_file, "prompts_file", "comes with --prompt; give one of the two")
    need(not args.model or not (args.checkpoint or args.script), "model", "comes with --checkpoint or --script, which "
         "name another one; leave one away")
    if args.prompt is not None and "\\udc" in ascii(args.prompt):   # how Python holds bytes that are no text
        raise UserError(f"--prompt={ascii(args.prompt)} is not UTF-8; give it as UTF-8 text")

# -----------------------------------------------------------------------------
# Files of a checkpoint

def check_plain(path: Path):
    """Raises UserError unless the path is a file, and no link: what a checkpoint holds lies in its folder."""
    if path.is_symlink():
        raise UserError(f"{path} is a link; put the file itself there")
    if not path.is_file():
        raise UserError(f"{path} is missing; {OTHER}, or {TRAIN_FIRST}")

def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; raises UserError."""
    check_plain(path)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {OTHER}") from None
    if len(content) > limit:
        raise UserError(f"{path} is not what it should be, it has more than {limit} bytes; {OTHER}")
    return content

def read_json(path: Path, content: bytes) -> dict:
    """The JSON object in `content`, read from `path`; raises UserError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; {OTHER}")
    return value

def follow_latest(folder: Path) -> Path:
    """The checkpoint that the file `latest` in `folder` names; raises UserError unless it names a folder beside it."""
    content = read_file(folder / "latest", LATEST_BYTES).decode(errors="replace").strip()
    named = folder / content
    if not re.fullmatch(r"\w[\w.-]*", content, re.ASCII) or named.is_symlink() or not named.is_dir():
        raise UserError(f"{folder / 'latest'} says {ascii(content)}, which is no folder beside it; name one with "
                        "--checkpoint=")
    return named

def find_checkpoint(out_dir: Path | str) -> Path:
    """The newest checkpoint folder among the runs in `out_dir`, by the time of their `latest`; raises UserError."""
    latest = sorted(Path(out_dir).glob("*/checkpoint/latest"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not latest:
        raise UserError(f"--out_dir={out_dir} has no run with a checkpoint; {TRAIN_FIRST}")
    return follow_latest(latest[-1].parent)

def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the latest of the run; raises UserError."""
    if not path.is_dir():
        raise UserError(f"--checkpoint={path} is not a folder; leave it away for the newest one, or {TRAIN_FIRST}")
    folder = next((folder for folder in (path, path / "checkpoint") if (folder / "latest").is_file()), None)
    if folder:
        return follow_latest(folder)
    if not (path / "meta.json").exists():
        inside = sorted({found.parent for pattern in ("*/meta.json", "*/checkpoint/latest", "checkpoint/*/meta.json")
                         for found in path.glob(pattern)})
        if inside:
            more = f" and {len(inside) - 4} more" * (len(inside) > 4)
            raise UserError(f"--checkpoint={path} is none, but holds {', '.join(map(str, inside[:4]))}{more}; name one")
    return path

def read_meta(path: Path) -> dict:
    """The meta.json of the checkpoint folder `path` with fields of the right types; raises UserError."""
    meta = read_json(path / "meta.json", read_file(path / "meta.json", META_BYTES))
    if meta.get("format") != FORMAT:
        raise UserError(f"{path / 'meta.json'} has format {str(meta.get('format'))[:80]!r}, this sample.py reads "
                        f"{FORMAT}; use the sample.py of the version that made it")
    kinds = {"script": str, "source_sha256": str, "config": dict, "step": int, "stage": int, "tokenizer_sha256": str}
    for name, kind in kinds.items():
        if type(meta.get(name)) is not kind:
            raise UserError(f"{path / 'meta.json'} has {name} {str(meta.get(name))[:80]!r}, which should be of type "
                            f"{kind.__name__}; {OTHER}")
    return meta

class Tokenizer:
    """Text to token ids and back, from the plain data of a tokenizer.json.

    bos_id begins each document; ids run from 0 to vocab_size - 1. Raises an error of Python's for data that is none.
    """

    def __init__(self, data: dict):
        self.ranks = [base64.b64decode(text, validate=True) for text in data["ranks"]]
        self.ids = {text: token for token, text in enumerate(self.ranks)}
        self.bos_id, special, pattern = data["bos_id"], data["special_tokens"], data["pattern"]
        self.vocab_size = len(self.ranks) + len(special)
        if len(self.ids) != len(self.ranks) or any(bytes([byte]) not in self.ids for byte in range(256)):
            raise ValueError("its tokens are not distinct, or lack some of the 256 bytes")
        after = list(range(len(self.ranks), self.vocab_size))
        if sorted(special.values()) != after or self.bos_id not in after or type(self.bos_id) is not int:
            raise ValueError("its special tokens are not the last ones")
        self.encoding = None
        if pattern:
            import tiktoken
            self.encoding = tiktoken.Encoding(data["name"], pat_str=pattern, mergeable_ranks=self.ids,
                                              special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never special ones, whatever it says."""
        if self.encoding:
            pieces = (text[low:low + PIECE] for low in range(0, len(text), PIECE))
            return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]
        return [self.ids[bytes([byte])] for byte in text.encode()]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a special one."""
        return self.ranks[token] if token < len(self.ranks) else b""

def read_tokenizer(path: Path, meta: dict) -> Tokenizer:
    """The tokenizer in the checkpoint folder `path`; raises UserError unless it is the one of its meta.json."""
    content = read_file(file := path / "tokenizer.json", TOKENIZER_BYTES)
    if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(f"{file} is not the tokenizer that meta.json names by its sha256; copy there the "
                        "tokenizer.json of the shards that the model was trained on")
    data = read_json(file, content)
    if isinstance(pattern := data.get("pattern"), str) and pattern not in PATTERNS:
        raise UserError(f"{file} splits text by {ascii(pattern)[:80]}, which is not among the PATTERNS of sample.py; "
                        "put it there if you trust it")
    try:
        return Tokenizer(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a tokenizer ({error}); {OTHER}") from None

# -----------------------------------------------------------------------------
# Model

def find_script(name: str, script: Path | None) -> Path:
    """The training script to import: `script` if given, else the train_*.py of that name beside this file."""
    if script is not None:
        if script.suffix != ".py" or not script.is_file():
            raise UserError(f"--script={script} is not a Python file; name a training script, as in a run's folder")
        return script.resolve()
    beside = {path.stem: path for path in sorted(HERE.glob("train_*.py"))}
    if name not in beside:
        raise UserError(f"the checkpoint was made by the script {ascii(name)[:80]}, beside sample.py are "
                        f"{', '.join(beside) or 'none'}; name its source with --script=PATH")
    return beside[name]

@contextlib.contextmanager
def companions_of(script: Path):
    """While it lasts, `import` gives a script the companions in its own folder, not those that another one has."""
    others = {name: module for name in COMPANIONS if (module := sys.modules.get(name))
              and Path(module.__file__).parent != script.parent}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(script.parent))
    try:
        yield
    finally:
        sys.path.remove(str(script.parent))
        sys.modules.update(others)

def import_script(path: Path, needs=("GPT", "config_from_dict", "UserError"), remedy="name another source with "
                  "--script=PATH"):
    """The module of a training script, imported once; raises UserError if it cannot be or lacks what it `needs`."""
    name = path.stem if path.parent == HERE else f"script {path}"   # an old source is never taken for the one beside us
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)   # before it runs: dataclasses look their module up
        try:
            with companions_of(path):
                spec.loader.exec_module(sys.modules[name])
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise UserError(f"{path} cannot be imported ({type(error).__name__}: {error}); {remedy}") from None
    missing = [part for part in needs if not hasattr(sys.modules[name], part)]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; {remedy}")
    return sys.modules[name]

def choose_device(device: str, precision: str) -> tuple[str, str]:
    """Device and precision with "auto" filled in; raises UserError for a device that is not there."""
    import torch
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = ("cuda" if there["cuda"] else "cpu") if device == "auto" else device
    if not there[device]:
        raise UserError(f"--device={device}, but PyTorch sees no such device here; leave the flag away")
    return device, ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision

def build_model(module, meta: dict, precision: str, file_bytes: int):
    """The untrained model of a checkpoint's config on the CPU, to run as it is, uncompiled; raises UserError.

    file_bytes: size of the weights. A config that asks for much more gets no memory.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Bounded(TorchFunctionMode):
        left = max(file_bytes // 2, 1 << 27)                        # numbers; in the file one has two bytes or more

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.empty:
                self.left -= math.prod(args if isinstance(args[0], int) else args[0]) if args else 0
                if self.left < 0:
                    raise ValueError(f"it asks for more parameters than {file_bytes} bytes of weights can hold")
            return function(*args, **(kwargs or {}))
    try:
        cfg = replace(module.config_from_dict(meta["config"]), precision=precision, attention="plain", compile=False)
        if not 0 <= meta["stage"] < len(cfg.stages):
            raise UserError(f"the checkpoint is at stage {meta['stage']} of {len(cfg.stages)}; {OTHER}")
        with Bounded():
            return module.GPT(cfg).requires_grad_(False)
    except module.UserError as error:
        raise UserError(str(error)) from None
    except (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's config makes no model ({error}); {OTHER}") from None

def load_weights(model, file: Path, remedy: str):
    """Fills the model from a safetensors file; raises UserError that lists what is missing, extra or misshapen."""
    from safetensors import SafetensorError, safe_open
    check_plain(file)
    try:
        with safe_open(file, "pt") as found:                        # the header is read and checked, no tensor yet
            names, wanted = list(found.keys()), model.state_dict()
            faults = [f"missing {name}" for name in wanted if name not in names]
            faults += [f"extra {ascii(name)[1:-1][:80]}" for name in names if name not in wanted]
            for name, want in wanted.items() if not faults else ():
                have = found.get_slice(name)
                kind, shape = have.get_dtype(), tuple(have.get_shape())
                if (kind in ("F64", "F32", "F16", "BF16"), shape) != (want.is_floating_point(), want.shape):
                    faults.append(f"{name} is {kind} {shape}, not {tuple(want.shape)}")
            if not faults:
                model.load_state_dict({name: found.get_tensor(name) for name in names}, strict=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {OTHER}") from None
    if faults:
        more = f" and {len(faults) - 8} more" * (len(faults) > 8)
        raise UserError(f"{file} does not fit the model: {', '.join(faults[:8])}{more}; {remedy}")

def load_checkpoint(path: Path | str, device: str = "auto", script: Path | None = None, precision: str = "auto"):
    """(model, tokenizer, meta) of a checkpoint folder, the model ready for model(tokens) -> logits on its device.

    device: auto, cpu, cuda or mps; script: source to use instead of the one beside this file that meta.json names;
    precision: auto, bf16 or fp32. Prints a note if the source has changed since. Raises UserError.
    """
    path = Path(path)
    meta = read_meta(path)
    tokenizer = read_tokenizer(path, meta)
    source = find_script(meta["script"], script)
    device, precision = choose_device(device, precision)
    kept = path.parent.parent / f"{meta['script']}.py"              # each run folder holds the source that ran
    remedy = f"name the source that made it with --script={kept if kept.is_file() else 'PATH'}"
    check_plain(weights := path / "model.safetensors")
    model = build_model(import_script(source), meta, precision, weights.stat().st_size)
    if tokenizer.bos_id != model.cfg.bos_id or tokenizer.vocab_size > model.cfg.vocab_size:
        raise UserError(f"{path} has a tokenizer of {tokenizer.vocab_size} ids that begins documents with "
                        f"{tokenizer.bos_id}, but a model of {model.cfg.vocab_size} and {model.cfg.bos_id}; {OTHER}")
    load_weights(model, weights, remedy)
    model.set_stage(meta["stage"], final=True)
    if hashlib.sha256(source.read_bytes()).hexdigest() != meta["source_sha256"]:
        print(f"sample.py: note: {source.name} is not what made this checkpoint; if the text looks wrong, {remedy}",
              file=sys.stderr)
    return model.to(device).eval(), tokenizer, meta

def load_model(name: str, device: str = "auto", precision: str = "auto"):
    """(model, tokenizer, meta) of a published GPT-2, or a folder with one, by gpt2.py; raises UserError."""
    module = import_script(HERE / "gpt2.py", ("load", "UserError"), "--model needs it as it comes with sample.py")
    try:
        model, content, meta = module.load(name, *choose_device(device, precision))
    except module.UserError as error:
        raise UserError(str(error)) from None
    return model, Tokenizer(json.loads(content)), meta

# -----------------------------------------------------------------------------
# Drawing tokens (shapes: B rows, V tokens of the vocabulary)

@dataclass(frozen=True)
class Draw:
    """How the next token is drawn; the flags of the same names say what each does."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

def nucleus(scores_BV, p: float):
    """(B, 1) the lowest score among the likeliest tokens that together have probability p, to 2e-6 below it.

    The highest score of a row is 0. Sorting rows of 50,000 takes a GPU longer than a small model does; here scores fall
    into 4,096 bins, then those of the decisive bin into 4,096 more. Integers, whose sum does not depend on the order.
    """
    weights, top = (scores_BV.exp() * 2.0 ** 40).long(), scores_BV.new_zeros(len(scores_BV), 1)
    wanted = (p * weights.sum(1, keepdim=True)).long()
    for width in (2.0 ** -7, 2.0 ** -19):
        bins = ((top - scores_BV) / width).clamp(0, 4095).long()
        mass = weights.new_zeros(len(bins), 4096).scatter_add(1, bins, weights).cumsum(1)
        top = top - width * (mass < wanted).sum(1, keepdim=True)
    return top - width

def filter_logits(logits_BV, draw: Draw, seen_BV=None):
    """(B, V) what softmax turns into the probabilities to draw with, -inf for what is left out.

    In this order: repetition_penalty on tokens in seen_BV (bool), temperature, top_k, top_p of what top_k leaves,
    min_p. Tokens exactly as likely as the last one kept are kept.
    """
    if draw.repetition_penalty != 1:
        logits = logits_BV * draw.repetition_penalty
        logits_BV = logits_BV.where(~seen_BV, logits.where(logits_BV < 0, logits_BV / draw.repetition_penalty))
    scores = logits_BV - logits_BV.amax(1, keepdim=True)
    if draw.temperature == 0:
        return scores
    scores = scores / max(draw.temperature, 1e-6)                   # below that fp32 divides by zero
    if draw.top_k:
        scores = scores.masked_fill(scores < scores.topk(draw.top_k).values[:, -1:], -math.inf)
    if draw.top_p < 1:
        scores = scores.masked_fill(scores < nucleus(scores, draw.top_p), -math.inf)
    if draw.min_p:
        scores = scores.masked_fill(scores < math.log(draw.min_p), -math.inf)
    return scores

def mix(x):
    """Integers below 2^32, scattered over that range; neighbours have nothing in common, devices agree."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45d9f3b) & 0xffffffff
    return x ^ (x >> 16)

def gumbel_noise(seed_B, step, ids_V):
    """(B, V) noise by which the largest of scores and noise is a token drawn with its probability (Gumbel).

    It depends on the row's seed, the step and the token alone, not on the other rows.
    """
    key = mix((seed_B + step * 0x9e3779b9) & 0xffffffff)
    bits = mix((key[:, None] + ids_V * 0x9e3779b1) & 0xffffffff)
    uniform = ((bits >> 9).float() + 0.5) * 2.0 ** -23              # exact in fp32, never 0 or 1
    return -(-uniform.log()).log()

# -----------------------------------------------------------------------------
# Engine

def in_parts(x_BV):
    """(B, 64, V / 64): the same in order, filled up with -inf."""
    import torch
    fill = torch.nn.functional.pad(x_BV, (0, -x_BV.size(1) % 64), value=-math.inf)
    return fill.view(x_BV.size(0), 64, -1)

@functools.cache                         # compiled code is for one class
def product_sums():
    """A class of contexts in which a matrix of one row is multiplied by summing up, as compiled code does fastest."""
    import torch
    from torch.overrides import TorchFunctionMode
    linear, product = torch.nn.functional.linear, torch.Tensor.__matmul__

    class ProductSums(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            known = function in (linear, product) and not kwargs and args[1].dim() == 2
            if not known or args[0].numel() > args[0].size(-1):
                return function(*args, **(kwargs or {}))
            row, matrix, *bias = args
            y = (row.reshape(1, -1).float() * (matrix if function is linear else matrix.T).float()).sum(1)
            y = y + bias[0] if bias and bias[0] is not None else y
            return y.to(row.dtype).view(*row.shape[:-1], -1)
    return ProductSums

class Engine:
    """Continues prompts: `batch` rows at a time, each of up to max_tokens tokens with its prompt.

    The model has cfg.bos_id, new_cache, decode and a cache with fill and bytes_read, as train_gpt.GPT. On CUDA a step,
    from one token to the next, is captured once as a graph: the tensors it works on stay where they are. compile: fuse
    its operations first. Raises ValueError if the model cannot go as far as max_tokens.
    """

    def __init__(self, model, vocab_size: int, draw: Draw = Draw(), batch: int = 1, max_tokens: int = 1024,
                 compile: bool = False):
        import torch
        self.model, self.vocab_size, self.draw, self.batch = model, vocab_size, draw, batch
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(batch, max_tokens, chunk=1)
        with torch.device(self.device):
            self.token, self.logprob = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch)
            self.seed, self.count = torch.zeros(batch, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            self.ids = torch.arange(vocab_size)
            self.seen = torch.zeros(batch, vocab_size, dtype=torch.bool) if draw.repetition_penalty != 1 else None
        self.step, cuda = self.advance, self.device.type == "cuda"
        if compile:
            step = torch.compile(self.advance, dynamic=False, fullgraph=True)

            def summing():
                with product_sums()():
                    step()
            self.step = step if batch > 1 else summing              # products of one row are fast as sums only
        if cuda:
            self.capture()

    def choose(self, logits_BV):
        """Draws each row's next token from the model's logits, and notes its log-probability."""
        logits = logits_BV[:, :self.vocab_size].float()
        scores = filter_logits(logits, self.draw, self.seen)
        if self.draw.temperature:
            scores = scores + gumbel_noise(self.seed, self.count, self.ids)
        # in two steps each, of which the first keeps all of a GPU busy also with one row
        best, places = (parts := in_parts(scores)).max(2)
        part = best.argmax(1, keepdim=True)
        token = part * parts.size(2) + places.gather(1, part)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        total = in_parts(logits).logsumexp(2).logsumexp(1)
        self.logprob.copy_(logits.gather(1, token)[:, 0] - total)
        self.token.copy_(token[:, 0])
        self.count.add_(1)

    def advance(self):
        """One step: from the tokens drawn last to the next."""
        self.choose(self.model.decode(self.token[:, None], self.cache)[:, 0])

    def capture(self):
        """Replaces the step by a CUDA graph of it; what it did to the cache on the way is overwritten by `start`."""
        import torch
        side, step = torch.cuda.Stream(), self.step
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self.step = graph.replay

    def start(self, prompts: list[list[int]], rows: list[tuple[int, int]]):
        """Reads the prompts that `rows` name, each once, and draws the first token of each row."""
        import torch
        used = sorted({prompt for prompt, _ in rows})
        rows = rows + rows[-1:] * (self.batch - len(rows))          # rows that nobody looks at
        lengths = torch.tensor([len(prompts[prompt]) for prompt in used])
        tokens = torch.zeros(len(used), int(lengths.max()), dtype=torch.int32)
        for line, prompt in zip(tokens, used):
            line[:len(prompts[prompt])] = torch.tensor(prompts[prompt])
        cache = self.model.new_cache(*tokens.shape)
        logits = self.model.decode(tokens.to(self.device), cache, lengths.to(self.device), last=True)[:, 0]
        index = torch.tensor([used.index(prompt) for prompt, _ in rows], device=self.device)
        self.cache.fill(cache, index)
        self.seed.copy_(torch.tensor([random.Random(f"{seed} {prompts[prompt]}").getrandbits(32)
                                     for prompt, seed in rows]))
        self.count.zero_()
        if self.seen is not None:
            self.seen.zero_()
            for line, (prompt, _) in zip(self.seen, rows):          # not the id that begins, and ends, a document
                line[[token for token in prompts[prompt] if token != self.model.cfg.bos_id]] = True
        self.choose(logits[index])

    def read(self):
        """Begins to copy the last tokens to the host; a function that waits for (tokens, log-probabilities)."""
        import torch
        if self.device.type != "cuda":
            tokens, logprobs = self.token.tolist(), self.logprob.tolist()
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

    def steps(self, prompts: list[list[int]], rows: list[tuple[int, int]], count: int):
        """Yields (tokens, log-probabilities), lists with one of each row, `count` times.

        rows: (index of the prompt, seed), at most `batch`; a prompt and `count` tokens have to fit into max_tokens. On
        CUDA the next step is on its way before a token is handed out. Raises UserError if the model is broken.
        """
        assert len(rows) <= self.batch, "more rows than the engine was made for"
        self.start(prompts, rows)
        waiting, behind = deque(), self.device.type == "cuda"
        for n in range(count + behind):
            if n < count:
                if n:
                    self.step()
                waiting.append(self.read())
            if len(waiting) > behind or n >= count:
                tokens, logprobs = waiting.popleft()()
                if any(map(math.isnan, logprobs)):
                    raise UserError(f"the model's logits are not finite; {OTHER}")
                yield tokens[:len(rows)], logprobs[:len(rows)]

# -----------------------------------------------------------------------------
# Text

class Text:
    """One text as its tokens come, in whole characters (bad bytes are U+FFFD) and up to a stop string.

    text: what is certain so far; unseen: what of it, after `lead`, is still to be printed. finish: "end" where the
    model ends the document, "stop" before a stop string, "length" at the most tokens asked for; None until then.
    tokens and logprobs are those of the text, and of the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop=(), prompt: int = 0, seed: int = 0, lead: str = ""):
        self.tokenizer, self.stop, self.prompt, self.seed = tokenizer, stop, prompt, seed
        self.text, self.unseen, self.held, self.finish = "", lead, "", None
        self.tokens, self.logprobs, self.decoder = [], [], codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, logprob: float = 0.0):
        """Takes in the next token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.take(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def close(self, finish: str):
        """No token follows."""
        self.take(self.decoder.decode(b"", final=True))
        if not self.finish:
            self.finish, self.text, self.unseen = finish, self.text + self.held, self.unseen + self.held

    def take(self, new: str):
        """Appends to the text what cannot be the beginning of a stop string."""
        self.held += new
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        begun = [n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])]
        certain = min(found) if found else len(self.held) - max(begun, default=0)
        self.text, self.unseen = self.text + self.held[:certain], self.unseen + self.held[:certain]
        self.held = self.held[certain:]
        if found:
            self.finish = "stop"

def decode(tokenizer: Tokenizer, tokens):
    """Yields the text of an iterable of ids as it becomes certain: no broken characters, bad bytes are U+FFFD."""
    text = Text(tokenizer)
    for token in tokens:
        text.add(token)
        if text.unseen:
            yield text.unseen
            text.unseen = ""
    text.close("end")
    if text.unseen:
        yield text.unseen

def generate(engine: Engine, prompts: list[list[int]], texts: list[Text], count: int):
    """Writes the texts, of up to `count` tokens each, `engine.batch` at a time; yields after every step."""
    for low in range(0, len(texts), engine.batch):
        group = texts[low:low + engine.batch]
        for tokens, logprobs in engine.steps(prompts, [(text.prompt, text.seed) for text in group], count):
            for text, token, logprob in zip(group, tokens, logprobs):
                if not text.finish and token == engine.model.cfg.bos_id:
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

def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[str]:
    """The prompts of the flags; raises UserError."""
    if not args.prompts_file:
        return [args.prompt or (WORDS_PROMPT if tokenizer.encoding else BYTES_PROMPT)]
    try:
        with open(args.prompts_file, "rb") as file:
            content = file.read(PROMPTS_BYTES + 1)
        if len(content) > PROMPTS_BYTES:
            raise UserError(f"--prompts_file={args.prompts_file} has more than {PROMPTS_BYTES} bytes; divide it")
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file={args.prompts_file} cannot be read ({error}); give a file of UTF-8 text, one "
                        "prompt a line") from None
    if "" in lines or not lines:
        raise UserError(f"--prompts_file={args.prompts_file} has no prompt in line {[*lines, ''].index('') + 1}; take "
                        "the empty line out")
    return lines

def make_engine(args: argparse.Namespace, model, vocab_size: int, batch: int, longest: int) -> Engine:
    """The engine for prompts of up to `longest` tokens; raises UserError if the model cannot go as far."""
    draw = Draw(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    try:
        return Engine(model, vocab_size, draw, batch, longest + args.max_tokens, args.compile)
    except ValueError as error:
        raise UserError(f"a prompt of {longest - 1} tokens and --max_tokens={args.max_tokens} are too much for the "
                        f"model ({error}); shorten it or lower --max_tokens") from None

def show(args: argparse.Namespace, prompts: list[str], texts: deque):
    """Prints what is new of the texts, in their order: the first one as it grows; takes out those that are finished."""
    while texts:
        text = texts[0]
        if text.unseen and not args.json:
            print(text.unseen, end="", flush=True)
            text.unseen = ""
        if not text.finish:
            return
        texts.popleft()
        values = {"prompt": prompts[text.prompt], "seed": text.seed, "text": text.text, "finish": text.finish,
                  "tokens": text.tokens} | ({"logprobs": text.logprobs} if args.logprobs else {})
        print(json.dumps(values) if args.json else "", flush=True)
        for token, logprob in zip(text.tokens, text.logprobs if args.logprobs and not args.json else ()):
            print(f"{logprob:10.4f}  {text.tokenizer.token_bytes(token).decode(errors='replace')!r}")

def sample(args: argparse.Namespace):
    """Loads the model and prints the texts as they come, or the benchmark; raises UserError."""
    if args.model:
        model, tokenizer, meta = load_model(args.model, args.device, args.precision)
        name = args.model
    else:
        path = resolve_checkpoint(args.checkpoint) if args.checkpoint else find_checkpoint(args.out_dir)
        model, tokenizer, meta = load_checkpoint(path, args.device, args.script, args.precision)
        val_loss = f", validation loss {meta['val_loss']:.4f}" if isinstance(meta.get("val_loss"), float) else ""
        name = f"{path}, {meta['script']} after {meta['step']} steps{val_loss}"
    if args.top_k > tokenizer.vocab_size:
        raise UserError(f"--top_k={args.top_k} is more than the {tokenizer.vocab_size} tokens there are; lower it")
    prompts = read_prompts(args, tokenizer)
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    print(f"sample.py: {name}", file=sys.stderr)
    if args.benchmark:
        return benchmark(args, model, tokenizer.vocab_size, ids[0], name)

    rows = [(prompt, args.seed + i) for prompt in range(len(prompts)) for i in range(args.num_samples)]
    texts = [Text(tokenizer, args.stop, prompt, seed, f"--- sample {n} of {len(rows)}, --seed={seed}\n"
                  * (len(rows) > 1) + prompts[prompt]) for n, (prompt, seed) in enumerate(rows, 1)]
    engine = make_engine(args, model, tokenizer.vocab_size, min(args.batch, len(texts)), max(map(len, ids)))
    unfinished = deque(texts)
    show(args, prompts, unfinished)
    for _ in generate(engine, ids, texts, args.max_tokens):
        show(args, prompts, unfinished)

def copy_speed(device) -> float:
    """Bytes per second that a large copy reads and writes."""
    import torch
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), dtype=torch.int32, device=device)
    target, wait = source.clone(), torch.cuda.synchronize if device.type == "cuda" else lambda: None
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

def benchmark(args: argparse.Namespace, model, vocab_size: int, ids: list[int], name: str):
    """Prints speed, memory and share of the memory's speed for three batches; the last line is JSON."""
    import resource

    import torch
    weight = next(model.parameters())
    cuda, precision = weight.is_cuda, str(weight.dtype)[6:]
    if not args.prompt:
        ids = ids[:1] + random.Random(0).choices(range(vocab_size - 1), k=127)
    weights, speed, results = model.matmul_parameters * weight.element_size(), copy_speed(weight.device), []
    machine = torch.cuda.get_device_name(weight.device) if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, torch {torch.__version__}, {precision}, a prompt of {len(ids)} tokens and {args.max_tokens} new "
          f"ones\nlimit of a step = ({weights / 1e6:.1f} MB of weights + keys and values that are visible after half "
          f"of the text) / {speed / 1e9:.1f} GB/s, which a large copy reads and writes\n\n"
          "batch    first token         step  tokens/s     memory  read a step      limit  limit / step")
    for batch in (1, 8, 64):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        engine = make_engine(args, model, vocab_size, batch, len(ids))
        time_steps(engine, ids, 4)                                  # warm
        first, step = time_steps(engine, ids, args.max_tokens)
        read = weights + engine.cache.bytes_read(len(ids) + args.max_tokens // 2)
        # the tensors on a GPU, elsewhere the process so far, in bytes on macOS and else in KiB
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(
            resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        result = {"batch": batch, "first_token_ms": 1e3 * first, "step_ms": 1e3 * step, "tokens_per_s": batch / step,
                  "memory_mb": memory / 1e6, "read_mb": read / 1e6, "limit_ms": 1e3 * read / speed,
                  "limit_share": read / speed / step}
        print("{:5d}  {:10.2f} ms  {:8.3f} ms  {:8.0f}  {:6.0f} MB  {:8.1f} MB  {:6.3f} ms  {:12.3f}".format(
            *result.values()), flush=True)
        results.append(result)
        del engine
    print(json.dumps({"model": name, "device": machine, "torch": torch.__version__, "precision": precision,
                      "compile": args.compile, "prompt_tokens": len(ids), "new_tokens": args.max_tokens,
                      "copy_gb_per_s": speed / 1e9, "batches": results}))

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 the user can put it right, 130 interrupted."""
    try:
        sys.stdout.reconfigure(errors="replace")                    # a terminal that knows fewer characters is no error
        sample(parse_args(argv))
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsample.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:                                         # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:                                        # a name that is too long, a folder that is closed
        print(f"sample.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
