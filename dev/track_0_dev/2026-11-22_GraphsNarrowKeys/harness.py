"""What a run needs and an experiment does not change; one file beside the training scripts, which all import it.

Command line, shards, setup and logging, choice of backends, checkpoints, processes. How a model is built and trained
stands in the scripts; nothing of theirs is imported here, it comes as an argument:

    script      the path of the script: its name and its source, which run folder and checkpoint hold on to
    cfg         its Hyperparameters, of which this file reads the fields that all scripts have
    model       parameters, buffers, matmul_parameters; optimizer: state, and share_rows, which says how it is sharded
    module      the script itself, only in the process that tries backends: config_from_dict, probe_case

A run folder and a record keep this file beside the script, and log.txt begins with both.
"""
import base64
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import get_origin

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# -----------------------------------------------------------------------------
# Command line

MAX_TOKENS = 1 << 24                     # of a slot, a stream, a window: more is a slip of the pen

class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""

    def __str__(self):                   # a line that a terminal only shows, whatever a file or a flag put into it
        line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(super().__str__().split()))
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"

class RankError(UserError):
    """A UserError that other ranks may not see."""

def convert(value, kind):
    """A value read from JSON as the type an annotation names, rows of tables too; raises ValueError or TypeError.

    A float may be written as a whole number; numbers are finite and below 2^63.
    """
    if is_dataclass(kind):
        row = dict(zip(kind.__annotations__, value, strict=True)) if isinstance(value, list) else value
        return kind(**{name: convert(item, kind.__annotations__[name]) for name, item in row.items()})
    if get_origin(kind) is tuple:
        kinds = kind.__args__[:1] * len(value) if kind.__args__[-1] is ... else kind.__args__
        return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(value)
    if kind in (int, float) and not abs(value) < 2**63:
        raise ValueError(value)
    return value

def parse_value(name: str, text: str, kind):
    """Value of `--name=text` with the type of the dataclass annotation; tables are JSON lists of rows."""
    row = kind.__args__[0] if get_origin(kind) is tuple else None
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if is_dataclass(row):
            return convert(json.loads(text), kind)
        return tuple(map(row, text.split(","))) if row else kind(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}
        wanted = f"a JSON list of {row.__name__} rows" if is_dataclass(row) else wanted.get(
            kind, "numbers separated by commas")
        raise UserError(f"--{name}={text} is not {wanted}; --help lists the flags and their defaults") from None

def parse_config(argv: list[str], presets: dict):
    """The config of `--preset=name`, by default the first, and `--field=value` flags; UserError on anything else."""
    flags = {}
    for arg in argv:
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            raise UserError(f"cannot read {arg!r}; flags look like --field=value, --help lists them")
        flags[name] = value
    preset = flags.pop("preset", next(iter(presets)))
    if preset not in presets:
        raise UserError(f"--preset={preset} does not exist; there are {', '.join(presets)}")
    kinds = {field.name: field.type for field in fields(presets[preset])}
    for name in flags.keys() - kinds.keys():
        raise UserError(f"--{name} is not a flag; --help lists them")
    cfg = replace(presets[preset], **{name: parse_value(name, value, kinds[name]) for name, value in flags.items()})
    check_config(cfg)
    return cfg

def check_config(cfg):
    """Raises UserError for a value out of range, values that contradict each other, and what the script refuses."""
    def need(good, names, remedy):
        for name in names.split():
            if not good(getattr(cfg, name)):
                raise UserError(f"--{name}={str(getattr(cfg, name)).strip('()')} {remedy}")
    need(lambda value: 1 <= value < 2**63, "num_iterations val_tokens val_stream_tokens slot_tokens model_dim head_dim "
         "mlp_dim gate_dim bigram_rows bigram_signs vocab_multiple keep", "must be at least 1")
    need(lambda value: not value or value.removesuffix("min").isdecimal(), "save_every",
         "is neither steps, like 500, nor minutes, like 10min")
    need(lambda value: 0 <= value < 2**63, "stop_after val_every micro_batch_tokens candidates qk_dim vocab_size seed "
         "momentum_warmup", "must not be negative or huge")
    need(lambda value: 0 <= value <= 1, "cooldown momentum_cooldown lr_floor untie", "must be in 0..1")
    need(lambda value: 0 < value < math.inf, "lr attn_scale rope_base", "must be positive")
    need(lambda tokens: tokens <= MAX_TOKENS, "val_stream_tokens slot_tokens", f"must be at most {MAX_TOKENS}")
    need(lambda pair: len(pair) == 2 and 1 <= min(pair) and max(pair) <= MAX_TOKENS, "final_windows",
         f"must be two numbers in 1..{MAX_TOKENS}")
    need(lambda pair: len(pair) == 2 and all(0 <= item < 1 for item in pair), "momentum", "must be two numbers in 0..1")
    choices = {"device": "auto cuda cpu mps", "precision": "bf16 fp32",
               "attention": "flex flex_small varlen fa3 plain auto"}
    for name, known in choices.items():
        need(lambda value: value in known.split(), name, f"is unknown; choose from {known}")
    need(lambda dim: dim % 4 == 0, "head_dim qk_dim", "must be a multiple of 4")
    need(lambda dim: dim % (2 * cfg.head_dim) == 0 and dim >= 12, "model_dim",
         f"must be at least 12 and hold an even number of heads of --head_dim={cfg.head_dim}")
    need(lambda count: count == 0 or count >= cfg.slot_tokens, "candidates",
         f"must be 0 or at least --slot_tokens={cfg.slot_tokens}, so that all targets fit")
    need(lambda tokens: tokens % cfg.slot_tokens == 0, "micro_batch_tokens",
         f"must be a multiple of --slot_tokens={cfg.slot_tokens}")
    for i, stage in enumerate(cfg.stages):
        before, rest = cfg.stages[i - 1].until if i else 0, (stage.max_doc_tokens, stage.short, stage.long)
        if (not before < stage.until < 2**31 or stage.batch_tokens % cfg.slot_tokens or not stage.lr > 0
                or min(stage.batch_tokens, *rest) < 1 or max(rest) > MAX_TOKENS or stage.batch_tokens >= 2**63):
            raise UserError(f"stage {i}: until={stage.until} must be above the row before, the rest positive, "
                            f"documents and windows at most {MAX_TOKENS} tokens, and batch_tokens={stage.batch_tokens} "
                            f"a multiple of --slot_tokens={cfg.slot_tokens}")
    if not cfg.stages or cfg.total_steps < cfg.num_iterations:
        raise UserError("the stage table ends before the run: its last row must have until >= 1")
    cfg.check_tables()

def config_from_dict(values: dict, kind: type):
    """A config of this kind from that in a checkpoint's meta.json; raises UserError on unknown or missing fields."""
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or values.keys() != names:
        odd = sorted(values.keys() ^ names) if isinstance(values, dict) else values
        raise UserError(f"the checkpoint's config and this script differ in {odd}; use the script that made it")
    try:
        cfg = convert(values, kind)
        check_config(cfg)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"the checkpoint's config cannot be read ({error}); use the script that made it") from None
    return cfg

def help_text(script: Path, presets: dict) -> str:
    """What --help prints: how to start, and every flag with its default and the comment beside it."""
    source, (name, default) = script.read_text(), next(iter(presets.items()))
    lines = source.split("class Hyperparameters:")[1].split("@property")[0].splitlines()
    comments = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in lines if ":" in line}
    text = ["\n\n".join(source.split('"""')[1].split("\n\n")[:2]), "", "Flags, --field=value, with the defaults of "
            f"--preset={name} (all presets: {', '.join(presets)}):", ""]
    for field in fields(default):
        value = getattr(default, field.name)
        if isinstance(value, tuple):
            value = "JSON rows, see the table in the script" if is_dataclass(value[0]) else ",".join(map(str, value))
        text.append(f"  --{field.name}={value}".ljust(66) + comments.get(field.name, ""))
    return "\n".join(text)

# -----------------------------------------------------------------------------
# Shards

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
JSON_BYTES = 1 << 24                     # a larger file of JSON is none
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"

@dataclass(frozen=True)
class Shard:
    """One file of tokens; see read_header for what is checked."""
    path: str
    num_tokens: int
    vocab_size: int
    bos_id: int
    width: int                           # bytes per token
    tokenizer: str                       # sha256 of its tokenizer.json
    modified: int                        # when it was last written to

    def read(self) -> np.ndarray:
        """(num_tokens,) uint16 or uint32, mapped from the file; raises RankError if it is not what it was."""
        try:
            if os.stat(self.path).st_mtime_ns != self.modified:
                raise ValueError("it was written to")
            return np.memmap(self.path, f"<u{self.width}", "r", offset=HEADER_BYTES, shape=(self.num_tokens,))
        except (OSError, ValueError) as error:
            raise RankError(f"{self.path} changed or disappeared while in use ({error}); make it again") from None

def read_header(path: str) -> Shard:
    """Header of a shard, with zeros read as GPT-2's values; raises UserError if the file is not a whole shard."""
    again = "make or download it again (python data/fineweb.py or python data/text.py)"
    if not os.path.isfile(path):         # reading a pipe would wait for its writer
        raise UserError(f"{path} is not a file; {again}")
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {again}") from None
    if size < HEADER_BYTES or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        found = f"begins with {header[0]}, version {header[1]}" if len(header) > 1 else f"has {size} bytes"
        raise UserError(f"{path} is not a shard of version {SHARD_VERSION} (it {found}); {again}")
    num_tokens, width = int(header[2]), int(header[5]) or 2
    if width not in (2, 4):
        raise UserError(f"{path} claims {width} bytes per token, only 2 and 4 exist; {again}")
    if num_tokens < 1 or size != HEADER_BYTES + num_tokens * width:
        raise UserError(f"{path} promises {num_tokens} tokens but holds {(size - HEADER_BYTES) // width}; {again}")
    tokenizer = header[8:16].tobytes().hex() if header[8:16].any() else GPT2_TOKENIZER_SHA256
    vocab_size, bos_id = int(header[3]) or 50257, int(header[4]) or 50256
    if not 0 <= bos_id < vocab_size <= 256 ** width:
        raise UserError(f"{path} claims {vocab_size} ids of {width} bytes, the begin-of-document id being {bos_id}, "
                        f"which cannot be; {again}")
    return Shard(path, num_tokens, vocab_size, bos_id, width, tokenizer, os.stat(path).st_mtime_ns)

def open_shards(train_files: str, val_files: str) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards of two globs; raises UserError if none match or tokenizers differ."""
    groups = []
    for flag, pattern in (("train_files", train_files), ("val_files", val_files)):
        groups.append([read_header(path) for path in sorted(glob.glob(pattern))])
        if not groups[-1]:
            raise UserError(f"--{flag}={pattern} matches no file; make some with data/fineweb.py or data/text.py")
    first = groups[0][0]
    for shard in groups[0] + groups[1]:
        if (shard.tokenizer, shard.vocab_size, shard.bos_id) != (first.tokenizer, first.vocab_size, first.bos_id):
            raise UserError(f"{shard.path} has tokenizer {shard.tokenizer[:12]}, {first.path} {first.tokenizer[:12]}; "
                            "make both with the same one")
    return groups[0], groups[1]

def read_tokenizer(shard: Shard) -> bytes:
    """The tokenizer.json beside a shard; raises UserError if it is absent or not the one the shard was made with."""
    path = Path(shard.path).parent / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; python data/fineweb.py or python data/text.py puts it there")
    text = read_small(path)
    if hashlib.sha256(text).hexdigest() != shard.tokenizer:
        raise UserError(f"{path} is not the tokenizer of {shard.path} ({shard.tokenizer[:12]}); put that one there")
    try:                                 # the hash says whose it is, not that it is sound
        data = json.loads(text)
        ids = len([base64.b64decode(rank, validate=True) for rank in data["ranks"]]) + len(data["special_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError):
        ids = 0
    if ids != shard.vocab_size or data.get("bos_id") != shard.bos_id:
        raise UserError(f"{path} is no tokenizer of {shard.vocab_size} ids, as {shard.path} claims; make both again")
    return text

def documents(shards: list[Shard], token: int = 0):
    """Yields (ids, start, end) of every document in order, from a token of the first shard on; of one cut by a shard
    border the rest is left out."""
    for shard in shards:
        ids, start, begin, token = shard.read(), None, token, 0
        for low in range(begin, len(ids), 1 << 22):                 # indexes a few million tokens at a time
            for bos in np.flatnonzero(ids[low:low + (1 << 22)] == shard.bos_id) + low:
                if start is not None:
                    yield ids, start, bos
                start = bos
        if start is not None:
            yield ids, start, len(ids)

def check_tokens(cfg, shards: list[Shard], num_steps: int) -> str:
    """The sentence on tokens needed and found; raises UserError if there are too few."""
    ends = [0, *(min(round(stage.until * cfg.num_iterations), num_steps) for stage in cfg.stages)]
    needed = sum((end - begin) * stage.batch_tokens for stage, begin, end in zip(cfg.stages, ends, ends[1:]))
    found = sum(shard.num_tokens for shard in shards)
    if found < needed:
        raise UserError(f"--train_files={cfg.train_files} holds {found} tokens, {num_steps} steps need {needed}; add "
                        f"shards (data/fineweb.py or data/text.py) or lower --num_iterations={cfg.num_iterations}")
    return f"tokens: {num_steps} steps need {needed:,}, found {found:,}"

def prefetch(batches, depth: int = 2):
    """The same items, prepared by a thread up to `depth` ahead; an exception in it is raised here."""
    with ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(next, batches, None) for _ in range(depth)]
        while (batch := pending.pop(0).result()) is not None:
            pending.append(thread.submit(next, batches, None))
            yield batch

def to_device(batch: tuple, device: torch.device) -> tuple[Tensor, ...]:
    """Arrays to tensors on the device, without waiting for the copy."""
    tensors = [torch.from_numpy(array) for array in batch]
    tensors = [tensor.pin_memory() for tensor in tensors] if device.type == "cuda" else tensors
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

# -----------------------------------------------------------------------------
# Setup and logging

BLOCK = 128                              # FlexAttention skips or computes tiles of BLOCK x BLOCK

# dense bf16 peaks in FLOP/s by a part of the device's name, from the vendor's datasheets; MFU is n/a for others
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "B200": 2250e12}

@dataclass(frozen=True)
class Machine:
    """Where this process runs: its device, its place among the ranks, and the name of the device."""
    device: torch.device
    rank: int
    world_size: int
    name: str

def setup_machine(cfg) -> Machine:
    """Chooses the device and joins the other ranks if torchrun started some (NCCL between GPUs, else gloo)."""
    env, cuda, gpus = os.environ, torch.cuda.is_available(), torch.cuda.device_count()
    rank, world_size, local_rank = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    kind = cfg.device if cfg.device != "auto" else "cuda" if cuda else "cpu"
    if not {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}[kind]:
        raise UserError(f"--device={kind}, but PyTorch sees no such device; use --device=cpu or another build of torch")
    if kind == "cuda" and local_rank >= gpus:
        raise RankError(f"torchrun starts more ranks than the {gpus} GPUs here; lower --nproc_per_node")
    slots = min(stage.batch_tokens for stage in cfg.stages) // cfg.slot_tokens
    if world_size > slots:
        raise UserError(f"{world_size} ranks share {slots} slots, so one has no token; start at most {slots} or lower "
                        f"--slot_tokens={cfg.slot_tokens}")
    device, name = torch.device(kind), f"{kind}, {torch.get_num_threads()} threads"
    if cfg.compile_cache:                # read by torch and Triton when they first compile
        for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            env[variable] = str(Path(cfg.compile_cache, folder).absolute())
    if kind == "cuda":
        device, name = torch.device(kind, local_rank), torch.cuda.get_device_name(local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return Machine(device, rank, world_size, name)

def resolve_config(cfg, machine: Machine, shard: Shard, has_kernels: bool):
    """The config with everything that was left to the machine and the shards filled in."""
    cuda = machine.device.type == "cuda"
    vocab_size = cfg.vocab_size or -(-shard.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
    bos_id = cfg.bos_id if cfg.bos_id >= 0 else shard.bos_id
    if shard.vocab_size > vocab_size or bos_id != shard.bos_id:
        raise UserError(f"{shard.path} has {shard.vocab_size} ids and begins documents with {shard.bos_id}, not as in "
                        f"--vocab_size={vocab_size} --bos_id={bos_id}; leave both flags away")
    attention = cfg.attention if cuda or cfg.attention != "auto" else "plain"
    if attention not in ("auto", "plain") and not fits_backends(cfg, cuda):
        raise UserError(f"--attention={attention} needs a CUDA device, and multiples of {BLOCK} for --slot_tokens="
                        f"{cfg.slot_tokens} and --val_stream_tokens={cfg.val_stream_tokens}; or use --attention=plain")
    kernels = cfg.kernels and cuda and has_kernels and cfg.precision == "bf16"      # they take bf16 only
    float8 = cfg.float8 and kernels and torch.cuda.get_device_capability() >= (8, 9) and vocab_size % 16 == 0
    return replace(cfg, vocab_size=vocab_size, bos_id=bos_id, attention=attention, compile=cfg.compile and cuda,
                   kernels=kernels, float8=float8)

def fits_backends(cfg, cuda: bool) -> bool:
    """Whether attention other than plain is possible: on CUDA, in streams of whole blocks."""
    return cuda and cfg.slot_tokens % BLOCK == 0 and cfg.val_stream_tokens % BLOCK == 0

def memory_plan(cfg, machine: Machine, head_chunk: int) -> tuple:
    """The config, with host_state on if need be, slots per micro-batch on this rank, whether micro-steps are to be
    CUDA graphs, and the sentence on all that.

    head_chunk: tokens whose logits exist at one time.
    """
    shares = [math.ceil(stage.batch_tokens // cfg.slot_tokens / machine.world_size) for stage in cfg.stages]
    if cfg.micro_batch_tokens or machine.device.type != "cuda":
        slots = min(cfg.micro_batch_tokens // cfg.slot_tokens or min(shares), min(shares))
        return cfg, slots, False, f"memory plan: none; {slots * cfg.slot_tokens:,} tokens per forward"
    # fits what was measured on an H200 with 16k to 131k tokens, one and four ranks, within 2 GiB: activations take, for
    # a token in a layer, 7 numbers a channel, 4 a channel of queries and 2 (without kernels 4) a hidden unit; a logit 2
    # (4); a weight and its gradient are two, and what the optimizer keeps is 8 bytes a weight over all ranks
    width, queries = 2 if cfg.precision == "bf16" else 4, cfg.num_heads * cfg.key_dim
    tables = ((2 + sum(layer.values >= 0 for layer in cfg.layers)) * cfg.vocab_size + cfg.bigram_rows) * cfg.model_dim
    matrices = len(cfg.layers) * (2 * cfg.model_dim + 2 * queries + 2 * cfg.mlp_dim) * cfg.model_dim
    per_token = width * len(cfg.layers) * (7 * cfg.model_dim + 4 * queries + (2 if cfg.kernels else 4) * cfg.mlp_dim)
    columns = min(cfg.candidates or cfg.vocab_size, cfg.vocab_size)
    cap = torch.cuda.get_per_process_memory_fraction(machine.device)
    have = 0.92 * cap * torch.cuda.get_device_properties(machine.device).total_memory
    def need(tokens, host_state):        # bytes: static ones, logits, activations
        kept = 8 * (matrices + tables * (not host_state)) / machine.world_size
        logits = (2 if cfg.kernels else 4) * width * min(tokens, head_chunk) * columns
        return 2 * width * (tables + matrices) + kept, logits, per_token * tokens
    def padding(slots):                  # empty slots that fill up the last micro-steps
        return sum(-share % slots for share in shares)
    host_state = cfg.host_state or sum(need(cfg.slot_tokens, False)) > have
    fits = [slots for slots in range(1, min(shares) + 1) if sum(need(slots * cfg.slot_tokens, host_state)) <= have]
    if not fits:
        less = next((cfg.slot_tokens >> i for i in range(1, 8) if sum(need(cfg.slot_tokens >> i, True)) <= have), 0)
        raise UserError(f"the GPU has {have / 2**30:.1f} GiB to use, one slot of --slot_tokens={cfg.slot_tokens} needs "
                        f"{sum(need(cfg.slot_tokens, True)) / 2**30:.1f}; "
                        + (f"try --slot_tokens={less}" if less else "take a larger GPU, or more of them"))
    slots = min(fits, key=lambda slots: (padding(slots), -slots))
    tokens = slots * cfg.slot_tokens
    parts = [part / 2**30 for part in need(tokens, host_state)]
    # what a graph keeps for its activations, a validation cannot use; windows must not be numbers, which it would keep
    replays = (cfg.compile and cfg.attention.startswith("flex") and tokens <= cfg.graph_tokens
               and sum(need(tokens, host_state)) <= have / 2)
    return replace(cfg, host_state=host_state), slots, replays, (
        "memory plan: {:.1f} GiB of parameters, gradients and {}state + {:.1f} of logits + {:.1f} of activations = "
        "{:.1f} of {:.1f} GiB".format(parts[0], "matrix " * host_state, *parts[1:], sum(parts), have / 2**30)
        + "; the moments of tables are in host memory" * host_state
        + f"; {tokens:,} tokens per forward" + ", replayed as CUDA graphs" * replays)

def everyone(machine: Machine, value) -> list:
    """The value that each rank has, in their order."""
    values = [value] * machine.world_size
    if machine.world_size > 1:
        dist.all_gather_object(values, value)
    return values

def first_rank(machine: Machine, function):
    """What the function returns on the first rank, for all ranks; so with its UserError."""
    outcome = None
    if machine.rank == 0:
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = everyone(machine, outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome

class Run:
    """The run folder: log.txt, run.json, the sources, the curve, checkpoints. Written as the run goes, by rank 0.

    A run that goes on from a checkpoint (folder and meta.json) keeps its folder.
    """

    def __init__(self, script: Path, cfg, machine: Machine, argv: list[str], checkpoint: Path | None, meta: dict):
        self.script, self.cfg, self.machine, self.master, self.live = script, cfg, machine, machine.rank == 0, False
        self.history, self.tokens_seen = [tuple(point) for point in meta.get("history", ())], meta.get("tokens_seen", 0)
        self.train_losses, self.wrote, self.writer, self.saved = [], 0.0, ThreadPoolExecutor(1), checkpoint
        self.writing = self.writer.submit(lambda: None)             # the last checkpoint, or one being written
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{script.stem}_{os.urandom(3).hex()}"
        self.folder = checkpoint.parent.parent if checkpoint else Path(cfg.out_dir) / name
        first_rank(machine, self.open_folder)
        if not self.master:
            return
        self.info = read_json(self.folder / "run.json")
        self.info.pop("error", None)
        if checkpoint:
            write_atomically(self.folder / "checkpoint" / "latest", checkpoint.name.encode())
            before = self.info.get("resumed") if isinstance(self.info.get("resumed"), list) else []
            self.info["resumed"] = before + [{"step": meta["step"], "at": now, "argv": argv}]
        self.save(format=1, status="running", script=script.name, argv=argv, job=os.environ.get("TORCHELASTIC_RUN_ID"),
                  config=asdict(cfg), seed=cfg.seed, source_sha256=file_sha256(script),
                  git={"commit": command_output("git", "rev-parse", "HEAD"),
                       "dirty": bool(command_output("git", "status", "--porcelain"))},
                  versions={"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
                            "numpy": np.__version__}, device=machine.name, world_size=machine.world_size,
                  gpu=command_output("nvidia-smi", "--format=csv", "--query-gpu=name,driver_version,memory.total,"
                                     "clocks.sm,clocks.mem,power.limit"), started=self.info.get("started", now))

    def open_folder(self):
        """Makes what is not there yet of the folder, the log and the copies of the sources; raises UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.rglob("*"):                     # writing follows links and waits for pipes
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise UserError(f"{path} is a link or no file; put the file itself there, or remove it")
            self.log_file = open(self.folder / "log.txt", "a", buffering=1)
            for source in source_files(self.script, self.cfg):
                copy = self.folder / source.name
                if not copy.exists() or copy.read_bytes() != source.read_bytes():
                    shutil.copy(source, copy)
                    self.log_file.write(source.read_text() + "\n" + "=" * 100 + "\n")
        except OSError as error:
            raise UserError(f"--out_dir={self.cfg.out_dir} cannot be written ({error}); choose another") from None

    def save(self, **changes):
        """Updates run.json, so that it is whole at any moment; a full disk does not end the run."""
        if self.master:
            self.info |= changes | {"tokens_seen": self.tokens_seen, "val_losses": [
                {"step": s, "train_time_ms": round(1000 * t), "val_loss": round(v, 6), "tokens": self.cfg.val_tokens}
                for s, t, v in self.history]}
            try:
                write_atomically(self.folder / "run.json", json.dumps(self.info, indent=1).encode())
            except OSError as error:
                self.print(f"warning: run.json is not up to date ({error})")

    def print(self, text: str, console: bool = True):
        """A line to the log, and to the console unless told otherwise."""
        if self.master:
            with contextlib.suppress(OSError):                      # a full disk: later lines take it along
                self.log_file.write(text + "\n")
            if console:
                print(("\r\033[K" if self.live else "") + text, flush=True)
                self.live = False

    def step(self, step: int, clock, model, loss: float, tokens: int):
        """Logs a finished step, its loss and how many tokens it had; on a terminal live, else a line now and then."""
        cfg, seconds, terminal = self.cfg, clock.seconds, sys.stdout.isatty()
        self.tokens_seen += tokens
        self.need_finite(loss, f"the loss of step {step}", model)
        self.train_losses.append((step, seconds, loss))
        text = f"step:{step}/{cfg.total_steps} train_loss:{loss:.4f} {train_time(seconds, step)}"
        self.print(text, console=False)
        if self.master and time.time() - self.wrote > (0.1 if terminal else 10):
            rate = self.tokens_seen / seconds
            peak = next((flops for part, flops in PEAK_FLOPS.items() if part in self.machine.name), 0)
            peak *= self.machine.world_size
            mfu = f"{600 * model.matmul_parameters * rate / peak:.1f}%" if peak else "n/a"
            left = (cfg.total_steps - step) * seconds / step
            text += f"  {rate / 1000:.1f}k tokens/s  mfu {mfu}  {left:.0f} s left"
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)
            self.live, self.wrote = terminal, time.time()

    def need_finite(self, loss: float, what: str, model):
        """Raises FloatingPointError, which names the first bad parameter, if a loss is NaN or infinite."""
        if math.isfinite(loss):
            return
        bad = next((name for name, param in model.named_parameters() if not torch.isfinite(param).all()),
                   "none: only the loss")
        self.give_up(f"{what} is {loss}; first bad parameter: {bad}; lower --lr={self.cfg.lr} or look at the last "
                     "change")

    def give_up(self, text: str):
        """Raises FloatingPointError with the text and the last good checkpoint, after taking them down in run.json."""
        self.writing.result()
        text += f"; last good checkpoint: {self.saved or 'none'}"
        self.save(status="diverged", error=text)
        raise FloatingPointError(text)

    def validated(self, step: int, clock, val_loss: float, model):
        """Logs a validation, which is also when run.json is brought up to date and the ranks compare parameters."""
        self.need_finite(val_loss, f"the validation loss of step {step}", model)
        sums = everyone(self.machine, digest(dict(model.named_parameters())) if self.machine.world_size > 1 else {})
        if other := [(name, rank) for name in sums[0] for rank, own in enumerate(sums) if own[name] != sums[0][name]]:
            self.give_up("after step {}, {} of rank {} is not that of rank 0; suspect that GPU".format(step, *other[0]))
        self.history.append((step, clock.seconds, val_loss))
        self.print(f"step:{step}/{self.cfg.total_steps} val_loss:{val_loss:.6f} {train_time(clock.seconds, step)}")
        self.save(train_time_ms=round(1000 * clock.seconds))

    def finish(self, status: str, step: int, clock, shards: list[Shard]):
        """The last lines of the log, the curve, and the final run.json.

        Notes the loss of a finished run in its checkpoint; raises UserError if that is not there.
        """
        self.writing.result()
        written = self.saved is not None and self.saved.name == f"step_{step:06d}"
        if self.master and written and status == "finished":
            meta = read_json(self.saved / "meta.json") | {"val_loss": self.history[-1][2]}
            write_atomically(self.saved / "meta.json", json.dumps(meta, indent=1).encode())
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.machine.device.type == "cuda" else 0
        data = {shard.path: shard.num_tokens for shard in shards}
        self.save(status=status, peak_memory_gib=round(memory, 2), data=data)
        if self.master:
            self.plot()
            self.print(f"{status}: {step} steps, {self.tokens_seen:,} tokens in {clock.seconds:.1f} s of training "
                       f"({self.tokens_seen / clock.seconds:,.0f} tokens/s), "
                       f"compilation {self.info['compile_seconds']} s, {self.info['recompiles']} recompiles"
                       + (f", peak memory {memory:.1f} GiB" if memory else ""))
            self.print(f"log, curve and checkpoint are in {self.folder}")
            self.print(f"next: python sample.py --checkpoint={self.saved}" if status == "finished" else
                       f"next: the same command with --resume={self.folder}")
        if self.master and not written:
            raise UserError(f"the checkpoint of step {step} could not be written, {self.folder / 'log.txt'} says why; "
                            f"free space or choose another --out_dir")

    def plot(self):
        """curve.svg: training and validation loss over steps and over training time."""
        try:
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
        except ImportError:
            return self.print("no curve.svg: matplotlib is not installed (pip install matplotlib)")
        figure, val = Figure((11, 4), layout="constrained"), np.array(self.history)
        train = np.array(self.train_losses).reshape(-1, 3)
        for column, axis in enumerate(figure.subplots(1, 2, sharey=True)):
            axis.plot(train[:, column], train[:, 2], color="0.65", linewidth=0.8, label="training (weighted)")
            axis.plot(val[:, column], val[:, 2], "o-", color="black", markersize=4, label="validation")
            axis.set(xlabel=("step", "training time in seconds")[column], ylabel="loss in nats per token")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"{self.script.stem}: validation loss {val[-1, 2]:.4f} after {val[-1, 0]:.0f} steps")
        FigureCanvasSVG(figure).print_svg(self.folder / "curve.svg")

def train_time(seconds: float, step: int) -> str:
    """The last two fields of a log line."""
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"

def source_files(script: Path, cfg) -> list[Path]:
    """The files of the project that a run of the script uses, itself first."""
    harness = Path(__file__)
    return [script, harness] + [harness.with_name("triton_kernels.py")] * cfg.kernels

def command_output(*words: str) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

def file_sha256(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def read_small(path: Path) -> bytes:
    """The content of a file of at most JSON_BYTES; empty for anything else."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= JSON_BYTES else b""
    except OSError:
        return b""

def read_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is none."""
    try:
        value = json.loads(read_small(path))
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}

def write_atomically(path: Path, content: bytes):
    """Writes under a temporary name, then renames, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

# -----------------------------------------------------------------------------
# Backends

# what is tried on this device before the run: error allowed, relative to the norm of the float32 result
ALLOWED = {"flex": 0.03, "flex_small": 0.03, "varlen": 0.03, "fa3": 0.03, "head_loss": 0.03, "float8_head_loss": 0.25,
           "float8_linear": 0.25, "float8_mlp": 0.25}
OPERATORS = {"kernels": ("head_loss",), "float8": ("float8_head_loss", "float8_linear", "float8_mlp")}     # by flag
PROBE_SECONDS = 300                      # for all, compilation included

def probe(probe_case, cfg, name: str, device: torch.device) -> tuple[float, float]:
    """(largest relative error of result and gradients against float32, seconds of one pass) of a key of ALLOWED.

    probe_case(cfg, name, device): the function, the same in plain PyTorch, and inputs that have gradients.
    """
    if name == "fa3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    function, plain, inputs = probe_case(cfg, name, device)
    if cfg.compile and name.startswith("flex"):                     # the others are kernels as they are
        function = torch.compile(function, dynamic=False, fullgraph=True)
    inputs = [tensor.to({"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.precision]) for tensor in inputs]
    def run(function, inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        result = function(*leaves)
        result.backward(torch.linspace(-1, 1, result.numel(), device=device).view(result.shape).to(result.dtype))
        return [result.detach(), *(leaf.grad for leaf in leaves)]
    pairs = zip(run(function, inputs), run(plain, [tensor.float() for tensor in inputs]), strict=True)
    errors = [((mine.float() - right).norm() / right.norm()).item() for mine, right in pairs]
    seconds = min(device_seconds(lambda: run(function, inputs), device) for _ in range(4))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf, seconds

def device_seconds(function, device: torch.device) -> float:
    """Seconds that the device works on what function launches; on a GPU without those that launching it takes."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ahead = torch.zeros(4096, 4096, device=device)
    for _ in range(4):                   # some ms of work, during which all else is launched
        ahead = ahead @ ahead
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000

def probe_all(module):
    """What the process of try_backends runs: reads a JSON object, writes a line of JSON for each backend."""
    order = json.loads(sys.stdin.read())
    cfg, device = module.config_from_dict(order["config"]), torch.device(order["device"])
    for name in order["names"]:
        try:
            error, seconds = probe(module.probe_case, cfg, name, device)
            fault = "" if error <= ALLOWED[name] else f"wrong by {error:.3g}"
        except Exception as reason:      # whatever a backend comes up with
            error, seconds, fault = 0.0, 0.0, " ".join(f"{type(reason).__name__}: {reason}".split())[:120]
        print(json.dumps({"backend": name, "fault": fault, "error": error, "seconds": seconds}), flush=True)

def try_backends(script: Path, cfg, names: list[str], device: torch.device) -> dict[str, dict]:
    """name -> {"fault": why it cannot be used, "" if it can, "error", "seconds"}, as probe_all says.

    They run in another process, for one that breaks the GPU's context takes the process along; then the rest is tried
    in a new one.
    """
    found, path = {}, script.resolve()                  # its name may be none that `import` can take
    start = ("import importlib.util as util, sys; sys.path.insert(0, {!r}); import harness; "
             "spec = util.spec_from_file_location('probed', {!r}); "
             "sys.modules['probed'] = module = util.module_from_spec(spec); spec.loader.exec_module(module); "
             "harness.probe_all(module)").format(str(path.parent), str(path))
    while left := [name for name in names if name not in found]:
        order = json.dumps({"config": asdict(cfg), "names": left, "device": str(device)})
        try:
            done = subprocess.run([sys.executable, "-c", start], input=order, capture_output=True, text=True,
                                  timeout=PROBE_SECONDS)
            output, end = done.stdout, f"its process ended with exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, end = (error.stdout or b"").decode(), f"no result within {PROBE_SECONDS} s"
        for line in output.splitlines():
            if line.startswith('{"backend"'):
                result = json.loads(line)
                found[result.pop("backend")] = result
        if stuck := [name for name in left if name not in found]:
            found[stuck[0]] = {"fault": end, "error": 0.0, "seconds": 0.0}
    return found

def remember_backends(script: Path, cfg, names: list[str], machine: Machine) -> dict[str, dict]:
    """What try_backends finds; it is kept for the next start with the same facts, if nothing is at fault."""
    facts = [names, machine.name, torch.__version__, cfg.slot_tokens, cfg.stages[0].long, cfg.model_dim, cfg.head_dim,
             cfg.key_dim, cfg.mlp_dim, cfg.vocab_size, cfg.candidates > 0, cfg.precision, cfg.compile,
             *map(file_sha256, source_files(script, cfg))]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.expanduser("~/.cache/minutegpt")
    path = Path(folder, f"backends_{key}.json")
    found = read_json(path)
    if found.keys() == set(names) and all(isinstance(result, dict) and result.keys() == {"fault", "error", "seconds"}
                                          and result["fault"] == "" for result in found.values()):
        return found
    found = try_backends(script, cfg, names, machine.device)
    if not any(result["fault"] for result in found.values()):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found).encode())
    return found

def load_compiler():
    """Imports what torch.compile needs; it takes seconds."""
    import torch._inductor.compile_fx  # noqa: F401

def choose_backends(script: Path, cfg, machine: Machine) -> tuple:
    """The config with the attention and the kernels that are right on this device, and lines on what was tried.

    Attention is the fastest that is as right as the plain one, or the flag's; UserError if that is not right.
    """
    if machine.device.type != "cuda":
        return cfg, []
    wanted = [cfg.attention] if cfg.attention not in ("auto", "plain") else []
    if cfg.attention == "auto" and fits_backends(cfg, True):
        wanted = ["flex", "flex_small", "varlen"]
    operators = [name for flag, names in OPERATORS.items() if getattr(cfg, flag) for name in names]
    begun = time.monotonic()
    if cfg.compile:                      # while another process tries the backends
        threading.Thread(target=load_compiler).start()
    found = first_rank(machine, lambda: remember_backends(script, cfg, wanted + operators, machine))
    right = {name: found[name]["seconds"] for name in wanted if not found[name]["fault"]}
    if cfg.attention in wanted and not right:
        raise UserError(f"--attention={cfg.attention} does not work here ({found[cfg.attention]['fault']}); use "
                        "--attention=auto")
    # an earlier one is preferred to one that is faster by the noise of so short a measurement
    best = min(right, key=lambda name: right[name] * 1.2 ** wanted.index(name), default="plain")
    faulty = {flag for flag, names in OPERATORS.items() if any(found.get(name, {}).get("fault") for name in names)}
    cfg = replace(cfg, attention=best, kernels=cfg.kernels and "kernels" not in faulty,
                  float8=cfg.float8 and not faulty)
    if best == "fa3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    return cfg, [f"{name}: " + (result["fault"] or f"right to {result['error']:.2g}, {1000 * result['seconds']:.2f} ms")
                 for name, result in found.items()] + [
                     f"used: {best} attention, {'kernels' if cfg.kernels else 'no kernels'}, "
                     f"{'float8' if cfg.float8 else 'no float8'}; found out in {time.monotonic() - begun:.1f} s"]

# -----------------------------------------------------------------------------
# Checkpoint

FILES = ("model.safetensors", "optimizer.safetensors")
# what may be another one when a run goes on: it changes no more than rounding, what is written, or where the run ends
FREE = ("micro_batch_tokens", "stop_after", "val_every", "device", "attention", "kernels", "host_state", "compile",
        "graph_tokens", "compile_cache", "out_dir", "save_every", "keep", "resume", "resume_override")

def run_identity(script: Path, cfg, tokenizer: bytes, **shards: list[Shard]) -> dict:
    """What makes the run the run it is, as plain JSON: flags, shards by name and tokens, tokenizer and source."""
    flags = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    files = {flag: [(Path(shard.path).name, shard.num_tokens) for shard in group] for flag, group in shards.items()}
    return json.loads(json.dumps(flags | files | {
        "source": file_sha256(script), "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "shard_times": [shard.modified for group in shards.values() for shard in group]}))

def gather_state(model, optimizer, machine: Machine, everything: bool) -> dict[str, Tensor]:
    """The model's tensors, or everything that training changes, whole, in CPU memory of the first rank."""
    found, pin = {}, machine.device.type == "cuda"
    for name, tensor in (run_state(model, optimizer, machine) if everything else model.state_dict()).items():
        if rows := optimizer.share_rows(name):
            mine = tensor.to(machine.device)
            whole = mine.new_empty(machine.world_size * len(mine), *mine.shape[1:])
            ALL_GATHER(whole, mine)
            tensor = whole[:rows]
        if machine.rank == 0:
            found[name] = torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor, non_blocking=pin)
    if pin:
        torch.cuda.synchronize()
    return found

@torch.no_grad()
def restore_state(folder: Path, meta: dict, model, optimizer, machine: Machine) -> list:
    """Gives every tensor its value in a checkpoint, which only the first rank reads; returns the training losses."""
    everything, found, losses = FILES[1] in meta["files"], {}, []
    if machine.rank == 0:
        try:
            for name in meta["files"]:
                found |= load_file(folder / name)
            losses = found.get("train_losses", torch.empty(0)).reshape(-1, 3).tolist()
            torch.Generator().set_state(found.get("rng", torch.get_rng_state()))
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise RankError(f"{folder} cannot be read ({error}); choose another checkpoint") from None
    for name, tensor in (run_state(model, optimizer, machine) if everything else model.state_dict()).items():
        rows, random = optimizer.share_rows(name), name.endswith("rng")
        shape = (machine.world_size * len(tensor), *tensor.shape[1:]) if rows else tensor.shape
        whole = torch.zeros(shape, dtype=tensor.dtype, device=machine.device)
        if machine.rank == 0:
            target, value = whole[:rows] if rows else whole, found.get(name, tensor if random else None)
            if value is None or value.shape != target.shape or not torch.can_cast(value.dtype, target.dtype):
                raise RankError(f"{folder} holds no {name} of shape {tuple(target.shape)}; a model of another shape "
                                "cannot go on from it")
            target.copy_(value)
        if machine.world_size > 1:
            dist.broadcast(whole, 0)
        tensor.copy_(whole.chunk(machine.world_size)[machine.rank] if rows else whole)
        if random:
            torch.cuda.set_rng_state(tensor, machine.device) if name.startswith("cuda") else torch.set_rng_state(tensor)
    return losses

def write_checkpoint(root: Path, meta: dict, files: dict[str, dict[str, Tensor]], tokenizer: bytes, keep: int) -> Path:
    """Writes the folder step_<n> in `root`, then `latest`, then removes all but the newest `keep`.

    Killed at any moment or without room, it leaves in place what was there; the next call clears up.
    """
    final = root / f"step_{meta['step']:06d}"
    temporary, old = root / f".{final.name}.tmp", lambda path: root / f".{path.name}.old"
    def clear():
        for path in root.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)
    clear()
    temporary.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file(tensors, temporary / name)
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        sums = {name: file_sha256(temporary / name) for name in files}
        write_atomically(temporary / "tokenizer.json", tokenizer)
        write_atomically(temporary / "meta.json", json.dumps(meta | {"files": sums}, indent=1).encode())
        if final.exists():               # of before the run went back to an earlier one; `latest` does not name it
            os.replace(final, old(final))
        os.replace(temporary, final)
        write_atomically(root / "latest", final.name.encode())
        for path in sorted(root.glob("step_*"), key=lambda path: path.stat().st_mtime_ns)[:-keep]:
            os.replace(path, old(path))
    finally:
        clear()
    return final

def save_checkpoint(run: Run, model, optimizer, step: int, stage: int, clock, tokenizer: bytes, everything: bool,
                    **more):
    """Copies the state of all ranks to CPU memory and starts a thread on the first that writes checkpoint/step_<n>.

    everything: also what going on needs, unless a gradient waits for Adam's next step. more: goes into meta.json.
    """
    clock.synchronize()
    begin = time.perf_counter()
    run.writing.result()                 # never two at a time
    finite = all(torch.isfinite(param).all() for param in model.parameters())
    run.need_finite(0.0 if finite else math.nan, f"a parameter after step {step}", model)
    everything = everything and all(param.grad is None for param in model.parameters())
    tensors = gather_state(model, optimizer, run.machine, everything)
    held = time.perf_counter() - begin if clock.started else 0
    if not run.master:
        return
    files = {FILES[0]: {name: tensors.pop(name) for name in model.state_dict()}}
    if everything:
        files[FILES[1]] = tensors | {"train_losses": torch.tensor(run.train_losses, dtype=torch.float64)}
    meta = {"format": 1, "script": run.script.stem, "source_sha256": run.info["source_sha256"],
            "config": asdict(model.cfg), "step": step, "stage": stage,
            "val_loss": run.history[-1][2] if run.history[-1][0] == step else None,
            "best_val_loss": min(loss for _, _, loss in run.history), "history": run.history,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(), "train_time": clock.seconds,
            "tokens_seen": run.tokens_seen} | more

    def write():
        begin, before = time.perf_counter(), run.saved
        try:
            run.saved = write_checkpoint(run.folder / "checkpoint", meta, files, tokenizer, run.cfg.keep)
            run.print(f"checkpoint of step {step}: {1000 * held:.0f} ms of training time, written in "
                      f"{time.perf_counter() - begin:.1f} s")
        except (OSError, SafetensorError) as error:
            run.print(f"warning: no checkpoint of step {step} ({error}); the last one: {before or 'none'}")
    run.writing = run.writer.submit(write)

def find_run(script: Path, cfg, argv: list[str], restarted: bool) -> Path | None:
    """What --resume means, None: a new run; for a job that torchrun has started again the run it was at."""
    if not restarted and cfg.resume != "latest":
        return Path(cfg.resume) if cfg.resume else None
    files = sorted(Path(cfg.out_dir).glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    infos = {file.parent: info for file in files if (info := read_json(file)).get("script") == script.name}
    job = os.environ.get("TORCHELASTIC_RUN_ID"), argv
    own = [run for run, info in infos.items() if restarted and (info.get("job"), info.get("argv")) == job]
    run = next((run for run in own[:1] or infos if list(run.glob("checkpoint/step_*"))), None)
    if own or cfg.resume == "latest":
        return run if run and (own or infos[run].get("status") != "finished") else None
    return Path(cfg.resume) if cfg.resume else None

def find_fault(folder: Path, meta: dict, num_steps: int) -> str:
    """Why a run cannot go on from a checkpoint; empty if it can."""
    kinds = {"files": dict, "identity": dict, "step": int, "place": tuple[int, int], "train_time": float,
             "tokens_seen": int, "history": tuple[tuple[int, float, float], ...]}
    try:
        _, _, step, place, _, _, history = (convert(meta[name], kind) for name, kind in kinds.items())
        if min(step, *place) < 0 or not history or not meta["files"].keys() <= set(FILES):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        return "its meta.json is damaged"
    for name, content in meta["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != content:
            return f"its {name} is damaged"
    if FILES[1] not in meta["files"] and step < num_steps:
        return f"it has no {FILES[1]}, which needs --save_every and an even step, or a signal"
    return "" if (folder.parent.parent / "run.json").is_file() else "it is not in the folder of a run"

def find_checkpoint(script: Path, cfg, argv: list[str], num_steps: int, identity: dict, restarted: bool
                    ) -> tuple[Path | None, dict, list[str]]:
    """(folder, its meta.json, lines for the log) of the checkpoint to go on from; (None, {}, lines) for a new run.

    Raises UserError if there is none, or if flags, shards or source are not those of its run.
    """
    run, notes, flag = find_run(script, cfg, argv, restarted), [], f"--resume={cfg.resume}"
    if run is None:
        return None, {}, [f"{flag}: no unfinished run with a checkpoint in {cfg.out_dir}; a new run"] * bool(cfg.resume)
    latest = run / "checkpoint" / "latest"
    newest = read_small(latest).decode(errors="replace") or "step_~"    # comes after all numbers
    folders = [run] if run.parent.name == "checkpoint" else run.glob("checkpoint/step_*")
    for folder in sorted((folder for folder in folders if folder.name <= newest), reverse=True):
        meta = read_json(folder / "meta.json")
        if not (fault := find_fault(folder, meta, num_steps)):
            break
        notes.append(f"{folder} is not used: {fault}")
    else:
        raise UserError("; ".join([f"{flag}: {run} has no checkpoint to go on from", *notes]))
    before = meta["identity"]
    changed = {name: f"{name} was {before.get(name)!s:.80}, now {identity.get(name)!s:.80}"
               for name in sorted(before.keys() | identity.keys()) if before.get(name) != identity.get(name)}
    allowed = {*cfg.resume_override.split(","), "shard_times"}      # they may have been copied
    if refused := [text for name, text in changed.items() if name not in allowed]:
        raise UserError(f"{flag}: {folder} is of another run: {'; '.join(refused)}; put it back or add "
                        f"--resume_override={','.join(sorted(changed.keys() - {'shard_times'}))}")
    (shard, token), files = meta["place"], identity["train_files"]
    if meta["step"] > cfg.total_steps or shard >= len(files) or token > files[shard][1]:
        raise UserError(f"{flag}: {folder} goes on after step {meta['step']} at token {token} of shard {shard}, beyond "
                        "the steps or the shards of this run; put them back")
    return folder, meta, notes + [f"changed: {text}" for text in changed.values()]

# -----------------------------------------------------------------------------
# Processes

# torch 2.13 renamed these two and warns about the old names; 2.11 knows only those
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

def digest(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A 64-bit sum per tensor that changes with any bit of it, computed where the tensor lies."""
    sums, integer = dict.fromkeys(tensors, 0), {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in tensors.items():
        words = tensor.detach().contiguous().flatten().view(integer[tensor.element_size()])
        for i, chunk in enumerate(words.split(1 << 24)):
            weights = torch.arange(chunk.numel(), device=chunk.device) * 2654435761 + 2 * i + 1
            sums[name] += int((chunk.long() * (weights | 1)).sum())
    return sums

def run_state(model, optimizer, machine: Machine) -> dict[str, Tensor]:
    """Every tensor that training changes, and the random state."""
    state = dict(model.state_dict()) | {"rng": torch.get_rng_state()}
    if machine.device.type == "cuda":
        state["cuda rng"] = torch.cuda.get_rng_state(machine.device)
    return state | {f"{name}.{key}": t for name, part in optimizer.state.items() for key, t in part.items()}

class Backward:
    """Loss of a micro-batch, its gradients added to the parameters'; on CUDA, once `replays` is set, by CUDA graphs.

    The GPU waits for the launches of a small micro-batch (dev/EXPERIMENTS.md, row 59). Autograd adds to gradients that
    exist and makes the others, so there is a graph for each set of them; it is captured when first met, and what
    it makes stays in its memory. The model must have run before, that nothing is left to compile.
    """

    def __init__(self, model):
        self.model, self.replays, self.graphs, self.inputs = model, False, {}, []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """model(*inputs), a scalar, detached; shapes are those of the first call."""
        if not self.replays:
            loss = self.model(*inputs)
            loss.backward()
            return loss.detach()
        params = list(self.model.parameters())
        self.inputs = self.inputs or [torch.empty_like(tensor) for tensor in inputs]
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        found = tuple(None if param.grad is None else param.grad.data_ptr() for param in params)
        if found not in self.graphs:
            self.graphs[found] = self.capture(params)
        graph, loss, grads = self.graphs[found]
        graph.replay()
        for param, grad in zip(params, grads):
            param.grad = grad
        return loss

    def capture(self, params: list) -> tuple:
        """(graph, loss, gradients of the parameters), in memory that all graphs share for what they do not keep."""
        graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph, *_ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            loss = self.model(*self.inputs)
            loss.backward()
        return graph, loss.detach(), [param.grad for param in params]

@contextlib.contextmanager
def memory_advice(cfg, flag: str, tokens: int):
    """Makes an error for want of memory one that names a flag and a value to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = tokens // 2
        if flag == "micro_batch_tokens":
            less = tokens // cfg.slot_tokens // 2 * cfg.slot_tokens
            flag, less = (flag, less) if less else ("slot_tokens", tokens // 2)
        raise RankError(f"{tokens} tokens at a time do not fit ({str(error).split('. ')[0]}); try --{flag}={less}"
                        ) from None

def was_restarted(machine: Machine) -> bool:
    """Whether torchrun started these ranks again after one had died."""
    return max(everyone(machine, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))) > 0

def share_parameters(model, machine: Machine):
    """Rank 0's parameters and buffers for all: random numbers may differ between kinds of GPU."""
    if machine.world_size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)

def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    dynamo = sys.modules.get("torch._dynamo")                       # importing it takes seconds
    return dynamo.utils.counters["stats"].get("unique_graphs", 0) if dynamo else 0

class Clock:
    """Training time in seconds: runs only between start() and stop(), which wait for the device and all ranks."""

    def __init__(self, machine: Machine):
        self.machine, self.before, self.started = machine, 0.0, None

    def synchronize(self):
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        if self.machine.world_size > 1:
            dist.barrier()

    def start(self):
        self.synchronize()
        self.started = time.perf_counter()

    def stop(self):
        self.synchronize()
        self.before, self.started = self.seconds, None

    @property
    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.started if self.started else 0.0)

GRACE_SECONDS = 20                       # torchrun kills its ranks 30 s after it has sent them SIGTERM

def watch_signals(run: Run) -> tuple[threading.Event, threading.Event]:
    """(an event that SIGINT and SIGTERM set, one to set when the ranks have agreed to stop).

    When a rank dies torchrun sends SIGTERM to the others, whose main threads may wait for it in a collective forever;
    so a thread of its own takes the signals, and ends the process if there is no agreement in time.
    """
    stopping, agreed, (reader, writer) = threading.Event(), threading.Event(), os.pipe()

    def watch():
        os.read(reader, 1)
        stopping.set()
        if run.machine.world_size > 1 and not agreed.wait(GRACE_SECONDS):
            name_lost_ranks(run.script)
            run.writing.result()
            os._exit(1)
    os.set_blocking(writer, False)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: None)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=watch, daemon=True).start()
    return stopping, agreed

def name_lost_ranks(script: Path):
    """Says on the first of the remaining ranks which ones are gone: those that do not answer within two seconds."""
    keys = [f"rank {rank} is here" for rank in range(dist.get_world_size())]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[dist.get_rank()], "")
        time.sleep(2)
        here = [store.check([key]) for key in keys]
    except RuntimeError:                 # the first rank keeps the store, unless torchrun does
        here = [rank > 0 for rank in range(len(keys))]
    if here.index(True) == dist.get_rank():
        gone = ", ".join(str(rank) for rank, answered in enumerate(here) if not answered) or "(none)"
        print(f"{script.name}: no answer from rank {gone}, so the others end; go on from the last checkpoint "
              "with --resume=latest", file=sys.stderr)

def run_main(script: Path, presets: dict, train) -> int:
    """Runs train(cfg, argv) for the command line. Exit code: 0 done, 1 another rank died, 2 the user can put it right,
    3 diverged, 130 interrupted."""
    argv, rank = sys.argv[1:], int(os.environ.get("RANK", 0))
    if "--help" in argv or "-h" in argv:
        print(help_text(script, presets))
        return 0
    try:
        return train(parse_config(argv, presets), argv)
    except (UserError, FloatingPointError) as error:
        if rank == 0 or isinstance(error, RankError):
            print(f"{script.name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
            raise
        print(f"{script.name}: {UserError(error)}; free space or choose another folder", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        name_lost_ranks(script)
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{script.name}: interrupted before the first step; nothing to save", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
