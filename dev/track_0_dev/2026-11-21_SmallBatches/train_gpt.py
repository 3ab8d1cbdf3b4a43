"""Train a GPT-2-class model to 3.28 validation loss on FineWeb, as fast as possible.

    python data/fineweb.py 9                                              # validation shard + 0.9 B training tokens
    torchrun --standalone --nproc_per_node=8 train_gpt.py                 # the speedrun; any number of GPUs works
    python train_gpt.py --preset=tiny                                     # three minutes on a laptop CPU
    cp train_gpt.py my_idea.py                                            # edit a table row, run both, compare the logs

Result: 3.891 in 49.6 s on one H200 (development text, 121 steps, torch 2.11, n=3,
records/track_0_dev/2026-11-21_FirstRuns). No run on eight GPUs or on FineWeb has been made yet.
The recipe: one packed stream of whole documents, sliding-window attention, cheap lookup tables (value and bigram
embeddings) beside a small transformer, NorMuon for matrices and Adam for tables, everything growing in stages.
Facts and figures come from the public NanoGPT speedrun (KellerJordan/modded-nanogpt, record 89; "#n" below is its
record n, "PR n" its pull request n). Read in this order: the tables, GPT.forward, Optimizer.step, train.

Shape suffixes: T tokens, H heads, D channels per head, C residual channels, V vocabulary, N matrices, K targets.
"""
import base64
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
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint as recompute

try:
    import triton_kernels
except ImportError:                      # no Triton on this machine: plain PyTorch does the same
    triton_kernels = None

# -----------------------------------------------------------------------------
# Hyperparameters

@dataclass(frozen=True)
class Stage:                     # what changes along the run; one row a stage
    until: float                 # where it ends, as a fraction of num_iterations (past 1: the extension)
    batch_tokens: int            # per step, over all ranks
    max_doc_tokens: int          # longer documents are cut
    short: int                   # attention windows in tokens
    long: int
    lr: float                    # factor on every learning rate before the cooldown
    next_tokens: tuple[tuple[float, float, float], tuple[float, float, float]]      # loss weights of the next three
    #                              tokens: at the start and at the end of the stage
    prefix: tuple[float, float]  # loss weight of the prefix token (see prefix_tokens): (start, end)

STAGES = (
    #     until    batch   docs short  long    lr  next_tokens                    prefix
    Stage(1 / 3, 131_072,  896,  128,  384, 1.00, ((1, .5, .25), (1, .5, 0)), (.25, .25)),
    Stage(2 / 3, 262_144, 2048,  384,  896, 1.52, ((1, .5, 0), (1, 0, 0)),    (.25, 0)),
    Stage(1.000, 393_216, 2048,  640, 1408, 1.73, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(1.012, 393_216, 2048,  768, 1664, 1.73, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
)

@dataclass(frozen=True)
class Layer:                     # what differs between layers; one row a layer
    attention: bool = True       # False: a gated skip instead (#17)
    window: str = "short"        # "long" layers also take half of each key from the previous token (#49)
    values: int = -1             # value embedding table added to the values, -1: none
    reads: int = -1              # attention reads the output of this layer, -1: the residual stream
    skip: int = -1               # layer whose output a layer without attention adds
    xsa: bool = False            # remove from the attention output what lies along the token's own value (#82)
    gate: bool = False           # gate each head's output
    mix: bool = False            # dense dynamic connections to earlier states (MUDD, arXiv 2502.12170, #81)

LAYERS = (
    Layer(),                                                                # 0
    Layer(values=0, xsa=True),                                              # 1
    Layer(values=1),                                                        # 2
    Layer(window="long", xsa=True, gate=True),                              # 3
    Layer(xsa=True),                                                        # 4
    Layer(),                                                                # 5
    Layer(attention=False, skip=3),                                         # 6
    Layer(xsa=True),                                                        # 7
    Layer(values=2, reads=7),                                               # 8
    Layer(values=3, reads=7),                                               # 9
    Layer(window="long", values=4, reads=7, gate=True, mix=True),           # 10
)

SINGLE_STAGES = (                # a quarter of the batch in four times as many steps: one GPU loses little speed
    #     until    batch   docs short  long    lr  next_tokens                    prefix
    Stage(1 / 3,  32_768,  896,  128,  384, 0.79, ((1, .5, .25), (1, .5, 0)), (.25, .25)),
    Stage(2 / 3,  65_536, 2048,  384,  896, 1.20, ((1, .5, 0), (1, 0, 0)),    (.25, 0)),
    Stage(1.000,  98_304, 2048,  640, 1408, 1.36, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(1.012,  98_304, 2048,  768, 1664, 1.36, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
)
TINY_STAGES = (
    Stage(1 / 3,   4_096,  512,   64,  128, 1.00, ((1, .5, .25), (1, .5, 0)), (0, 0)),
    Stage(1.000,   8_192, 1024,   64,  256, 1.40, ((1, .5, 0), (1, 0, 0)),    (0, 0)),
)
TINY_LAYERS = (
    Layer(values=0),                                                        # 0
    Layer(window="long", values=1, gate=True),                              # 1
    Layer(attention=False, skip=1),                                         # 2
    Layer(xsa=True),                                                        # 3
    Layer(window="long", values=2, reads=3, gate=True, mix=True),           # 4
)

@dataclass(frozen=True)
class Rule:                      # how one parameter is trained and shared between ranks; one row a parameter
    rule: str                    # "muon" (orthogonalised momentum, every step) or "adam" (odd steps only, #39)
    lr: float | tuple            # peak learning rate; a tuple alternates over the matrices of a bank
    betas: tuple                 # adam: first and second moment; muon: second moment only, its momentum is scheduled
    decay: float                 # cautious weight decay; adam: times lr^2, muon: times lr (#43, #50)
    shared: str                  # "shard": each rank updates a slice, then all gather; "all": all ranks update all

PARAMETERS = {
    # name               rule    lr              betas         decay  shared    in the order of communication
    "attn_scales":  Rule("adam", 0.04,           (0.90, 0.99), 0,     "all"),
    "smear_lambda": Rule("adam", 0.04,           (0.90, 0.99), 0,     "all"),
    "skip_lambda":  Rule("adam", 0.04,           (0.90, 0.99), 0,     "all"),
    "smear_gate":   Rule("adam", 8e-5,           (0.90, 0.99), 0,     "all"),
    "resid_lambdas": Rule("adam", 0.04,          (0.90, 0.95), 0,     "all"),
    "post_lambdas": Rule("adam", 0.008,          (0.90, 0.95), 0,     "all"),
    "value_gates":  Rule("adam", 0.008,          (0.90, 0.99), 0.005, "all"),
    "gate_fc":      Rule("adam", 8e-4,           (0.90, 0.99), 0.005, "all"),
    "gate_proj":    Rule("adam", 8e-4,           (0.90, 0.99), 0.005, "all"),
    "gate_bias":    Rule("adam", 8e-4,           (0.90, 0.99), 0,     "all"),
    "gate_scale":   Rule("adam", 8e-4,           (0.90, 0.99), 0,     "all"),
    "mix_fc":       Rule("adam", 0.002,          (0.90, 0.99), 0.005, "all"),
    "mix_proj":     Rule("adam", 0.002,          (0.90, 0.99), 0.005, "all"),
    "mix_bias":     Rule("adam", 0.002,          (0.90, 0.99), 0,     "all"),
    "value_embeds": Rule("adam", 0.6,            (0.75, 0.95), 0.025, "shard"),
    "bigram_embed": Rule("adam", 0.6,            (0.75, 0.95), 0.025, "shard"),
    "lm_head":      Rule("adam", 0.008,          (0.50, 0.95), 0.75,  "shard"),
    "embed":        Rule("adam", 0.008,          (0.50, 0.95), 0.75,  "shard"),     # trained from the untie step on
    "attn_qk":      Rule("muon", 0.023,          (0.90,),      1.2,   "shard"),
    "attn_vo":      Rule("muon", 0.023,          (0.90,),      1.2,   "shard"),
    "mlp":          Rule("muon", (0.046, 0.092), (0.90,),      1.2,   "shard"),     # c_fc, c_proj
}

@dataclass(frozen=True)
class Hyperparameters:
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"    # glob of training shards, read once in name order
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"        # glob of validation shards
    val_tokens: int = 10_485_760         # fixed by the track: the metric is the mean loss over exactly these
    val_stream_tokens: int = 131_072     # whole documents are packed into streams of this length for validation
    slot_tokens: int = 16_384            # a batch is made of slots of whole documents; the unit ranks share out
    micro_batch_tokens: int = 0          # tokens per forward on a rank; 0: as memory allows
    # schedule
    num_iterations: int = 1270           # scales the whole schedule
    stop_after: int = 0                  # end after this many steps, schedule unchanged; 0: off
    val_every: int = 250                 # steps between validations; 0: only first and last
    stages: tuple[Stage, ...] = STAGES
    final_windows: tuple[int, ...] = (768, 2560)    # short, long window of the final validation and of sampling
    cooldown: float = 0.6                # last fraction of num_iterations, over which the learning rate falls
    lr_floor: float = 0.15               # learning rate factor at the end (#72)
    untie: float = 2 / 3                 # embedding and head are one matrix until here (#51, #53)
    # model
    layers: tuple[Layer, ...] = LAYERS
    model_dim: int = 768
    head_dim: int = 128
    mlp_dim: int = 3072
    gate_dim: int = 64                   # hidden width of the gate networks
    bigram_rows: int = 377_280           # rows of the hashed bigram table (#62)
    bigram_signs: int = 8192             # random sign patterns that tell colliding bigrams apart (#83)
    candidates: int = 0                  # tokens that the training loss of a slot compares with; 0: all of them
    vocab_size: int = 0                  # 0: from the shards, rounded up to a multiple of vocab_multiple
    vocab_multiple: int = 128            # matrix units like multiples of 128
    bos_id: int = -1                     # begin-of-document id; -1: from the shards
    attn_scale: float = 0.1              # softmax scale in the first stage; grows with the windows
    rope_base: float = 1024.0            # longest rotary period, in tokens per radian
    # optimizer
    lr: float = 1.0                      # factor on every learning rate of PARAMETERS
    momentum: tuple[float, ...] = (0.85, 0.95)      # Muon momentum: low, high
    momentum_warmup: int = 300           # steps from low to high; steps, for short runs want a short memory
    momentum_cooldown: float = 0.039     # back to low over this last fraction of num_iterations
    # machine
    device: str = "auto"                 # cuda, cpu or mps
    precision: str = "bf16"              # of weights and activations: bf16 or fp32
    attention: str = "auto"              # flex (CUDA) or plain (anywhere)
    kernels: bool = True                 # the kernels of triton_kernels.py, on CUDA
    float8: bool = True                  # products in float8, if the GPU and the kernels can; never in validation
    compile: bool = True                 # torch.compile; off on the CPU
    compile_cache: str = ""              # folder that keeps what was compiled; "": torch's own in the temporary files
    seed: int = 0
    out_dir: str = "logs"                # each run makes a folder in it

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: num_iterations and the extension."""
        return round(self.stages[-1].until * self.num_iterations)

PRESETS = {
    "speedrun": Hyperparameters(),       # track 1, on eight GPUs
    "single": Hyperparameters(num_iterations=5080, val_every=1000, stages=SINGLE_STAGES, cooldown=0.5),     # on one
    "tiny": Hyperparameters(             # learns to write Python-like text in three minutes on two cores
        train_files="data/local/train_*.bin", val_files="data/local/val_*.bin", val_tokens=131_072,
        val_stream_tokens=8192, slot_tokens=1024, num_iterations=110, val_every=50, stages=TINY_STAGES,
        final_windows=(64, 256), layers=TINY_LAYERS, model_dim=192, head_dim=48, mlp_dim=768, gate_dim=16,
        bigram_rows=32_768, bigram_signs=256, vocab_multiple=1, precision="fp32", compile=False),
}

# -----------------------------------------------------------------------------
# Command line

class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""

class RankError(UserError):
    """A UserError that other ranks may not see."""

def convert(value, kind):
    """A value read from JSON as the type an annotation names, rows of tables too; raises ValueError or TypeError."""
    if is_dataclass(kind):
        row = dict(zip(kind.__annotations__, value, strict=True)) if isinstance(value, list) else value
        return kind(**{name: convert(item, kind.__annotations__[name]) for name, item in row.items()})
    if get_origin(kind) is tuple:
        kinds = kind.__args__[:1] * len(value) if kind.__args__[-1] is ... else kind.__args__
        return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(value)
    return value

def parse_value(name: str, text: str, kind):
    """Value of `--name=text` with the type of the dataclass annotation; tables are JSON lists of rows."""
    tables = {tuple[Stage, ...]: "a JSON list of Stage rows", tuple[Layer, ...]: "a JSON list of Layer rows"}
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in tables:
            return convert(json.loads(text), kind)
        return tuple(map(kind.__args__[0], text.split(","))) if get_origin(kind) is tuple else kind(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        wanted = tables | {bool: "true or false", int: "a whole number", float: "a number"}
        wanted = wanted.get(kind, "numbers separated by commas")
        raise UserError(f"--{name}={text} is not {wanted}; --help lists the flags and their defaults") from None

def parse_config(argv: list[str]) -> Hyperparameters:
    """Hyperparameters from `--preset=name` and `--field=value` flags; raises UserError on anything else."""
    flags = {}
    for arg in argv:
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            raise UserError(f"cannot read {arg!r}; flags look like --field=value, --help lists them")
        flags[name] = value
    preset = flags.pop("preset", "speedrun")
    if preset not in PRESETS:
        raise UserError(f"--preset={preset} does not exist; there are {', '.join(PRESETS)}")
    kinds = {field.name: field.type for field in fields(Hyperparameters)}
    for name in flags.keys() - kinds.keys():
        raise UserError(f"--{name} is not a flag; --help lists them")
    cfg = replace(PRESETS[preset], **{name: parse_value(name, value, kinds[name]) for name, value in flags.items()})
    check_config(cfg)
    return cfg

def check_config(cfg: Hyperparameters):
    """Raises UserError for a value out of range or values that contradict each other."""
    def need(good, names, remedy):
        for name in names.split():
            if not good(getattr(cfg, name)):
                raise UserError(f"--{name}={str(getattr(cfg, name)).strip('()')} {remedy}")
    need(lambda value: 1 <= value < 2**63, "num_iterations val_tokens val_stream_tokens slot_tokens model_dim head_dim "
         "mlp_dim gate_dim bigram_rows bigram_signs vocab_multiple", "must be at least 1")
    need(lambda value: 0 <= value < 2**63, "stop_after val_every micro_batch_tokens candidates vocab_size seed "
         "momentum_warmup", "must not be negative or huge")
    need(lambda value: 0 <= value <= 1, "cooldown momentum_cooldown lr_floor untie", "must be in 0..1")
    need(lambda value: 0 < value < math.inf, "lr attn_scale rope_base", "must be positive")
    need(lambda pair: len(pair) == 2 and min(pair) >= 1, "final_windows", "must be two positive numbers")
    need(lambda pair: len(pair) == 2 and all(0 <= item < 1 for item in pair), "momentum", "must be two numbers in 0..1")
    for name, known in (("device", "auto cuda cpu mps"), ("precision", "bf16 fp32"), ("attention", "auto flex plain")):
        need(lambda value: value in known.split(), name, f"is unknown; choose from {known}")
    need(lambda dim: dim % 4 == 0, "head_dim", "must be a multiple of 4")
    need(lambda dim: dim % (2 * cfg.head_dim) == 0 and dim >= 12, "model_dim",
         f"must be at least 12 and hold an even number of heads of --head_dim={cfg.head_dim}")
    need(lambda tokens: tokens % cfg.slot_tokens == 0, "micro_batch_tokens",
         f"must be a multiple of --slot_tokens={cfg.slot_tokens}")
    for i, stage in enumerate(cfg.stages):
        before, rest = cfg.stages[i - 1].until if i else 0, (stage.max_doc_tokens, stage.short, stage.long)
        if (not before < stage.until < math.inf or stage.batch_tokens % cfg.slot_tokens or not stage.lr > 0
                or min(stage.batch_tokens, *rest) < 1):
            raise UserError(f"stage {i}: until={stage.until} must be above the row before, the rest positive, and "
                            f"batch_tokens={stage.batch_tokens} a multiple of --slot_tokens={cfg.slot_tokens}")
    if not cfg.stages or cfg.total_steps < cfg.num_iterations:
        raise UserError("the stage table ends before the run: its last row must have until >= 1")
    layers, rows = cfg.layers, list(enumerate(cfg.layers))
    reads, skips, tables = ([value for layer in layers if (value := getattr(layer, name)) >= 0]
                            for name in ("reads", "skip", "values"))
    rules = {
        "every window is short or long": all(layer.window in ("short", "long") for layer in layers),
        "the first layer has attention": layers and layers[0].attention,
        "late attention reads one earlier layer": len(set(reads)) == 1 and all(layer.reads < i for i, layer in rows),
        "layers without attention, and only they, skip from one earlier layer": len(set(skips)) == 1 and all(
            layer.attention != (layer.skip >= 0) and layer.skip < i for i, layer in rows),
        "layers without attention have no xsa and no gate": not any(
            (layer.xsa or layer.gate) and not layer.attention for layer in layers),
        "values are 0, 1, ... in order, at least two": len(tables) > 1 and tables == list(range(len(tables))),
        "the last layer, and only it, has mix": [i for i, layer in rows if layer.mix] == [len(layers) - 1],
        "the last layer has gate and values": layers and layers[-1].gate and layers[-1].values >= 0,
    }
    for rule, kept in rules.items():
        if not kept:
            raise UserError(f"the layer table breaks a rule: {rule}; change its rows or --layers")

def help_text() -> str:
    """What --help prints: how to start, and every flag with its default and the comment beside it."""
    lines = Path(__file__).read_text().split("class Hyperparameters:")[1].split("@property")[0].splitlines()
    comments = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in lines if ":" in line}
    text = ["\n\n".join(__doc__.split("\n\n")[:2]), "", "Flags, --field=value, with the defaults of --preset=speedrun "
            f"(all presets: {', '.join(PRESETS)}):", ""]
    for field in fields(Hyperparameters):
        value = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        value = "JSON rows, see the table in the script" if field.name in ("stages", "layers") else value
        text.append(f"  --{field.name}={value}".ljust(66) + comments.get(field.name, ""))
    return "\n".join(text)

# -----------------------------------------------------------------------------
# Data

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
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

    def read(self) -> np.ndarray:
        """(num_tokens,) uint16 or uint32, mapped from the file."""
        try:
            return np.memmap(self.path, f"<u{self.width}", "r", offset=HEADER_BYTES, shape=(self.num_tokens,))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} changed or disappeared while in use ({error}); make it again") from None

def read_header(path: str) -> Shard:
    """Header of a shard, with zeros read as GPT-2's values; raises UserError if the file is not a whole shard."""
    again = "make or download it again (python data/fineweb.py or python data/text.py)"
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
    return Shard(path, num_tokens, int(header[3]) or 50257, int(header[4]) or 50256, width, tokenizer)

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
    if not path.exists():
        raise UserError(f"{path} is missing; python data/fineweb.py or python data/text.py puts it there")
    if path.stat().st_size > 1 << 26 or hashlib.sha256(text := path.read_bytes()).hexdigest() != shard.tokenizer:
        raise UserError(f"{path} is not the tokenizer of {shard.path} ({shard.tokenizer[:12]}); put that one there")
    return text

def prefix_tokens(tokenizer: dict, vocab_size: int) -> np.ndarray:
    """(V,) int64: for each token the longest other token whose bytes begin it, -1 if there is none (#88)."""
    longest, ancestors = np.full(vocab_size, -1, np.int64), []      # ancestors begin the current one, shortest first
    for text, token in sorted((base64.b64decode(rank), i) for i, rank in enumerate(tokenizer["ranks"])):
        while ancestors and not text.startswith(ancestors[-1][0]):
            ancestors.pop()
        if ancestors:
            longest[token] = ancestors[-1][1]
        ancestors.append((text, token))
    return longest

def documents(shards: list[Shard]):
    """Yields (ids, start, end) of every document in order; of one cut by a shard border the rest is left out."""
    for shard in shards:
        ids, start = shard.read(), None
        for low in range(0, len(ids), 1 << 22):                     # indexes a few million tokens at a time
            for bos in np.flatnonzero(ids[low:low + (1 << 22)] == shard.bos_id) + low:
                if start is not None:
                    yield ids, start, bos
                start = bos
        if start is not None:
            yield ids, start, len(ids)

def fill_slot(pieces: list, slot_tokens: int, bos_id: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (int32), targets (int64) of one slot from (ids, start, length) pieces, padded with bos_id and -1."""
    inputs, targets, filled = np.full(slot_tokens, bos_id, np.int32), np.full(slot_tokens, -1, np.int64), 0
    for ids, start, length in pieces:
        inputs[filled:filled + length] = ids[start:start + length]
        after = ids[start + 1:start + length + 1]                   # what really follows, also where a document is cut
        targets[filled:filled + len(after)] = after
        targets[filled + len(after):filled + length] = bos_id       # the shard ends with this document
        filled += length
    if (highest := max(inputs.max(), targets.max())) >= vocab_size:
        raise RankError(f"{getattr(pieces[0][0], 'filename', 'a shard')} holds id {highest}, outside the vocabulary of "
                        f"{vocab_size}; make the shard again")
    return inputs, targets

def training_batches(cfg: Hyperparameters, shards: list[Shard], rank: int, world_size: int, micro_slots: int):
    """Yields for each step this rank's share of its slots, as a list of (inputs, targets) of micro_slots slots each."""
    docs, kind = documents(shards), (cfg.slot_tokens, shards[0].bos_id, shards[0].vocab_size)
    for step in range(cfg.total_steps):  # the same slots for any number of ranks, who take contiguous shares
        stage, mine = cfg.stages[stage_index(cfg, step)], []
        num_slots = stage.batch_tokens // cfg.slot_tokens
        for slot in range(num_slots):
            pieces, room = [], cfg.slot_tokens
            while room:
                ids, start, end = next(docs, (None, 0, 0))
                if ids is None:
                    raise UserError(f"the training text ran out at step {step} of {cfg.total_steps} (what is cut from "
                                    f"documents is lost); add shards or lower --num_iterations={cfg.num_iterations}")
                pieces.append((ids, start, length := min(end - start, stage.max_doc_tokens, room)))
                room -= length
            if rank * num_slots // world_size <= slot < (rank + 1) * num_slots // world_size:
                mine.append(fill_slot(pieces, *kind))
        # every rank runs the same number of equal micro-steps
        mine += [fill_slot([], *kind)] * (micro_steps(cfg, stage, world_size, micro_slots) * micro_slots - len(mine))
        yield [tuple(np.concatenate(part) for part in zip(*mine[i:i + micro_slots]))
               for i in range(0, len(mine), micro_slots)]

def check_tokens(cfg: Hyperparameters, shards: list[Shard], num_steps: int) -> str:
    """The sentence on tokens needed and found; raises UserError if there are too few."""
    needed = sum(cfg.stages[stage_index(cfg, step)].batch_tokens for step in range(num_steps))
    found = sum(shard.num_tokens for shard in shards)
    if found < needed:
        raise UserError(f"--train_files={cfg.train_files} holds {found} tokens, {num_steps} steps need {needed}; add "
                        f"shards (data/fineweb.py or data/text.py) or lower --num_iterations={cfg.num_iterations}")
    return f"tokens: {num_steps} steps need {needed:,}, found {found:,}"

def micro_steps(cfg: Hyperparameters, stage: Stage, world_size: int, micro_slots: int) -> int:
    """Forward passes per step of the busiest rank."""
    return math.ceil(math.ceil(stage.batch_tokens // cfg.slot_tokens / world_size) / micro_slots)

def validation_streams(cfg: Hyperparameters, shards: list[Shard]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) streams that hold each of the first val_tokens tokens once; only longer documents are cut."""
    found = sum(shard.num_tokens for shard in shards)
    if found <= cfg.val_tokens:
        raise UserError(f"--val_files={cfg.val_files} holds {found} tokens, --val_tokens={cfg.val_tokens} needs more; "
                        "add shards or lower it")
    streams, pieces, room, left = [], [], cfg.val_stream_tokens, cfg.val_tokens
    for ids, start, end in documents(shards):
        while left and start < end:
            whole = min(end - start, left)
            if whole > room and room < cfg.val_stream_tokens:
                streams.append(pieces)
                pieces, room = [], cfg.val_stream_tokens
            length = min(whole, room)
            pieces.append((ids, start, length))
            start, room, left = start + length, room - length, left - length
    if left:
        raise UserError(f"--val_files={cfg.val_files} has tokens before its first document; make the shards again")
    return [fill_slot(pieces, cfg.val_stream_tokens, shards[0].bos_id, shards[0].vocab_size)
            for pieces in streams + [pieces] if pieces]

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
# Model

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without gain."""
    return F.rms_norm(x, (x.size(-1),))

def mlp(u_TC: Tensor, up_FC: Tensor, down_FC: Tensor) -> Tensor:
    """relu(u up^T)^2 down (#5)."""
    return F.linear(u_TC, up_FC).relu().square() @ down_FC

def rotary(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates channel pairs (j, j + D/4) of the first half; the tables leave the other half where it is (#17)."""
    swapped = x_THD.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    return x_THD * cos_TD[:, None] + swapped * sin_TD[:, None]

def rotary_tables(position_T: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) for `rotary`: the first half of the channels turns, the second has no position."""
    angle = position_T[:, None].float() * inv_freq
    cos, sin, still = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.cat([cos, cos, still + 1, still + 1], 1).to(dtype), torch.cat([sin, -sin, still, still], 1).to(dtype)

class Stream:
    """Where each token of one packed stream (T,) stands: its place in its document, and its way to other tokens.

    The layers treat tokens as rows of one axis. All that reaches from one to another goes through before and attend of
    a Stream, or of the Rows that take its place in decoding.
    """
    projections = {}                     # nothing is prepared, see GPT.projections

    def __init__(self, model: "GPT", tokens: Tensor):
        index = torch.arange(tokens.numel(), device=tokens.device, dtype=torch.int32)
        self.starts = torch.where(tokens == model.cfg.bos_id, index, 0).cummax(0).values.to(torch.int32)
        self.fresh, self.masks = self.starts == index, model.masks(self.starts)     # fresh: first of its document
        self.position, self.window_lengths = index - self.starts, model.window_lengths

    def before(self, name: str, x: Tensor) -> Tensor:
        """x (T, ...) of the token before; that of a fresh token means nothing. `name` tells quantities apart."""
        return x.roll(1, 0)

    def attend(self, i: int, window: str, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attention output (T, H, D) of layer i, for its window."""
        first, blocks = self.masks[window]
        if blocks is None:
            return plain_attention(q_THD, k_THD, v_THD, first, self.window_lengths[window])
        return flex(q_THD, k_THD, v_THD, blocks)

class GPT(nn.Module):
    """The model, built from the layer table of `cfg`, which must name vocab_size and bos_id.

    All parameters are in a few banks: one tensor for all matrices of a shape, one for all tables. Windows are those of
    the first stage; set_stage moves on.
    """

    def __init__(self, cfg: Hyperparameters):
        super().__init__()
        assert cfg.vocab_size > 0 and cfg.bos_id >= 0, "vocab_size and bos_id come from the shards"
        self.cfg, layers, C, V = cfg, cfg.layers, cfg.model_dim, cfg.vocab_size
        self.attn_layers = [i for i, layer in enumerate(layers) if layer.attention]
        self.late, self.skip = max(layer.reads for layer in layers), max(layer.skip for layer in layers)
        self.gate_names, num_tables = self.name_gates(), sum(layer.values >= 0 for layer in layers)
        num_gates = sum(size for net in self.gate_names for _, size, _ in net)
        num_mixes = sum(size for net in self.MIXES for _, size, _ in net)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.precision]

        def parameter(*shape, dtype=dtype):
            return nn.Parameter(torch.empty(shape, dtype=dtype))
        self.embed, self.lm_head = parameter(V, C), parameter(V, C)
        self.value_embeds = parameter(num_tables, V, C)
        self.bigram_embed = parameter(cfg.bigram_rows, C)
        self.attn_qk = parameter(len(self.attn_layers) * cfg.num_heads, 2 * cfg.head_dim, C)    # pairs of heads: #80
        self.attn_vo = parameter(len(self.attn_layers) * 2, C, C)
        self.mlp = parameter(len(layers) * 2, cfg.mlp_dim, C)
        self.attn_scales = parameter(len(layers), 2, dtype=torch.float32)       # of the weights of q, k, v and of o
        self.resid_lambdas = parameter(len(layers), 2, dtype=torch.float32)     # of the stream at attention and mlp
        self.post_lambdas = parameter(len(layers), 2, dtype=torch.float32)      # of what they add
        self.smear_gate = parameter(12)
        self.smear_lambda, self.skip_lambda = parameter(1, dtype=torch.float32), parameter(1, dtype=torch.float32)
        self.value_gates = parameter(max(num_tables - 1, 1), cfg.num_heads, 12)
        self.gate_fc = parameter(2, cfg.gate_dim, C)
        self.gate_proj, self.gate_bias = parameter(num_gates, cfg.gate_dim), parameter(num_gates)
        self.gate_scale = parameter(1, dtype=torch.float32)
        self.mix_fc = parameter(2, cfg.gate_dim, C)
        self.mix_proj, self.mix_bias = parameter(num_mixes, cfg.gate_dim), parameter(num_mixes)
        self.register_buffer("bigram_signs", torch.empty(cfg.bigram_signs, C, dtype=dtype))
        self.register_buffer("inv_freq", torch.empty(cfg.head_dim // 4))
        self.register_buffer("attn_scale", torch.empty(()))
        self.register_buffer("windows", torch.empty(2, dtype=torch.int32))      # short, long
        self.register_buffer("prefix_of", torch.full((V,), -1), persistent=False)
        self.init_parameters()

    # the mix nets of the last layer and of the output: name, outputs, their initial value (#81)
    MIXES = ((("value", 3, 0.), ("stream", 3, 0.), ("value_gate", 2, 2.), ("attn_x", 1, 1.1 ** 0.5), ("attn", 1, 1.),
              ("attn_x0", 1, 0.), ("attn_bigram", 1, 0.05), ("mlp_x", 1, 1.1 ** 0.5), ("mlp", 1, 1.)),
             (("x0", 1, 0.), ("late", 1, -0.5), ("last", 1, 0.), ("embed", 1, 0.), ("skip", 1, 0.)))

    def name_gates(self):
        """Outputs (name, size, initial value) of the two gate nets: layers up to the skip source, and those after."""
        nets, H = ([], []), self.cfg.num_heads
        for i, layer in enumerate(self.cfg.layers):
            net = nets[i > self.skip]
            net += [(f"xsa.{i}", H, 0.)] * layer.xsa + [(f"out.{i}", H, 0.25)] * layer.gate
            if layer.attention and not layer.mix:
                net += [(f"x0.{i}", 1, 0.), (f"bigram.{i}", 1, 0.05)]
            elif not layer.attention:
                net += [(f"skip.{i}", 1, 0.5)]
        return nets

    @torch.no_grad()
    def init_parameters(self):
        """Sets every parameter and buffer to its initial value, the same for the same seed and kind of device."""
        C, generator = self.cfg.model_dim, torch.Generator(self.embed.device).manual_seed(self.cfg.seed)
        self.lm_head.normal_(0, 0.005, generator=generator)
        self.embed.copy_(self.lm_head)
        self.value_embeds.normal_(0, 0.01, generator=generator)
        bound = 3 ** 0.5 * 0.5 * C ** -0.5
        for bank in (self.attn_qk, self.attn_vo, self.mlp):
            bank.uniform_(-bound, bound, generator=generator)
        self.mlp[1::2] = 0                                          # every mlp starts as nothing
        self.attn_scales.copy_(torch.tensor([0.5, 1.0]))
        self.resid_lambdas.fill_(1.1 ** 0.5)                        # the early stream fades with depth (#45)
        self.post_lambdas.fill_(1)
        self.skip_lambda.fill_(-1.5)
        self.gate_scale.fill_(0.1)
        for zero in (self.bigram_embed, self.smear_gate, self.smear_lambda, self.value_gates):
            zero.zero_()
        for fc, proj, bias, nets in ((self.gate_fc, self.gate_proj, self.gate_bias, self.gate_names),
                                     (self.mix_fc, self.mix_proj, self.mix_bias, self.MIXES)):
            fc.uniform_(-C ** -0.5, C ** -0.5, generator=generator)
            proj.zero_()
            bias.copy_(torch.tensor([value / 0.1 for net in nets for _, size, value in net for _ in range(size)]))
        signs = torch.randint(0, 2, self.bigram_signs.shape, generator=generator, device=self.embed.device)
        self.bigram_signs.copy_(signs * 2 - 1)
        self.set_stage(0)

    @torch.no_grad()
    def set_stage(self, index: int, final: bool = False):
        """Windows, rotary frequencies and softmax scale of a stage; `final`: the windows of the last validation."""
        stages = self.cfg.stages[:index + 1]
        freq = self.cfg.rope_base ** -torch.linspace(0, 1, self.inv_freq.numel(), dtype=torch.float64, device="cpu")
        scale = self.cfg.attn_scale
        # when the long window grows from a to b tokens, frequencies that turn less than once in a are slowed by a/b
        # and fast ones kept (YaRN, arXiv 2309.00071, #31), and the softmax scale grows a little
        for old, new in zip(stages, stages[1:]):
            keep = ((old.long * freq / (2 * math.pi) - 1) / 31).clamp(0, 1)
            freq = freq * (keep + (1 - keep) * old.long / new.long)
            scale *= 1 + 0.2 * math.log(new.long / old.long)
        self.inv_freq.copy_(freq)
        self.attn_scale.fill_(scale)
        short, long = self.cfg.final_windows if final else (stages[-1].short, stages[-1].long)
        self.windows.copy_(torch.tensor([short, long], device="cpu"))
        self.window_lengths = {"short": short, "long": long}

    def masks(self, starts_T: Tensor) -> dict[str, tuple]:
        """window -> (first visible key of each token, block mask or None without FlexAttention)."""
        index = torch.arange(starts_T.numel(), device=starts_T.device, dtype=torch.int32)
        if self.cfg.attention != "flex":
            return {name: (torch.maximum(starts_T, index - size), None) for name, size in self.window_lengths.items()}
        longest = max(self.cfg.final_windows + tuple(w for stage in self.cfg.stages for w in (stage.short, stage.long)))
        short, long = (torch.maximum(starts_T, index - window) for window in self.windows)
        return {name: (first, block_mask(first, -(-longest // BLOCK) + 2))
                for name, first in (("short", short), ("long", long))}

    def gate_net(self, kind: str, net: int, x_TC: Tensor) -> dict[str, Tensor]:
        """name -> (T, size): the outputs of one small network that computes gates for each token (#81, #85)."""
        names = self.gate_names if kind == "gate" else self.MIXES
        fc, proj, bias = (getattr(self, f"{kind}_{part}") for part in ("fc", "proj", "bias"))
        sizes = [size for _, size, _ in names[net]]
        low = sum(size for other in names[:net] for _, size, _ in other)
        part = slice(low, low + sum(sizes))
        scale = self.gate_scale.to(x_TC.dtype) if kind == "gate" else 0.1
        out = F.linear(F.gelu(F.linear(x_TC, fc[net])), proj[part], bias[part]) * scale
        return {name: value for (name, _, _), value in zip(names[net], out.split(sizes, dim=1))}

    def matrices(self) -> dict[int, tuple[Tensor, ...]]:
        """Layer -> matrices of its attention: of queries and keys (2C, C), of values, and of the output."""
        # unbinding a bank once gives one stacked gradient; indexing it layer by layer would give one a layer
        qk, vo = self.attn_qk.view(-1, 2 * self.cfg.model_dim, self.cfg.model_dim).unbind(), self.attn_vo.unbind()
        return dict(zip(self.attn_layers, zip(qk, vo[0::2], vo[1::2])))

    def projections(self, i: int, qk: Tensor, v: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of layer i as its attention uses them: one (3C, C), and that of the output, scales applied."""
        scales = self.attn_scales[i].to(qk.dtype)
        return torch.cat([qk, v]) * scales[0], o * scales[1]

    def attention(self, i: int, u_TC: Tensor, weights: tuple, place, rope: tuple, gates: dict, value_TC: Tensor | None,
                  float8: bool) -> Tensor:
        """What the attention of layer i adds to the stream, (T, C), from its normalised input u."""
        layer, T, H, D = self.cfg.layers[i], u_TC.size(0), self.cfg.num_heads, self.cfg.head_dim
        qkv, o = place.projections.get(i) or self.projections(i, *weights)
        linear = triton_kernels.float8_linear if float8 else F.linear
        q, k, v = linear(u_TC, qkv).view(T, 3, H, D).unbind(1)
        if value_TC is not None:
            v = v + value_TC.view(T, H, D)
        q, k = rotary(norm(q) * self.attn_scale.to(q.dtype), *rope), rotary(norm(k), *rope)
        if layer.window == "long":       # the half of the key without position is the previous token's (#49)
            moving = torch.arange(D, device=k.device) < D // 2
            k = torch.where(place.fresh[:, None, None] | moving, k, place.before(f"key.{i}", k))
        y = place.attend(i, layer.window, q, k, v)
        if layer.xsa:
            along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - torch.tanh(gates[f"xsa.{i}"])[:, :, None] * along * v
        if layer.gate:
            y = y * gates[f"out.{i}"][:, :, None]
        return F.linear(y.reshape(T, -1), o)

    def hidden(self, tokens: Tensor, float8: bool = False, place=None) -> tuple[Tensor, Tensor]:
        """What the head reads, (T, C), for tokens (T,), and where the document of each starts.

        The tokens are one packed stream, or those that `place` (Rows) says.
        """
        cfg, H = self.cfg, self.cfg.num_heads
        place = place or Stream(self, tokens)
        rope = rotary_tables(place.position, self.inv_freq, self.embed.dtype)
        weights, up, down = self.matrices(), self.mlp.unbind()[0::2], self.mlp.unbind()[1::2]
        resid, post = (lambdas.to(self.embed.dtype) for lambdas in (self.resid_lambdas, self.post_lambdas))
        values = [F.embedding(tokens, table) for table in self.value_embeds.unbind()]
        # token, with a little of the token before (#34)
        embed = F.embedding(tokens, self.embed)
        smear = self.smear_lambda.to(embed.dtype) * torch.sigmoid(embed[:, :12] @ self.smear_gate)
        x0 = norm(embed + torch.where(place.fresh, 0, smear)[:, None] * place.before("embed", embed))
        # pair of tokens, hashed (#62)
        before = torch.where(place.fresh, tokens, place.before("token", tokens))
        pair = ((36313 * tokens) ^ (27191 * before)) % cfg.bigram_rows
        bigram = F.embedding(pair, self.bigram_embed)
        bigram = bigram * F.embedding((tokens ^ before) % cfg.bigram_signs, self.bigram_signs)

        gates = self.gate_net("gate", 0, x0)
        x = start = x0 + gates["bigram.0"] * bigram
        kept = {}                        # outputs of the layers that later ones read
        for i, layer in enumerate(cfg.layers):
            if i == self.skip + 1:
                gates |= self.gate_net("gate", 1, x)
            value, resid_mlp, post_mlp = None, resid[i, 1], post[i, 1]
            if layer.mix:
                kept["last"], mix = x, self.gate_net("mix", 0, x)
                sources, resid_mlp, post_mlp = (start, kept[self.late], x), mix["mlp_x"], mix["mlp"]
                gate = mix["value_gate"].repeat_interleave(H // 2, dim=1)
                own = values[layer.values].view(-1, H, cfg.head_dim) * gate[:, :, None]
                value = own.flatten(1) + sum(c * s for c, s in zip(mix["value"].split(1, dim=1), sources))
            u = norm(x if layer.reads < 0 else kept[layer.reads])
            if layer.values >= 0 and not layer.mix:
                table = values[layer.values]
                gate = F.linear(torch.cat([u[:, :6], table[:, :6]], 1), self.value_gates[layer.values])
                value = (table.view(-1, H, cfg.head_dim) * (2 * torch.sigmoid(gate))[:, :, None]).flatten(1)
            if layer.mix:
                x = x + sum(c * s for c, s in zip(mix["stream"].split(1, dim=1), sources))
                attn = self.attention(i, u, weights[i], place, rope, gates, value, float8)
                x = mix["attn_x"] * x + mix["attn"] * attn + mix["attn_x0"] * start + mix["attn_bigram"] * bigram
            elif layer.attention:
                attn = self.attention(i, u, weights[i], place, rope, gates, value, float8)
                x = resid[i, 0] * x + post[i, 0] * attn + gates[f"x0.{i}"] * x0
                x = x + gates[f"bigram.{i}"] * bigram if i else x           # layer 0 starts with it
            else:
                x = x + torch.sigmoid(self.skip_lambda).to(x.dtype) * gates[f"skip.{i}"] * kept[layer.skip]
            relu2_mlp = triton_kernels.float8_mlp if float8 else mlp
            x = resid_mlp * x + post_mlp * relu2_mlp(norm(x), up[i], down[i])
            if i in (self.skip, self.late):
                kept[i] = x
        mix = self.gate_net("mix", 1, x)
        x = norm(x + mix["x0"] * start + mix["late"] * kept[self.late] + mix["last"] * kept["last"]
                 + mix["embed"] * values[0] + mix["skip"] * kept[self.skip])
        return x, place.starts

    def score(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target (T,) in nats, fp32, 0 where it is -1; and the likeliest token (T,) int64."""
        x, _ = self.hidden(tokens)
        losses, likeliest = [], []
        for x, targets in zip(x.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):      # so much of the logits at one time
            logits_TV = map_logits(F.linear(x, self.lm_head))
            losses.append(F.cross_entropy(logits_TV, targets, ignore_index=-1, reduction="none"))
            likeliest.append(logits_TV.argmax(1))
        return torch.cat(losses), torch.cat(likeliest)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, loss_weights: Tensor | None = None) -> Tensor:
        """Logits (T, V) fp32 of one packed stream; with targets the sum of the cross-entropies in nats, a fp32 scalar.

        tokens (T,) integers, documents beginning with bos_id; no token sees another document. targets (T,) int64, -1:
        none. With loss_weights (4,) fp32 the sum is the training loss, whose weights are those of the next token, the
        second, the third, and the next token's prefix.
        """
        if targets is None:
            return map_logits(F.linear(self.hidden(tokens)[0], self.lm_head))
        if loss_weights is None:
            return self.score(tokens, targets)[0].sum()
        kernels = self.cfg.kernels and tokens.is_cuda and triton_kernels is not None
        float8 = self.cfg.float8 and kernels                        # in training only
        x, starts = self.hidden(tokens, float8)
        all_targets = [targets]
        for k in (1, 2):                 # the target k tokens further, within the same document
            same = torch.cat([starts[k:], starts[:k] - 1]) == starts
            all_targets.append(torch.where(same, targets.roll(-k), -1))
        all_targets.append(torch.where(targets >= 0, self.prefix_of[targets.clamp(min=0)], -1))
        def loss_of(x, head, targets, counts=None):
            args = x, head, targets, loss_weights, counts
            return triton_kernels.head_loss(*args, float8) if kernels else head_loss(*args)
        targets_TK = torch.stack(all_targets, dim=1)
        if not 0 < self.cfg.candidates < self.cfg.vocab_size:
            return loss_of(x, self.lm_head, targets_TK)
        losses = []                      # slot by slot, so that the sample depends on neither ranks nor micro-batches
        for x, targets in zip(x.split(self.cfg.slot_tokens), targets_TK.split(self.cfg.slot_tokens)):
            ids, counts, places = choose_candidates(targets, self.cfg.vocab_size, self.cfg.candidates)
            losses.append(loss_of(x, F.embedding(ids, self.lm_head), places, counts))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def new_cache(self, batch: int, max_tokens: int, chunk: int = 256) -> "Cache":
        """An empty cache for `batch` rows of up to max_tokens tokens, which enter it up to `chunk` at a time.

        It holds to the weights and windows (set_stage) of this moment.
        """
        return Cache(self, batch, max_tokens, min(chunk, max_tokens))

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: "Cache", lengths: Tensor | None = None, last: bool = False) -> Tensor:
        """Logits (B, T, V) fp32 of the next tokens (B, T) of each row; they enter the cache.

        A row is a stream of its own, as for `forward`: its first token and every bos_id begin a document. lengths (B,)
        int64: how many tokens of a row are real, 0 to T; the others, at its end, change nothing and their logits mean
        nothing. last: only the logits of each row's last token, (B, 1, V). One token a row can be captured in a CUDA
        graph; more raise ValueError when a row would exceed the cache.
        """
        B, T = tokens.shape
        if T > 1:                        # of single steps the caller keeps count, for looking would wait for the device
            cache.check_room(T if lengths is None else lengths)
        parts = []
        for low, part in zip(range(0, T, cache.chunk), tokens.to(torch.int32).split(cache.chunk, 1)):
            rows = Rows(cache, part, None if lengths is None else (lengths - low).clamp(0, part.size(1)))
            parts.append(self.hidden(part.flatten(), place=rows)[0].view(B, part.size(1), -1))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if last:
            x = x[:, -1:] if lengths is None else x[cache.rows, lengths[:, None] - 1]
        return map_logits(F.linear(x, self.lm_head))

    @property
    def matmul_parameters(self) -> int:
        """Weights that take part in a dense product for every token; tables are looked up instead."""
        banks = self.attn_qk, self.attn_vo, self.mlp, self.lm_head, self.gate_fc, self.mix_fc
        return sum(bank.numel() for bank in banks)

# -----------------------------------------------------------------------------
# Decoding

class Cache:
    """What the next token of each row needs of those before it; made by GPT.new_cache, changed by GPT.decode.

    Keys and values (B, R, H, D) of each layer are rings: position p lies in slot p % R. R is the window and what one
    call brings, so no token that comes, real or padding, takes the slot of one that is still seen. Every tensor stays
    where it is, so that a CUDA graph can hold a step.
    """

    def __init__(self, model: GPT, batch: int, max_tokens: int, chunk: int):
        cfg, like = model.cfg, model.embed
        self.max_tokens, self.chunk, self.bos_id, self.windows = max_tokens, chunk, cfg.bos_id, model.window_lengths
        # kernels like lengths that are multiples of 16
        self.rings = {name: -(-(min(window, max_tokens) + chunk) // 16) * 16 for name, window in self.windows.items()}
        self.rows = torch.arange(batch, device=like.device)[:, None]
        self.position = torch.zeros(batch, dtype=torch.int64, device=like.device)   # of each row's next token
        self.start = torch.zeros_like(self.position)                                # of its document
        head = cfg.num_heads, cfg.head_dim
        self.carried = {"token": like.new_zeros(batch, dtype=torch.int32), "embed": like.new_zeros(batch, like.size(1))}
        self.keys, self.values, self.projections, self.window = {}, {}, {}, {}      # by layer
        for i, matrices in model.matrices().items():
            self.window[i] = window = cfg.layers[i].window
            self.keys[i], self.values[i] = (like.new_zeros(batch, self.rings[window], *head) for _ in range(2))
            self.projections[i] = model.projections(i, *matrices)
            if window == "long":
                self.carried[f"key.{i}"] = like.new_zeros(batch, *head)

    def check_room(self, more: int | Tensor):
        """Raises ValueError unless every row has room for `more` tokens."""
        if (most := int((self.position + more).max())) > self.max_tokens:
            raise ValueError(f"a row of {most} tokens is longer than the cache, which was made for {self.max_tokens}")

    def held(self, ring: int, last_B: Tensor) -> Tensor:
        """(B, R) the position that each slot of a ring holds when last_B is the newest; negative: none yet."""
        return last_B[:, None] - (last_B[:, None] - torch.arange(ring, device=last_B.device)) % ring

    @torch.no_grad()
    def fill(self, other: "Cache", rows_B: Tensor):
        """Makes row b what row rows_B[b] of another cache of the model is, whatever the batch and chunk of that."""
        for mine, theirs in ((self.position, other.position), (self.start, other.start),
                             *((self.carried[name], other.carried[name]) for name in self.carried)):
            mine.copy_(theirs[rows_B])
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for i in mine:
                slots = self.held(mine[i].size(1), self.position - 1) % theirs[i].size(1)
                mine[i].copy_(theirs[i][rows_B[:, None], slots])

    def bytes_read(self, tokens: int) -> int:
        """Bytes of keys and values that the last of `tokens` tokens sees, over all rows."""
        return sum(2 * min(tokens, self.windows[self.window[i]] + 1) * key[:, 0].nbytes for i, key in self.keys.items())

class Rows:
    """The next tokens (B, T) of each row of a cache, of which lengths_B are real, in the place of a Stream."""

    def __init__(self, cache: Cache, tokens_BT: Tensor, lengths_B: Tensor | None = None):
        self.cache, self.lengths, self.projections = cache, lengths_B, cache.projections
        self.shape = B, T = tokens_BT.shape
        position = cache.position[:, None] + torch.arange(T, device=tokens_BT.device)
        starts = torch.where(tokens_BT == cache.bos_id, position, 0).cummax(1).values
        starts = torch.maximum(starts, cache.start[:, None])
        self.starts, self.position = starts.flatten(), (position - starts).flatten()
        self.fresh = self.position == 0
        self.slots, self.visible = {}, {}
        for name, window in cache.windows.items():
            held, first = cache.held(cache.rings[name], position[:, -1]), torch.maximum(starts, position - window)
            self.slots[name] = position % cache.rings[name]
            self.visible[name] = (held[:, None] <= position[:, :, None]) & (held[:, None] >= first[:, :, None])
        self.carry(cache.start, starts)
        cache.position.add_(T if lengths_B is None else lengths_B)

    def carry(self, kept_B: Tensor, x_BT: Tensor) -> Tensor:
        """x of the token before, (B, T, ...); kept_B (B, ...) holds that of the first one and then of the next call."""
        seen = torch.cat([kept_B[:, None], x_BT], 1)
        kept_B.copy_(seen[:, -1] if self.lengths is None else seen[self.cache.rows[:, 0], self.lengths])
        return seen[:, :-1]

    def before(self, name: str, x: Tensor) -> Tensor:
        """x (B * T, ...) of the token before."""
        return self.carry(self.cache.carried[name], x.unflatten(0, self.shape)).flatten(0, 1)

    def attend(self, i: int, window: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (B * T, H, D) of layer i, whose ring takes in the new keys and values."""
        keys, values, visible = self.cache.keys[i], self.cache.values[i], self.visible[window]
        q, k, v = (x.unflatten(0, self.shape) for x in (q, k, v))
        keys[self.cache.rows, self.slots[window]] = k
        values[self.cache.rows, self.slots[window]] = v
        if self.shape[1] == 1 and torch.compiler.is_compiling():
            return attend_one(q[:, 0], keys, values, visible[:, 0])
        q, k, v = (x.transpose(1, 2) for x in (q, keys, values))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=1.0)
        return y.transpose(1, 2).flatten(0, 1)

def attend_one(q_BHD: Tensor, k_BRHD: Tensor, v_BRHD: Tensor, visible_BR: Tensor) -> Tensor:
    """Attention output (B, H, D) of one query a row: sums that torch.compile turns into one pass over keys and one over
    values, spread over the whole GPU. A fused kernel gives each head of a row one multiprocessor."""
    scores = (q_BHD.float()[:, :, None] * k_BRHD.float().transpose(1, 2)).sum(-1)
    weights = scores.masked_fill(~visible_BR[:, None], -math.inf).softmax(-1)
    return (weights[..., None] * v_BRHD.float().transpose(1, 2)).sum(2).to(q_BHD.dtype)

# -----------------------------------------------------------------------------
# Optimizer

# Polar Express (arXiv 2505.16932): five quintic steps towards the nearest orthogonal matrix, safety factor 0.02
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def polar_express(g_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, rows, cols) `dtype`: each matrix with its singular values moved to about 1 (0.86 to 1.14 from above 1e-3)."""
    x = (g_NRC / (g_NRC.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    tall = x.size(1) > x.size(2)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT                       # on the short side
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x

def normuon_update(grad, master, momentum, second, lr, decay, mu, beta2, apply):
    """One NorMuon step (arXiv 2510.05491) on a bank of matrices, in place on master, momentum and second.

    grad (N, rows, cols) any dtype; master, momentum fp32 of the same shape; second (N, rows, 1) or (N, 1, cols); lr
    (N, 1, 1) spectral norm per step; decay, mu, beta2 scalars; apply a bool tensor: whether master changes. Decay acts
    only where the update shrinks the weight (cautious, arXiv 2411.16085).
    """
    g = grad.float()
    momentum.lerp_(g, 1 - mu)
    x = polar_express(g.lerp(momentum, mu), torch.bfloat16 if grad.is_cuda else torch.float32).float()
    axis = 2 if second.size(2) == 1 else 1
    second.lerp_(x.square().mean(dim=axis, keepdim=True), 1 - beta2)
    scaled = x * second.clamp(min=1e-10).rsqrt()
    x = scaled * (x.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10))
    master.copy_(torch.where(apply, master - lr * (x + decay * master * (x * master >= 0)), master))

def adam_update(grad, param, m, v, rate, decay, beta1, beta2, apply):
    """One Adam step with cautious decay, in place on param (if `apply`), m and v; rate is corrected for bias."""
    g, p = grad.float(), param.float()
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    update = rate * m / (v.sqrt() + 1e-10)
    param.copy_(torch.where(apply, p - update - decay * p * (update * p > 0), p))

# torch 2.13 renamed these two and warns about the old names; 2.11 knows only those
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

class Optimizer:
    """NorMuon and Adam over all parameters, by the rows of PARAMETERS, with state sharded over ranks.

    After backward, step() sums gradients over ranks (all reductions start at once, in the table's order), updates what
    this rank owns, and gathers the new values. Adam parameters move on odd steps only, with the gradient of both.
    """

    def __init__(self, model: GPT, rank: int = 0, world_size: int = 1):
        self.model, self.rank, self.world_size = model, rank, world_size
        self.params, self.whole, self.state = dict(model.named_parameters()), {}, {}
        odd = sorted(self.params.keys() ^ PARAMETERS.keys())
        assert not odd, f"in one place only: {odd}"
        self.normuon, self.adam = normuon_update, adam_update
        if model.cfg.compile:
            torch._dynamo.config.recompile_limit = 64               # one graph a parameter shape
            self.normuon, self.adam = (torch.compile(rule, dynamic=False) for rule in (normuon_update, adam_update))
        for name, param in self.params.items():
            self.share_out(name, param)
        self.reset()

    def share_out(self, name: str, param: nn.Parameter):
        """Storage of a parameter that divides by the number of ranks, and zeroed state for this rank's part."""
        rule, flat = PARAMETERS[name], param.data
        if rule.rule == "adam" and rule.shared == "shard":          # share out single rows, not whole tables
            flat = flat.view(-1, flat.size(-1))
        self.whole[name] = whole = flat
        if rule.shared == "shard" and self.world_size > 1:
            rows = -(-flat.size(0) // self.world_size) * self.world_size
            self.whole[name] = whole = flat.new_zeros(rows, *flat.shape[1:])
            whole[:flat.size(0)] = flat
            param.data = whole[:flat.size(0)].view(param.shape)
        part = self.part(name)
        state = self.state[name] = {"m": torch.zeros_like(part, dtype=torch.float32)}
        if rule.rule == "adam":
            state |= {"v": torch.zeros_like(state["m"]), "count": torch.zeros((), dtype=torch.int64)}
        else:
            n, rows, cols = part.shape
            state |= {"master": torch.zeros_like(state["m"]),
                      "v": state["m"].new_zeros((n, rows, 1) if rows >= cols else (n, 1, cols))}

    def part(self, name: str) -> Tensor:
        """The rows of a parameter that this rank updates."""
        whole = self.whole[name]
        return whole if PARAMETERS[name].shared == "all" else whole.chunk(self.world_size)[self.rank]

    @torch.no_grad()
    def reset(self):
        """State of step 0 for the parameters as they are."""
        self.healthy = torch.ones((), dtype=torch.bool, device=self.model.embed.device)
        for name, state in self.state.items():
            for tensor in state.values():
                tensor.zero_()
            if "master" in state:
                state["master"].copy_(self.part(name))
            self.params[name].grad = None

    def reduce(self, name: str) -> tuple[Tensor, object]:
        """Starts summing a gradient over ranks; this rank's part of the sum, and a handle to wait on or None."""
        whole, param = self.whole[name], self.params[name]
        grad, param.grad = param.grad.view(-1, *whole.shape[1:]), None
        if self.world_size == 1:
            return grad, None
        if PARAMETERS[name].shared == "all":
            return grad, dist.all_reduce(grad, async_op=True)
        if grad.size(0) < whole.size(0):
            grad = F.pad(grad, (0, 0) * (grad.dim() - 1) + (0, whole.size(0) - grad.size(0)))
        part = torch.empty_like(self.part(name))
        return part, REDUCE_SCATTER(part, grad, async_op=True)

    @torch.no_grad()
    def step(self, step: int, apply: Tensor | None = None):
        """Updates the parameters due at this step, drops their gradients; none once `apply` (bool scalar) was false."""
        # false: the loss is not finite; a tensor on the device, so that nothing waits for it
        apply = self.healthy = self.healthy if apply is None else self.healthy & apply
        cfg, tied = self.model.cfg, is_tied(self.model.cfg, step)
        if tied:                         # one matrix: its gradient is the sum, and the embedding follows the head
            head, embed = self.params["lm_head"], self.params["embed"]
            head.grad += embed.grad
            embed.grad = None
        due = [name for name, rule in PARAMETERS.items()
               if (rule.rule == "muon" or step % 2) and not (tied and name == "embed")]
        reduced = {name: self.reduce(name) for name in due}
        gathers = []
        for name in due:
            grad, handle = reduced.pop(name)
            if handle:
                handle.wait()
            self.update(name, grad, step, apply)
            if self.world_size > 1 and PARAMETERS[name].shared == "shard":
                gathers.append(ALL_GATHER(self.whole[name], self.part(name), async_op=True))
        for handle in gathers:
            handle.wait()
        if tied and step % 2:
            embed.copy_(head)
            if not is_tied(cfg, step + 2):                          # last update as one: they part with equal state
                for key, value in self.state["lm_head"].items():
                    self.state["embed"][key].copy_(value)

    def update(self, name: str, grad: Tensor, step: int, apply: Tensor):
        """The rule of one parameter, on this rank's part."""
        cfg, rule, state, part = self.model.cfg, PARAMETERS[name], self.state[name], self.part(name)
        factor = cfg.lr * lr_factor(cfg, step)
        scalar = lambda value: torch.tensor(value, dtype=torch.float32)         # a tensor, so that nothing recompiles
        if rule.rule == "adam":
            lr, (beta1, beta2) = rule.lr * factor, rule.betas
            state["count"] += 1
            corrected = lr * math.sqrt(1 - beta2 ** int(state["count"])) / (1 - beta1 ** int(state["count"]))
            self.adam(grad, part, state["m"], state["v"], scalar(corrected), scalar(lr * lr * rule.decay), beta1, beta2,
                      apply)
        else:
            rates = rule.lr if isinstance(rule.lr, tuple) else (rule.lr,)
            first = self.rank * part.size(0)
            lr = torch.tensor([rates[(first + n) % len(rates)] * factor for n in range(part.size(0))])
            lr = lr.view(-1, 1, 1).to(part.device, non_blocking=True)
            self.normuon(grad, state["master"], state["m"], state["v"], lr, scalar(rule.decay * ATTN_LR * factor),
                         scalar(momentum(cfg, step)), rule.betas[0], apply)
            part.copy_(torch.where(apply, state["master"], part))

ATTN_LR = PARAMETERS["attn_vo"].lr       # matrix decay follows this rate, whatever a bank's own multiplier

# -----------------------------------------------------------------------------
# Schedule (pure functions of the step)

def stage_index(cfg: Hyperparameters, step: int) -> int:
    """Row of the stage table that a step belongs to."""
    return next((i for i, stage in enumerate(cfg.stages) if step < round(stage.until * cfg.num_iterations)),
                len(cfg.stages) - 1)

def stage_progress(cfg: Hyperparameters, step: int) -> float:
    """0 at the first step of a stage, towards 1 at its end."""
    index = stage_index(cfg, step)
    begin = round(cfg.stages[index - 1].until * cfg.num_iterations) if index else 0
    return (step - begin) / max(1, round(cfg.stages[index].until * cfg.num_iterations) - begin)

def lr_factor(cfg: Hyperparameters, step: int) -> float:
    """The stage's factor, falling in a straight line to lr_floor over the cooldown, where the extension stays."""
    begin = math.floor((1 - cfg.cooldown) * cfg.num_iterations)
    done = min(1.0, max(0.0, (step - begin) / max(1, cfg.num_iterations - begin)))
    return cfg.stages[stage_index(cfg, step)].lr * (1 - done) + cfg.lr_floor * done

def momentum(cfg: Hyperparameters, step: int) -> float:
    """Muon momentum: up over the warmup, down again over the last steps."""
    low, high = cfg.momentum
    rise = step / max(1, cfg.momentum_warmup)
    fall = (cfg.total_steps - step) / max(1, cfg.momentum_cooldown * cfg.num_iterations)
    return low + (high - low) * max(0.0, min(1.0, rise, fall))

def loss_weights(cfg: Hyperparameters, step: int) -> list[float]:
    """Weights of the next three tokens and of the prefix token."""
    stage, t = cfg.stages[stage_index(cfg, step)], stage_progress(cfg, step)
    starts, ends = (*stage.next_tokens[0], stage.prefix[0]), (*stage.next_tokens[1], stage.prefix[1])
    return [start + (end - start) * t for start, end in zip(starts, ends, strict=True)]

def is_tied(cfg: Hyperparameters, step: int) -> bool:
    """Whether embedding and head are one matrix; the last such step is odd, so that Adam moves at it."""
    return step <= round(cfg.untie * cfg.num_iterations) // 2 * 2 + 1

# -----------------------------------------------------------------------------
# Setup and logging

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

def setup_machine(cfg: Hyperparameters) -> Machine:
    """Chooses the device and joins the other ranks if torchrun started some (NCCL between GPUs, else gloo)."""
    env, cuda, gpus = os.environ, torch.cuda.is_available(), torch.cuda.device_count()
    rank, world_size, local_rank = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    kind = cfg.device if cfg.device != "auto" else "cuda" if cuda else "cpu"
    if not {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}[kind]:
        raise UserError(f"--device={kind}, but PyTorch sees no such device; use --device=cpu or another build of torch")
    if kind == "cuda" and local_rank >= gpus:
        raise UserError(f"torchrun starts more ranks than the {gpus} GPUs here; lower --nproc_per_node")
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

def resolve_config(cfg: Hyperparameters, machine: Machine, shard: Shard) -> Hyperparameters:
    """The config with everything that was left to the machine and the shards filled in."""
    cuda = machine.device.type == "cuda"
    vocab_size = cfg.vocab_size or -(-shard.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
    bos_id = cfg.bos_id if cfg.bos_id >= 0 else shard.bos_id
    if shard.vocab_size > vocab_size or bos_id != shard.bos_id:
        raise UserError(f"{shard.path} has {shard.vocab_size} ids and begins documents with {shard.bos_id}, not as in "
                        f"--vocab_size={vocab_size} --bos_id={bos_id}; leave both flags away")
    attention = cfg.attention if cfg.attention != "auto" else ("flex" if cuda else "plain")
    if attention == "flex" and (not cuda or cfg.slot_tokens % BLOCK or cfg.val_stream_tokens % BLOCK):
        raise UserError(f"--attention=flex needs a CUDA device, and multiples of {BLOCK} for --slot_tokens="
                        f"{cfg.slot_tokens} and --val_stream_tokens={cfg.val_stream_tokens}; or use --attention=plain")
    kernels = cfg.kernels and cuda and triton_kernels is not None and cfg.precision == "bf16"      # they take bf16 only
    float8 = cfg.float8 and kernels and torch.cuda.get_device_capability() >= (8, 9) and vocab_size % 16 == 0
    return replace(cfg, vocab_size=vocab_size, bos_id=bos_id, attention=attention, compile=cfg.compile and cuda,
                   kernels=kernels, float8=float8)

def memory_plan(cfg: Hyperparameters, machine: Machine) -> tuple[int, str]:
    """Slots per micro-batch on this rank, and the sentence that explains them."""
    shares = [math.ceil(stage.batch_tokens // cfg.slot_tokens / machine.world_size) for stage in cfg.stages]
    if cfg.micro_batch_tokens or machine.device.type != "cuda":
        return min(cfg.micro_batch_tokens // cfg.slot_tokens or min(shares), min(shares)), "memory plan: none"
    # measured on an H200: activations take up to 11 numbers per token, layer and channel, and 3 per hidden unit (4
    # without kernels); weights, gradients and optimizer state 16 bytes a parameter on one rank
    width = 2 if cfg.precision == "bf16" else 4
    per_token = width * len(cfg.layers) * (11 * cfg.model_dim + (3 if cfg.kernels else 4) * cfg.mlp_dim)
    rows = (2 + sum(layer.values >= 0 for layer in cfg.layers)) * cfg.vocab_size + cfg.bigram_rows
    matrices = len(cfg.layers) * (4 * cfg.model_dim + 2 * cfg.mlp_dim)
    static = 16 * (rows + matrices) * cfg.model_dim + 4 * width * HEAD_CHUNK * cfg.vocab_size
    cap = torch.cuda.get_per_process_memory_fraction(machine.device)
    have = 0.92 * cap * torch.cuda.get_device_properties(machine.device).total_memory
    slot = per_token * cfg.slot_tokens
    fits = int((have - static) / slot)
    if fits < 1:
        raise UserError(f"the GPU has {have / 2**30:.0f} GiB to use, one slot of --slot_tokens={cfg.slot_tokens} needs "
                        f"{(static + slot) / 2**30:.0f}; lower --slot_tokens")
    def padding(slots):                  # empty slots that fill up the last micro-steps
        return sum(-share % slots for share in shares)
    slots = min(range(1, min(fits, min(shares)) + 1), key=lambda slots: (padding(slots), -slots))
    return slots, (f"memory plan: {static / 2**30:.1f} GiB for parameters, gradients, state and logits + {slots} x "
                   f"{cfg.slot_tokens} tokens x {per_token / 2**20:.2f} MiB = {(static + slots * slot) / 2**30:.1f} of "
                   f"{have / 2**30:.1f} GiB")

class Run:
    """The run folder: log.txt, run.json, the source, the curve, the checkpoint. Written as the run goes, by rank 0."""

    def __init__(self, cfg: Hyperparameters, machine: Machine, argv: list[str]):
        self.cfg, self.machine, self.master, self.live = cfg, machine, machine.rank == 0, False
        self.history, self.train_losses, self.tokens_seen, self.wrote, self.info = [], [], 0, 0.0, {}
        script, errors = Path(__file__), [None]
        if self.master:
            name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{script.stem}_{os.urandom(3).hex()}"
            self.folder = Path(cfg.out_dir) / name
            try:
                self.folder.mkdir(parents=True)
                sources = [script] + ([Path(triton_kernels.__file__)] if cfg.kernels else [])
                for source in sources:
                    shutil.copy(source, self.folder / source.name)
                self.log_file = open(self.folder / "log.txt", "w", buffering=1)
            except OSError as error:
                errors = [f"--out_dir={cfg.out_dir} cannot be written ({error.strerror}); choose another"]
        if machine.world_size > 1:
            dist.broadcast_object_list(errors, 0)
        if errors[0]:
            raise UserError(errors[0])
        if not self.master:
            return
        for source in sources:
            self.log_file.write(source.read_text() + "\n" + "=" * 100 + "\n")
        self.save(format=1, status="running", script=script.name, argv=argv, config=asdict(cfg), seed=cfg.seed,
                  source_sha256=hashlib.sha256(script.read_bytes()).hexdigest(),
                  git={"commit": command_output("git", "rev-parse", "HEAD"),
                       "dirty": bool(command_output("git", "status", "--porcelain"))},
                  versions={"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
                            "numpy": np.__version__}, device=machine.name, world_size=machine.world_size,
                  gpu=command_output("nvidia-smi", "--format=csv", "--query-gpu=name,driver_version,memory.total,"
                                     "clocks.sm,clocks.mem,power.limit"),
                  started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), val_losses=[])

    def save(self, **changes):
        """Updates run.json, so that it is whole at any moment."""
        if self.master:
            self.info |= changes
            write_atomically(self.folder / "run.json", json.dumps(self.info, indent=1).encode())

    def print(self, text: str, console: bool = True):
        """A line to the log, and to the console unless told otherwise."""
        if self.master:
            self.log_file.write(text + "\n")
            if console:
                print(("\r\033[K" if self.live else "") + text, flush=True)
                self.live = False

    def step(self, step: int, clock, loss: float, stop: float, model) -> bool:
        """Logs a finished step, on a terminal as a live line, else a line now and then. Returns whether to stop."""
        cfg, seconds, terminal = self.cfg, clock.seconds, sys.stdout.isatty()
        batch = cfg.stages[stage_index(cfg, step - 1)].batch_tokens
        self.tokens_seen += batch
        loss = loss / batch / sum(loss_weights(cfg, step - 1))
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
        return stop > 0

    def need_finite(self, loss: float, what: str, model):
        """Raises FloatingPointError, which names the first bad parameter of the table, if a loss is NaN or infinite."""
        if math.isfinite(loss):
            return
        named = dict(model.named_parameters())
        bad = next((name for name in PARAMETERS if not torch.isfinite(named[name]).all()), "none: only the loss")
        text = f"{what} is {loss}; first bad parameter: {bad}; lower --lr={self.cfg.lr} or look at the last change"
        self.save(status="diverged", error=text, tokens_seen=self.tokens_seen)
        raise FloatingPointError(text)

    def validated(self, step: int, clock, val_loss: float, model):
        """Logs a validation, which is also when run.json is brought up to date."""
        self.need_finite(val_loss, f"the validation loss of step {step}", model)
        self.history.append((step, clock.seconds, val_loss))
        self.print(f"step:{step}/{self.cfg.total_steps} val_loss:{val_loss:.6f} {train_time(clock.seconds, step)}")
        self.save(tokens_seen=self.tokens_seen, train_time_ms=round(1000 * clock.seconds), val_losses=[
            {"step": s, "train_time_ms": round(1000 * t), "val_loss": round(v, 6), "tokens": self.cfg.val_tokens}
            for s, t, v in self.history])

    def finish(self, status: str, step: int, clock, checkpoint: Path | None, shards: list[Shard]):
        """The last lines of the log, the curve, and the final run.json."""
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
            self.print(f"next: python sample.py --checkpoint={checkpoint}")

    def plot(self):
        """curve.svg: training and validation loss over steps and over training time."""
        try:
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
        except ImportError:
            return self.print("no curve.svg: matplotlib is not installed (pip install matplotlib)")
        figure, train, val = Figure((11, 4), layout="constrained"), np.array(self.train_losses), np.array(self.history)
        for column, axis in enumerate(figure.subplots(1, 2, sharey=True)):
            axis.plot(train[:, column], train[:, 2], color="0.65", linewidth=0.8, label="training (weighted)")
            axis.plot(val[:, column], val[:, 2], "o-", color="black", markersize=4, label="validation")
            axis.set(xlabel=("step", "training time in seconds")[column], ylabel="loss in nats per token")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"{Path(__file__).stem}: validation loss {val[-1, 2]:.4f} after {val[-1, 0]:.0f} steps")
        FigureCanvasSVG(figure).print_svg(self.folder / "curve.svg")

def train_time(seconds: float, step: int) -> str:
    """The last two fields of a log line."""
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"

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

def write_atomically(path: Path, content: bytes):
    """Writes under a temporary name, then renames, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

# -----------------------------------------------------------------------------
# Checkpoint

def save_checkpoint(run: Run, model: GPT, step: int, tokenizer: bytes) -> Path | None:
    """Writes checkpoint/step_<n> of the run (model.safetensors, meta.json, tokenizer.json), then the file `latest`."""
    if not run.master:
        return None
    root = run.folder / "checkpoint"
    final, temporary = root / f"step_{step:06d}", root / f".step_{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()},
                  temporary / "model.safetensors")
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{temporary} cannot be written ({error}); free space or choose another --out_dir") from None
    meta = {"format": 1, "script": Path(__file__).stem, "source_sha256": run.info["source_sha256"],
            "config": asdict(model.cfg), "step": step, "stage": stage_index(model.cfg, step - 1), "val_loss": None,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()}
    write_atomically(temporary / "tokenizer.json", tokenizer)
    write_atomically(temporary / "meta.json", json.dumps(meta, indent=1).encode())
    os.replace(temporary, final)
    write_atomically(root / "latest", final.name.encode())
    return final

def config_from_dict(values: dict) -> Hyperparameters:
    """Hyperparameters from the `config` of a checkpoint's meta.json; raises UserError on unknown or missing fields."""
    names = {field.name for field in fields(Hyperparameters)}
    if not isinstance(values, dict) or values.keys() != names:
        odd = sorted(values.keys() ^ names) if isinstance(values, dict) else values
        raise UserError(f"the checkpoint's config and this script differ in {odd}; use the script that made it")
    try:
        cfg = convert(values, Hyperparameters)
        check_config(cfg)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the checkpoint's config cannot be read ({error}); use the script that made it") from None
    return cfg

# -----------------------------------------------------------------------------
# Training and validation

def digest(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A 64-bit sum per tensor that changes with any bit of it, computed where the tensor lies."""
    sums = dict.fromkeys(tensors, 0)
    for name, tensor in tensors.items():
        words = tensor.detach().contiguous().flatten().view(torch.uint8)
        for i, chunk in enumerate(words.split(1 << 24)):
            weights = torch.arange(chunk.numel(), device=chunk.device) * 2654435761 + 2 * i + 1
            sums[name] += int((chunk.long() * (weights | 1)).sum())
    return sums

def run_state(model: GPT, optimizer: Optimizer, machine: Machine) -> dict[str, Tensor]:
    """Every tensor that training changes, and the random state."""
    state = dict(model.state_dict()) | {"rng": torch.get_rng_state()}
    if machine.device.type == "cuda":
        state["cuda rng"] = torch.cuda.get_rng_state(machine.device)
    return state | {f"{name}.{key}": t for name, part in optimizer.state.items() for key, t in part.items()}

def training_step(model, optimizer: Optimizer, batches: list, step: int, machine: Machine, stop=False) -> Tensor:
    """Trains on one batch; returns (its summed loss, number of ranks asked to stop) of all ranks, on the device."""
    weights = torch.tensor(loss_weights(optimizer.model.cfg, step)).to(machine.device, non_blocking=True)
    total = torch.tensor([0.0, float(stop)]).to(machine.device, non_blocking=True)
    for batch in batches:
        loss = model(*to_device(batch, machine.device), weights)
        loss.backward()
        total[0] += loss.detach()
    if machine.world_size > 1:
        dist.all_reduce(total)
    optimizer.step(step, torch.isfinite(total[0]))
    return total

@torch.no_grad()
def validate(model, cfg: Hyperparameters, streams: list, machine: Machine) -> float:
    """Mean cross-entropy in nats over the val_tokens targets, summed in float64; the same for any number of ranks."""
    total = torch.zeros((), dtype=torch.float64, device="cpu" if machine.device.type == "mps" else machine.device)
    for stream in streams[machine.rank::machine.world_size]:
        total += model(*to_device(stream, machine.device)).to(total)
    if machine.world_size > 1:
        dist.all_reduce(total)
    return total.item() / cfg.val_tokens

def warm_up(model, optimizer: Optimizer, machine: Machine, micro_slots: int):
    """Compiles all that the run will use, on made-up tokens, then puts everything back and checks that bit for bit."""
    cfg, raw = optimizer.model.cfg, optimizer.model
    before = digest(run_state(raw, optimizer, machine))
    generator = np.random.default_rng(0)

    def synthetic(length):
        tokens = generator.integers(0, cfg.vocab_size, length, dtype=np.int32)
        tokens[::512] = cfg.bos_id
        return tokens, np.roll(tokens, -1).astype(np.int64)
    untied = round(cfg.untie * cfg.num_iterations) // 2 * 2 + 3
    for step, count in ((0, 2), (1, 2), (untied, 1)):               # Adam rests at even steps and moves at odd ones
        training_step(model, optimizer, [synthetic(micro_slots * cfg.slot_tokens)] * count, step, machine)
    with torch.no_grad():
        model(*to_device(synthetic(cfg.val_stream_tokens), machine.device))
    raw.init_parameters()
    share_parameters(raw, machine)
    optimizer.reset()
    changed = [name for name, value in digest(run_state(raw, optimizer, machine)).items() if value != before[name]]
    assert not changed, f"warm-up changed the initial state of {changed}"

def share_parameters(model: GPT, machine: Machine):
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

def train(cfg: Hyperparameters, argv: list[str]) -> int:
    """The experiment: build, warm up, start the clock, train, validate with the clock stopped, save. The exit code."""
    machine = setup_machine(cfg)
    train_shards, val_shards = open_shards(cfg.train_files, cfg.val_files)
    cfg = resolve_config(cfg, machine, train_shards[0])
    num_steps = min(cfg.stop_after or cfg.total_steps, cfg.total_steps)
    tokens, tokenizer = check_tokens(cfg, train_shards, num_steps), read_tokenizer(train_shards[0])
    streams = validation_streams(cfg, val_shards)
    micro_slots, plan = memory_plan(cfg, machine)

    run = Run(cfg, machine, argv)
    if run.master:                       # so that a record can be held to its track's validation data
        run.save(data_sha256={shard.path: file_sha256(shard.path) for shard in val_shards})
    stopping = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.set())
    with torch.device(machine.device):
        model = GPT(cfg)
    share_parameters(model, machine)
    optimizer = Optimizer(model, machine.rank, machine.world_size)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model
    run.print(f"{Path(__file__).name}: {machine.world_size} x {machine.name}, {cfg.precision}, "
              f"{cfg.attention} attention, torch {torch.__version__}")
    run.print(f"parameters: {sum(param.numel() for param in model.parameters()) / 1e6:.1f} M, of which "
              f"{model.matmul_parameters / 1e6:.1f} M in matrix products")
    run.print(f"{tokens}; validation on {cfg.val_tokens:,}")
    run.print(f"{plan}; {micro_slots * cfg.slot_tokens:,} tokens per forward")

    clock = Clock(machine)
    clock.start()
    if cfg.compile:
        warm_up(forward, optimizer, machine, micro_slots)
        run.print(f"compiled and warmed up in {clock.seconds:.1f} s; the initial state is back, bit for bit")
    clock.stop()
    run.save(compile_seconds=round(clock.seconds, 1))
    graphs, clock = compiled_graphs(), Clock(machine)
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run.validated(0, clock, validate(forward, cfg, streams, machine), model)

    clock.start()                        # training time counts from the first look at the data
    model.prefix_of.copy_(torch.from_numpy(prefix_tokens(json.loads(tokenizer), cfg.vocab_size)))
    loader = prefetch(training_batches(cfg, train_shards, machine.rank, machine.world_size, micro_slots))
    stage, done, pending = 0, 0, None    # pending: the loss of the last step, read one step late so that nothing waits
    for step, batches in zip(range(num_steps), loader):
        if stage != (stage := stage_index(cfg, step)):
            model.set_stage(stage)
        loss = training_step(forward, optimizer, batches, step, machine, stopping.is_set())
        done, validating = step + 1, cfg.val_every and (step + 1) % cfg.val_every == 0 and step + 1 < num_steps
        stop = pending is not None and run.step(done - 1, clock, *pending.tolist(), model)
        pending = loss
        if stop or validating:
            clock.stop()
            if stop:
                break
            run.validated(done, clock, validate(forward, cfg, streams, machine), model)
            clock.start()
    if clock.started:
        clock.stop()
    run.step(done, clock, *pending.tolist(), model)
    milliseconds = round(1000 * clock.seconds)
    run.save(recompiles=compiled_graphs() - graphs, tokens_seen=run.tokens_seen, train_time_ms=milliseconds)
    folder = save_checkpoint(run, model, done, tokenizer)           # before the evaluation can fail
    finished = done == num_steps
    if finished:
        if done == cfg.total_steps:
            model.set_stage(stage, final=True)
        run.validated(done, clock, validate(forward, cfg, streams, machine), model)
        if run.master:
            meta = json.loads((folder / "meta.json").read_text()) | {"val_loss": run.history[-1][2]}
            write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())
    run.finish("finished" if finished else "interrupted", done, clock, folder, train_shards + val_shards)
    return 0 if finished else 130

def main() -> int:
    """Runs the command line. Exit code: 0 done, 2 the user can put it right, 3 diverged, 130 interrupted."""
    argv, rank = sys.argv[1:], int(os.environ.get("RANK", 0))
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    try:
        return train(parse_config(argv), argv)
    except (UserError, FloatingPointError) as error:
        if rank == 0 or isinstance(error, RankError):
            print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"{Path(__file__).name}: {error}; free space or choose another --out_dir", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{Path(__file__).name}: interrupted before the first step; nothing to save", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

# -----------------------------------------------------------------------------
# Kernels (appendix)

BLOCK = 128                              # FlexAttention skips or computes tiles of BLOCK x BLOCK

def block_mask(first_T: Tensor, max_blocks: int) -> BlockMask:
    """FlexAttention mask where query q sees keys first[q]..q; `first` int32, non-decreasing, of a multiple of BLOCK.

    Since first never decreases, each query block sees a contiguous run of key blocks and the other way round, so all
    tables follow from each block's first and last entry; nothing of size (T / BLOCK)^2 is built.
    """
    n = first_T.numel() // BLOCK
    i = torch.arange(n, device=first_T.device, dtype=torch.int32)
    first = first_T.view(n, BLOCK)
    seen = first[:, 0] // BLOCK                                     # first key block that any query of the block sees
    whole = (first[:, -1] + BLOCK - 1) // BLOCK                     # first key block that every query sees whole
    last = torch.searchsorted(seen, i, right=True, out_int32=True) - 1          # last query block that sees key block i
    last_whole = torch.maximum(torch.searchsorted(whole, i, right=True, out_int32=True) - 1, i)
    whole = torch.minimum(whole, i)
    column = torch.arange(max_blocks, device=first_T.device, dtype=torch.int32)

    def table(count, indices):
        return count.to(torch.int32)[None, None], indices.clamp(max=n - 1).to(torch.int32)[None, None].contiguous()
    kv = table(whole - seen + 1, torch.where(column < (whole - seen)[:, None], seen[:, None] + column, i[:, None]))
    full_kv = table(i - whole, whole[:, None] + column)
    q = table(last - last_whole + 1, torch.where(column > 0, last_whole[:, None] + column, i[:, None]))
    full_q = table(last_whole - i, i[:, None] + 1 + column)

    def visible(b, h, q_index, kv_index):
        return (kv_index <= q_index) & (kv_index >= first_T[q_index])
    return BlockMask((first_T.numel(), first_T.numel()), *kv, *full_kv, *q, *full_q, (BLOCK, BLOCK), visible)

def flex(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, mask: BlockMask) -> Tensor:
    """Attention output (T, H, D) under a block mask; the softmax scale is already in q."""
    # 64 x 64 tiles: with windows of 128 to 1664 larger ones waste work at the edges (dev/EXPERIMENTS.md)
    tiles = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3, "bwd_BLOCK_M1": 32,
             "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 4, "bwd_num_stages": 3}
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    return flex_attention(q, k, v, block_mask=mask, scale=1.0, kernel_options=tiles)[0].transpose(0, 1)

def plain_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, first_T: Tensor, window: int) -> Tensor:
    """The same in plain PyTorch: chunks as long as the window, each of which sees itself and the one before."""
    T, H, D = q_THD.shape
    size = min(window, T)
    n = -(-T // size)
    index = torch.arange(n * size, device=q_THD.device)
    first = torch.cat([first_T, index[T:].to(first_T.dtype)]).view(n, size)    # padding sees itself
    pad = (0, 0, 0, 0, 0, n * size - T)
    q = F.pad(q_THD, pad).view(n, size, H, D).transpose(1, 2)
    k, v = (F.pad(x, pad).view(n, size, H, D) for x in (k_THD, v_THD))
    k, v = (torch.cat([torch.cat([x[:1], x[:-1]]), x], dim=1).transpose(1, 2) for x in (k, v))
    index = index.view(n, size)
    key = torch.cat([index - size, index], dim=1)[:, None, :]
    mask = (key <= index[:, :, None]) & (key >= first[:, :, None])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=1.0)
    return y.transpose(1, 2).reshape(n * size, H, D)[:T]

LOGIT_SCALE, LOGIT_SHIFT, LOGIT_WIDTH = 23.0, 5.0, 7.5             # logits lie in 0..23 (#54)
HEAD_CHUNK = 16_384                      # tokens whose logits exist at one time

def choose_candidates(targets_TK: Tensor, vocab_size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (count,), how many tokens each stands for (count,) fp32, targets as places among the ids, -1: none).

    Sampled softmax (Bengio and Senecal 2008; PR 360): all targets are candidates and stand for themselves; a sample of
    the other tokens stands for all of those. The sample is a hash of the targets, so the same wherever it is computed.
    """
    device, index = targets_TK.device, torch.arange(vocab_size, device=targets_TK.device)
    targets = torch.where(targets_TK < 0, vocab_size, targets_TK)
    wanted = torch.zeros(vocab_size + 1, dtype=torch.int64, device=device).scatter(0, targets.flatten(), 1)[:vocab_size]
    key = torch.zeros_like(index)
    for salt in (index, targets_TK[:, 0].sum(), 1):                 # rounds of a multiplicative hash of 31 bits
        key = (key + salt) * 0x2C1B3C6D & 0x7FFFFFFF
        key = key ^ key >> 15
    key, ids = torch.topk(key + (wanted << 31), count)
    others = (vocab_size - wanted.sum()) / (count - wanted.sum()).clamp(min=1)
    counts = torch.where(key >> 31 > 0, 1.0, others).float()
    places = torch.full((vocab_size + 1,), -1, device=device).scatter(0, ids, torch.arange(count, device=device))
    return ids, counts, places[targets]

def head_loss(x_TC: Tensor, weight_VC: Tensor, targets_TK: Tensor, weights_K: Tensor,
              counts_V: Tensor | None = None) -> Tensor:
    """Sum over tokens of the weighted cross-entropies of K targets (int64, -1: none), a fp32 scalar.

    counts (V,) fp32: for how many tokens each row of the weight stands in the sum of exponentials; None: for one.
    """
    def of_chunk(x, targets):
        logits = map_logits(F.linear(x, weight_VC))
        total = (logits if counts_V is None else logits + counts_V.log()).logsumexp(dim=1, keepdim=True)
        return ((total - logits.gather(1, targets.clamp(min=0))) * weights_K * (targets >= 0)).sum()
    # each chunk's logits are computed again in the backward instead of kept
    chunks = zip(x_TC.split(HEAD_CHUNK), targets_TK.split(HEAD_CHUNK))
    return torch.stack([recompute(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()

def map_logits(logits: Tensor) -> Tensor:
    """fp32 logits in 0..23 from the head's raw product."""
    return LOGIT_SCALE * torch.sigmoid((logits.float() + LOGIT_SHIFT) / LOGIT_WIDTH)

if __name__ == "__main__":
    sys.exit(main())
