"""Train a GPT-2-medium-class model (track 2) to 2.92 validation loss on FineWeb, as fast as possible.

    python data/fineweb.py 28                                             # validation shard + 2.8 B training tokens
    torchrun --standalone --nproc_per_node=8 train_gpt_medium.py          # the speedrun; any number of GPUs works
    python train_gpt_medium.py --preset=single                            # the same tokens on one GPU, in small batches
    python train_gpt_medium.py --preset=tiny                              # three minutes on a laptop CPU

Result: No run has been made yet.
Only the tables below differ from train_gpt.py: 16 layers of width 1024; batches up to 524,288 tokens, windows up to
2944; two thirds of its Muon rates, half of its Adam rates, a longer cooldown; head and embedding are one matrix for a
sixth of the run. The figures are those of track 2 of the public speedrun (KellerJordan/modded-nanogpt, its record 18),
the techniques those of track 1, some of them newer: bigram table, gate networks, dense connections, fused loss, float8.
Where no table can say what record 18 does: one layer skips instead of three U-Net connections, the bigram table stands
for its second embedding, each value table serves one layer instead of two, gates learn by Adam, and rotary frequencies
follow the windows to their end instead of to 1664 tokens.
"#n" below is record n of the public track 1, "PR n" its pull request n. Read train_gpt.py first.

Shape suffixes: T tokens, H heads, D channels per head, C residual channels, V vocabulary, N matrices, K targets.
"""
# -----------------------------------------------------------------------------
# Imports (same in every train_*.py)

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
from functools import partial
from pathlib import Path
from typing import get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

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
    #      until    batch   docs short  long    lr  next_tokens                    prefix
    Stage(1 / 12, 131_072, 4096,  128,  384, 1.00, ((1, .5, .25), (1, .5, 0)), (.25, .25)),
    Stage(2 / 12, 262_144, 4096,  384,  896, 1.52, ((1, .5, 0), (1, 0, 0)),    (.25, 0)),
    Stage(3 / 12, 393_216, 4096,  640, 1408, 1.73, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(4 / 12, 524_288, 4096,  768, 1664, 2.00, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(5 / 12, 524_288, 4096,  896, 1920, 2.00, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(6 / 12, 524_288, 4096, 1024, 2176, 2.00, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(7 / 12, 524_288, 4096, 1152, 2432, 2.00, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(8 / 12, 524_288, 4096, 1280, 2688, 2.00, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(1.0085, 524_288, 4096, 1408, 2944, 2.00, ((1, 0, 0), (1, 0, 0)),     (0, 0)),    # with the extension
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
    Layer(window="long", gate=True),                                        # 0
    Layer(values=0, xsa=True),                                              # 1
    Layer(values=1),                                                        # 2
    Layer(),                                                                # 3
    Layer(window="long", xsa=True, gate=True),                              # 4
    Layer(),                                                                # 5
    Layer(xsa=True),                                                        # 6
    Layer(),                                                                # 7
    Layer(xsa=True),                                                        # 8
    Layer(attention=False, skip=4),                                         # 9
    Layer(xsa=True),                                                        # 10
    Layer(window="long", gate=True),                                        # 11
    Layer(reads=11),                                                        # 12
    Layer(values=2, reads=11),                                              # 13
    Layer(values=3, reads=11),                                              # 14
    Layer(window="long", values=4, reads=11, gate=True, mix=True),          # 15
)

# a quarter of the batch in four times as many steps: one GPU loses little speed
SINGLE_STAGES = tuple(replace(stage, batch_tokens=stage.batch_tokens // 4, lr=0.79 * stage.lr) for stage in STAGES)
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
    "attn_scales":  Rule("adam", 0.008,          (0.90, 0.99), 0,     "all"),
    "smear_lambda": Rule("adam", 0.008,          (0.90, 0.99), 0,     "all"),
    "skip_lambda":  Rule("adam", 0.008,          (0.90, 0.99), 0,     "all"),
    "smear_gate":   Rule("adam", 4e-5,           (0.90, 0.99), 0,     "all"),
    "resid_lambdas": Rule("adam", 0.008,         (0.90, 0.95), 0,     "all"),
    "post_lambdas": Rule("adam", 0.008,          (0.90, 0.95), 0,     "all"),
    "value_gates":  Rule("adam", 0.004,          (0.90, 0.99), 0.005, "all"),
    "gate_fc":      Rule("adam", 4e-4,           (0.90, 0.99), 0.005, "all"),
    "gate_proj":    Rule("adam", 4e-4,           (0.90, 0.99), 0.005, "all"),
    "gate_bias":    Rule("adam", 4e-4,           (0.90, 0.99), 0,     "all"),
    "gate_scale":   Rule("adam", 4e-4,           (0.90, 0.99), 0,     "all"),
    "mix_fc":       Rule("adam", 0.001,          (0.90, 0.99), 0.005, "all"),
    "mix_proj":     Rule("adam", 0.001,          (0.90, 0.99), 0.005, "all"),
    "mix_bias":     Rule("adam", 0.001,          (0.90, 0.99), 0,     "all"),
    "value_embeds": Rule("adam", 0.3,            (0.75, 0.95), 0.025, "shard"),
    "bigram_embed": Rule("adam", 0.3,            (0.75, 0.95), 0.025, "shard"),
    "lm_head":      Rule("adam", 0.004,          (0.50, 0.95), 0.75,  "shard"),
    "embed":        Rule("adam", 0.004,          (0.50, 0.95), 0.75,  "shard"),     # trained from the untie step on
    "attn_qk":      Rule("muon", 0.015,          (0.95,),      1.2,   "shard"),
    "attn_vo":      Rule("muon", 0.015,          (0.95,),      1.2,   "shard"),
    "mlp":          Rule("muon", (0.03, 0.06),   (0.95,),      1.2,   "shard"),     # c_fc, c_proj
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
    num_iterations: int = 4700           # scales the whole schedule
    stop_after: int = 0                  # end after this many steps, schedule unchanged; 0: off
    val_every: int = 250                 # steps between validations; 0: only first and last
    stages: tuple[Stage, ...] = STAGES
    final_windows: tuple[int, ...] = (1408, 3456)   # short, long window of the final validation and of sampling
    cooldown: float = 0.7                # last fraction of num_iterations, over which the learning rate falls
    lr_floor: float = 0.1                # learning rate factor at the end
    untie: float = 1 / 6                 # embedding and head are one matrix until here (#51, #53)
    # model
    layers: tuple[Layer, ...] = LAYERS
    model_dim: int = 1024
    head_dim: int = 128
    mlp_dim: int = 4096
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
    momentum_cooldown: float = 0.011     # back to low over this last fraction of num_iterations
    # machine
    device: str = "auto"                 # cuda, cpu or mps
    precision: str = "bf16"              # of weights and activations: bf16 or fp32
    attention: str = "auto"              # flex (CUDA) or plain (anywhere)
    kernels: bool = True                 # the kernels of triton_kernels.py, on CUDA
    float8: bool = True                  # products in float8, if the GPU and the kernels can; never in validation
    host_state: bool = False             # Adam's moments of tables in host memory; on by itself if the GPU is small
    compile: bool = True                 # torch.compile; off on the CPU
    compile_cache: str = ""              # folder that keeps what was compiled; "": torch's own in the temporary files
    seed: int = 0
    out_dir: str = "logs"                # each run makes a folder in it
    # checkpoints; one with everything that a run needs to go on is also made when a signal ends it
    save_every: str = ""                 # 500: steps (on the next even one); 10min: minutes; "": only at the end
    keep: int = 2                        # so many remain
    resume: str = ""                     # go on with a run or a checkpoint (its folder) or with the "latest" in out_dir
    resume_override: str = ""            # names of what may then be other than it was, separated by commas

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: num_iterations and the extension."""
        return round(self.stages[-1].until * self.num_iterations)

PRESETS = {
    "speedrun": Hyperparameters(),       # track 2, on eight GPUs
    "single": Hyperparameters(num_iterations=18_800, val_every=1000, stages=SINGLE_STAGES),     # on one
    "tiny": Hyperparameters(             # learns to write Python-like text in three minutes on two cores
        train_files="data/local/train_*.bin", val_files="data/local/val_*.bin", val_tokens=65_536,
        val_stream_tokens=8192, slot_tokens=1024, num_iterations=90, val_every=45, stages=TINY_STAGES,
        final_windows=(64, 256), layers=TINY_LAYERS, model_dim=192, head_dim=48, mlp_dim=768, gate_dim=16,
        bigram_rows=32_768, bigram_signs=256, vocab_multiple=1, precision="fp32", compile=False, lr=2.0, untie=2 / 3),
}

# -----------------------------------------------------------------------------
# Command line (same in every train_*.py)

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
         "mlp_dim gate_dim bigram_rows bigram_signs vocab_multiple keep", "must be at least 1")
    need(lambda value: not value or value.removesuffix("min").isdecimal(), "save_every",
         "is neither steps, like 500, nor minutes, like 10min")
    need(lambda value: 0 <= value < 2**63, "stop_after val_every micro_batch_tokens candidates vocab_size seed "
         "momentum_warmup", "must not be negative or huge")
    need(lambda value: 0 <= value <= 1, "cooldown momentum_cooldown lr_floor untie", "must be in 0..1")
    need(lambda value: 0 < value < math.inf, "lr attn_scale rope_base", "must be positive")
    need(lambda tokens: tokens <= MAX_TOKENS, "val_stream_tokens slot_tokens", f"must be at most {MAX_TOKENS}")
    need(lambda pair: len(pair) == 2 and 1 <= min(pair) and max(pair) <= MAX_TOKENS, "final_windows",
         f"must be two numbers in 1..{MAX_TOKENS}")
    need(lambda pair: len(pair) == 2 and all(0 <= item < 1 for item in pair), "momentum", "must be two numbers in 0..1")
    choices = ("device", "auto cuda cpu mps"), ("precision", "bf16 fp32"), ("attention", " ".join(ATTENTION))
    for name, known in choices:
        need(lambda value: value in known.split(), name, f"is unknown; choose from {known}")
    need(lambda dim: dim % 4 == 0, "head_dim", "must be a multiple of 4")
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
# Data (same in every train_*.py)

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
JSON_BYTES = 1 << 24                     # a larger file of JSON is none
DOC_TOKENS = 64                          # padding is cut into documents of this length
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

def fill_slot(pieces: list, slot_tokens: int, bos_id: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (int32), targets (int64) of one slot from (ids, start, length) pieces, then documents of 0 and -1."""
    inputs, targets, filled = np.zeros(slot_tokens, np.int32), np.full(slot_tokens, -1, np.int64), 0
    for ids, start, length in pieces:
        inputs[filled:filled + length] = ids[start:start + length]
        after = ids[start + 1:start + length + 1]                   # what really follows, also where a document is cut
        targets[filled:filled + len(after)] = after
        targets[filled + len(after):filled + length] = bos_id       # the shard ends with this document
        filled += length
    inputs[filled::DOC_TOKENS] = bos_id
    if (highest := max(inputs.max(), targets.max())) >= vocab_size:
        raise RankError(f"{getattr(pieces[0][0], 'filename', 'a shard')} holds id {highest}, outside the vocabulary of "
                        f"{vocab_size}; make the shard again")
    return inputs, targets

def training_batches(cfg: Hyperparameters, shards: list[Shard], rank: int, world_size: int, micro_slots: int,
                     first_step: int = 0, place: tuple[int, int] = (0, 0)):
    """Yields for each step this rank's share of its slots, as a list of (inputs, targets) of micro_slots slots each,
    and the place where the next step reads on: (shard, token). `place` is that of first_step.
    """
    kind, (first, token) = (cfg.slot_tokens, shards[0].bos_id, shards[0].vocab_size), place
    docs = ((i, *document) for i in range(first, len(shards))
            for document in documents([shards[i]], token if i == first else 0))
    for step in range(first_step, cfg.total_steps):     # the same slots for any number of ranks; contiguous shares
        stage, mine = cfg.stages[stage_index(cfg, step)], []
        shards[place[0]].read()          # notices that the file was written to since
        num_slots = stage.batch_tokens // cfg.slot_tokens
        for slot in range(num_slots):
            pieces, room = [], cfg.slot_tokens
            while room and len(pieces) < max_documents(cfg, cfg.slot_tokens):
                shard, ids, start, end = next(docs, (0, None, 0, 0))
                if ids is None:
                    raise UserError(f"the training text ran out at step {step} of {cfg.total_steps} (what is cut from "
                                    f"documents is lost); add shards or lower --num_iterations={cfg.num_iterations}")
                pieces.append((ids, start, length := min(end - start, stage.max_doc_tokens, room)))
                room, place = room - length, (shard, int(end))
            if rank * num_slots // world_size <= slot < (rank + 1) * num_slots // world_size:
                mine.append(fill_slot(pieces, *kind))
        # every rank runs the same number of equal micro-steps
        mine += [fill_slot([], *kind)] * (micro_steps(cfg, stage, world_size, micro_slots) * micro_slots - len(mine))
        yield [tuple(np.concatenate(part) for part in zip(*mine[i:i + micro_slots]))
               for i in range(0, len(mine), micro_slots)], place

def max_documents(cfg: Hyperparameters, length: int) -> int:
    """How many documents a slot or stream of this length may hold: some backends reserve room for a list of them."""
    return length // DOC_TOKENS if cfg.attention in ("varlen", "fa3") else length

def check_tokens(cfg: Hyperparameters, shards: list[Shard], num_steps: int) -> str:
    """The sentence on tokens needed and found; raises UserError if there are too few."""
    ends = [0, *(min(round(stage.until * cfg.num_iterations), num_steps) for stage in cfg.stages)]
    needed = sum((end - begin) * stage.batch_tokens for stage, begin, end in zip(cfg.stages, ends, ends[1:]))
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
            full = len(pieces) == max_documents(cfg, cfg.val_stream_tokens)
            if full or whole > room and room < cfg.val_stream_tokens:
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
# Model (same in every train_*.py)

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

    def __init__(self, model: "GPT", tokens: Tensor, max_doc_tokens: int = 0):
        index = torch.arange(tokens.numel(), device=tokens.device, dtype=torch.int32)
        self.starts = torch.where(tokens == model.cfg.bos_id, index, 0).cummax(0).values.to(torch.int32)
        self.fresh, self.position = self.starts == index, index - self.starts       # fresh: first of its document
        self.windows = model.attention_windows(self.starts, max_doc_tokens or tokens.numel())

    def before(self, name: str, x: Tensor) -> Tensor:
        """x (T, ...) of the token before; that of a fresh token means nothing. `name` tells quantities apart."""
        return x.roll(1, 0)

    def attend(self, i: int, window: str, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attention output (T, H, D) of layer i, for its window."""
        return self.windows[window](q_THD, k_THD, v_THD)

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

    def attention_windows(self, starts_T: Tensor, max_doc_tokens: int) -> dict:
        """window -> function of (q, k, v) (T, H, D) for these documents, by the chosen backend."""
        # to FlexAttention windows are tensors: one graph serves all stages
        flexible = self.cfg.attention.startswith("flex")
        sizes = dict(zip(("short", "long"), self.windows)) if flexible else self.window_lengths
        longest = max(self.cfg.final_windows + tuple(w for stage in self.cfg.stages for w in (stage.short, stage.long)))
        return {name: ATTENTION[self.cfg.attention](starts_T, size, longest, max_doc_tokens)
                for name, size in sizes.items()}

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
        stream = Stream(self, tokens, max(stage.max_doc_tokens for stage in self.cfg.stages))
        x, starts = self.hidden(tokens, float8, stream)
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
# Decoding (same in every train_*.py)

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
        head, power = (cfg.num_heads, cfg.head_dim), cfg.head_dim & (cfg.head_dim - 1) == 0
        self.kernels = cfg.kernels and like.is_cuda and triton_kernels is not None and power
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
        self.fresh, self.kernel = self.position == 0, cache.kernels and T == 1
        self.place, self.slots, self.visible = position, {}, {}
        for name, window in () if self.kernel else cache.windows.items():
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
        keys, values = self.cache.keys[i], self.cache.values[i]
        if self.kernel:
            return triton_kernels.decode_attention(q, k, v, keys, values, self.place[:, 0], self.starts,
                                                   self.cache.windows[window])
        q, k, v = (x.unflatten(0, self.shape) for x in (q, k, v))
        keys[self.cache.rows, self.slots[window]] = k
        values[self.cache.rows, self.slots[window]] = v
        q, k, v = (x.transpose(1, 2) for x in (q, keys, values))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible[window][:, None], scale=1.0)
        return y.transpose(1, 2).flatten(0, 1)

# -----------------------------------------------------------------------------
# Optimizer (same in every train_*.py)

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
        part, table = self.part(name), rule.rule == "adam" and rule.shared == "shard"
        device = "cpu" if table and self.model.cfg.host_state else part.device
        zeros = partial(torch.zeros, dtype=torch.float32, device=device, pin_memory=part.is_cuda and device == "cpu")
        state = self.state[name] = {"m": zeros(part.shape)}
        if rule.rule == "adam":
            state |= {"v": zeros(part.shape), "count": torch.zeros((), dtype=torch.int64)}
        else:
            n, rows, cols = part.shape
            state |= {"master": zeros(part.shape), "v": zeros((n, rows, 1) if rows >= cols else (n, 1, cols))}

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
            rows = HOST_ROWS if cfg.host_state and rule.shared == "shard" else len(part)
            for g, p, *kept in zip(*(tensor.split(rows) for tensor in (grad, part, state["m"], state["v"]))):
                m, v = (tensor.to(p.device, non_blocking=True) for tensor in kept)
                self.adam(g, p, m, v, scalar(corrected), scalar(lr * lr * rule.decay), beta1, beta2, apply)
                for tensor, new in zip(kept, (m, v)):
                    tensor.copy_(new, non_blocking=True)            # nothing, if they are one
        else:
            rates = rule.lr if isinstance(rule.lr, tuple) else (rule.lr,)
            first = self.rank * part.size(0)
            lr = torch.tensor([rates[(first + n) % len(rates)] * factor for n in range(part.size(0))])
            lr = lr.view(-1, 1, 1).to(part.device, non_blocking=True)
            self.normuon(grad, state["master"], state["m"], state["v"], lr, scalar(rule.decay * ATTN_LR * factor),
                         scalar(momentum(cfg, step)), rule.betas[0], apply)
            part.copy_(torch.where(apply, state["master"], part))

HOST_ROWS = 1 << 15                      # of a table, whose moments are on the GPU at one time when the host keeps them
ATTN_LR = PARAMETERS["attn_vo"].lr       # matrix decay follows this rate, whatever a bank's own multiplier

# -----------------------------------------------------------------------------
# Schedule: pure functions of the step (same in every train_*.py)

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
# Setup and logging (same in every train_*.py)

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

def resolve_config(cfg: Hyperparameters, machine: Machine, shard: Shard) -> Hyperparameters:
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
    kernels = cfg.kernels and cuda and triton_kernels is not None and cfg.precision == "bf16"      # they take bf16 only
    float8 = cfg.float8 and kernels and torch.cuda.get_device_capability() >= (8, 9) and vocab_size % 16 == 0
    return replace(cfg, vocab_size=vocab_size, bos_id=bos_id, attention=attention, compile=cfg.compile and cuda,
                   kernels=kernels, float8=float8)

def fits_backends(cfg: Hyperparameters, cuda: bool) -> bool:
    """Whether attention other than plain is possible: on CUDA, in streams of whole blocks."""
    return cuda and cfg.slot_tokens % BLOCK == 0 and cfg.val_stream_tokens % BLOCK == 0

def memory_plan(cfg: Hyperparameters, machine: Machine) -> tuple[Hyperparameters, int, str]:
    """The config, with host_state on if need be, slots per micro-batch on this rank, and the sentence on them."""
    shares = [math.ceil(stage.batch_tokens // cfg.slot_tokens / machine.world_size) for stage in cfg.stages]
    if cfg.micro_batch_tokens or machine.device.type != "cuda":
        return cfg, min(cfg.micro_batch_tokens // cfg.slot_tokens or min(shares), min(shares)), "memory plan: none"
    # fits what was measured on an H200 with 16k to 131k tokens, one and four ranks, within 2 GiB: activations take 11
    # numbers per token, layer and channel and 2 per hidden unit (4 without kernels), a logit 2 (4); a weight and its
    # gradient are two, and what the optimizer keeps is 8 bytes a weight over all ranks
    width = 2 if cfg.precision == "bf16" else 4
    tables = ((2 + sum(layer.values >= 0 for layer in cfg.layers)) * cfg.vocab_size + cfg.bigram_rows) * cfg.model_dim
    matrices = len(cfg.layers) * (4 * cfg.model_dim + 2 * cfg.mlp_dim) * cfg.model_dim
    per_token = width * len(cfg.layers) * (11 * cfg.model_dim + (2 if cfg.kernels else 4) * cfg.mlp_dim)
    chunk = triton_kernels.HEAD_CHUNK if cfg.kernels else HEAD_CHUNK
    columns = min(cfg.candidates or cfg.vocab_size, cfg.vocab_size)
    cap = torch.cuda.get_per_process_memory_fraction(machine.device)
    have = 0.92 * cap * torch.cuda.get_device_properties(machine.device).total_memory
    def need(tokens, host_state):        # bytes: static ones, logits, activations
        kept = 8 * (matrices + tables * (not host_state)) / machine.world_size
        logits = (2 if cfg.kernels else 4) * width * min(tokens, chunk) * columns
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
    parts = [part / 2**30 for part in need(slots * cfg.slot_tokens, host_state)]
    return replace(cfg, host_state=host_state), slots, (
        "memory plan: {:.1f} GiB of parameters, gradients and {}state + {:.1f} of logits + {:.1f} of activations = "
        "{:.1f} of {:.1f} GiB".format(parts[0], "matrix " * host_state, *parts[1:], sum(parts), have / 2**30)
        + "; the moments of tables are in host memory" * host_state)

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
    """The run folder: log.txt, run.json, the source, the curve, checkpoints. Written as the run goes, by rank 0.

    A run that goes on from a checkpoint (folder and meta.json) keeps its folder.
    """

    def __init__(self, cfg: Hyperparameters, machine: Machine, argv: list[str], checkpoint: Path | None, meta: dict):
        self.cfg, self.machine, self.master, self.live = cfg, machine, machine.rank == 0, False
        self.history, self.tokens_seen = [tuple(point) for point in meta.get("history", ())], meta.get("tokens_seen", 0)
        self.train_losses, self.wrote, self.writer, self.saved = [], 0.0, ThreadPoolExecutor(1), checkpoint
        self.writing = self.writer.submit(lambda: None)             # the last checkpoint, or one being written
        script, now = Path(__file__), time.strftime("%Y-%m-%dT%H:%M:%S%z")
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
        """Makes what is not there yet of the folder, the log and the copies of the source; raises UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.rglob("*"):                     # writing follows links and waits for pipes
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise UserError(f"{path} is a link or no file; put the file itself there, or remove it")
            self.log_file = open(self.folder / "log.txt", "a", buffering=1)
            for source in [Path(__file__)] + ([Path(triton_kernels.__file__)] if self.cfg.kernels else []):
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

    def step(self, step: int, clock, model, loss: float, *wishes: float) -> tuple[float, ...]:
        """Logs a finished step, on a terminal as a live line, else a line now and then. Returns the ranks' wishes."""
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
        return wishes

    def need_finite(self, loss: float, what: str, model):
        """Raises FloatingPointError, which names the first bad parameter of the table, if a loss is NaN or infinite."""
        if math.isfinite(loss):
            return
        named = dict(model.named_parameters())
        bad = next((name for name in PARAMETERS if not torch.isfinite(named[name]).all()), "none: only the loss")
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
            self.print(f"next: python sample.py --checkpoint={self.saved}" if status == "finished" else
                       f"next: the same command with --resume={self.folder}")

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
# Backends (same in every train_*.py)

# what is tried on this device before the run: error allowed, relative to the norm of the float32 result
ALLOWED = {"flex": 0.03, "flex_small": 0.03, "varlen": 0.03, "fa3": 0.03, "head_loss": 0.03, "float8_head_loss": 0.25,
           "float8_linear": 0.25, "float8_mlp": 0.25}
OPERATORS = {"kernels": ("head_loss",), "float8": ("float8_head_loss", "float8_linear", "float8_mlp")}     # by flag
PROBE_SECONDS = 300                      # for all, compilation included

def probe_case(cfg: Hyperparameters, name: str, device: torch.device):
    """(function, the same in plain PyTorch, inputs that have gradients) for a key of ALLOWED."""
    generator, T = torch.Generator(device).manual_seed(0), cfg.slot_tokens
    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=generator, device=device) * std
    if name in ATTENTION:
        index, window = torch.arange(T, device=device, dtype=torch.int32), cfg.stages[0].long
        starts, size = index - index % 1500, torch.tensor(window, device=device) if "flex" in name else window
        return (lambda *qkv: ATTENTION[name](starts, size, window, 1500)(*qkv),
                lambda *qkv: with_plain(starts, window, window, 1500)(*qkv),
                [normal(T, cfg.num_heads, cfg.head_dim, std=std) for std in (cfg.head_dim ** -0.5, 1, 1)])
    C, u = cfg.model_dim, norm(normal(1024, cfg.model_dim))
    def matrix(rows):
        return normal(rows, C, std=0.5 * C ** -0.5)
    if "head_loss" in name:
        targets, weights = torch.arange(1024, device=device)[:, None] % cfg.vocab_size, torch.ones(1, device=device)
        counts = normal(cfg.vocab_size).exp().scatter(0, targets[:, 0], 1) if cfg.candidates else None
        return (lambda x, head: triton_kernels.head_loss(x, head, targets, weights, counts, name.startswith("float8")),
                lambda x, head: head_loss(x, head, targets, weights, counts), [u, normal(cfg.vocab_size, C, std=0.02)])
    if name == "float8_linear":
        return triton_kernels.float8_linear, F.linear, [u, matrix(3 * C)]
    return triton_kernels.float8_mlp, mlp, [u, matrix(cfg.mlp_dim), matrix(cfg.mlp_dim)]

def probe(cfg: Hyperparameters, name: str, device: torch.device) -> tuple[float, float]:
    """(largest relative error of result and gradients against float32, seconds of one pass) of a key of ALLOWED."""
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

def probe_all():
    """What the process of try_backends runs: reads a JSON object, writes a line of JSON for each backend."""
    order = json.loads(sys.stdin.read())
    cfg, device = config_from_dict(order["config"]), torch.device(order["device"])
    for name in order["names"]:
        try:
            error, seconds = probe(cfg, name, device)
            fault = "" if error <= ALLOWED[name] else f"wrong by {error:.3g}"
        except Exception as reason:      # whatever a backend comes up with
            error, seconds, fault = 0.0, 0.0, " ".join(f"{type(reason).__name__}: {reason}".split())[:120]
        print(json.dumps({"backend": name, "fault": fault, "error": error, "seconds": seconds}), flush=True)

def try_backends(cfg: Hyperparameters, names: list[str], device: torch.device) -> dict[str, dict]:
    """name -> {"fault": why it cannot be used, "" if it can, "error", "seconds"}, as probe_all says.

    They run in another process, for one that breaks the GPU's context takes the process along; then the rest is tried
    in a new one.
    """
    found, path = {}, Path(__file__).resolve()          # its name may be none that `import` can take
    start = ("import importlib.util as util, sys; sys.path.insert(0, {!r}); "
             "spec = util.spec_from_file_location('probed', {!r}); "
             "sys.modules['probed'] = script = util.module_from_spec(spec); spec.loader.exec_module(script); "
             "script.probe_all()").format(str(path.parent), str(path))
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

def remember_backends(cfg: Hyperparameters, names: list[str], machine: Machine) -> dict[str, dict]:
    """What try_backends finds; it is kept for the next start with the same facts, if nothing is at fault."""
    sources = [__file__] + ([triton_kernels.__file__] if triton_kernels else [])
    facts = [names, machine.name, torch.__version__, cfg.slot_tokens, cfg.stages[0].long, cfg.model_dim, cfg.head_dim,
             cfg.mlp_dim, cfg.vocab_size, cfg.candidates > 0, cfg.precision, cfg.compile, *map(file_sha256, sources)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.expanduser("~/.cache/minutegpt")
    path = Path(folder, f"backends_{key}.json")
    found = read_json(path)
    if found.keys() == set(names) and all(isinstance(result, dict) and result.keys() == {"fault", "error", "seconds"}
                                          and result["fault"] == "" for result in found.values()):
        return found
    found = try_backends(cfg, names, machine.device)
    if not any(result["fault"] for result in found.values()):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found).encode())
    return found

def choose_backends(cfg: Hyperparameters, machine: Machine) -> tuple[Hyperparameters, list[str]]:
    """The config with the attention and the kernels that are right on this device, and lines on what was tried.

    Attention is the fastest that is as right as the plain one, or the flag's; UserError if that is not right.
    """
    if machine.device.type != "cuda":
        return cfg, []
    wanted = [cfg.attention] if cfg.attention not in ("auto", "plain") else []
    if cfg.attention == "auto" and fits_backends(cfg, True):
        wanted = ["flex", "flex_small", "varlen"]
    operators = [name for flag, names in OPERATORS.items() if getattr(cfg, flag) for name in names]
    found = first_rank(machine, lambda: remember_backends(cfg, wanted + operators, machine))
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
                 for name, result in found.items()] + [f"used: {best} attention, "
                 f"{'kernels' if cfg.kernels else 'no kernels'}, {'float8' if cfg.float8 else 'no float8'}"]

# -----------------------------------------------------------------------------
# Checkpoint (same in every train_*.py)

FILES = ("model.safetensors", "optimizer.safetensors")
# what may be another one when a run goes on: it changes no more than rounding, what is written, or where the run ends
FREE = ("micro_batch_tokens", "stop_after", "val_every", "device", "attention", "kernels", "host_state", "compile",
        "compile_cache", "out_dir", "save_every", "keep", "resume", "resume_override")

def run_identity(cfg: Hyperparameters, tokenizer: bytes, **shards: list[Shard]) -> dict:
    """What makes the run the run it is, as plain JSON: flags, shards by name and tokens, tokenizer and source."""
    flags = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    files = {flag: [(Path(shard.path).name, shard.num_tokens) for shard in group] for flag, group in shards.items()}
    return json.loads(json.dumps(flags | files | {
        "source": file_sha256(__file__), "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "shard_times": [shard.modified for group in shards.values() for shard in group]}))

def share_rows(optimizer: Optimizer, name: str) -> int:
    """Rows of a tensor of run_state of which each rank holds a share; 0 if each rank holds all of it."""
    param, _, key = name.partition(".")
    if key in ("", "count") or optimizer.world_size == 1 or PARAMETERS[param].shared == "all":
        return 0
    return optimizer.params[param].numel() // optimizer.whole[param][0].numel()

def gather_state(model: GPT, optimizer: Optimizer, machine: Machine, everything: bool) -> dict[str, Tensor]:
    """The model's tensors, or everything that training changes, whole, in CPU memory of the first rank."""
    found, pin = {}, machine.device.type == "cuda"
    for name, tensor in (run_state(model, optimizer, machine) if everything else model.state_dict()).items():
        if rows := share_rows(optimizer, name):
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
def restore_state(folder: Path, meta: dict, model: GPT, optimizer: Optimizer, machine: Machine) -> list:
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
        rows, random = share_rows(optimizer, name), name.endswith("rng")
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

def save_checkpoint(run: Run, model: GPT, optimizer: Optimizer, step: int, clock, tokenizer: bytes, everything: bool,
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
    meta = {"format": 1, "script": Path(__file__).stem, "source_sha256": run.info["source_sha256"],
            "config": asdict(model.cfg), "step": step, "stage": stage_index(model.cfg, step - 1),
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

def find_run(cfg: Hyperparameters, argv: list[str], restarted: bool) -> Path | None:
    """What --resume means, None: a new run; for a job that torchrun has started again the run it was at."""
    if not restarted and cfg.resume != "latest":
        return Path(cfg.resume) if cfg.resume else None
    files = sorted(Path(cfg.out_dir).glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    infos = {file.parent: info for file in files if (info := read_json(file)).get("script") == Path(__file__).name}
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

def find_checkpoint(cfg: Hyperparameters, argv: list[str], num_steps: int, identity: dict, restarted: bool
                    ) -> tuple[Path | None, dict, list[str]]:
    """(folder, its meta.json, lines for the log) of the checkpoint to go on from; (None, {}, lines) for a new run.

    Raises UserError if there is none, or if flags, shards or source are not those of its run.
    """
    run, notes, flag = find_run(cfg, argv, restarted), [], f"--resume={cfg.resume}"
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

def config_from_dict(values: dict) -> Hyperparameters:
    """Hyperparameters from the `config` of a checkpoint's meta.json; raises UserError on unknown or missing fields."""
    names = {field.name for field in fields(Hyperparameters)}
    if not isinstance(values, dict) or values.keys() != names:
        odd = sorted(values.keys() ^ names) if isinstance(values, dict) else values
        raise UserError(f"the checkpoint's config and this script differ in {odd}; use the script that made it")
    try:
        cfg = convert(values, Hyperparameters)
        check_config(cfg)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"the checkpoint's config cannot be read ({error}); use the script that made it") from None
    return cfg

# -----------------------------------------------------------------------------
# Training and validation (same in every train_*.py)

def digest(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A 64-bit sum per tensor that changes with any bit of it, computed where the tensor lies."""
    sums, integer = dict.fromkeys(tensors, 0), {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in tensors.items():
        words = tensor.detach().contiguous().flatten().view(integer[tensor.element_size()])
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

@contextlib.contextmanager
def memory_advice(cfg: Hyperparameters, flag: str, tokens: int):
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

def training_step(model, optimizer: Optimizer, batches: list, step: int, machine: Machine, *wishes: bool) -> Tensor:
    """Trains on one batch; (its summed loss, how many ranks have each wish) over all ranks, on the device."""
    weights = torch.tensor(loss_weights(optimizer.model.cfg, step)).to(machine.device, non_blocking=True)
    total = torch.tensor([0.0, *map(float, wishes)]).to(machine.device, non_blocking=True)
    for batch in batches:
        with memory_advice(optimizer.model.cfg, "micro_batch_tokens", len(batch[0])):
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
        with memory_advice(cfg, "val_stream_tokens", cfg.val_stream_tokens):
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
    # backends that take windows as numbers need a graph for each
    for stage in range(len(cfg.stages)) if not cfg.attention.startswith("flex") else [0]:
        raw.set_stage(stage)
        training_step(model, optimizer, [synthetic(micro_slots * cfg.slot_tokens)] * 2, 0, machine)
        validate(model, cfg, [synthetic(cfg.val_stream_tokens)] * machine.world_size, machine)
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
    cfg, tried = choose_backends(cfg, machine)
    streams = validation_streams(cfg, val_shards)
    cfg, micro_slots, plan = memory_plan(cfg, machine)

    identity = run_identity(cfg, tokenizer, train_files=train_shards, val_files=val_shards)
    restarted = max(everyone(machine, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))) > 0
    origin, meta, notes = first_rank(machine, lambda: find_checkpoint(cfg, argv, num_steps, identity, restarted))

    run = Run(cfg, machine, argv, origin, meta)
    if run.master:                       # so that a record can be held to its track's validation data
        run.save(data_sha256={shard.path: file_sha256(shard.path) for shard in val_shards})
    stopping, agreed = watch_signals(run)
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
    run.print("\n".join([*tried, f"{plan}; {micro_slots * cfg.slot_tokens:,} tokens per forward", *notes]))

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
    done = saved = meta.get("step", 0)
    model.set_stage(stage := stage_index(cfg, max(done - 1, 0)))
    if origin:
        clock.before, run.train_losses = meta["train_time"], restore_state(origin, meta, model, optimizer, machine)
        run.print(f"goes on from {origin} after {clock.seconds:.1f} s of training")
    else:
        run.validated(0, clock, validate(forward, cfg, streams, machine), model)
    every, unit = int(cfg.save_every.removesuffix("min") or 0), "minutes" if cfg.save_every.endswith("min") else "steps"
    if every:
        gather_state(model, optimizer, machine, True)               # finding pinned memory takes seconds the first time
    clock.start()                        # training time counts from the first look at the data
    model.prefix_of.copy_(torch.from_numpy(prefix_tokens(json.loads(tokenizer), cfg.vocab_size)))
    place = meta.get("place", (0, 0))
    loader = prefetch(training_batches(cfg, train_shards, machine.rank, machine.world_size, micro_slots, done, place))

    def save(everything):
        save_checkpoint(run, model, optimizer, done, clock, tokenizer, everything, place=place, identity=identity)
    stop, due, last_save = False, False, time.monotonic()
    pending = None                       # the loss of the last step, read one step late so that nothing waits
    while done < num_steps and not (stop and done % 2 == 0):        # even: no gradient waits for Adam's next step
        batches, place = next(loader)
        if stage != (stage := stage_index(cfg, done)):
            model.set_stage(stage)
        overdue = unit == "minutes" and machine.rank == 0 and time.monotonic() - last_save > 60 * every
        loss = training_step(forward, optimizer, batches, done, machine, stopping.is_set(), overdue)
        done += 1
        if pending is not None:
            stop, due = run.step(done - 1, clock, model, *pending.tolist())
        pending = loss
        validating = cfg.val_every and done % cfg.val_every == 0 and done < num_steps
        saving = done % 2 == 0 and done < num_steps and (due or unit == "steps" and every and done % every < 2)
        if validating or saving:         # not before all losses so far are known to be finite
            stop, due = run.step(done, clock, model, *pending.tolist())
            pending = None
        if validating:
            clock.stop()
            run.validated(done, clock, validate(forward, cfg, streams, machine), model)
            clock.start()
        if saving:
            save(everything=True)
            saved, last_save = done, time.monotonic()
    agreed.set()
    clock.stop()
    if pending is not None:
        run.step(done, clock, model, *pending.tolist())
    run.save(recompiles=compiled_graphs() - graphs, train_time_ms=round(1000 * clock.seconds))
    finished = done == num_steps
    if saved != done:                    # before the evaluation can fail
        save(everything=not finished or every > 0)
    run.writing.result()
    written = not run.master or run.saved is not None and run.saved.name == f"step_{done:06d}"
    if finished:
        if done == cfg.total_steps:
            model.set_stage(stage, final=True)
        run.validated(done, clock, validate(forward, cfg, streams, machine), model)
        if run.master and written:
            meta = read_json(run.saved / "meta.json") | {"val_loss": run.history[-1][2]}
            write_atomically(run.saved / "meta.json", json.dumps(meta, indent=1).encode())
    run.finish("finished" if finished else "interrupted", done, clock, train_shards + val_shards)
    if not written:
        raise UserError(f"the checkpoint of step {done} could not be written, {run.folder / 'log.txt'} says why; free "
                        f"space or choose another --out_dir")
    return 0 if finished else 130

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
            name_lost_ranks()
            run.writing.result()
            os._exit(1)
    os.set_blocking(writer, False)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: None)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=watch, daemon=True).start()
    return stopping, agreed

def name_lost_ranks():
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
        print(f"{Path(__file__).name}: no answer from rank {gone}, so the others end; go on from the last checkpoint "
              "with --resume=latest", file=sys.stderr)

def main() -> int:
    """Runs the command line. Exit code: 0 done, 1 another rank died, 2 the user can put it right, 3 diverged, 130
    interrupted."""
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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
            raise
        print(f"{Path(__file__).name}: {UserError(error)}; free space or choose another folder", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        name_lost_ranks()
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{Path(__file__).name}: interrupted before the first step; nothing to save", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

# -----------------------------------------------------------------------------
# Kernels: appendix (same in every train_*.py)

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

# 64 x 64 tiles: with windows of 128 to 1664 larger ones waste work at the edges (dev/EXPERIMENTS.md); the small ones
# are for GPUs with 99 KiB of shared memory a block
TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3, "bwd_BLOCK_M1": 32,
         "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 4, "bwd_num_stages": 3}
SMALL_TILES = TILES | {"fwd_BLOCK_N": 32, "fwd_num_stages": 2, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32,
                       "bwd_num_stages": 1}

def flex(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, mask: BlockMask, tiles: dict = TILES) -> Tensor:
    """Attention output (T, H, D) under a block mask; the softmax scale is already in q."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    return flex_attention(q, k, v, block_mask=mask, scale=1.0, kernel_options=tiles)[0].transpose(0, 1)

def list_documents(starts_T: Tensor) -> Tensor:
    """(T / 32 + 1,) int32: where each document begins, after the last one T. There is room for those of max_documents
    and as many of padding."""
    fresh = starts_T == torch.arange(starts_T.numel(), device=starts_T.device)
    wanted = torch.arange(1, 2 * starts_T.numel() // DOC_TOKENS + 1, device=starts_T.device)
    return F.pad(torch.searchsorted(fresh.cumsum(0), wanted, out_int32=True), (0, 1), value=starts_T.numel())

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

def with_flex(tiles: dict, starts_T: Tensor, window: Tensor, longest: int, max_doc_tokens: int):
    """FlexAttention with these tiles; see ATTENTION."""
    # as_strided fixes the layout, which the mask needs in graphs where a fused kernel computes the starts (PR 182737)
    starts_T = starts_T.as_strided(starts_T.shape, (1,))
    index = torch.arange(starts_T.numel(), device=starts_T.device, dtype=torch.int32)
    mask = block_mask(torch.maximum(starts_T, index - window), -(-longest // BLOCK) + 2)
    return lambda q, k, v: flex(q, k, v, mask, tiles)

def with_varlen(starts_T: Tensor, window: int, longest: int, max_doc_tokens: int):
    """torch's variable-length attention, whose kernels --attention=fa3 replaces; see ATTENTION."""
    from torch.nn.attention.varlen import varlen_attn               # loading it takes two seconds
    begins = list_documents(starts_T)
    return lambda q, k, v: varlen_attn(q, k, v, begins, begins, max_doc_tokens, max_doc_tokens, scale=1.0,
                                       window_size=(window, 0))

def with_plain(starts_T: Tensor, window: int, longest: int, max_doc_tokens: int):
    """Plain PyTorch; see ATTENTION."""
    index = torch.arange(starts_T.numel(), device=starts_T.device, dtype=torch.int32)
    first = torch.maximum(starts_T, index - window)
    return lambda q, k, v: plain_attention(q, k, v, first, window)

# name of a backend -> function of (where the document of each token starts (T,) int32, window in tokens, longest window
# of the run, longest document), whose result is the attention: a function of q, k, v (T, H, D)
ATTENTION = {"flex": partial(with_flex, TILES), "flex_small": partial(with_flex, SMALL_TILES), "varlen": with_varlen,
             "fa3": with_varlen, "plain": with_plain, "auto": with_plain}

LOGIT_SCALE, LOGIT_SHIFT, LOGIT_WIDTH = 23.0, 5.0, 7.5             # logits lie in 0..23 (#54)
HEAD_CHUNK = 8192                        # tokens whose logits exist at one time

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

class HeadLoss(torch.autograd.Function):
    """head_loss with both gradients in one pass, chunk by chunk, so that logits are neither kept nor computed twice."""

    @staticmethod
    def forward(ctx, x_TC, weight_VC, targets_TK, weights_K, counts_V):
        loss, dx = x_TC.new_zeros((), dtype=torch.float32), []
        dweight = torch.zeros_like(weight_VC, dtype=torch.float32)
        for x, targets in zip(x_TC.split(HEAD_CHUNK), targets_TK.split(HEAD_CHUNK)):
            logits = map_logits(F.linear(x, weight_VC))
            wanted, places = weights_K * (targets >= 0), targets.clamp(min=0)
            counted = logits if counts_V is None else logits + counts_V.log()
            total = counted.logsumexp(dim=1, keepdim=True)
            loss += ((total - logits.gather(1, places)) * wanted).sum()
            grad = (counted - total).exp() * wanted.sum(dim=1, keepdim=True)
            grad = grad.scatter_add(1, places, -wanted) * logits * (1 - logits / LOGIT_SCALE) / LOGIT_WIDTH
            grad = grad.to(x.dtype)      # by the raw product: of a sigmoid s it is s (1 - s)
            dx.append(grad @ weight_VC)
            dweight += grad.T @ x
        ctx.save_for_backward(torch.cat(dx), dweight.to(weight_VC.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None, None, None

def head_loss(x_TC: Tensor, weight_VC: Tensor, targets_TK: Tensor, weights_K: Tensor,
              counts_V: Tensor | None = None) -> Tensor:
    """Sum over tokens of the weighted cross-entropies of K targets (int64, -1: none), a fp32 scalar.

    counts (V,) fp32: for how many tokens each row of the weight stands in the sum of exponentials; None: for one.
    """
    return HeadLoss.apply(x_TC, weight_VC, targets_TK, weights_K, counts_V)

def map_logits(logits: Tensor) -> Tensor:
    """fp32 logits in 0..23 from the head's raw product."""
    return LOGIT_SCALE * torch.sigmoid((logits.float() + LOGIT_SHIFT) / LOGIT_WIDTH)

if __name__ == "__main__":
    sys.exit(main())
