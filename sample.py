"""Text from a trained model: goes on from a prompt with the newest checkpoint, or with the one you name.

    python sample.py                                            # the newest checkpoint under logs/
    python sample.py --prompt="The old house" --num_samples=3
    python sample.py --checkpoint=logs/<run>/checkpoint/step_000900 --temperature=0

A checkpoint is numbers and plain JSON. Its meta.json names the training script that made it, which must be one of the
train_*.py beside this file; other code runs only if you name it with --script=PATH. The same seed gives the same text
on the same kind of machine. Every new token looks at the whole text so far, up to the longest document that the model
was trained on; from there on at the last that many tokens.
"""
import argparse
import base64
import codecs
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

# PyTorch takes seconds to import, so the functions that need it do it: --help and mistakes are answered at once

HERE = Path(__file__).resolve().parent
FORMAT = 1                                                          # of meta.json
META_BYTES, TOKENIZER_BYTES, LATEST_BYTES = 1 << 20, 1 << 26, 256   # larger files are not what they should be
TRAIN_FIRST = "train one with ./run.sh or python train_gpt.py --preset=tiny"
OTHER = "choose another checkpoint with --checkpoint="
BYTES_PROMPT, WORDS_PROMPT = "def ", "The"                          # the tiny preset learns Python, byte by byte


class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""


# -----------------------------------------------------------------------------
# Command line

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
    add("--num_samples", type=int, default=1, metavar="N", help="number of texts (default: %(default)s)")
    add("--max_tokens", type=int, default=400, metavar="N", help="longest text, in tokens after the prompt; it ends "
        "sooner where the model ends the document (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1: more likely tokens, above 1: more surprising ones, "
        "0: always the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=0, metavar="K", help="choose among the K likeliest tokens, 0: all "
        "(default: %(default)s)")
    add("--top_p", type=float, default=0.95, metavar="P", help="choose among the likeliest tokens that together have "
        "probability P, 1: all (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first text; the second has the next one (default: %(default)s)")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="(default: cuda where there is one)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="(default: bf16 on cuda, fp32 elsewhere)")
    add("--script", type=Path, metavar="PATH", help="training script with the model, run as it is; default: the one of "
        "that name beside sample.py")
    add("--out_dir", type=Path, default=Path("logs"), metavar="FOLDER",
        help="where the runs are (default: %(default)s)")
    args = parser.parse_args(argv)
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
    need(0 <= args.seed < 1 << 63, "seed", "must lie between 0 and 2^63 - 1")
    need(args.prompt != "", "prompt", "is empty; give it some text, or leave the flag away")
    if args.prompt is not None and "\\udc" in ascii(args.prompt):   # how Python holds bytes that are no text
        raise UserError(f"--prompt={ascii(args.prompt)} is not UTF-8; give it as UTF-8 text")


# -----------------------------------------------------------------------------
# Files of a checkpoint

def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {OTHER}, or {TRAIN_FIRST}")
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
    if not re.fullmatch(r"\w[\w.-]*", content, re.ASCII) or not (folder / content).is_dir():
        raise UserError(f"{folder / 'latest'} says {ascii(content)}, which is no folder beside it; name one with "
                        "--checkpoint=")
    return folder / content


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
    return follow_latest(folder) if folder else path


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
        if sorted(special.values()) != after or self.bos_id not in after:
            raise ValueError("its special tokens are not the last ones")
        self.encoding = None
        if pattern:
            import tiktoken
            self.encoding = tiktoken.Encoding(data["name"], pat_str=pattern, mergeable_ranks=self.ids,
                                              special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never special ones, whatever it says."""
        if self.encoding:
            return self.encoding.encode_ordinary(text)
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
    try:
        return Tokenizer(read_json(file, content))
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


def import_script(path: Path):
    """The module of a training script, imported once; raises UserError if it cannot be or is not a training script."""
    name = path.stem if path.parent == HERE else f"script {path}"   # an old source is never taken for the one beside us
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)   # before it runs: dataclasses look their module up
        try:
            spec.loader.exec_module(sys.modules[name])
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise UserError(f"{path} cannot be imported ({type(error).__name__}: {error}); name another source with "
                            "--script=PATH") from None
    missing = [part for part in ("GPT", "config_from_dict", "UserError") if not hasattr(sys.modules[name], part)]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; name a training script with --script=PATH")
    return sys.modules[name]


def choose_device(device: str, precision: str) -> tuple[str, str]:
    """Device and precision with "auto" filled in; raises UserError for a device that is not there."""
    import torch
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = ("cuda" if there["cuda"] else "cpu") if device == "auto" else device
    if not there[device]:
        raise UserError(f"--device={device}, but PyTorch sees no such device here; leave the flag away")
    return device, ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision


def build_model(module, meta: dict, precision: str):
    """The untrained model of a checkpoint's config on the CPU, to run as it is, uncompiled; raises UserError."""
    try:
        cfg = replace(module.config_from_dict(meta["config"]), precision=precision, attention="plain", compile=False)
        if not 0 <= meta["stage"] < len(cfg.stages):
            raise UserError(f"the checkpoint is at stage {meta['stage']} of {len(cfg.stages)}; {OTHER}")
        return module.GPT(cfg).requires_grad_(False)
    except module.UserError as error:
        raise UserError(str(error)) from None
    except (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's config makes no model ({error}); {OTHER}") from None


def load_weights(model, file: Path, remedy: str):
    """Fills the model from a safetensors file; raises UserError that lists what is missing, extra or misshapen."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {OTHER}") from None
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"extra {ascii(name)[1:-1]}" for name in found if name not in wanted]
    for name, want in wanted.items():
        have = found.get(name, want)
        if (have.shape, have.is_floating_point()) != (want.shape, want.is_floating_point()):
            faults.append(f"{name} is {str(have.dtype)[6:]} {tuple(have.shape)}, not {tuple(want.shape)}")
    if faults:
        more = f" and {len(faults) - 8} more" * (len(faults) > 8)
        raise UserError(f"{file} does not fit the model: {', '.join(faults[:8])}{more}; {remedy}")
    model.load_state_dict(found, strict=True)


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
    model = build_model(import_script(source), meta, precision)
    if tokenizer.bos_id != model.cfg.bos_id or tokenizer.vocab_size > model.cfg.vocab_size:
        raise UserError(f"{path} has a tokenizer of {tokenizer.vocab_size} ids that begins documents with "
                        f"{tokenizer.bos_id}, but a model of {model.cfg.vocab_size} and {model.cfg.bos_id}; {OTHER}")
    load_weights(model, path / "model.safetensors", remedy)
    model.set_stage(meta["stage"], final=True)
    if hashlib.sha256(source.read_bytes()).hexdigest() != meta["source_sha256"]:
        print(f"sample.py: note: {source.name} is not what made this checkpoint; if the text looks wrong, {remedy}",
              file=sys.stderr)
    return model.to(device).eval(), tokenizer, meta


# -----------------------------------------------------------------------------
# Sampling

def context_tokens(model) -> int:
    """The longest document the model was trained on, in tokens with its begin-of-document id."""
    return max(stage.max_doc_tokens for stage in model.cfg.stages)


def next_token(logits_V, temperature: float, top_k: int, top_p: float, generator) -> int:
    """One token drawn from logits (V,) on the CPU; top_p is of the probability that the top_k tokens share."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    scores, tokens = logits_V.double().sort(descending=True, stable=True)
    scores = scores[:top_k or None]
    probs = ((scores - scores[0]) / temperature).softmax(0)
    before = probs.cumsum(0) - probs                                # the first token is always kept
    return int(tokens[probs.where(before < top_p, 0).multinomial(1, generator=generator)])


def generate(model, ids: list[int], vocab_size: int, max_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0):
    """Yields up to max_tokens ids below vocab_size that follow `ids`, ending before a begin-of-document id.

    top_k=0, top_p=1: all tokens; temperature=0: always the likeliest. Raises UserError if the model is broken.
    """
    import torch
    ids, context, device = list(ids), context_tokens(model), next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)                 # on the CPU, so that devices draw the same numbers
    for _ in range(max_tokens):
        tokens = torch.tensor(ids[-context:], dtype=torch.int32, device=device)     # as in training: pairs are hashed
        with torch.inference_mode():
            logits = model(tokens)[-1, :vocab_size].float().cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite; choose an earlier checkpoint with --checkpoint=")
        ids.append(next_token(logits, temperature, top_k, top_p, generator))
        if ids[-1] == model.cfg.bos_id:
            return
        yield ids[-1]


def decode(tokenizer: Tokenizer, tokens):
    """Yields the text of an iterable of ids as it becomes certain: no broken characters, bad bytes are U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(tokenizer.token_bytes(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def sample(args: argparse.Namespace):
    """Loads the checkpoint and prints the texts as they come; raises UserError."""
    path = resolve_checkpoint(args.checkpoint) if args.checkpoint else find_checkpoint(args.out_dir)
    model, tokenizer, meta = load_checkpoint(path, args.device, args.script, args.precision)
    prompt = args.prompt or (WORDS_PROMPT if tokenizer.encoding else BYTES_PROMPT)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(ids) > context_tokens(model):
        raise UserError(f"--prompt has {len(ids) - 1} tokens, the model was trained on documents of up to "
                        f"{context_tokens(model) - 1}; shorten it")
    if args.top_k > tokenizer.vocab_size:
        raise UserError(f"--top_k={args.top_k} is more than the {tokenizer.vocab_size} tokens there are; lower it")
    val_loss = f", validation loss {meta['val_loss']:.4f}" if isinstance(meta.get("val_loss"), float) else ""
    print(f"sample.py: {path}, {meta['script']} after {meta['step']} steps{val_loss}", file=sys.stderr)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}, --seed={args.seed + i}")
        print(prompt, end="", flush=True)
        tokens = generate(model, ids, tokenizer.vocab_size, args.max_tokens, args.temperature, args.top_k, args.top_p,
                          args.seed + i)
        for text in decode(tokenizer, tokens):
            print(text, end="", flush=True)
        print(flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 the user can put it right, 130 interrupted."""
    try:
        sys.stdout.reconfigure(errors="replace")                    # a terminal that knows fewer characters is no error
        sample(parse_args(argv))
        return 0
    except UserError as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsample.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:                                         # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
