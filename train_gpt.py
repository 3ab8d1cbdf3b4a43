"""Train a GPT-2-class model to 3.28 validation loss on FineWeb, as fast as possible.

    python data/fineweb.py 9                                              # validation shard + 0.9 B training tokens
    torchrun --standalone --nproc_per_node=8 train_gpt.py                 # the speedrun; any number of GPUs works
    python train_gpt.py --preset=single                                   # one GPU: smaller batches, more steps
    python train_gpt.py --preset=sprint                                   # one GPU: a small model in seconds
    python train_gpt.py --preset=tiny                                     # a minute or two on a laptop CPU
    cp train_gpt.py my_idea.py                                            # edit a table row, run both, compare the logs

Result on one H200, development text (torch 2.11): 3.889 in 12.2 s (--preset=sprint, n=6), 3.890 in 23.4 s (--preset=
single --num_iterations=270, n=3), 3.656 in 50.0 s (stage batches halved, --num_iterations=290, n=1). No run on eight
GPUs or on FineWeb yet.
The recipe: one packed stream of whole documents, sliding-window attention, cheap lookup tables (value and bigram
embeddings) beside a small transformer, NorMuon for matrices and Adam for tables, everything growing in stages.
Facts and figures come from the public NanoGPT speedrun (KellerJordan/modded-nanogpt, record 89; "#n" below is its
record n, "PR n" its pull request n). Read in this order: the tables, GPT.trunk, Optimizer.step, train. The two
appendices, kernels and the run, can wait.

Shape suffixes: T tokens, H heads, D channels per head, C residual channels, V vocabulary, N matrices, K targets.
"""
# -----------------------------------------------------------------------------
# Imports

import base64
import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import pairwise
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
except ImportError:                      # not beside this file, or no Triton here: plain PyTorch computes the same
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
    attention: bool = True       # False: only the MLP, and what `skip` adds (#17)
    window: str = "short"        # "long" layers also take half of each key from the previous token (#49)
    ve: int = -1                 # value embedding table added to the values, -1: none
    attn_input: int = -1         # attention reads the output of this earlier layer, -1: the residual stream
    skip: int = -1               # earlier layer whose gated output is added, -1: none
    xsa: bool = False            # remove from the attention output what lies along the token's own value (#82)
    gate: bool = False           # gate each head's output
    mudd: bool = False           # dense dynamic connections to earlier states (arXiv 2502.12170, #81); last layer only

LAYERS = (
    Layer(),                                                                # 0
    Layer(ve=0, xsa=True),                                                  # 1
    Layer(ve=1),                                                            # 2
    Layer(window="long", xsa=True, gate=True),                              # 3
    Layer(xsa=True),                                                        # 4
    Layer(),                                                                # 5
    Layer(attention=False, skip=3),                                         # 6
    Layer(xsa=True),                                                        # 7
    Layer(ve=2, attn_input=7),                                              # 8
    Layer(ve=3, attn_input=7),                                              # 9
    Layer(window="long", ve=4, attn_input=7, gate=True, mudd=True),         # 10
)

SINGLE_STAGES = (                # a quarter of the batch in four times as many steps: one GPU loses little speed
    #     until    batch   docs short  long    lr  next_tokens                    prefix
    Stage(1 / 3,  32_768,  896,  128,  384, 0.79, ((1, .5, .25), (1, .5, 0)), (.25, .25)),
    Stage(2 / 3,  65_536, 2048,  384,  896, 1.20, ((1, .5, 0), (1, 0, 0)),    (.25, 0)),
    Stage(1.000,  98_304, 2048,  640, 1408, 1.36, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
    Stage(1.012,  98_304, 2048,  768, 1664, 1.36, ((1, 0, 0), (1, 0, 0)),     (0, 0)),
)
SPRINT_LAYERS = (                # fewer: in a quarter of a minute a small model learns more
    Layer(ve=0, xsa=True),                                                  # 0
    Layer(window="long", ve=1, xsa=True, gate=True),                        # 1
    Layer(attention=False, skip=1),                                         # 2
    Layer(ve=2, xsa=True),                                                  # 3
    Layer(window="long", ve=3, attn_input=3, gate=True, mudd=True),         # 4
)
TINY_STAGES = (
    Stage(1 / 3,   1_024,  512,   64,  128, 1.00, ((1, .5, .25), (1, .5, 0)), (0, 0)),
    Stage(1.000,   2_048,  512,   64,  256, 1.40, ((1, .5, 0), (1, 0, 0)),    (0, 0)),
)
TINY_LAYERS = (
    Layer(ve=0),                                                            # 0
    Layer(window="long", ve=1, gate=True),                                  # 1
    Layer(attention=False, skip=1),                                         # 2
    Layer(xsa=True),                                                        # 3
    Layer(window="long", ve=2, attn_input=3, gate=True, mudd=True),         # 4
)

@dataclass(frozen=True)
class ParamConfig:               # how one parameter is trained and shared between ranks; one row a parameter
    optim: str                   # "muon" (orthogonalised momentum, every step) or "adam" (odd steps only, #39)
    lr: float | tuple            # peak learning rate; a tuple alternates over the matrices of a bank
    betas: tuple                 # adam: first and second moment; muon: second moment only, its momentum is scheduled
    decay: float                 # cautious weight decay; adam: times lr^2, muon: times lr (#43, #50)
    comms: str                   # "sharded": each rank updates a slice, then all gather; "replicated": all update all

PARAMETERS = {
    # name                      optim    lr              betas         decay  comms     in the order of communication
    "attn_scales":   ParamConfig("adam", 0.04,           (0.90, 0.99), 0,     "replicated"),
    "smear_lambda":  ParamConfig("adam", 0.04,           (0.90, 0.99), 0,     "replicated"),
    "skip_lambda":   ParamConfig("adam", 0.04,           (0.90, 0.99), 0,     "replicated"),
    "smear_gate":    ParamConfig("adam", 8e-5,           (0.90, 0.99), 0,     "replicated"),
    "resid_lambdas": ParamConfig("adam", 0.04,           (0.90, 0.95), 0,     "replicated"),
    "post_lambdas":  ParamConfig("adam", 0.008,          (0.90, 0.95), 0,     "replicated"),
    "value_gates":   ParamConfig("adam", 0.008,          (0.90, 0.99), 0.005, "replicated"),
    "gate_fc":       ParamConfig("adam", 8e-4,           (0.90, 0.99), 0.005, "replicated"),
    "gate_proj":     ParamConfig("adam", 8e-4,           (0.90, 0.99), 0.005, "replicated"),
    "gate_bias":     ParamConfig("adam", 8e-4,           (0.90, 0.99), 0,     "replicated"),
    "gate_scale":    ParamConfig("adam", 8e-4,           (0.90, 0.99), 0,     "replicated"),
    "mix_fc":        ParamConfig("adam", 0.002,          (0.90, 0.99), 0.005, "replicated"),
    "mix_proj":      ParamConfig("adam", 0.002,          (0.90, 0.99), 0.005, "replicated"),
    "mix_bias":      ParamConfig("adam", 0.002,          (0.90, 0.99), 0,     "replicated"),
    "attn_qk":       ParamConfig("muon", 0.023,          (0.90,),      1.2,   "sharded"),
    "attn_vo":       ParamConfig("muon", 0.023,          (0.90,),      1.2,   "sharded"),
    "value_embeds":  ParamConfig("adam", 0.6,            (0.75, 0.95), 0.025, "sharded"),
    "bigram_embed":  ParamConfig("adam", 0.6,            (0.75, 0.95), 0.025, "sharded"),
    "lm_head":       ParamConfig("adam", 0.008,          (0.50, 0.95), 0.75,  "sharded"),
    "embed":         ParamConfig("adam", 0.008,          (0.50, 0.95), 0.75,  "sharded"),   # after split_embed
    "mlp":           ParamConfig("muon", (0.046, 0.092), (0.90,),      1.2,   "sharded"),   # c_fc, c_proj
}

@dataclass(frozen=True)
class Hyperparameters:
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"    # training shards (a glob), read in the order of names
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"        # validation shards (a glob)
    vocab_dir: str = ""                  # folder with GPT-2's encoder.json, for shards that have no tokenizer.json
    val_tokens: int = 10_485_760         # fixed by the track: the metric is the mean loss over exactly these
    val_stream_tokens: int = 131_072     # whole documents are packed into streams of this length for validation
    pack_tokens: int = 16_384            # a batch is made of packs of whole documents; ranks share out whole packs
    micro_batch_tokens: int = 0          # tokens per forward on a rank; 0: as many as fit into memory
    epochs: int = 1                      # how often the training text is read, each time in another order
    # schedule
    num_iterations: int = 1270           # steps without the extension; scales the whole schedule
    stop_after: int = 0                  # end after this many steps, schedule unchanged; 0: off
    val_every: int = 250                 # steps between validations; 0: only first and last
    stages: tuple[Stage, ...] = STAGES   # the stage table
    final_windows: tuple[int, ...] = (768, 2560)    # short, long window of the final validation and of sampling
    cooldown: float = 0.6                # last fraction of num_iterations, over which the learning rate falls
    lr_floor: float = 0.15               # learning rate factor at the end (#72)
    split_embed: float = 2 / 3           # embedding and head are one matrix until here (#51, #53); 0: never
    # model
    layers: tuple[Layer, ...] = LAYERS   # the layer table
    model_dim: int = 768                 # residual channels
    head_dim: int = 128                  # channels of a head
    qk_dim: int = 0                      # channels of a head's query and key (PR 344); 0: head_dim
    mlp_dim: int = 3072                  # hidden units of each MLP
    gate_dim: int = 64                   # hidden width of the gate networks; 0: gates keep their initial values
    bigram_rows: int = 377_280           # rows of the hashed bigram table (#62); 0: no such table
    bigram_signs: int = 8192             # random sign patterns that tell colliding bigrams apart (#83); 0: none
    sampled_vocab: int = 0               # tokens that the training loss of a pack compares with; 0: all of them
    vocab_size: int = 0                  # 0: from the shards, rounded up to a multiple of vocab_multiple
    vocab_multiple: int = 128            # matrix units like multiples of 128
    bos_id: int = -1                     # begin-of-document id; -1: from the shards
    attn_scale: float = 0.1              # softmax scale in the first stage; grows with the windows
    rope_base: float = 1024.0            # tokens in which the slowest rotary pair turns by one radian
    earlier_windows: tuple[int, ...] = ()           # long windows of the run before this one; set by --init_from
    # optimizer
    lr: float = 1.0                      # factor on every learning rate of PARAMETERS
    momentum: tuple[float, ...] = (0.85, 0.95)      # Muon momentum: low, high
    momentum_warmup: int = 300           # steps from low to high, in steps because a short run wants a short memory
    momentum_cooldown: float = 0.039     # back to low over this last fraction of num_iterations
    # machine
    device: str = "auto"                 # cuda, cpu or mps; auto: cuda if there is one, else cpu
    precision: str = "bf16"              # of weights and activations: bf16 or fp32
    attention: str = "auto"              # flex, flex_small (less shared memory) or plain; auto: the first that works
    kernels: bool = True                 # the kernels of triton_kernels.py, on CUDA
    float8: bool = True                  # products in float8, if the GPU and the kernels can; never in validation
    host_state: bool = False             # Adam's moments of tables in host memory; on by itself if the GPU is small
    compile: bool = True                 # torch.compile; off on the CPU
    graph_tokens: int = 32_768           # forwards of up to so many tokens become CUDA graphs, if memory allows
    compile_cache: str = ""              # folder that keeps what was compiled; "": torch's own in the temporary files
    seed: int = 0                        # of the initial weights, and of the order of documents after the first epoch
    out_dir: str = "logs"                # each run makes a folder in it
    # checkpoints; one is also written at the end, and when a signal ends the run
    init_from: str = ""                  # start with the weights of this run or checkpoint
    save_every: str = ""                 # 500: steps (on the next even one); 10min: minutes; "": only at the end
    keep: int = 2                        # number of checkpoints to keep
    resume: str = ""                     # go on with a run or a checkpoint (its folder) or with the "latest" in out_dir
    resume_override: str = ""            # flags that may differ from those of the resumed run, separated by commas

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def key_dim(self) -> int:
        return self.qk_dim or self.head_dim

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: num_iterations and the extension."""
        return round(self.stages[-1].until * self.num_iterations)

PRESETS = {
    "speedrun": Hyperparameters(sampled_vocab=16_384, qk_dim=64),   # track 1, on eight GPUs
    "single": Hyperparameters(num_iterations=5080, val_every=1000, stages=SINGLE_STAGES, cooldown=0.5,      # on one
                              sampled_vocab=16_384, qk_dim=64),
    "sprint": Hyperparameters(num_iterations=402, val_every=0, stages=SINGLE_STAGES, cooldown=0.5, lr=1.2,  # one GPU
                              layers=SPRINT_LAYERS, model_dim=512, mlp_dim=2048, sampled_vocab=16_384, qk_dim=64),
    "tiny": Hyperparameters(             # learns to write Python-like text in a minute or two on two cores
        train_files="data/local/train_*.bin", val_files="data/local/val_*.bin", val_tokens=65_536,
        val_stream_tokens=8192, pack_tokens=512, num_iterations=330, val_every=110, stages=TINY_STAGES,
        final_windows=(64, 256), layers=TINY_LAYERS, model_dim=128, head_dim=32, mlp_dim=512, gate_dim=16,
        bigram_rows=8192, bigram_signs=256, vocab_multiple=1, precision="fp32", compile=False),
}

# -----------------------------------------------------------------------------
# Data

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"
DOC_TOKENS = 64                          # padding is cut into documents of this length
INDEX_TOKENS = 1 << 22                   # document starts are searched for in this many tokens at a time

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
        """(num_tokens,) uint16 or uint32, mapped from the file; raises RankError if the file has changed."""
        try:
            if os.stat(self.path).st_mtime_ns != self.modified:
                raise ValueError("it was written to")
            return np.memmap(self.path, f"<u{self.width}", "r", offset=HEADER_BYTES, shape=(self.num_tokens,))
        except (OSError, ValueError) as error:
            raise RankError(f"{self.path} changed or disappeared while in use ({error}); make it again") from None

def prefix_tokens(tokenizer: dict, vocab_size: int) -> np.ndarray:
    """(V,) int64: for each token the longest other token whose bytes begin it, -1 if there is none (#88)."""
    tokens = {base64.b64decode(rank): i for i, rank in enumerate(tokenizer["ranks"])}
    longest = np.full(vocab_size, -1)
    for text, token in tokens.items():
        for length in range(len(text) - 1, 0, -1):
            if text[:length] in tokens:
                longest[token] = tokens[text[:length]]
                break
    return longest

def documents(shards: list[Shard]):
    """Yields (ids, start, end) of every document in order; of one cut by a shard border the rest is left out."""
    for shard in shards:
        ids = shard.read()
        start = None
        for low in range(0, len(ids), INDEX_TOKENS):
            for bos in np.flatnonzero(ids[low:low + INDEX_TOKENS] == shard.bos_id) + low:
                if start is not None:
                    yield ids, start, bos
                start = bos
        if start is not None:
            yield ids, start, len(ids)

@dataclass(frozen=True)
class LoaderPosition:
    """Where training reads on: shard counts on from epoch to epoch, document is the number of those read of it."""
    shard: int = 0
    document: int = 0

def training_documents(cfg: Hyperparameters, shards: list[Shard], position: LoaderPosition):
    """Yields ((ids, start, end), the position after it) of every document of all epochs from a position on."""
    for number in range(position.shard, cfg.epochs * len(shards)):
        epoch, index = divmod(number, len(shards))
        found = documents([shards[index]])
        if epoch:                        # the first time as they lie in the file, then in another order each time
            found = list(found)
            order = np.random.default_rng((cfg.seed, number)).permutation(len(found))
            found = [found[i] for i in order]
        for count, document in enumerate(found, 1):
            if number > position.shard or count > position.document:
                yield document, LoaderPosition(number, count)

def fill_pack(pieces: list, length: int, bos_id: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (int32), targets (int64) of one pack from (ids, start, length) pieces, then documents of 0 and -1."""
    inputs = np.zeros(length, np.int32)
    targets = np.full(length, -1, np.int64)
    filled = 0
    for ids, start, size in pieces:
        inputs[filled:filled + size] = ids[start:start + size]
        after = ids[start + 1:start + size + 1]                     # what really follows, also where a document is cut
        targets[filled:filled + len(after)] = after
        targets[filled + len(after):filled + size] = bos_id         # the shard ends with this document
        filled += size
    inputs[filled::DOC_TOKENS] = bos_id
    if (highest := max(inputs.max(), targets.max())) >= vocab_size:
        ids = max(pieces, key=lambda piece: piece[0][piece[1]:sum(piece[1:]) + 1].max())[0]
        file = getattr(ids, "filename", "a shard")
        raise RankError(f"{file} holds id {highest}, but the last one is {vocab_size - 1}; make the shard again")
    return inputs, targets

def next_pack(docs, pack_tokens: int, max_doc_tokens: int, position: LoaderPosition) -> tuple[list, LoaderPosition]:
    """Pieces (ids, start, length) of the next documents that fill a pack exactly, and the position after them.

    No pieces when the text ends before the pack is full.
    """
    pieces = []
    room = pack_tokens
    while room:
        document, position = next(docs, (None, position))
        if document is None:
            return [], position
        ids, start, end = document
        length = min(end - start, max_doc_tokens, room)             # the rest of a document that is cut is not read
        pieces.append((ids, start, length))
        room -= length
    return pieces, position

def training_batches(cfg: Hyperparameters, shards: list[Shard], rank: int, world_size: int, micro_packs: int,
                     first_step: int = 0, position: LoaderPosition = LoaderPosition()):
    """Yields for each step this rank's share of its packs, as a list of (inputs, targets) of micro_packs packs each,
    and the position where the next step reads on. `position` is that of first_step.

    All ranks read the same packs, whatever their number, and take contiguous shares.
    """
    docs = training_documents(cfg, shards, position)
    kind = (cfg.pack_tokens, shards[0].bos_id, shards[0].vocab_size)
    for step in range(first_step, cfg.total_steps):
        stage = cfg.stages[stage_index(cfg, step)]
        shards[position.shard % len(shards)].read()                 # notices that the file was written to since
        num_packs = stage.batch_tokens // cfg.pack_tokens
        mine = []
        for pack in range(num_packs):
            pieces, position = next_pack(docs, cfg.pack_tokens, stage.max_doc_tokens, position)
            if not pieces:               # check_tokens has counted for all steps, but a resumed run may read elsewhere
                raise UserError(f"--train_files={cfg.train_files} ends at step {step} of {cfg.total_steps}; add text, "
                                f"or read it more often (--epochs={cfg.epochs + 1})")
            if rank * num_packs // world_size <= pack < (rank + 1) * num_packs // world_size:
                mine.append(fill_pack(pieces, *kind))
        # every rank runs the same number of equal micro-steps
        missing = micro_steps(cfg, stage, world_size, micro_packs) * micro_packs - len(mine)
        mine += [fill_pack([], *kind)] * missing
        groups = [mine[i:i + micro_packs] for i in range(0, len(mine), micro_packs)]
        yield [tuple(map(np.concatenate, zip(*group))) for group in groups], position

def micro_steps(cfg: Hyperparameters, stage: Stage, world_size: int, micro_packs: int) -> int:
    """Forward passes per step of the busiest rank."""
    return math.ceil(math.ceil(stage.batch_tokens // cfg.pack_tokens / world_size) / micro_packs)

def validation_streams(cfg: Hyperparameters, shards: list[Shard]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) streams that hold each of the first val_tokens tokens once; only longer documents are cut."""
    found = sum(shard.num_tokens for shard in shards)
    if found <= cfg.val_tokens:
        raise UserError(f"--val_files={cfg.val_files} holds {found} tokens, --val_tokens={cfg.val_tokens} needs more; "
                        f"add text or use --val_tokens={max(found - 1, 1)}")
    streams = []
    pieces = []
    room = cfg.val_stream_tokens
    left = cfg.val_tokens
    for ids, start, end in documents(shards):
        while left and start < end:
            whole = min(end - start, left)
            if whole > room and room < cfg.val_stream_tokens:       # the document begins the next stream
                streams.append(pieces)
                pieces = []
                room = cfg.val_stream_tokens
            length = min(whole, room)
            pieces.append((ids, start, length))
            start += length
            room -= length
            left -= length
    if left:
        raise UserError(f"--val_files={cfg.val_files} has tokens before its first document; make the shards again")
    return [fill_pack(pieces, cfg.val_stream_tokens, shards[0].bos_id, shards[0].vocab_size)
            for pieces in streams + [pieces] if pieces]

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
    swapped = x_THD.view(*x_THD.shape[:-1], 2, 2, -1).flip(-2).flatten(-3)
    return x_THD * cos_TD[:, None] + swapped * sin_TD[:, None]

def rotary_tables(position_T: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) for `rotary`: the first half of the channels turns, the second has no position."""
    angle = position_T[:, None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    zero = torch.zeros_like(angle)
    return torch.cat([cos, cos, zero + 1, zero + 1], 1).to(dtype), torch.cat([sin, -sin, zero, zero], 1).to(dtype)

class PackedContext:
    """Where each token of one packed stream (T,) stands: its position in its document, and its way to other tokens.

    The layers treat tokens as rows of one axis. All that reaches from one to another goes through `previous` and
    `attend` of a PackedContext, or of the DecodeContext that takes its place in decoding.
    """
    projections = {}                     # nothing is prepared, see GPT.projections

    def __init__(self, model: "GPT", tokens: Tensor):
        index = torch.arange(tokens.numel(), device=tokens.device, dtype=torch.int32)
        self.doc_start = torch.where(tokens == model.cfg.bos_id, index, 0).cummax(0).values.to(torch.int32)
        self.is_doc_start = self.doc_start == index
        self.position = index - self.doc_start
        self.windows = model.attention_windows(self.doc_start)

    def previous(self, name: str, x: Tensor) -> Tensor:
        """x (T, ...) of the token before; meaningless at a document's start. `name` tells quantities apart."""
        return x.roll(1, 0)

    def attend(self, i: int, window: str, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attention output (T, H, D) of layer i, for its window."""
        return self.windows[window](q_THD, k_THD, v_THD)

@dataclass(frozen=True)
class GateNet:
    """A small network that computes gates for each token (#81, #85): what its outputs are, and where its weights lie.

    The two nets of a bank share the parameters <bank>_fc (2, gate_dim, C), <bank>_proj and <bank>_bias (all outputs).
    """
    bank: str                            # "gate" or "mix"
    index: int                           # of its matrix in <bank>_fc
    first: int                           # of its rows in <bank>_proj and <bank>_bias
    outputs: tuple                       # (name, size, initial value) each

    @property
    def sizes(self) -> list[int]:
        return [size for _, size, _ in self.outputs]

class GPT(nn.Module):
    """The model, built from the layer table of `cfg`, which must name vocab_size and bos_id.

    All parameters are in a few banks: one tensor for all matrices of a shape, one for all tables. What no layer uses
    does not exist. Windows are those of the first stage; set_stage moves on.
    """

    def __init__(self, cfg: Hyperparameters):
        super().__init__()
        assert cfg.vocab_size > 0 and cfg.bos_id >= 0, "vocab_size and bos_id come from the shards"
        self.cfg = cfg
        layers, C, V = cfg.layers, cfg.model_dim, cfg.vocab_size
        self.kernels = fused_kernels(cfg)
        self.attn_layers = [i for i, layer in enumerate(layers) if layer.attention]
        self.late_input = max(layer.attn_input for layer in layers)                 # -1: none
        self.skip_input = max(layer.skip for layer in layers)
        self.kept_layers = {layer.attn_input for layer in layers} | {layer.skip for layer in layers}
        self.num_tables = 1 + max(layer.ve for layer in layers)
        gated_ve = [i for i, layer in enumerate(layers) if layer.ve >= 0 and not layer.mudd]
        self.value_gate_index = {i: index for index, i in enumerate(gated_ve)}      # layer -> row of value_gates
        # gates of the first layers are computed from x0, those of the others from the stream after them
        self.first_gates_until = self.skip_input if self.skip_input >= 0 else len(layers) // 3
        self.gate_nets = self.pair_of_nets("gate", *self.name_gates())
        self.mudd_nets = self.pair_of_nets("mix", *self.name_mudd()) if layers[-1].mudd else []
        self.gate_banks = [nets for nets in (self.gate_nets, self.mudd_nets) if nets and cfg.gate_dim]
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.precision]

        def parameter(*shape, dtype=dtype):
            # NaN until init_parameters has set it, so that a forgotten one is noticed
            return nn.Parameter(torch.empty(shape, dtype=dtype).fill_(math.nan))
        self.embed = parameter(V, C)
        self.lm_head = parameter(V, C)
        if self.num_tables:
            self.value_embeds = parameter(self.num_tables, V, C)
        if cfg.bigram_rows:
            self.bigram_embed = parameter(cfg.bigram_rows, C)
        self.attn_qk = parameter(len(self.attn_layers) * cfg.num_heads, 2 * cfg.key_dim, C)     # pairs of heads: #80
        self.attn_vo = parameter(len(self.attn_layers) * 2, C, C)
        self.mlp = parameter(len(layers) * 2, cfg.mlp_dim, C)
        self.attn_scales = parameter(len(layers), 2, dtype=torch.float32)       # of the weights of q, k, v and of o
        self.resid_lambdas = parameter(len(layers), 2, dtype=torch.float32)     # of the stream at attention and mlp
        self.post_lambdas = parameter(len(layers), 2, dtype=torch.float32)      # of what they add
        self.smear_gate = parameter(12)
        self.smear_lambda = parameter(1, dtype=torch.float32)
        if self.skip_input >= 0:
            self.skip_lambda = parameter(1, dtype=torch.float32)
        if gated_ve:
            self.value_gates = parameter(len(gated_ve), cfg.num_heads, 12)
        if cfg.gate_dim:
            self.gate_scale = parameter(1, dtype=torch.float32)
        for early, late in self.gate_banks:
            outputs = sum(early.sizes + late.sizes)
            self.register_parameter(f"{early.bank}_fc", parameter(2, cfg.gate_dim, C))
            self.register_parameter(f"{early.bank}_proj", parameter(outputs, cfg.gate_dim))
            self.register_parameter(f"{early.bank}_bias", parameter(outputs))
        if cfg.bigram_rows and cfg.bigram_signs:
            self.register_buffer("bigram_signs", torch.empty(cfg.bigram_signs, C, dtype=dtype))
        self.register_buffer("inv_freq", torch.empty(cfg.key_dim // 4))
        self.register_buffer("attn_scale", torch.empty(()))
        self.register_buffer("windows", torch.empty(2, dtype=torch.int32))      # short, long
        self.register_buffer("prefix_of", torch.full((V,), -1), persistent=False)
        self.init_parameters()

    def pair_of_nets(self, bank: str, early: list, late: list) -> list[GateNet]:
        """The two nets of a bank, with these outputs (name, size, initial value)."""
        return [GateNet(bank, 0, 0, tuple(early)), GateNet(bank, 1, sum(size for _, size, _ in early), tuple(late))]

    def name_gates(self) -> tuple[list, list]:
        """Outputs (name, size, initial value) of the two gate nets: of the first layers, and of the others."""
        nets = ([], [])
        H = self.cfg.num_heads
        for i, layer in enumerate(self.cfg.layers):
            net = nets[i > self.first_gates_until]
            if layer.xsa:
                net.append((("xsa", i), H, 0.))
            if layer.gate:
                net.append((("out", i), H, 0.25))
            if layer.attention and not layer.mudd:
                net.append((("x0", i), 1, 0.))
                if self.cfg.bigram_rows:
                    net.append((("bigram", i), 1, 0.05))
            if layer.skip >= 0:
                net.append((("skip", i), 1, 0.5))
        return nets

    def name_mudd(self) -> tuple[list, list]:
        """Outputs (name, size, initial value) of the two MUDD nets: of the last layer, and of the output (#81)."""
        sources = 3 if self.late_input >= 0 else 2                  # the start, the late layers' input, the stream
        block = [("value", sources, 0.), ("stream", sources, 0.), ("value_gate", 2, 2.),
                 ("attn_x", 1, 1.1 ** 0.5), ("attn", 1, 1.), ("attn_x0", 1, 0.), ("attn_bigram", 1, 0.05),
                 ("mlp_x", 1, 1.1 ** 0.5), ("mlp", 1, 1.)]
        output = [("x0", 1, 0.), ("late", 1, -0.5), ("last", 1, 0.), ("embed", 1, 0.), ("skip", 1, 0.)]
        off = {"value_gate": self.cfg.layers[-1].ve < 0, "attn_bigram": not self.cfg.bigram_rows,
               "late": self.late_input < 0, "embed": not self.num_tables, "skip": self.skip_input < 0}
        return tuple([row for row in net if not off.get(row[0])] for net in (block, output))

    @torch.no_grad()
    def init_parameters(self):
        """Sets every parameter and buffer to its initial value, the same for the same seed and kind of device."""
        C = self.cfg.model_dim
        generator = torch.Generator(self.embed.device).manual_seed(self.cfg.seed)
        self.lm_head.normal_(0, 0.005, generator=generator)
        self.embed.copy_(self.lm_head)
        if self.num_tables:
            self.value_embeds.normal_(0, 0.01, generator=generator)
        bound = 3 ** 0.5 * 0.5 * C ** -0.5
        for bank in (self.attn_qk, self.attn_vo, self.mlp):
            bank.uniform_(-bound, bound, generator=generator)
        self.mlp[1::2] = 0                                          # every mlp starts as nothing
        self.attn_scales.copy_(torch.tensor([0.5, 1.0]))
        self.resid_lambdas.fill_(1.1 ** 0.5)                        # the early stream fades with depth (#45)
        self.post_lambdas.fill_(1)
        for name, value in {"skip_lambda": -1.5, "gate_scale": 0.1, "bigram_embed": 0, "smear_gate": 0,
                            "smear_lambda": 0, "value_gates": 0}.items():
            if hasattr(self, name):
                getattr(self, name).fill_(value)
        for nets in self.gate_banks:
            values = [value / 0.1 for net in nets for _, size, value in net.outputs for _ in range(size)]
            getattr(self, f"{nets[0].bank}_fc").uniform_(-C ** -0.5, C ** -0.5, generator=generator)
            getattr(self, f"{nets[0].bank}_proj").zero_()
            getattr(self, f"{nets[0].bank}_bias").copy_(torch.tensor(values))
        if hasattr(self, "bigram_signs"):
            signs = torch.randint(0, 2, self.bigram_signs.shape, generator=generator, device=self.embed.device)
            self.bigram_signs.copy_(signs * 2 - 1)
        self.set_stage(0)

    @torch.no_grad()
    def set_stage(self, index: int, final: bool = False):
        """Windows, rotary frequencies and softmax scale of a stage; `final`: the windows of the last validation."""
        stages = self.cfg.stages[:index + 1]
        freq = self.cfg.rope_base ** -torch.linspace(0, 1, self.inv_freq.numel(), dtype=torch.float64, device="cpu")
        # random queries and keys give products that spread as much as those of head_dim channels
        scale = self.cfg.attn_scale * (self.cfg.head_dim / self.cfg.key_dim) ** 0.5
        # when the long window grows from a to b tokens, frequencies that turn less than once in a are slowed by a/b
        # and fast ones kept (YaRN, arXiv 2309.00071, #31), and the softmax scale grows a little
        for old, new in pairwise([*self.cfg.earlier_windows, *(stage.long for stage in stages)]):
            keep = ((old * freq / (2 * math.pi) - 1) / 31).clamp(0, 1)
            freq = freq * (keep + (1 - keep) * old / new)
            scale *= 1 + 0.2 * math.log(new / old)
        self.inv_freq.copy_(freq)
        self.attn_scale.fill_(scale)
        short, long = self.cfg.final_windows if final else (stages[-1].short, stages[-1].long)
        self.windows.copy_(torch.tensor([short, long], device="cpu"))
        self.window_lengths = {"short": short, "long": long}

    def attention_windows(self, doc_start_T: Tensor) -> dict:
        """window -> function of (q, k, v) (T, H, D) for these documents, by the chosen backend."""
        # to FlexAttention windows are tensors: one graph serves all stages
        flexible = self.cfg.attention.startswith("flex")
        sizes = dict(zip(("short", "long"), self.windows)) if flexible else self.window_lengths
        longest = max(self.cfg.final_windows + tuple(w for stage in self.cfg.stages for w in (stage.short, stage.long)))
        return {name: ATTENTION[self.cfg.attention](doc_start_T, size, longest) for name, size in sizes.items()}

    def gates(self, net: GateNet, x_TC: Tensor) -> dict[object, Tensor]:
        """Output name -> (T, size), or (1, size) when gates are constants: what a gate network says of each token."""
        if not self.cfg.gate_dim:
            return {name: x_TC.new_full((1, size), value) for name, size, value in net.outputs}
        fc, proj, bias = (getattr(self, f"{net.bank}_{part}") for part in ("fc", "proj", "bias"))
        rows = slice(net.first, net.first + sum(net.sizes))
        scale = self.gate_scale.to(x_TC.dtype) if net.bank == "gate" else 0.1
        out = (F.linear(F.gelu(F.linear(x_TC, fc[net.index])), proj[rows]) + bias[rows]) * scale
        return {name: value for (name, _, _), value in zip(net.outputs, out.split(net.sizes, dim=1))}

    def matrices(self) -> dict[int, tuple[Tensor, ...]]:
        """Layer -> matrices of its attention: of queries and keys (2HD, C), of values, and of the output."""
        # unbinding a bank once gives one stacked gradient; indexing it layer by layer would give one a layer
        qk = self.attn_qk.view(-1, 2 * self.cfg.num_heads * self.cfg.key_dim, self.cfg.model_dim).unbind()
        vo = self.attn_vo.unbind()
        return dict(zip(self.attn_layers, zip(qk, vo[0::2], vo[1::2])))

    def projections(self, i: int, qk: Tensor, v: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of layer i as its attention uses them: one (2HD + C, C), and of the output, scales applied."""
        scales = self.attn_scales[i].to(qk.dtype)
        return torch.cat([qk, v]) * scales[0], o * scales[1]

    def attention(self, i: int, u_TC: Tensor, weights: tuple, ctx, rope: tuple, gates: dict, value_TC: Tensor | None,
                  kernels: dict) -> Tensor:
        """What the attention of layer i adds to the stream, (T, C), from its normalised input u."""
        layer = self.cfg.layers[i]
        T, H, D = u_TC.size(0), self.cfg.num_heads, self.cfg.key_dim
        qkv, o = ctx.projections.get(i) or self.projections(i, *weights)
        linear = kernels.get("linear", F.linear)
        q, k, v = (x.view(T, H, -1) for x in linear(u_TC, qkv).split((H * D, H * D, u_TC.size(1)), dim=1))
        if value_TC is not None:
            v = v + value_TC.view(T, H, -1)
        q = rotary(norm(q) * self.attn_scale.to(q.dtype), *rope)
        k = rotary(norm(k), *rope)
        if layer.window == "long":       # the half of the key without position is the previous token's (#49)
            moving = torch.arange(D, device=k.device) < D // 2
            k = torch.where(ctx.is_doc_start[:, None, None] | moving, k, ctx.previous(f"key.{i}", k))
        y = ctx.attend(i, layer.window, q, k, v)
        if layer.xsa:
            along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - torch.tanh(gates["xsa", i])[:, :, None] * along * v
        if layer.gate:
            y = y * gates["out", i][:, :, None]
        return F.linear(y.reshape(T, -1), o)

    def embeddings(self, tokens: Tensor, ctx) -> tuple[Tensor, Tensor | None]:
        """(T, C) each: the token with a little of the token before (#34); the pair of both, hashed (#62), or None."""
        embed = F.embedding(tokens, self.embed)
        smear = self.smear_lambda.to(embed.dtype) * torch.sigmoid(embed[:, :12] @ self.smear_gate)
        x0 = norm(embed + torch.where(ctx.is_doc_start, 0, smear)[:, None] * ctx.previous("embed", embed))
        if not self.cfg.bigram_rows:
            return x0, None
        before = torch.where(ctx.is_doc_start, tokens, ctx.previous("token", tokens))
        pair = ((36313 * tokens) ^ (27191 * before)) % self.cfg.bigram_rows
        bigram = F.embedding(pair, self.bigram_embed)
        if self.cfg.bigram_signs:
            bigram = bigram * F.embedding((tokens ^ before) % self.cfg.bigram_signs, self.bigram_signs)
        return x0, bigram

    def value_input(self, i: int, u: Tensor, table: Tensor) -> Tensor:
        """(T, C) what a value embedding table (T, C) adds to the values of layer i, gated for each head."""
        gate = F.linear(torch.cat([u[:, :6], table[:, :6]], 1), self.value_gates[self.value_gate_index[i]])
        return (table.view(len(table), -1, self.cfg.head_dim) * (2 * torch.sigmoid(gate))[:, :, None]).flatten(1)

    def mudd_value_input(self, mudd: dict, table: Tensor | None, sources: list) -> Tensor:
        """(T, C) what a MUDD layer adds to its values: its table and the states it reads, each with its weight."""
        value = sum(c * s for c, s in zip(mudd["value"].split(1, dim=1), sources))
        if table is None:
            return value
        gate = mudd["value_gate"].repeat_interleave(self.cfg.num_heads // 2, dim=1)
        return (table.view(len(table), -1, self.cfg.head_dim) * gate[:, :, None]).flatten(1) + value

    def trunk(self, tokens: Tensor, kernels: dict, ctx=None) -> tuple[Tensor, Tensor]:
        """What the head reads, (T, C), for tokens (T,), and where the document of each starts.

        The tokens are one packed stream, or those that `ctx` (DecodeContext) says. kernels: see fused_kernels.
        """
        layers = self.cfg.layers
        ctx = ctx or PackedContext(self, tokens)
        rope = rotary_tables(ctx.position, self.inv_freq, self.embed.dtype)
        weights, up, down = self.matrices(), self.mlp.unbind()[0::2], self.mlp.unbind()[1::2]
        resid, post = self.resid_lambdas.to(self.embed.dtype), self.post_lambdas.to(self.embed.dtype)
        tables = self.value_embeds.unbind() if self.num_tables else ()
        ve = [F.embedding(tokens, table) for table in tables]
        relu2_mlp = kernels.get("mlp", mlp)

        x0, bigram = self.embeddings(tokens, ctx)
        gates = self.gates(self.gate_nets[0], x0)
        x = start = x0 if bigram is None else x0 + gates["bigram", 0] * bigram
        kept = {}                        # outputs of the layers that later ones read
        for i, layer in enumerate(layers):
            if i == self.first_gates_until + 1 and self.gate_nets[1].outputs:
                gates |= self.gates(self.gate_nets[1], x)
            attn_input = x if layer.attn_input < 0 else kept[layer.attn_input]
            resid_mlp, post_mlp = resid[i, 1], post[i, 1]
            if layer.mudd:
                last, mudd = x, self.gates(self.mudd_nets[0], x)
                sources = [start, kept[self.late_input], x] if self.late_input >= 0 else [start, x]
                value = self.mudd_value_input(mudd, ve[layer.ve] if layer.ve >= 0 else None, sources)
                u = norm(attn_input)
                x = x + sum(c * s for c, s in zip(mudd["stream"].split(1, dim=1), sources))
                attn = self.attention(i, u, weights[i], ctx, rope, gates, value, kernels)
                x = mudd["attn_x"] * x + mudd["attn"] * attn + mudd["attn_x0"] * start
                if bigram is not None:
                    x = x + mudd["attn_bigram"] * bigram
                resid_mlp, post_mlp = mudd["mlp_x"], mudd["mlp"]
            elif layer.attention:
                u = norm(attn_input)
                value = self.value_input(i, u, ve[layer.ve]) if layer.ve >= 0 else None
                attn = self.attention(i, u, weights[i], ctx, rope, gates, value, kernels)
                x = resid[i, 0] * x + post[i, 0] * attn + gates["x0", i] * x0
                if bigram is not None and i > 0:                    # layer 0 starts with it
                    x = x + gates["bigram", i] * bigram
            if layer.skip >= 0:
                x = x + torch.sigmoid(self.skip_lambda).to(x.dtype) * gates["skip", i] * kept[layer.skip]
            x = resid_mlp * x + post_mlp * relu2_mlp(norm(x), up[i], down[i])
            if i in self.kept_layers:
                kept[i] = x
        if layers[-1].mudd:
            mudd = self.gates(self.mudd_nets[1], x)
            states = {"x0": start, "late": kept.get(self.late_input), "last": last, "embed": ve[0] if ve else None,
                      "skip": kept.get(self.skip_input)}
            for name, weight in mudd.items():
                x = x + weight * states[name]
        return norm(x), ctx.doc_start

    def score(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target (T,) in nats, fp32, 0 where it is -1; and the likeliest token (T,) int64."""
        hidden, _ = self.trunk(tokens, {})
        losses, likeliest = [], []
        for x, wanted in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):  # so much of the logits at one time
            logits_TV = map_logits(F.linear(x, self.lm_head))
            losses.append(F.cross_entropy(logits_TV, wanted, ignore_index=-1, reduction="none"))
            likeliest.append(logits_TV.argmax(1))
        return torch.cat(losses), torch.cat(likeliest)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, loss_weights: Tensor | None = None) -> Tensor:
        """Logits (T, V) fp32 of one packed stream; with targets the sum of the cross-entropies in nats, a fp32 scalar.

        tokens (T,) integers, documents beginning with bos_id; no token sees another document. targets (T,) int64, -1:
        none. With loss_weights (4,) fp32 the sum is the training loss, whose weights are those of the next token, the
        second, the third, and the next token's prefix.
        """
        if targets is None:
            return map_logits(F.linear(self.trunk(tokens, {})[0], self.lm_head))
        if loss_weights is None:
            return self.score(tokens, targets)[0].sum()
        kernels = self.kernels if tokens.is_cuda else {}
        x, doc_start = self.trunk(tokens, kernels)
        targets_TK = self.training_targets(targets, doc_start)
        loss = kernels.get("head_loss", head_loss)
        if not 0 < self.cfg.sampled_vocab < self.cfg.vocab_size:
            return loss(x, self.lm_head, targets_TK, loss_weights, None)
        losses = []                      # pack by pack, so that the sample depends on neither ranks nor micro-batches
        for x, wanted in zip(x.split(self.cfg.pack_tokens), targets_TK.split(self.cfg.pack_tokens)):
            ids, counts, columns = sample_vocab(wanted, self.cfg.vocab_size, self.cfg.sampled_vocab)
            losses.append(loss(x, F.embedding(ids, self.lm_head), columns, loss_weights, counts))
        return torch.stack(losses).sum()

    def training_targets(self, targets: Tensor, doc_start: Tensor) -> Tensor:
        """(T, 4) the next token, the second, the third, and the next one's prefix; -1 where there is none."""
        found = [targets]
        for k in (1, 2):                 # the target k tokens further, within the same document
            same = torch.cat([doc_start[k:], doc_start[:k] - 1]) == doc_start
            found.append(torch.where(same, targets.roll(-k), -1))
        found.append(torch.where(targets >= 0, self.prefix_of[targets.clamp(min=0)], -1))
        return torch.stack(found, dim=1)

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
        nothing. last: only the logits of each row's last token, (B, 1, V). Raises ValueError if several tokens per row
        are given without lengths and exceed the cache. In the other cases the caller keeps count, as a CUDA graph must.
        """
        B, T = tokens.shape
        if T > 1 and lengths is None and (most := int(cache.position.max()) + T) > cache.max_tokens:
            raise ValueError(f"a row of {most} tokens is longer than the cache, which was made for {cache.max_tokens}")
        parts = []
        for low, part in zip(range(0, T, cache.chunk), tokens.to(torch.int32).split(cache.chunk, 1)):
            ctx = DecodeContext(cache, part, None if lengths is None else (lengths - low).clamp(0, part.size(1)))
            parts.append(self.trunk(part.flatten(), {}, ctx)[0].view(B, part.size(1), -1))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if last:
            x = x[:, -1:] if lengths is None else x[cache.rows, lengths[:, None] - 1]
        return map_logits(F.linear(x, self.lm_head))

    @property
    def matmul_parameters(self) -> int:
        """Weights that take part in a dense product for every token; tables are looked up instead."""
        banks = "attn_qk", "attn_vo", "mlp", "lm_head", "gate_fc", "mix_fc"
        return sum(param.numel() for name, param in self.named_parameters() if name in banks)

# -----------------------------------------------------------------------------
# Decoding

class Cache:
    """What the next token of each row needs of those before it; made by GPT.new_cache, changed by GPT.decode.

    Keys and values (B, R, H, channels) of each layer are rings: position p lies at index p % R. R is the window and
    what one call brings, so no token that comes, real or padding, takes the place of one that is still seen. Every
    tensor stays where it is, so that a CUDA graph can hold a step.
    """

    def __init__(self, model: GPT, batch: int, max_tokens: int, chunk: int):
        cfg, like = model.cfg, model.embed
        self.max_tokens = max_tokens
        self.chunk = chunk
        self.bos_id = cfg.bos_id
        self.windows = model.window_lengths
        # kernels like lengths that are multiples of 16
        self.rings = {name: -(-(min(window, max_tokens) + chunk) // 16) * 16 for name, window in self.windows.items()}
        self.rows = torch.arange(batch, device=like.device)[:, None]
        self.position = torch.zeros(batch, dtype=torch.int64, device=like.device)   # of each row's next token
        self.doc_start = torch.zeros_like(self.position)                            # of its document
        powers_of_two = cfg.key_dim.bit_count() == cfg.head_dim.bit_count() == 1
        self.kernels = cfg.kernels and like.is_cuda and triton_kernels is not None and powers_of_two
        self.done = torch.zeros(batch, cfg.num_heads, dtype=torch.int32, device=like.device)    # see decode_attention
        self.carried = {"token": like.new_zeros(batch, dtype=torch.int32), "embed": like.new_zeros(batch, like.size(1))}
        self.keys, self.values, self.projections, self.window = {}, {}, {}, {}      # by layer
        for i, matrices in model.matrices().items():
            window = cfg.layers[i].window
            self.window[i] = window
            self.keys[i] = like.new_zeros(batch, self.rings[window], cfg.num_heads, cfg.key_dim)
            self.values[i] = like.new_zeros(batch, self.rings[window], cfg.num_heads, cfg.head_dim)
            self.projections[i] = model.projections(i, *matrices)
            if window == "long":
                self.carried[f"key.{i}"] = like.new_zeros(batch, cfg.num_heads, cfg.key_dim)

    def held(self, ring: int, last_B: Tensor) -> Tensor:
        """(B, R) the position that each cell of a ring holds when last_B is the newest; negative: none yet."""
        return last_B[:, None] - (last_B[:, None] - torch.arange(ring, device=last_B.device)) % ring

    @torch.no_grad()
    def fill(self, other: "Cache", rows_B: Tensor):
        """Makes row b what row rows_B[b] of another cache of the model is, whatever the batch and chunk of that."""
        self.position.copy_(other.position[rows_B])
        self.doc_start.copy_(other.doc_start[rows_B])
        for name, tensor in self.carried.items():
            tensor.copy_(other.carried[name][rows_B])
        cells = {name: self.held(ring, self.position - 1) % other.rings[name] for name, ring in self.rings.items()}
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for i in mine:
                mine[i].copy_(theirs[i][rows_B[:, None], cells[self.window[i]]])

    def bytes_read(self, tokens: int) -> int:
        """Bytes of keys and values that the last of `tokens` tokens sees, over all rows."""
        return sum(min(tokens, self.windows[self.window[i]] + 1) * (key[:, 0].nbytes + self.values[i][:, 0].nbytes)
                   for i, key in self.keys.items())

class DecodeContext:
    """The next tokens (B, T) of each row of a cache, of which lengths_B are real, in the place of a PackedContext."""

    def __init__(self, cache: Cache, tokens_BT: Tensor, lengths_B: Tensor | None = None):
        self.cache = cache
        self.lengths = lengths_B
        self.projections = cache.projections
        self.shape = B, T = tokens_BT.shape
        self.index = cache.position[:, None] + torch.arange(T, device=tokens_BT.device)     # in its row
        starts = torch.where(tokens_BT == cache.bos_id, self.index, 0).cummax(1).values
        starts = torch.maximum(starts, cache.doc_start[:, None])
        self.doc_start = starts.flatten()
        self.position = (self.index - starts).flatten()
        self.is_doc_start = self.position == 0
        self.kernel = cache.kernels and T == 1
        self.cells, self.visible = {}, {}                           # by window
        if not self.kernel:
            for name, window in cache.windows.items():
                held = cache.held(cache.rings[name], self.index[:, -1])
                first = torch.maximum(starts, self.index - window)
                self.cells[name] = self.index % cache.rings[name]
                self.visible[name] = (held[:, None] <= self.index[:, :, None]) & (held[:, None] >= first[:, :, None])
        self.shift_and_remember(cache.doc_start, starts)
        cache.position.add_(T if lengths_B is None else lengths_B)

    def shift_and_remember(self, kept_B: Tensor, x_BT: Tensor) -> Tensor:
        """x of the token before, (B, T, ...); kept_B (B, ...) has it for the first one, and keeps it for the next call.
        """
        seen = torch.cat([kept_B[:, None], x_BT], 1)
        kept_B.copy_(seen[:, -1] if self.lengths is None else seen[self.cache.rows[:, 0], self.lengths])
        return seen[:, :-1]

    def previous(self, name: str, x: Tensor) -> Tensor:
        """x (B * T, ...) of the token before."""
        x_BT = x.view(*self.shape, *x.shape[1:])
        return self.shift_and_remember(self.cache.carried[name], x_BT).flatten(0, 1)

    def attend(self, i: int, window: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (B * T, H, D) of layer i, whose ring takes in the new keys and values."""
        keys, values = self.cache.keys[i], self.cache.values[i]
        if self.kernel:
            return triton_kernels.decode_attention(q, k, v, keys, values, self.index[:, 0], self.doc_start,
                                                   self.cache.windows[window], self.cache.done)
        q, k, v = (x.view(*self.shape, *x.shape[1:]) for x in (q, k, v))
        keys[self.cache.rows, self.cells[window]] = k
        values[self.cache.rows, self.cells[window]] = v
        q, k, v = (x.transpose(1, 2) for x in (q, keys, values))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible[window][:, None], scale=1.0)
        return y.transpose(1, 2).flatten(0, 1)

# -----------------------------------------------------------------------------
# Optimizer

# Polar Express (arXiv 2505.16932): five quintic steps towards the nearest orthogonal matrix, safety factor 0.02
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169301323))
HOST_ROWS = 1 << 15                      # of a table, whose moments are on the GPU at one time when the host keeps them
ATTN_LR = PARAMETERS["attn_vo"].lr       # matrix decay follows this rate, whatever a bank's own multiplier

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
    only where the update shrinks the weight (cautious, arXiv 2510.12402).
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

def adam_updates(updates: list[tuple], apply: Tensor):
    """adam_update with each tuple of arguments: compiled, one graph for many small parameters."""
    for arguments in updates:
        adam_update(*arguments, apply)

class Optimizer:
    """NorMuon and Adam over all parameters, by the rows of PARAMETERS, with state sharded over ranks.

    After backward, step() sums gradients over ranks (all reductions start at once, in the order of PARAMETERS, so that
    the large tables' go on while the attention matrices are updated), updates what this rank owns, and gathers the new
    values. Adam parameters move on odd steps only, with the gradient of both.
    """

    def __init__(self, model: GPT, rank: int = 0, world_size: int = 1):
        self.model = model
        self.rank = rank
        self.world_size = world_size
        self.params = dict(model.named_parameters())
        if unknown := sorted(self.params.keys() - PARAMETERS.keys()):
            raise UserError(f"nothing trains the parameter {', '.join(unknown)}; give it a row in PARAMETERS")
        self.normuon, self.adam = normuon_update, adam_updates
        if model.cfg.compile:                                       # one graph a shape; the small parameters have one
            torch._dynamo.config.recompile_limit = 64
            self.normuon, self.adam = (torch.compile(rule, dynamic=False) for rule in (normuon_update, adam_updates))
        self.update = {"adam": self.update_table, "muon": self.update_muon}     # of one large parameter
        self.whole = {name: self.pad_for_sharding(name) for name in self.params}
        self.state = {name: self.new_state(name) for name in self.params}
        self.reset()

    def is_sharded_table(self, name: str) -> bool:
        """Whether ranks share out single rows of the parameter, not whole matrices."""
        return PARAMETERS[name].optim == "adam" and PARAMETERS[name].comms == "sharded"

    def pad_for_sharding(self, name: str) -> Tensor:
        """The storage of a parameter, of which ranks own equal parts; padded, and the parameter made a view of it."""
        param = self.params[name]
        flat = param.data.view(-1, param.size(-1)) if self.is_sharded_table(name) else param.data
        if PARAMETERS[name].comms == "replicated" or self.world_size == 1:
            return flat
        rows = math.ceil(flat.size(0) / self.world_size) * self.world_size
        whole = flat.new_zeros(rows, *flat.shape[1:])
        whole[:flat.size(0)] = flat
        param.data = whole[:flat.size(0)].view(param.shape)
        return whole

    def new_state(self, name: str) -> dict[str, Tensor]:
        """Zeroed state for this rank's part of a parameter."""
        part = self.part(name)
        device = "cpu" if self.is_sharded_table(name) and self.model.cfg.host_state else part.device
        zeros = partial(torch.zeros, dtype=torch.float32, device=device, pin_memory=part.is_cuda and device == "cpu")
        if PARAMETERS[name].optim == "adam":
            return {"m": zeros(part.shape), "v": zeros(part.shape), "count": torch.zeros((), dtype=torch.int64)}
        n, rows, cols = part.shape
        second = (n, rows, 1) if rows >= cols else (n, 1, cols)
        return {"m": zeros(part.shape), "master": zeros(part.shape), "v": zeros(second)}

    def sharded_rows(self, name: str) -> int:
        """Rows of a tensor of run_state of which each rank holds a share; 0 if each rank holds all of it."""
        param, _, key = name.partition(".")
        if key in ("", "count") or self.world_size == 1 or PARAMETERS[param].comms == "replicated":
            return 0
        return self.params[param].numel() // self.whole[param][0].numel()

    def part(self, name: str) -> Tensor:
        """The rows of a parameter that this rank updates."""
        whole = self.whole[name]
        return whole if PARAMETERS[name].comms == "replicated" else whole.chunk(self.world_size)[self.rank]

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

    def take_grad(self, name: str) -> Tensor:
        """The gradient of a parameter, which drops it, in the shape of its storage."""
        param = self.params[name]
        if param.grad is None:
            raise UserError(f"the parameter {name} has no gradient; use it in GPT.trunk, or remove it")
        grad = param.grad.view(-1, *self.whole[name].shape[1:])
        param.grad = None
        return grad

    def reduce_small(self, names: list[str]) -> tuple[list[Tensor], object]:
        """Starts summing gradients over ranks, all in one call; the sums, and a handle to wait on or None."""
        grads = [self.take_grad(name) for name in names]
        if self.world_size == 1 or not names:
            return grads, None
        flat = torch.cat([grad.flatten().float() for grad in grads])
        parts = flat.split([grad.numel() for grad in grads])
        return [part.view_as(grad) for part, grad in zip(parts, grads)], dist.all_reduce(flat, async_op=True)

    def reduce(self, name: str) -> tuple[Tensor, object]:
        """Starts summing a gradient over ranks; this rank's part of the sum, and a handle to wait on or None."""
        whole, grad = self.whole[name], self.take_grad(name)
        if self.world_size == 1:
            return grad, None
        if PARAMETERS[name].comms == "replicated":
            return grad, dist.all_reduce(grad, async_op=True)
        if grad.size(0) < whole.size(0):
            grad = F.pad(grad, (0, 0) * (grad.dim() - 1) + (0, whole.size(0) - grad.size(0)))
        part = torch.empty_like(self.part(name))
        return part, REDUCE_SCATTER(part, grad, async_op=True)

    @torch.no_grad()
    def step(self, step: int, schedule: "StepSchedule", apply: Tensor | None = None):
        """Updates the parameters due at this step, drops their gradients; none once `apply` (bool scalar) was false."""
        # false: the loss is not finite; a tensor on the device, so that nothing waits for it
        apply = self.healthy = self.healthy if apply is None else self.healthy & apply
        head, embed = self.params["lm_head"], self.params["embed"]
        if schedule.tied:                # one matrix: its gradient is the sum, and the embedding follows the head
            head.grad += embed.grad
            embed.grad = None
        due = [name for name in PARAMETERS if name in self.params
               and (PARAMETERS[name].optim == "muon" or step % 2) and not (schedule.tied and name == "embed")]
        small = self.small(due)
        grads, handle = self.reduce_small(small)
        reduced = {name: self.reduce(name) for name in due if name not in small}
        if handle:
            handle.wait()
        if small:
            self.adam([self.adam_arguments(*pair, schedule) for pair in zip(small, grads)], apply)
        gathers = []
        for name in list(reduced):
            grad, handle = reduced.pop(name)
            if handle:
                handle.wait()
            self.update[PARAMETERS[name].optim](name, grad, schedule, apply)
            if self.world_size > 1 and PARAMETERS[name].comms == "sharded":
                gathers.append(ALL_GATHER(self.whole[name], self.part(name), async_op=True))
        for handle in gathers:
            handle.wait()
        if schedule.tied and step % 2:
            embed.copy_(head)
            if schedule.splits:          # the last update as one: they part with equal state
                for key, value in self.state["lm_head"].items():
                    self.state["embed"][key].copy_(value)

    def small(self, names) -> list[str]:
        """Those of the parameters that Adam updates whole on every rank, all in one call."""
        return [name for name in names if PARAMETERS[name].optim == "adam" and not self.is_sharded_table(name)]

    def adam_arguments(self, name: str, grad: Tensor, schedule: "StepSchedule") -> tuple:
        """Arguments of adam_update for this rank's part of a parameter, whose step is counted."""
        config, state = PARAMETERS[name], self.state[name]
        beta1, beta2 = config.betas
        lr = config.lr * schedule.lr_factor
        state["count"] += 1
        count = int(state["count"])
        rate = lr * math.sqrt(1 - beta2 ** count) / (1 - beta1 ** count)
        return (grad, self.part(name), state["m"], state["v"], scalar(rate), scalar(lr * lr * config.decay), beta1,
                beta2)

    def update_table(self, name: str, grad: Tensor, schedule: "StepSchedule", apply: Tensor):
        """Adam on this rank's rows of a table; some rows at a time if the host keeps their moments."""
        arguments = self.adam_arguments(name, grad, schedule)
        if not self.model.cfg.host_state:
            self.adam([arguments], apply)
            return
        tensors, scalars = arguments[:4], arguments[4:]
        for g, p, kept_m, kept_v in zip(*(tensor.split(HOST_ROWS) for tensor in tensors)):
            m, v = kept_m.to(p.device, non_blocking=True), kept_v.to(p.device, non_blocking=True)
            self.adam([(g, p, m, v, *scalars)], apply)
            kept_m.copy_(m, non_blocking=True)
            kept_v.copy_(v, non_blocking=True)

    def update_muon(self, name: str, grad: Tensor, schedule: "StepSchedule", apply: Tensor):
        """NorMuon on this rank's part of one bank."""
        config, state, part = PARAMETERS[name], self.state[name], self.part(name)
        rates = config.lr if isinstance(config.lr, tuple) else (config.lr,)
        first = self.rank * part.size(0)
        lr = torch.tensor([rates[(first + n) % len(rates)] * schedule.lr_factor for n in range(part.size(0))])
        lr = lr.view(-1, 1, 1).to(part.device, non_blocking=True)
        self.normuon(grad, state["master"], state["m"], state["v"], lr,
                     scalar(config.decay * ATTN_LR * schedule.lr_factor), scalar(schedule.momentum), config.betas[0],
                     apply)
        part.copy_(torch.where(apply, state["master"], part))

def scalar(value: float) -> Tensor:
    """A number as a tensor, for which compiled code is not made anew."""
    return torch.tensor(value, dtype=torch.float32)

# -----------------------------------------------------------------------------
# Schedule: pure functions of the step

@dataclass(frozen=True)
class StepSchedule:
    """What the schedule says of one step."""
    lr_factor: float                     # on all rates of PARAMETERS
    momentum: float                      # of Muon
    loss_weights: list[float]            # of the next three tokens and of the prefix token
    tied: bool                           # embedding and head are one matrix
    splits: bool                         # this is the last update as one

def schedule(cfg: Hyperparameters, step: int) -> StepSchedule:
    """The row of a step."""
    return StepSchedule(cfg.lr * lr_factor(cfg, step), momentum(cfg, step), loss_weights(cfg, step),
                        is_tied(cfg, step), is_tied(cfg, step) and not is_tied(cfg, step + 2))

def stage_ends(cfg: Hyperparameters) -> list[int]:
    """The first step after each stage."""
    return [round(stage.until * cfg.num_iterations) for stage in cfg.stages]

def stage_index(cfg: Hyperparameters, step: int) -> int:
    """Row of the stage table that a step belongs to."""
    return next((i for i, end in enumerate(stage_ends(cfg)) if step < end), len(cfg.stages) - 1)

def tokens_of_steps(cfg: Hyperparameters, num_steps: int) -> int:
    """Tokens of the first num_steps steps; however many these are, they are not counted one by one."""
    ends = [min(end, num_steps) for end in stage_ends(cfg)]
    return sum(stage.batch_tokens * (end - begin) for stage, begin, end in zip(cfg.stages, [0, *ends], ends))

def stage_progress(cfg: Hyperparameters, step: int) -> float:
    """0 at the first step of a stage, towards 1 at its end."""
    index = stage_index(cfg, step)
    begin, end = ([0, *stage_ends(cfg)][index:index + 2])
    return (step - begin) / max(1, end - begin)

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
    stage = cfg.stages[stage_index(cfg, step)]
    t = stage_progress(cfg, step)
    starts = (*stage.next_tokens[0], stage.prefix[0])
    ends = (*stage.next_tokens[1], stage.prefix[1])
    return [start + (end - start) * t for start, end in zip(starts, ends, strict=True)]

def is_tied(cfg: Hyperparameters, step: int) -> bool:
    """Whether embedding and head are one matrix; the last such step is odd, so that Adam moves at it."""
    return cfg.split_embed > 0 and step <= first_split_step(cfg) - 2

def first_split_step(cfg: Hyperparameters) -> int:
    """The first odd step at which embedding and head are two matrices, if they were one before."""
    return round(cfg.split_embed * cfg.num_iterations) // 2 * 2 + 3

# -----------------------------------------------------------------------------
# Ranks, clock and graphs

# torch 2.13 renamed these two and warns about the old names; 2.11 knows only those
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

@dataclass(frozen=True)
class Machine:
    """Where this process runs: its device, its rank among world_size, and the name of the device."""
    device: torch.device
    rank: int
    world_size: int
    name: str

class Clock:
    """Training time in seconds: runs only between start() and stop(), which wait for the device and all ranks."""

    def __init__(self, machine: Machine, before: float = 0.0):
        self.machine = machine
        self.before = before
        self.started = None

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
        self.before = self.seconds
        self.started = None

    @property
    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.started if self.started else 0.0)

class Backward:
    """Loss of a micro-batch, its gradients added to the parameters'; on CUDA, once `replays` is set, by CUDA graphs.

    The GPU waits for the launches of a small micro-batch (dev/LOG.md, row 59). Autograd adds to gradients that exist
    and makes the others, so there is a graph for each set of them; it is captured when first met, and what it makes
    stays in its memory. The model must have run before, so that nothing is left to compile.
    """

    def __init__(self, model):
        self.model = model
        self.replays = False
        self.graphs = {}
        self.inputs = []

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
        graph = torch.cuda.CUDAGraph()
        pool = next((graph.pool() for graph, *_ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            loss = self.model(*self.inputs)
            loss.backward()
        return graph, loss.detach(), [param.grad for param in params]

# -----------------------------------------------------------------------------
# Training

def training_step(backward: Backward, optimizer: Optimizer, batches: list, step: int, plan: StepSchedule,
                  machine: Machine, votes: tuple = ()) -> Tensor:
    """Trains on one batch. Returns (1 + votes,) fp32 over all ranks, on the device: the summed loss, and for each vote
    (bool) how many ranks are for it."""
    weights = torch.tensor(plan.loss_weights).to(machine.device, non_blocking=True)
    loss = torch.zeros(1, device=machine.device)
    for batch in batches:
        loss += backward(*to_device(batch, machine.device), weights)
    totals = torch.cat([loss, torch.tensor(votes, dtype=torch.float32).to(machine.device, non_blocking=True)])
    if machine.world_size > 1:
        dist.all_reduce(totals)
    optimizer.step(step, plan, torch.isfinite(totals[0]))
    return totals

@torch.no_grad()
def validate(model, cfg: Hyperparameters, streams: list, machine: Machine) -> float:
    """Mean cross-entropy in nats over the val_tokens targets, summed in float64; the same for any number of ranks."""
    total = torch.zeros((), dtype=torch.float64, device="cpu" if machine.device.type == "mps" else machine.device)
    for stream in streams[machine.rank::machine.world_size]:
        total += model(*to_device(stream, machine.device)).to(total)
    if machine.world_size > 1:
        dist.all_reduce(total)
    return total.item() / cfg.val_tokens

def initialize(model: GPT, optimizer: Optimizer, machine: Machine):
    """The state in which training starts: initial weights or those of --init_from, the same on all ranks."""
    model.init_parameters()
    if model.cfg.init_from:
        load_weights(model, machine)
    for name, param in model.named_parameters():
        if param.isnan().any():
            raise UserError(f"the parameter {name} has no initial value, or NaN; set it in GPT.init_parameters")
    broadcast_parameters(model, machine)
    optimizer.reset()

def build(cfg: Hyperparameters, machine: Machine) -> tuple[Backward, Optimizer]:
    """The model in its initial state, ready for forward and backward, and its optimizer."""
    with torch.device(machine.device):
        model = GPT(cfg)
    model.cfg = place_state(model, machine)
    optimizer = Optimizer(model, machine.rank, machine.world_size)
    initialize(model, optimizer, machine)
    if cfg.compile:                      # a second start need not trace the float8 products again
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        torch._inductor.config.dynamic_scale_rblock = False         # its variants compile one by one, in this process
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch._inductor.config.compile_threads = max(1, min(32, threads // machine.world_size))
    return Backward(torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model), optimizer

def train(cfg: Hyperparameters, argv: list[str]) -> int:
    """The experiment: build, warm up, start the clock, train, validate with the clock stopped, save. The exit code."""
    machine = setup_machine(cfg)
    cfg, data = load_data(cfg, machine)
    cfg, tried = choose_attention(cfg, machine)
    backward, optimizer = build(cfg, machine)
    model, forward, cfg = optimizer.model, backward.model, optimizer.model.cfg
    run = Run(cfg, machine, argv, data, optimizer)
    with run.failures_noted():
        run.describe(tried)
        micro_packs = run.timed_warm_up(backward)
        clock = Clock(machine, run.meta.get("train_time", 0.0))
        step = run.meta.get("step", 0)
        position = LoaderPosition(*run.meta.get("loader_position", (0, 0)))
        stage = stage_index(cfg, max(step - 1, 0))
        model.set_stage(stage)
        if run.origin:
            run.restore(clock)
        else:
            run.validated(0, clock, validate(forward, cfg, data.streams, machine))
        last_step = num_steps(cfg)
        stopping = stop_on_signals()
        save_steps, save_seconds = save_interval(cfg)
        saved, last_save = step, time.monotonic()
        if cfg.save_every:               # finding pinned memory takes seconds the first time
            gather_state(model, optimizer, machine, everything=True)

        clock.start()                    # training time counts from the first look at the data
        if data.tokenizer:
            model.prefix_of.copy_(torch.from_numpy(prefix_tokens(json.loads(data.tokenizer), cfg.vocab_size)))
        loader = prefetch(training_batches(cfg, data.train, machine.rank, machine.world_size, micro_packs, step,
                                           position))
        log = StepLog(run, clock)
        while step < last_step and not (log.stop and step % 2 == 0):        # even: no gradient waits for Adam's step
            batches, position = next(loader)
            if stage_index(cfg, step) != stage:
                stage = stage_index(cfg, step)
                model.set_stage(stage)
            overdue = machine.rank == 0 and 0 < save_seconds < time.monotonic() - last_save
            totals = training_step(backward, optimizer, batches, step, schedule(cfg, step), machine,
                                   (stopping.is_set(), overdue))
            step += 1
            log.add(step, totals)
            validating = cfg.val_every and step % cfg.val_every == 0 and step < last_step
            saving = step % 2 == 0 and step < last_step and (log.save or save_steps and step % save_steps < 2)
            if validating or saving:
                log.flush()
            if validating:
                clock.stop()
                run.validated(step, clock, validate(forward, cfg, data.streams, machine))
                clock.start()
            if saving:
                run.save_checkpoint(step, stage, position, clock, everything=True)
                saved, last_save = step, time.monotonic()
        clock.stop()
        log.flush()

        finished = step == last_step
        run.trained(clock)
        if saved != step:                # before the evaluation can fail
            run.save_checkpoint(step, stage, position, clock, everything=not finished or bool(cfg.save_every))
        if finished:
            model.set_stage(stage, final=step == cfg.total_steps)
            run.validated(step, clock, validate(forward, cfg, data.streams, machine))
        run.finish("finished" if finished else "interrupted", step, clock)
    return 0 if finished else 130

def main() -> int:
    """Runs the command line; the exit code, see run_main."""
    return run_main(train)

# -----------------------------------------------------------------------------
# Appendix: kernels

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

# 64 x 64 tiles: with windows of 128 to 1664 larger ones waste work at the edges (dev/LOG.md); the small ones are for
# GPUs with 99 KiB of shared memory a block
TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3, "bwd_BLOCK_M1": 32,
         "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 4, "bwd_num_stages": 3}
SMALL_TILES = TILES | {"fwd_BLOCK_N": 32, "fwd_num_stages": 2, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32,
                       "bwd_num_stages": 1}

def with_flex(tiles: dict, doc_start_T: Tensor, window: Tensor, longest: int):
    """FlexAttention with these tiles; see ATTENTION."""
    # as_strided fixes the layout, which the mask needs in graphs where a fused kernel computes the starts (PR 182737)
    doc_start_T = doc_start_T.as_strided(doc_start_T.shape, (1,))
    index = torch.arange(doc_start_T.numel(), device=doc_start_T.device, dtype=torch.int32)
    mask = block_mask(torch.maximum(doc_start_T, index - window), -(-longest // BLOCK) + 2)

    def attend(q_THD, k_THD, v_THD):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
        return flex_attention(q, k, v, block_mask=mask, scale=1.0, kernel_options=tiles)[0].transpose(0, 1)
    return attend

def plain_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, first_T: Tensor, window: int) -> Tensor:
    """The same in plain PyTorch: chunks as long as the window, each of which sees itself and the one before."""
    T, H, _ = q_THD.shape
    size = min(window, T)
    n = -(-T // size)
    index = torch.arange(n * size, device=q_THD.device)
    first = torch.cat([first_T, index[T:].to(first_T.dtype)]).view(n, size)    # padding sees itself
    pad = (0, 0, 0, 0, 0, n * size - T)
    q = F.pad(q_THD, pad).view(n, size, H, -1).transpose(1, 2)
    k, v = (F.pad(x, pad).view(n, size, H, -1) for x in (k_THD, v_THD))
    k, v = (torch.cat([torch.cat([x[:1], x[:-1]]), x], dim=1).transpose(1, 2) for x in (k, v))
    index = index.view(n, size)
    key = torch.cat([index - size, index], dim=1)[:, None, :]
    mask = (key <= index[:, :, None]) & (key >= first[:, :, None])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=1.0)
    return y.transpose(1, 2).reshape(n * size, H, -1)[:T]

def with_plain(doc_start_T: Tensor, window: int, longest: int):
    """Plain PyTorch; see ATTENTION."""
    index = torch.arange(doc_start_T.numel(), device=doc_start_T.device, dtype=torch.int32)
    first = torch.maximum(doc_start_T, index - window)
    return lambda q, k, v: plain_attention(q, k, v, first, window)

# name of a backend -> function of (where the document of each token starts (T,) int32, window in tokens, longest window
# of the run), whose result is the attention: a function of q, k, v (T, H, D), the softmax scale being in q already
ATTENTION = {"flex": partial(with_flex, TILES), "flex_small": partial(with_flex, SMALL_TILES), "plain": with_plain,
             "auto": with_plain}

LOGIT_SCALE, LOGIT_SHIFT, LOGIT_WIDTH = 23.0, 5.0, 7.5             # logits lie in 0..23 (#54)
HEAD_CHUNK = 8192                        # tokens whose logits exist at one time

def sample_vocab(targets_TK: Tensor, vocab_size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (count,), how many tokens each stands for (count,) fp32, targets as indices into the ids, -1: none).

    Sampled softmax (Bengio and Senecal 2008; PR 360): all targets are in it and stand for themselves; a sample of the
    other tokens stands for all of those. The sample is a hash of the targets, so the same wherever it is computed.
    """
    device = targets_TK.device
    index = torch.arange(vocab_size, device=device)
    targets = torch.where(targets_TK < 0, vocab_size, targets_TK)
    wanted = torch.zeros(vocab_size + 1, dtype=torch.int64, device=device).scatter(0, targets.flatten(), 1)[:vocab_size]
    key = torch.zeros_like(index)
    for salt in (targets_TK[:, 0].sum(), index, 1, 2):              # rounds of a multiplicative hash of 31 bits
        key = (key + salt) * 0x2C1B3C6D & 0x7FFFFFFF
        key = key ^ key >> 15
    key, ids = torch.topk(key + (wanted << 31), count)
    others = (vocab_size - wanted.sum()) / (count - wanted.sum()).clamp(min=1)
    counts = torch.where(key >> 31 > 0, 1.0, others).float()
    columns = torch.full((vocab_size + 1,), -1, device=device).scatter(0, ids, torch.arange(count, device=device))
    return ids, counts, columns[targets]

class HeadLoss(torch.autograd.Function):
    """head_loss with both gradients in one pass, chunk by chunk, so that logits are neither kept nor computed twice."""

    @staticmethod
    def forward(ctx, x_TC, weight_VC, targets_TK, weights_K, counts_V):
        losses, dx = [], []
        dweight = torch.zeros_like(weight_VC, dtype=torch.float32)
        for x, targets in zip(x_TC.split(HEAD_CHUNK), targets_TK.split(HEAD_CHUNK)):
            logits = map_logits(F.linear(x, weight_VC))
            wanted = weights_K * (targets >= 0)
            columns = targets.clamp(min=0)
            counted = logits if counts_V is None else logits + counts_V.log()
            total = counted.logsumexp(dim=1, keepdim=True)
            losses.append(((total - logits.gather(1, columns)) * wanted).sum())
            grad = (counted - total).exp() * wanted.sum(dim=1, keepdim=True)
            grad = grad.scatter_add(1, columns, -wanted) * logits * (1 - logits / LOGIT_SCALE) / LOGIT_WIDTH
            grad = grad.to(x.dtype)      # by the raw product: of a sigmoid s it is s (1 - s)
            dx.append(grad @ weight_VC)
            dweight += grad.T @ x
        ctx.save_for_backward(torch.cat(dx), dweight.to(weight_VC.dtype))
        return torch.stack(losses).sum()

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

def fused_kernels(cfg: Hyperparameters) -> dict:
    """What training on CUDA computes by triton_kernels.py: name of the plain function -> the kernel in its place."""
    if not cfg.kernels or triton_kernels is None:
        return {}
    kernels = {"head_loss": partial(triton_kernels.head_loss, float8=cfg.float8)}
    if cfg.float8:
        kernels |= {"linear": triton_kernels.float8_linear, "mlp": triton_kernels.float8_mlp}
    return kernels

def check_kernels(model: GPT, machine: Machine) -> str:
    """Compares training loss and gradients with and without each kernel, on a small batch; a line for the log.

    A kernel that does not run on this device is not used. One that computes something else than the plain function
    raises UserError: somebody has edited that function. Changes the parameters, so that none is zero.
    """
    batch = to_device(synthetic_batch(model.cfg, min(model.cfg.pack_tokens, 4096)), machine.device)
    generator = torch.Generator(machine.device).manual_seed(0)
    for param in model.parameters():
        param.data += torch.empty_like(param).normal_(0, 0.02, generator=generator)
    cfg, kernels = model.cfg, model.kernels
    model.cfg = replace(cfg, attention="plain")                     # FlexAttention is slow unless compiled
    large = [name for name, config in PARAMETERS.items() if config.comms == "sharded"]
    ones = torch.ones(4, device=machine.device)
    faults, differences = triton_kernels.compare_with_plain(model, large, *batch, ones)
    model.cfg = cfg
    of_ranks = all_gather_object(machine, (faults, differences))
    if differences := [text for _, found in of_ranks for text in found]:
        raise UserError(f"{differences[0]}; if you have changed {SCRIPT.name} there, use --kernels=false")
    faults = {name: fault for found, _ in of_ranks for name, fault in found.items()}
    model.kernels = {name: kernel for name, kernel in kernels.items() if name not in faults}
    return "; ".join([f"kernels that are right on this device: {', '.join(model.kernels) or 'none'}",
                      *(f"{name} does not run here ({fault})" for name, fault in faults.items())])

def choose_attention(cfg: Hyperparameters, machine: Machine) -> tuple[Hyperparameters, list[str]]:
    """The config with the first attention backend that is right on this device, or the flag's; lines on what was tried.

    Raises UserError if the backend that the flag names does not work.
    """
    blocks = cfg.pack_tokens % BLOCK == 0 and cfg.val_stream_tokens % BLOCK == 0
    if machine.device.type != "cuda" or not blocks or cfg.attention == "plain":
        if cfg.attention not in ("auto", "plain"):
            raise UserError(f"--attention={cfg.attention} needs a CUDA device, and multiples of {BLOCK} for "
                            f"--pack_tokens={cfg.pack_tokens} and --val_stream_tokens={cfg.val_stream_tokens}; use "
                            "--attention=plain")
        return replace(cfg, attention="plain"), []
    lines = []
    for name in ("flex", "flex_small") if cfg.attention == "auto" else (cfg.attention,):
        fault = next(filter(None, all_gather_object(machine, try_attention(cfg, name, machine.device))), "")
        lines.append(f"{name} attention " + (f"does not work here: {fault}" if fault else "is right on this device"))
        if not fault:
            return replace(cfg, attention=name), lines
    if cfg.attention != "auto":
        raise UserError(f"--attention={cfg.attention} does not work here ({fault}); use --attention=auto")
    return replace(cfg, attention="plain"), [*lines, "used: plain attention"]

def try_attention(cfg: Hyperparameters, name: str, device: torch.device) -> str:
    """What is wrong with a backend on this device, compared with plain PyTorch in fp32; empty if nothing is."""
    T, window = max(2048 // BLOCK, 1) * BLOCK, cfg.stages[0].long
    generator = torch.Generator(device).manual_seed(0)
    index = torch.arange(T, device=device, dtype=torch.int32)
    doc_start = index - index % 1500
    inputs = [torch.randn(T, cfg.num_heads, channels, generator=generator, device=device)
              for channels in (cfg.key_dim, cfg.key_dim, cfg.head_dim)]
    inputs[0] *= cfg.key_dim ** -0.5

    def run(function, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        y = function(*leaves)
        y.float().square().sum().backward()
        return [y.detach().float(), *(leaf.grad.float() for leaf in leaves)]
    size = torch.tensor(window, device=device)
    function = torch.compile(lambda *qkv: ATTENTION[name](doc_start, size, window)(*qkv), dynamic=False)
    try:
        found = run(function, {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.precision])
    except Exception as error:           # whatever a backend comes up with
        return " ".join(f"{type(error).__name__}: {error}".split())[:120]
    right = run(lambda *qkv: with_plain(doc_start, window, window)(*qkv), torch.float32)
    errors = [((mine - want).norm() / want.norm()).item() for mine, want in zip(found, right, strict=True)]
    wrong = [error for error in errors if not error <= 0.03]        # so is NaN
    return f"wrong by {wrong[0]:.3g}" if wrong else ""

# -----------------------------------------------------------------------------
# Appendix: the run

SCRIPT = Path(__file__)
MAX_TOKENS = 1 << 24                     # of a pack, a stream, a window: more is a slip of the pen
JSON_BYTES = 1 << 24                     # JSON files of more bytes are not read

class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""

    def __str__(self):                   # one line that is safe to print, whatever a file or a flag put into it
        line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(super().__str__().split()))
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"

class RankError(UserError):
    """A UserError that other ranks may not see."""

# ---- command line

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
        if row:
            return tuple(map(row, text.split(","))) if text else ()
        return os.path.expanduser(text) if kind is str else kind(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}
        wanted = f"a JSON list of {row.__name__} rows" if is_dataclass(row) else wanted.get(
            kind, "numbers separated by commas")
        raise UserError(f"--{name}={text} is not {wanted}; --help lists the flags and their defaults") from None

def parse_config(argv: list[str]) -> Hyperparameters:
    """The config of `--preset=name`, by default the first, and `--field=value` flags; UserError on anything else."""
    flags = {}
    for arg in argv:
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            raise UserError(f"cannot read {arg!r}; flags look like --field=value, with =; --help lists them")
        flags[name] = value
    preset = flags.pop("preset", next(iter(PRESETS)))
    if preset not in PRESETS:
        raise UserError(f"--preset={preset} does not exist; choose from {', '.join(PRESETS)}")
    kinds = {field.name: field.type for field in fields(Hyperparameters)}
    for name in flags.keys() - kinds.keys():
        near = name.replace("-", "_")
        raise UserError(f"--{name} is not a flag; {f'write --{near}=' if near in kinds else '--help lists them'}")
    values = {name: parse_value(name, value, kinds[name]) for name, value in flags.items()}
    cfg = replace(PRESETS[preset], **values)
    check_config(cfg)
    return cfg

def config_from_dict(values: dict) -> Hyperparameters:
    """The config in a checkpoint's meta.json; raises UserError on unknown, missing or impossible fields."""
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

def check_config(cfg: Hyperparameters):
    """Raises UserError for a value out of range and for values that contradict each other; fields that are not there
    are not checked, so that a copy of this script may drop or add some."""
    def need(good, names, remedy):
        for name in names.split():
            if hasattr(cfg, name) and not good(getattr(cfg, name)):
                raise UserError(f"--{name}={str(getattr(cfg, name)).strip('()')} {remedy}")
    need(lambda value: 1 <= value < 2**63, "num_iterations val_tokens val_stream_tokens pack_tokens model_dim head_dim "
         "mlp_dim vocab_multiple keep epochs", "must be at least 1")
    need(lambda value: 0 <= value < 2**63, "stop_after val_every micro_batch_tokens sampled_vocab qk_dim vocab_size "
         "seed momentum_warmup gate_dim bigram_rows bigram_signs", "must not be negative or huge")
    need(lambda value: not value or value.removesuffix("min").isdecimal(), "save_every",
         "is neither steps, like 500, nor minutes, like 10min")
    need(lambda value: 0 <= value <= 1, "cooldown momentum_cooldown lr_floor split_embed", "must be in 0..1")
    need(lambda value: 0 < value < math.inf, "lr attn_scale rope_base", "must be positive")
    need(lambda tokens: tokens <= MAX_TOKENS, "val_stream_tokens pack_tokens", f"must be at most {MAX_TOKENS}")
    need(lambda pair: len(pair) == 2 and 1 <= min(pair) and max(pair) <= MAX_TOKENS, "final_windows",
         f"must be two numbers in 1..{MAX_TOKENS}")
    need(lambda windows: all(1 <= window <= MAX_TOKENS for window in windows), "earlier_windows",
         f"must be numbers in 1..{MAX_TOKENS}")
    need(lambda pair: len(pair) == 2 and all(0 <= item < 1 for item in pair), "momentum", "must be two numbers in 0..1")
    for name, known in {"device": "auto cuda cpu mps", "precision": "bf16 fp32", "attention": " ".join(ATTENTION)
                        }.items():
        need(lambda value: value in known.split(), name, f"is unknown; choose from {known}")
    need(lambda dim: dim % 4 == 0, "head_dim qk_dim", "must be a multiple of 4")
    need(lambda dim: dim % (2 * cfg.head_dim) == 0 and dim >= 12, "model_dim",
         f"must be at least 12 and hold an even number of heads of --head_dim={cfg.head_dim}")
    need(lambda count: count == 0 or count >= cfg.pack_tokens, "sampled_vocab",
         f"must be 0 or at least --pack_tokens={cfg.pack_tokens}, so that all targets fit")
    need(lambda tokens: tokens % cfg.pack_tokens == 0, "micro_batch_tokens",
         f"must be a multiple of --pack_tokens={cfg.pack_tokens}")
    for i, stage in enumerate(cfg.stages):
        before = cfg.stages[i - 1].until if i else 0
        lengths = (stage.max_doc_tokens, stage.short, stage.long)
        if (not before < stage.until < 2**31 or stage.batch_tokens % cfg.pack_tokens or not stage.lr > 0
                or min(stage.batch_tokens, *lengths) < 1 or max(lengths) > MAX_TOKENS or stage.batch_tokens >= 2**63):
            raise UserError(f"stage {i}: until={stage.until} must be above the row before, the rest positive, "
                            f"documents and windows at most {MAX_TOKENS} tokens, and batch_tokens={stage.batch_tokens} "
                            f"a multiple of --pack_tokens={cfg.pack_tokens}")
    if not cfg.stages or cfg.total_steps < cfg.num_iterations:
        raise UserError("the stage table ends before the run: its last row must have until >= 1")
    check_layers(cfg.layers)

def check_layers(layers: tuple[Layer, ...]):
    """Raises UserError with all rules that the layer table breaks."""
    rows = list(enumerate(layers))
    tables = {layer.ve for layer in layers if layer.ve >= 0}
    broken = [rule for rule, kept in {
        "there is a layer, and the first one has attention": layers and layers[0].attention,
        "every window is short or long": all(layer.window in ("short", "long") for layer in layers),
        "attn_input and skip name an earlier layer": all(max(layer.attn_input, layer.skip) < i for i, layer in rows),
        "a layer without attention has no ve, attn_input, xsa, gate or mudd": all(
            layer.attention or layer == Layer(attention=False, window=layer.window, skip=layer.skip)
            for layer in layers),
        "ve counts tables 0, 1, ... without a gap": tables == set(range(len(tables))),
        "only the last layer has mudd, and it is not the only layer": not any(
            layer.mudd and not 0 < i == len(layers) - 1 for i, layer in rows),
    }.items() if not kept]
    if broken:
        raise UserError(f"the layer table breaks {'a rule' if len(broken) == 1 else f'{len(broken)} rules'}: "
                        f"{'; '.join(broken)}; change its rows or --layers")

def help_text() -> str:
    """What --help prints: how to start, and every flag with its default and the comment beside it."""
    source = SCRIPT.read_text(encoding="utf-8")
    name, default = next(iter(PRESETS.items()))
    lines = source.split("class Hyperparameters:")[1].split("@property")[0].splitlines()
    comments = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in lines if ":" in line}
    text = ["\n\n".join(source.split('"""')[1].split("\n\n")[:2]), "", "Flags, --field=value, with the defaults of "
            f"--preset={name} (all presets: {', '.join(PRESETS)}):", ""]
    for field in fields(default):
        value = getattr(default, field.name)
        if isinstance(value, tuple):
            table = value and is_dataclass(value[0])
            value = "JSON rows, see the table in the script" if table else ",".join(map(str, value))
        text.append(f"  --{field.name}={value}".ljust(66) + comments.get(field.name, ""))
    return "\n".join(text)

# ---- data

def read_header(path: str) -> Shard:
    """Header of a shard, with zeros read as GPT-2's values; raises UserError if the file is not a whole shard."""
    remedy = "make or download it again (python data/fineweb.py or python data/text.py)"
    if not os.path.isfile(path):         # reading a pipe would wait for its writer
        raise UserError(f"{path} is not a file; {remedy}")
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if size < HEADER_BYTES or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        found = f"begins with {header[0]}, version {header[1]}" if len(header) > 1 else f"has {size} bytes"
        raise UserError(f"{path} is not a shard of version {SHARD_VERSION} (it {found}); {remedy}")
    num_tokens = int(header[2])
    width = int(header[5]) or 2
    if width not in (2, 4):
        raise UserError(f"{path} claims {width} bytes per token, only 2 and 4 exist; {remedy}")
    if num_tokens < 1 or size != HEADER_BYTES + num_tokens * width:
        raise UserError(f"{path} promises {num_tokens} tokens but holds {(size - HEADER_BYTES) // width}; {remedy}")
    tokenizer = header[8:16].tobytes().hex() if header[8:16].any() else GPT2_TOKENIZER_SHA256
    vocab_size = int(header[3]) or 50257
    bos_id = int(header[4]) or 50256
    if not 0 <= bos_id < vocab_size <= 256 ** width:
        raise UserError(f"{path} claims {vocab_size} ids of {width} bytes with begin-of-document id {bos_id}, which "
                        f"is impossible; {remedy}")
    return Shard(path, num_tokens, vocab_size, bos_id, width, tokenizer, os.stat(path).st_mtime_ns)

def match_files(pattern: str) -> list[str]:
    """Paths that a glob matches, sorted. A folder or file that is there is taken by its name, whatever signs it has."""
    folder, name = os.path.split(pattern)
    if os.path.exists(pattern):
        return [pattern]
    if os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    return sorted(glob.glob(pattern))

def open_shards(train_files: str, val_files: str) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards of two globs; raises UserError if none match or tokenizers differ."""
    groups = []
    for flag, pattern in (("train_files", train_files), ("val_files", val_files)):
        groups.append([read_header(path) for path in match_files(pattern)])
        if not groups[-1]:
            raise UserError(f"--{flag}={pattern} matches no file; make some with data/fineweb.py or data/text.py")
    first = groups[0][0]
    for shard in groups[0] + groups[1]:
        if (shard.tokenizer, shard.vocab_size, shard.bos_id) != (first.tokenizer, first.vocab_size, first.bos_id):
            raise UserError(f"{shard.path} has tokenizer {shard.tokenizer[:12]}, {first.path} {first.tokenizer[:12]}; "
                            "make both with the same one")
    return groups[0], groups[1]

def read_tokenizer(shard: Shard, vocab_dir: str = "") -> bytes:
    """tokenizer.json of a shard: the file beside it, else for GPT-2's shards what gpt2_tokenizer finds (b"": nothing).

    Raises UserError if it is missing or is not the tokenizer that the shard was made with.
    """
    path = Path(shard.path).parent / "tokenizer.json"
    if not path.is_file() and shard.tokenizer == GPT2_TOKENIZER_SHA256:
        return gpt2_tokenizer(vocab_dir)
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it from where {shard.path} was made")
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

def gpt2_tokenizer(vocab_dir: str = "") -> bytes:
    """GPT-2's tokenizer.json, made of encoder.json in vocab_dir or in tiktoken's cache; b"" if it is in neither.

    Never touches the network. Raises UserError if vocab_dir is given and does not hold GPT-2's encoder.json.
    """
    url = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"       # names the cached file
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = cache or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    path = Path(vocab_dir, "encoder.json") if vocab_dir else Path(cache, hashlib.sha1(url).hexdigest())
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(hidden)}            # how the file spells invisible bytes
    try:
        ids = json.loads(read_small(path))
        tokens = [bytes(byte_of[letter] for letter in token) for token in sorted(ids, key=ids.get)[:50256]]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        tokens = []
    ranks = [base64.b64encode(token).decode() for token in tokens]
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    data = {"name": "gpt2", "pattern": pattern, "ranks": ranks, "special_tokens": {"<|endoftext|>": 50256},
            "bos_id": 50256}
    text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    if hashlib.sha256(text).hexdigest() == GPT2_TOKENIZER_SHA256:
        return text
    if vocab_dir:
        raise UserError(f"--vocab_dir={vocab_dir} has no encoder.json of GPT-2; name the folder that holds it")
    return b""

def check_tokens(cfg: Hyperparameters, shards: list[Shard], num_steps: int) -> str:
    """The sentence on the tokens that training will read; raises UserError if the text ends before num_steps.

    Packs all documents as training_batches will, so that a run never ends for want of text after minutes.
    """
    needed = tokens_of_steps(cfg, num_steps)
    docs = training_documents(cfg, shards, LoaderPosition())
    position = LoaderPosition()
    packed = 0
    found = sum(shard.num_tokens for shard in shards)
    for step in range(num_steps):
        stage = cfg.stages[stage_index(cfg, step)]
        longest = stage.max_doc_tokens
        for _ in range(stage.batch_tokens // cfg.pack_tokens):
            pieces, position = next_pack(docs, cfg.pack_tokens, longest, position)
            if not pieces:
                fits = int(0.98 * cfg.num_iterations * packed / needed)
                remedy = f", or use --num_iterations={fits}" if fits >= 2 else ""
                raise UserError(f"--train_files={cfg.train_files} ends at step {step} of {num_steps}, which need "
                                f"{needed} tokens: it holds {found}, of which {packed} can be used, because at "
                                f"most {longest} tokens of a document are read; add text, read it more often "
                                f"(--epochs={cfg.epochs + 1}){remedy}")
            packed += cfg.pack_tokens
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
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

@dataclass(frozen=True)
class Data:
    """What a run reads: its shards, the tokenizer.json of their tokenizer, and the packed validation text."""
    train: list[Shard]
    val: list[Shard]
    tokenizer: bytes
    streams: list
    summary: str

def load_data(cfg: Hyperparameters, machine: Machine) -> tuple[Hyperparameters, Data]:
    """The config with everything filled in that was left to machine and shards, and the data; raises UserError."""
    train_shards, val_shards = open_shards(cfg.train_files, cfg.val_files)
    cfg = resolve_config(cfg, machine, train_shards[0])
    tokenizer = on_rank0(machine, lambda: read_tokenizer(train_shards[0], cfg.vocab_dir))
    if not tokenizer and any(any(stage.prefix) for stage in cfg.stages):
        raise UserError(f"--train_files={cfg.train_files} has no tokenizer.json beside it, which the prefix targets of "
                        "the stage table need; name a folder with GPT-2's encoder.json by --vocab_dir=")
    summary = on_rank0(machine, lambda: check_tokens(cfg, train_shards, num_steps(cfg)))
    streams = validation_streams(cfg, val_shards)
    return cfg, Data(train_shards, val_shards, tokenizer, streams, f"{summary}; validation on {cfg.val_tokens:,}")

# ---- machine

def setup_machine(cfg: Hyperparameters) -> Machine:
    """Chooses the device and joins the other ranks if torchrun started some (NCCL between GPUs, else gloo)."""
    rank, world_size, local_rank = (environment_int(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world_size = max(world_size, 1)
    if world_size > 1 and cfg.device in ("auto", "cuda"):
        show_one_gpu(local_rank)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = cfg.device if cfg.device != "auto" else "cuda" if there["cuda"] else "cpu"
    if not there[kind]:
        raise UserError(f"--device={kind}, but PyTorch sees no such device; use --device=cpu or another build of torch")
    packs = min(stage.batch_tokens for stage in cfg.stages) // cfg.pack_tokens
    if world_size > packs:
        raise UserError(f"{world_size} ranks share {packs} packs, so one has no token; start at most {packs} or lower "
                        f"--pack_tokens={cfg.pack_tokens}")
    if cfg.compile_cache:                # read by torch and Triton when they first compile
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath(os.path.join(cfg.compile_cache, "inductor"))
        os.environ["TRITON_CACHE_DIR"] = os.path.abspath(os.path.join(cfg.compile_cache, "triton"))
    if kind == "cpu":
        keep_freed_memory()
    device, name = torch.device(kind), f"{kind}, {torch.get_num_threads()} threads"
    if kind == "cuda":
        device = torch.device(kind, 0 if torch.cuda.device_count() == 1 else local_rank)
        name = torch.cuda.get_device_name(device)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return Machine(device, rank, world_size, name)

def keep_freed_memory():
    """Tells glibc to keep freed memory; else the kernel maps and zeroes the memory of every large tensor anew.

    The tiny run takes 5 % less time with it (dev/LOG.md, 2026-11-28). Does nothing with other C libraries.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                   # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)                  # M_TRIM_THRESHOLD: nothing goes back to the kernel

def show_one_gpu(local_rank: int):
    """Hides all GPUs but this rank's own, so that all ranks run the same compiled code and can share it.

    Raises RankError if there are fewer GPUs than ranks. Does nothing without GPUs.
    """
    count = torch.cuda.device_count()    # asks NVML where it can: what is hidden after CUDA has started stays visible
    if 0 < count <= local_rank:
        raise RankError(f"torchrun starts more ranks than the {count} GPUs here; lower --nproc_per_node")
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]

def num_steps(cfg: Hyperparameters) -> int:
    """Steps that this process trains, counted from the first of the run."""
    return min(cfg.stop_after or cfg.total_steps, cfg.total_steps)

def warm_up(backward: Backward, optimizer: Optimizer, machine: Machine, run: "Run") -> int:
    """Compiles all that the run will use, on made-up tokens, then puts everything back and checks that bit for bit.

    Returns the packs of a micro-batch.
    """
    raw, cfg = optimizer.model, optimizer.model.cfg
    before = digest(run_state(raw, optimizer, machine))
    if raw.kernels:
        run.print(check_kernels(raw, machine))
    if machine.world_size > 1:
        share_compilation(backward, optimizer, machine)
    micro_packs = largest_micro_batch(backward, optimizer, machine)
    tokens = micro_packs * cfg.pack_tokens
    batch = synthetic_batch(cfg, tokens)
    split = first_split_step(cfg)

    def steps():                         # Adam rests at even steps and moves at odd ones
        for step in (0, 1, split - 1, split):
            training_step(backward, optimizer, [batch] * 2, step, schedule(cfg, step), machine)
    steps()
    peak, memory = torch.cuda.max_memory_allocated(), device_memory(machine)
    # what a graph keeps for its activations, a validation cannot use; a graph would keep windows that are numbers
    flexible = cfg.attention.startswith("flex")
    if flexible and tokens <= cfg.graph_tokens and 2 * peak <= memory:
        backward.replays = True
        steps()
    for stage in range(1 if flexible else len(cfg.stages)):         # windows that are numbers need a graph each
        raw.set_stage(stage)
        training_step(backward, optimizer, [batch], 0, schedule(cfg, 0), machine)
        validate(backward.model, cfg, [synthetic_batch(cfg, cfg.val_stream_tokens)] * machine.world_size, machine)
    initialize(raw, optimizer, machine)
    after = digest(run_state(raw, optimizer, machine))
    changed = [name for name in before if after[name] != before[name]]
    assert not changed, f"warm-up changed the initial state of {changed}"
    run.print(f"memory: {tokens:,} tokens per forward take {peak / 2**30:.1f} of {memory / 2**30:.1f} GiB"
              + ", replayed as CUDA graphs" * backward.replays)
    return micro_packs

def share_compilation(backward: Backward, optimizer: Optimizer, machine: Machine):
    """Each rank compiles a part of what the run will use; all find the other parts in the compile cache afterwards."""
    cfg = optimizer.model.cfg

    def forward_and_backward():
        batch = synthetic_batch(cfg, micro_batch_sizes(cfg, machine)[0] * cfg.pack_tokens)
        with contextlib.suppress(torch.OutOfMemoryError):           # largest_micro_batch will try a smaller one
            backward(*to_device(batch, machine.device), torch.tensor(loss_weights(cfg, 0), device=machine.device))

    def validation():
        with torch.no_grad():
            backward.model(*to_device(synthetic_batch(cfg, cfg.val_stream_tokens), machine.device))
    parts = forward_and_backward, validation, partial(rehearse_updates, optimizer, schedule(cfg, 1))
    for part in parts[machine.rank::machine.world_size]:
        part()
    optimizer.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    dist.barrier()

@torch.no_grad()
def rehearse_updates(optimizer: Optimizer, plan: StepSchedule):
    """Updates this rank's parts with gradients of zero, without the other ranks: compiles all that step() uses."""
    parts = {name: optimizer.part(name) for name in PARAMETERS if name in optimizer.params}
    small = optimizer.small(parts)
    sizes = [parts[name].numel() for name in small]
    zeros = torch.zeros(sum(sizes), device=optimizer.healthy.device).split(sizes)       # as reduce_small has them
    optimizer.adam([optimizer.adam_arguments(name, zero.view_as(parts[name]), plan)
                    for name, zero in zip(small, zeros)], optimizer.healthy)
    for name in parts.keys() - set(small):
        optimizer.update[PARAMETERS[name].optim](name, torch.zeros_like(parts[name]), plan, optimizer.healthy)

def micro_batch_sizes(cfg: Hyperparameters, machine: Machine) -> list[int]:
    """Packs that a micro-batch could have, the best number first: the least padding, then the largest."""
    shares = [math.ceil(stage.batch_tokens // cfg.pack_tokens / machine.world_size) for stage in cfg.stages]
    if cfg.micro_batch_tokens or machine.device.type != "cuda":
        return [min(cfg.micro_batch_tokens // cfg.pack_tokens or min(shares), min(shares))]
    return sorted(range(1, min(shares) + 1), key=lambda packs: (sum(-share % packs for share in shares), -packs))

def largest_micro_batch(backward: Backward, optimizer: Optimizer, machine: Machine) -> int:
    """Packs of a micro-batch: as many as fit into memory on all ranks, found by trying; raises UserError if none do."""
    cfg = optimizer.model.cfg
    sizes = micro_batch_sizes(cfg, machine)
    if cfg.micro_batch_tokens or machine.device.type != "cuda":
        return sizes[0]
    while sizes:                         # each new size is compiled, so the next one to try is at most half as large
        batch = to_device(synthetic_batch(cfg, sizes[0] * cfg.pack_tokens), machine.device)
        weights = torch.tensor(loss_weights(cfg, 0), device=machine.device)
        try:
            for _ in range(2):           # the second time with gradients to add to
                backward(*batch, weights)
            fits = torch.cuda.max_memory_allocated() < 0.92 * device_memory(machine)
        except torch.OutOfMemoryError:
            fits = False
        optimizer.reset()                # drops the gradients
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if all(all_gather_object(machine, fits)):
            return sizes[0]
        sizes = [packs for packs in sizes if packs <= sizes[0] // 2]
    raise UserError(f"one pack of --pack_tokens={cfg.pack_tokens} needs more than the GPU's "
                    f"{device_memory(machine) / 2**30:.1f} GiB; try --pack_tokens={cfg.pack_tokens // 2}")

def environment_int(name: str, default: int = 0) -> int:
    """A number that torchrun sets; raises UserError if something else is there."""
    value = os.environ.get(name) or str(default)                    # an empty one counts as unset
    if not value.isdecimal():
        raise UserError(f"the environment has {name}={value!r}, not a number; unset it, or start with torchrun")
    return int(value)

def all_gather_object(machine: Machine, value) -> list:
    """The value that each rank has, in their order."""
    values = [value] * machine.world_size
    if machine.world_size > 1:
        dist.all_gather_object(values, value)
    return values

def on_rank0(machine: Machine, function):
    """What the function returns on the first rank, for all ranks; so with its UserError."""
    outcome = None
    if machine.rank == 0:
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = all_gather_object(machine, outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome

def digest(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A 64-bit sum per tensor that changes with any bit of it, computed where the tensor lies."""
    sums = dict.fromkeys(tensors, 0)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in tensors.items():
        words = tensor.detach().contiguous().flatten().view(integer[tensor.element_size()])
        for i, chunk in enumerate(words.split(1 << 24)):
            weights = torch.arange(chunk.numel(), device=chunk.device) * 2654435761 + 2 * i + 1
            sums[name] += int((chunk.long() * (weights | 1)).sum())
    return sums

def synthetic_batch(cfg: Hyperparameters, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of documents of 512 random tokens."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, length, dtype=np.int32)
    tokens[::512] = cfg.bos_id
    return tokens, np.roll(tokens, -1).astype(np.int64)

def broadcast_parameters(model: GPT, machine: Machine):
    """Rank 0's parameters and buffers for all: random numbers may differ between kinds of GPU."""
    if machine.world_size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)

def run_state(model: GPT, optimizer: Optimizer, machine: Machine) -> dict[str, Tensor]:
    """Every tensor that training changes, and the random state."""
    state = dict(model.state_dict()) | {"rng": torch.get_rng_state()}
    if machine.device.type == "cuda":
        state["cuda rng"] = torch.cuda.get_rng_state(machine.device)
    return state | {f"{name}.{key}": t for name, part in optimizer.state.items() for key, t in part.items()}

def resolve_config(cfg: Hyperparameters, machine: Machine, shard: Shard) -> Hyperparameters:
    """The config with everything filled in that was left to the machine and the shards."""
    cuda = machine.device.type == "cuda"
    vocab_size = cfg.vocab_size or math.ceil(shard.vocab_size / cfg.vocab_multiple) * cfg.vocab_multiple
    bos_id = cfg.bos_id if cfg.bos_id >= 0 else shard.bos_id
    if shard.vocab_size > vocab_size or bos_id != shard.bos_id:
        raise UserError(f"{shard.path} has {shard.vocab_size} ids and begins documents with {shard.bos_id}, which "
                        f"--vocab_size={vocab_size} --bos_id={bos_id} contradict; omit both flags")
    kernels = cfg.kernels and cuda and triton_kernels is not None and cfg.precision == "bf16"       # they take bf16
    float8 = cfg.float8 and kernels and torch.cuda.get_device_capability() >= (8, 9) and vocab_size % 16 == 0
    return replace(cfg, vocab_size=vocab_size, bos_id=bos_id, compile=cfg.compile and cuda, kernels=kernels,
                   float8=float8, earlier_windows=windows_before(cfg))

def device_memory(machine: Machine) -> float:
    """Bytes of GPU memory that this process may use."""
    fraction = torch.cuda.get_per_process_memory_fraction(machine.device)
    return fraction * torch.cuda.get_device_properties(machine.device).total_memory

def place_state(model: GPT, machine: Machine) -> Hyperparameters:
    """The config, with host_state on if weights, gradients and optimizer state would fill 0.4 of the GPU's memory."""
    if machine.device.type != "cuda":
        return model.cfg
    weights = sum(param.nbytes for param in model.parameters())
    state = 8 * sum(param.numel() for param in model.parameters()) / machine.world_size
    return replace(model.cfg, host_state=model.cfg.host_state or 2 * weights + state > 0.4 * device_memory(machine))

def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set."""
    stopping = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.set())
    return stopping

def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    dynamo = sys.modules.get("torch._dynamo")                       # importing it takes seconds
    return dynamo.utils.counters["stats"].get("unique_graphs", 0) if dynamo else 0

# ---- files

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

def command_output(*words: str) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=SCRIPT.parent, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

def source_files(cfg: Hyperparameters) -> list[Path]:
    """The files of the project that the run uses, the script first."""
    return [SCRIPT] + ([Path(triton_kernels.__file__)] if cfg.kernels else [])

def source_sha256(cfg: Hyperparameters) -> str:
    """sha256 over all that runs."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in source_files(cfg))).hexdigest()

# ---- run folder and log

# dense bf16 peaks in FLOP/s by a part of the device's name, from the vendor's datasheets; MFU is n/a for others
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "B200": 2250e12}

def train_time(seconds: float, step: int) -> str:
    """The last two fields of a log line."""
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"

class StepLog:
    """Logs each step one step late, so that nothing waits for the device. stop, save: a rank has voted for it."""

    def __init__(self, run: "Run", clock: Clock):
        self.run = run
        self.clock = clock
        self.pending = None
        self.stop = self.save = False

    def add(self, step: int, totals: Tensor):
        """Takes what training_step returned as step number `step`, and logs the one before."""
        self.flush()
        copied = None
        if totals.is_cuda:               # queued now: reading it later would also wait for the steps launched since
            totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(totals, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.pending = step, totals, copied

    def flush(self):
        """Logs the last step, so that all losses so far are known to be finite."""
        if self.pending is None:
            return
        step, totals, copied = self.pending
        if copied:
            copied.synchronize()
        loss, stop, save = totals.tolist()
        self.pending = None
        self.stop, self.save = stop > 0, save > 0
        self.run.step(step, self.clock, loss)

class Run:
    """The run folder: log.txt, run.json, the sources, the curve, checkpoints. Written as the run goes, by rank 0.

    A run that goes on from a checkpoint (`origin`, its meta.json `meta`) keeps its folder.
    """

    def __init__(self, cfg: Hyperparameters, machine: Machine, argv: list[str], data: Data, optimizer: Optimizer):
        self.cfg = cfg
        self.machine = machine
        self.data = data
        self.optimizer = optimizer
        self.model = optimizer.model
        self.master = machine.rank == 0
        self.identity = run_identity(cfg, data)
        self.origin, self.meta, self.notes = on_rank0(machine, lambda: find_checkpoint(cfg, self.identity))
        self.saved = self.origin
        self.history = [tuple(point) for point in self.meta.get("history", ())]
        self.tokens_seen = self.meta.get("tokens_seen", 0)
        self.total_tokens = tokens_of_steps(cfg, num_steps(cfg))
        self.train_losses = []
        self.live = False                # the console's last line is to be overwritten
        self.wrote = 0.0
        self.writer = ThreadPoolExecutor(1)
        self.writing = self.writer.submit(lambda: None)             # the last checkpoint, or one being written
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{SCRIPT.stem}_{os.urandom(3).hex()}"
        self.folder = self.origin.parent.parent if self.origin else Path(cfg.out_dir) / name
        on_rank0(machine, self.open_folder)
        if not self.master:
            return
        self.info = read_json(self.folder / "run.json")
        self.info.pop("error", None)
        if self.origin:
            write_atomically(self.folder / "checkpoint" / "latest", self.origin.name.encode())
            before = self.info.get("resumed") if isinstance(self.info.get("resumed"), list) else []
            self.info["resumed"] = before + [{"step": self.meta["step"], "at": now, "argv": argv}]
        self.save(format=1, status="running", script=SCRIPT.name, argv=argv, config=asdict(cfg), seed=cfg.seed,
                  sources={path.name: file_sha256(path) for path in source_files(cfg)},
                  source_sha256=source_sha256(cfg),
                  git={"commit": command_output("git", "rev-parse", "HEAD"),
                       "dirty": bool(command_output("git", "status", "--porcelain"))},
                  versions={"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
                            "numpy": np.__version__}, device=machine.name, world_size=machine.world_size,
                  gpu=command_output("nvidia-smi", "--format=csv", "--query-gpu=name,driver_version,memory.total,"
                                     "clocks.sm,clocks.mem,power.limit"), started=self.info.get("started", now),
                  # so that a record can be held to its track's validation data
                  data_sha256={shard.path: file_sha256(shard.path) for shard in data.val})

    def open_folder(self):
        """Makes what is not there yet of the folder, the log and the copies of the sources; raises UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.rglob("*"):                     # writing follows links and waits for pipes
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise UserError(f"{path} is a link or no file; put the file itself there, or remove it")
            self.log_file = open(self.folder / "log.txt", "a", buffering=1, encoding="utf-8",
                                 errors="backslashreplace")         # of names that are not text
            for source in source_files(self.cfg):
                copy = self.folder / source.name
                if not copy.exists() or copy.read_bytes() != source.read_bytes():
                    shutil.copyfile(source, copy)
                    self.log_file.write(source.read_text(encoding="utf-8") + "\n" + "=" * 100 + "\n")
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
            if console:                  # in one piece, since another thread may print, too
                print(("\r\033[K" if self.live else "") + text + "\n", end="", flush=True)
                self.live = False

    @contextlib.contextmanager
    def failures_noted(self):
        """Whatever ends the run early stands in run.json."""
        try:
            yield
        except BaseException as error:
            if self.master and self.info["status"] == "running":
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                self.save(status=status, error=f"{type(error).__name__}: {error}")
            raise

    def describe(self, tried: list[str]):
        """The first lines of the log."""
        cfg = self.cfg
        parameters = sum(param.numel() for param in self.model.parameters())
        self.print(f"{SCRIPT.name}: {self.machine.world_size} x {self.machine.name}, {cfg.precision}, "
                   f"{cfg.attention} attention, torch {torch.__version__}")
        products = self.model.matmul_parameters
        self.print(f"parameters: {parameters / 1e6:.1f} M, of which {products / 1e6:.1f} M in matrix products"
                   + "; the optimizer's moments of tables are in host memory" * cfg.host_state)
        self.print("\n".join([self.data.summary, *tried, *self.notes]))

    def timed_warm_up(self, backward: Backward) -> int:
        """What warm_up does and returns, with the seconds noted; without compilation there is nothing to warm up."""
        clock = Clock(self.machine)
        clock.start()
        if self.cfg.compile:
            micro_packs = warm_up(backward, self.optimizer, self.machine, self)
        else:
            micro_packs = largest_micro_batch(backward, self.optimizer, self.machine)
        clock.stop()
        if self.cfg.compile:
            self.print(f"compiled and warmed up in {clock.seconds:.1f} s; the initial state is back, bit for bit")
        self.save(compile_seconds=round(clock.seconds, 1))
        self.graphs = compiled_graphs()
        if self.machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return micro_packs

    def step(self, step: int, clock: Clock, summed_loss: float):
        """Logs a finished step and its loss; on a terminal live, else a line now and then."""
        cfg, seconds, terminal = self.cfg, clock.seconds, sys.stdout.isatty()
        tokens = cfg.stages[stage_index(cfg, step - 1)].batch_tokens
        loss = summed_loss / tokens / sum(loss_weights(cfg, step - 1))
        self.tokens_seen += tokens
        self.need_finite(loss, f"the loss of step {step}")
        self.train_losses.append((step, seconds, loss))
        text = f"step:{step}/{cfg.total_steps} train_loss:{loss:.4f} {train_time(seconds, step)}"
        self.print(text, console=False)
        if self.master and time.time() - self.wrote > (0.1 if terminal else 10):
            rate = self.tokens_seen / seconds
            peak = next((flops for part, flops in PEAK_FLOPS.items() if part in self.machine.name), 0)
            peak *= self.machine.world_size
            mfu = f"{600 * self.model.matmul_parameters * rate / peak:.1f}%" if peak else "n/a"
            left = (self.total_tokens - self.tokens_seen) / rate
            text += f"  {rate / 1000:.1f}k tokens/s  mfu {mfu}  {left:.0f} s left"
            print(f"\r\033[K{text}" if terminal else f"{text}\n", end="", flush=True)
            self.live, self.wrote = terminal, time.time()

    def need_finite(self, loss: float, what: str):
        """Raises FloatingPointError, which names the first bad parameter, if a loss is NaN or infinite."""
        if math.isfinite(loss):
            return
        bad = next((name for name, param in self.model.named_parameters() if not torch.isfinite(param).all()),
                   "none: only the loss")
        self.give_up(f"{what} is {loss}; first bad parameter: {bad}; lower --lr={self.cfg.lr} or look at the last "
                     "change")

    def give_up(self, text: str):
        """Raises FloatingPointError with the text and the last good checkpoint, after noting them in run.json."""
        self.writing.result()
        text += f"; last good checkpoint: {self.saved or 'none'}"
        self.save(status="diverged", error=text)
        raise FloatingPointError(text)

    def validated(self, step: int, clock: Clock, val_loss: float):
        """Logs a validation, which is also when run.json is brought up to date and the ranks compare parameters."""
        self.need_finite(val_loss, f"the validation loss of step {step}")
        sums = digest(dict(self.model.named_parameters())) if self.machine.world_size > 1 else {}
        of_ranks = all_gather_object(self.machine, sums)
        other = [(name, rank) for name in sums for rank, own in enumerate(of_ranks) if own[name] != of_ranks[0][name]]
        if other:
            self.give_up("after step {}, {} of rank {} is not that of rank 0; suspect that GPU".format(step, *other[0]))
        self.history.append((step, clock.seconds, val_loss))
        self.print(f"step:{step}/{self.cfg.total_steps} val_loss:{val_loss:.6f} {train_time(clock.seconds, step)}")
        self.save(train_time_ms=round(1000 * clock.seconds))

    def trained(self, clock: Clock):
        """Notes what is known when the last step is done."""
        self.save(recompiles=compiled_graphs() - self.graphs, train_time_ms=round(1000 * clock.seconds))

    def finish(self, status: str, step: int, clock: Clock):
        """The last lines of the log, the curve, and the final run.json.

        Notes the loss of a finished run in its checkpoint; raises UserError if that is not there.
        """
        self.writing.result()
        if not self.master:
            return
        written = self.saved is not None and self.saved.name == f"step_{step:06d}"
        if written and status == "finished":
            meta = read_json(self.saved / "meta.json") | {"val_loss": self.history[-1][2]}
            write_atomically(self.saved / "meta.json", json.dumps(meta, indent=1).encode())
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.machine.device.type == "cuda" else 0
        shards = self.data.train + self.data.val
        self.save(status=status, peak_memory_gib=round(memory, 2), data={s.path: s.num_tokens for s in shards})
        try:
            self.plot()
        except Exception as error:       # whatever drawing comes up with: the run is over and well
            self.print(f"no curve.svg ({type(error).__name__}: {error})")
        self.print(f"{status}: {step} steps, {self.tokens_seen:,} tokens in {clock.seconds:.1f} s of training "
                   f"({self.tokens_seen / clock.seconds:,.0f} tokens/s), "
                   f"compilation {self.info['compile_seconds']} s, {self.info['recompiles']} recompiles"
                   + (f", peak memory {memory:.1f} GiB" if memory else ""))
        self.print(f"log, curve and checkpoint are in {self.folder}")
        self.print(f"next: {self.next_command(status)}")
        if not written:
            raise UserError(f"the checkpoint of step {step} could not be written, {self.folder / 'log.txt'} says why; "
                            f"free space or choose another --out_dir")

    def next_command(self, status: str) -> str:
        """What to type next."""
        if status != "finished":
            return f"the same command with {shlex.quote(f'--resume={self.folder}')}"
        sample = SCRIPT.with_name("sample.py")
        words = ["python", os.path.relpath(sample) if sample.is_file() else "sample.py", f"--checkpoint={self.saved}"]
        if not SCRIPT.name.startswith("train_") or not sample.is_file():        # sample.py runs no other by itself
            words.append(f"--script={self.folder / SCRIPT.name}")
        return shlex.join(words)

    def plot(self):
        """curve.svg: training and validation loss over steps and over training time."""
        backend = os.environ.pop("MPLBACKEND", None)                # a notebook's, which a script cannot load
        try:
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        figure = Figure((11, 4), layout="constrained")
        train, val = np.array(self.train_losses).reshape(-1, 3), np.array(self.history)
        joined = "o-" if len(val) > 8 else "o"                      # a line through few points would claim too much
        for column, axis in enumerate(figure.subplots(1, 2, sharey=True)):
            axis.plot(train[:, column], train[:, 2], color="0.65", linewidth=0.8, label="training (weighted)")
            axis.plot(val[:, column], val[:, 2], joined, color="black", markersize=4, label="validation")
            axis.set(xlabel=("step", "training time in seconds")[column], ylabel="loss in nats per token",
                     yscale="log")       # the end matters more than the fall from the first value
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.grid(alpha=0.3, which="both")
            axis.legend()
        name = SCRIPT.stem.encode("utf-8", "replace").decode()      # names of files may be no text
        figure.suptitle(f"{name}: validation loss {val[-1, 2]:.4f} after {val[-1, 0]:.0f} steps")
        FigureCanvasSVG(figure).print_svg(self.folder / "curve.svg")

    def restore(self, clock: Clock):
        """Makes model and optimizer what the checkpoint holds."""
        self.train_losses = restore_state(self.origin, self.meta, self.model, self.optimizer, self.machine)
        self.print(f"goes on from {self.origin} after {clock.seconds:.1f} s of training")

    def save_checkpoint(self, step: int, stage: int, position: LoaderPosition, clock: Clock, everything: bool):
        """Copies the state of all ranks to CPU memory and starts a thread on the first that writes checkpoint/step_<n>.

        everything: also what going on needs, unless a gradient waits for Adam's next step.
        """
        clock.synchronize()
        begin = time.perf_counter()
        self.writing.result()            # never two at a time
        finite = all(torch.isfinite(param).all() for param in self.model.parameters())
        self.need_finite(0.0 if finite else math.nan, f"a parameter after step {step}")
        everything = everything and all(param.grad is None for param in self.model.parameters())
        tensors = gather_state(self.model, self.optimizer, self.machine, everything)
        held = time.perf_counter() - begin if clock.started else 0
        if not self.master:
            return
        files = {FILES[0]: {name: tensors.pop(name) for name in self.model.state_dict()}}
        if everything:
            files[FILES[1]] = tensors | {"train_losses": torch.tensor(self.train_losses, dtype=torch.float64)}
        meta = {"format": 1, "script": SCRIPT.stem, "source_sha256": self.info["source_sha256"],
                "sources": self.info["sources"], "config": asdict(self.cfg), "step": step, "stage": stage,
                "val_loss": self.history[-1][2] if self.history[-1][0] == step else None,
                "best_val_loss": min(loss for _, _, loss in self.history), "history": self.history,
                "tokenizer_sha256": self.data.train[0].tokenizer, "train_time": clock.seconds,
                "tokens_seen": self.tokens_seen, "identity": self.identity,
                "loader_position": [position.shard, position.document]}

        def write():
            begin, before = time.perf_counter(), self.saved
            try:
                self.saved = write_checkpoint(self.folder / "checkpoint", meta, files, self.data.tokenizer,
                                              self.cfg.keep)
                self.print(f"checkpoint of step {step}: {1000 * held:.0f} ms of training time, written in "
                           f"{time.perf_counter() - begin:.1f} s")
            except (OSError, SafetensorError) as error:
                self.print(f"warning: no checkpoint of step {step} ({error}); the last one: {before or 'none'}")
        self.writing = self.writer.submit(write)

# ---- checkpoints

FILES = ("model.safetensors", "optimizer.safetensors")
# what may be another one when a run goes on: it changes no more than rounding, what is written, or where the run ends
FREE = ("micro_batch_tokens", "stop_after", "val_every", "device", "attention", "kernels", "host_state", "compile",
        "graph_tokens", "compile_cache", "out_dir", "save_every", "keep", "resume", "resume_override", "vocab_dir")

def save_interval(cfg: Hyperparameters) -> tuple[int, int]:
    """(steps, seconds) between checkpoints, 0: not counted so."""
    number = int(cfg.save_every.removesuffix("min") or 0)
    return (0, 60 * number) if cfg.save_every.endswith("min") else (number, 0)

def run_identity(cfg: Hyperparameters, data: Data) -> dict:
    """What makes the run the run it is, as plain JSON: flags, shards by name and tokens, tokenizer and sources."""
    flags = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    groups = {"train_files": data.train, "val_files": data.val}
    files = {flag: [(Path(shard.path).name, shard.num_tokens) for shard in group] for flag, group in groups.items()}
    return json.loads(json.dumps(flags | files | {"source": source_sha256(cfg), "tokenizer": data.train[0].tokenizer}))

def gather_state(model: GPT, optimizer: Optimizer, machine: Machine, everything: bool) -> dict[str, Tensor]:
    """The model's tensors, or everything that training changes, whole, in CPU memory of the first rank."""
    found, pin = {}, machine.device.type == "cuda"
    for name, tensor in (run_state(model, optimizer, machine) if everything else model.state_dict()).items():
        if rows := optimizer.sharded_rows(name):
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
    everything = FILES[1] in meta["files"]
    found, losses = {}, []
    if machine.rank == 0:
        try:
            for name in meta["files"]:
                found |= load_file(folder / name)
            losses = found.get("train_losses", torch.empty(0)).reshape(-1, 3).tolist()
            torch.Generator().set_state(found.get("rng", torch.get_rng_state()))
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise RankError(f"{folder} cannot be read ({error}); choose another checkpoint") from None
    for name, tensor in (run_state(model, optimizer, machine) if everything else model.state_dict()).items():
        rows, random = optimizer.sharded_rows(name), name.endswith("rng")
        shape = (machine.world_size * len(tensor), *tensor.shape[1:]) if rows else tensor.shape
        whole = torch.zeros(shape, dtype=tensor.dtype, device=machine.device)
        if machine.rank == 0:
            target = whole[:rows] if rows else whole
            value = found.get(name, tensor if random else None)
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
    temporary = root / f".{final.name}.tmp"

    def clear():
        for path in root.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)
    clear()
    temporary.mkdir(parents=True)
    try:
        if tokenizer:
            write_atomically(temporary / "tokenizer.json", tokenizer)
        for name, tensors in files.items():
            (temporary / name).touch()
            mode = (temporary / name).stat().st_mode
            save_file(tensors, temporary / name)
            os.chmod(temporary / name, mode)                        # safetensors' own are for the owner alone
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        sums = {name: file_sha256(temporary / name) for name in files}
        write_atomically(temporary / "meta.json", json.dumps(meta | {"files": sums}, indent=1).encode())
        if final.exists():               # of before the run went back to an earlier one; `latest` does not name it
            os.replace(final, root / f".{final.name}.old")
        os.replace(temporary, final)
        write_atomically(root / "latest", final.name.encode())
        # the one just written is the newest, whatever a coarse or wrong clock says
        by_age = sorted(root.glob("step_*"), key=lambda path: (path == final, path.stat().st_mtime_ns, path.name))
        for path in by_age[:-keep]:
            os.replace(path, root / f".{path.name}.old")
    finally:
        clear()
    return final

def newest_checkpoint(path: Path) -> list[Path]:
    """Checkpoint folders that a run, its folder `checkpoint` or one of the folders in it means, the best first."""
    if path.parent.name == "checkpoint" or (path / "meta.json").exists():
        return [path]
    root = path if path.name == "checkpoint" else path / "checkpoint"
    newest = read_small(root / "latest").decode(errors="replace") or "step_~"   # comes after all numbers
    return sorted((folder for folder in root.glob("step_*") if folder.name <= newest), reverse=True)

def find_fault(folder: Path, meta: dict, last_step: int) -> str:
    """Why a run cannot go on from a checkpoint; empty if it can."""
    kinds = {"files": dict, "identity": dict, "step": int, "loader_position": tuple[int, int], "train_time": float,
             "tokens_seen": int, "history": tuple[tuple[int, float, float], ...]}
    try:
        _, _, step, position, _, _, history = (convert(meta[name], kind) for name, kind in kinds.items())
        if min(step, *position) < 0 or not history or not meta["files"].keys() <= set(FILES):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        maker = meta.get("script", SCRIPT.stem)
        return "its meta.json is damaged" if maker == SCRIPT.stem else f"it is of another script, {maker}.py"
    for name, content in meta["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != content:
            return f"its {name} is damaged"
    if FILES[1] not in meta["files"] and step < last_step:
        return f"it has no {FILES[1]}, which needs --save_every and an even step, or a signal"
    return "" if (folder.parent.parent / "run.json").is_file() else "it is not in the folder of a run"

def latest_run(out_dir: str) -> Path | None:
    """The newest unfinished run of this script that has a checkpoint."""
    files = sorted(Path(out_dir).glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for file in files:
        if read_json(file).get("script") == SCRIPT.name and newest_checkpoint(file.parent):
            return file.parent if read_json(file).get("status") != "finished" else None
    return None

def find_checkpoint(cfg: Hyperparameters, identity: dict) -> tuple[Path | None, dict, list[str]]:
    """(folder, its meta.json, lines for the log) of the checkpoint to go on from; (None, {}, lines) for a new run.

    Raises UserError if there is none, or if flags, shards or source are not those of its run.
    """
    flag, notes = f"--resume={cfg.resume}", []
    run = latest_run(cfg.out_dir) if cfg.resume == "latest" else Path(cfg.resume)
    if not cfg.resume or run is None:
        return None, {}, [f"{flag}: no unfinished run with a checkpoint in {cfg.out_dir}; a new run"] * bool(cfg.resume)
    for folder in newest_checkpoint(run):
        meta = read_json(folder / "meta.json")
        fault = find_fault(folder, meta, num_steps(cfg))
        if not fault:
            break
        notes.append(f"{folder} is not used: {fault}")
    else:
        raise UserError("; ".join([f"{flag}: {run} has no checkpoint to go on from", *notes]))
    before = meta["identity"]
    changed = {name: f"{name} was {before.get(name)!s:.80}, now {identity.get(name)!s:.80}"
               for name in sorted(before.keys() | identity.keys()) if before.get(name) != identity.get(name)}
    if refused := [text for name, text in changed.items() if name not in cfg.resume_override.split(",")]:
        raise UserError(f"{flag}: {folder} is of another run: {'; '.join(refused)}; put it back or add "
                        f"--resume_override={','.join(sorted(changed))}")
    if meta["step"] > cfg.total_steps or meta["loader_position"][0] >= cfg.epochs * len(identity["train_files"]):
        raise UserError(f"{flag}: {folder} goes on after step {meta['step']}, beyond the steps or the shards of this "
                        "run; put them back")
    return folder, meta, notes + [f"changed: {text}" for text in changed.values()]

def init_checkpoint(cfg: Hyperparameters) -> tuple[Path, dict]:
    """(folder, its meta.json) of the checkpoint that --init_from means; raises UserError."""
    folder = next(iter(newest_checkpoint(Path(cfg.init_from))), None)
    meta = read_json(folder / "meta.json") if folder else {}
    if not isinstance(meta.get("config"), dict) or not (folder / FILES[0]).is_file():
        raise UserError(f"--init_from={cfg.init_from} is not a run or a checkpoint; name a folder under logs/")
    return folder, meta

def windows_before(cfg: Hyperparameters) -> tuple[int, ...]:
    """Long windows through which the weights of --init_from have gone: their rotary frequencies follow from these."""
    if not cfg.init_from:
        return cfg.earlier_windows
    folder, meta = init_checkpoint(cfg)
    try:
        before = config_from_dict(meta["config"])
    except UserError as error:
        raise UserError(f"--init_from={cfg.init_from}: {error}") from None
    stage = meta.get("stage")
    if type(stage) is not int or not 0 <= stage < len(before.stages):
        raise UserError(f"--init_from={cfg.init_from}: its meta.json names the stage {stage!s:.80}, which its config "
                        "does not have; choose another checkpoint")
    for name in ("rope_base", "attn_scale"):
        if getattr(before, name, None) != getattr(cfg, name, None):
            raise UserError(f"--init_from={cfg.init_from} has {name}={getattr(before, name)}; add "
                            f"--{name}={getattr(before, name)}")
    return (*before.earlier_windows, *(row.long for row in before.stages[:stage + 1]))

def load_weights(model: GPT, machine: Machine):
    """Gives the model the weights of --init_from, on the first rank; raises UserError if it is of another shape."""
    folder, _ = init_checkpoint(model.cfg)
    try:
        found = load_file(folder / FILES[0])
        model.load_state_dict(found, strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"--init_from={model.cfg.init_from} does not fit this model: {error}") from None
    model.set_stage(0)                   # its buffers are of its own last stage

# ---- main

def run_main(train) -> int:
    """Runs train(cfg, argv) for the command line. Exit code: 0 done, 1 another rank died, 2 the user can put it right,
    3 diverged, 130 interrupted."""
    argv = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")           # a name that the terminal cannot show ends nothing
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    def say(text):
        print(f"{SCRIPT.name}: {text}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # until training starts it is as Ctrl-C
    try:
        return train(parse_config(argv), argv)
    except (UserError, FloatingPointError) as error:
        rank = os.environ.get("RANK") or "0"
        if rank == "0" or not rank.isdecimal() or isinstance(error, RankError):
            say(error)
        return 2 if isinstance(error, UserError) else 3
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # what Python still holds for it
        say("nobody reads the output any more, so the run has stopped; >FILE keeps it")
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
            raise
        say(f"{UserError(error)}; free space or choose another folder")
        return 2
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "to allocate" in str(error):            # of a GPU or a CPU
            say(f"{UserError(error)}; use a smaller model, or smaller --micro_batch_tokens=, --val_stream_tokens= or "
                "--pack_tokens=")
            return 2
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        say("another rank has died, see above; go on from the last checkpoint with --resume=latest")
        return 1
    except KeyboardInterrupt:
        say("interrupted before the first step; nothing to save")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
