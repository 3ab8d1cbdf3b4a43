"""Train a GPT-2-class model to 3.28 validation loss on FineWeb, as fast as possible.

    python data/fineweb.py 9                                              # validation shard + 0.9 B training tokens
    torchrun --standalone --nproc_per_node=8 train_gpt.py                 # the speedrun; any number of GPUs works
    python train_gpt.py --preset=tiny                                     # three minutes on a laptop CPU
    cp train_gpt.py my_idea.py                                            # edit a table row, run both, compare the logs

Result on one H200, development text (torch 2.11, records/track_0_dev): 3.887 in 26.4 s (--preset=single
--num_iterations=265, n=4), 3.891 in 49.6 s (--num_iterations=120, n=3). No run on eight GPUs or on FineWeb yet.
This file is the experiment; what every run needs (flags, shards, logs, checkpoints, signals) is in harness.py.
The recipe: one packed stream of whole documents, sliding-window attention, cheap lookup tables (value and bigram
embeddings) beside a small transformer, NorMuon for matrices and Adam for tables, everything growing in stages.
Facts and figures come from the public NanoGPT speedrun (KellerJordan/modded-nanogpt, record 89; "#n" below is its
record n, "PR n" its pull request n). Read in this order: the tables, GPT.hidden, Optimizer.step, train.

Shape suffixes: T tokens, H heads, D channels per head, C residual channels, V vocabulary, N matrices, K targets.
"""
# -----------------------------------------------------------------------------
# Imports (same in every train_*.py)

import base64
import json
import math
import sys
import time
from dataclasses import dataclass, replace      # replace: tables made of others, as in train_gpt_medium.py
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import harness
# sample.py, evaluate.py and dev/ reach some of these through the script, for an old one holds them itself
from harness import (ALL_GATHER, BLOCK, REDUCE_SCATTER, Backward, Clock, Machine, RankError, Run, Shard, UserError,
                     check_tokens, choose_backends, compiled_graphs, digest, documents, file_sha256, find_checkpoint,
                     first_rank, gather_state, memory_advice, memory_plan, open_shards, prefetch, read_tokenizer,
                     resolve_config, restore_state, run_identity, run_main, run_state, save_checkpoint, setup_machine,
                     share_parameters, to_device, was_restarted, watch_signals)

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
    Stage(1 / 3,   2_048,  512,   64,  128, 1.00, ((1, .5, .25), (1, .5, 0)), (0, 0)),
    Stage(1.000,   4_096,  512,   64,  256, 1.40, ((1, .5, 0), (1, 0, 0)),    (0, 0)),
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
    "attn_qk":      Rule("muon", 0.023,          (0.90,),      1.2,   "shard"),
    "attn_vo":      Rule("muon", 0.023,          (0.90,),      1.2,   "shard"),
    "value_embeds": Rule("adam", 0.6,            (0.75, 0.95), 0.025, "shard"),
    "bigram_embed": Rule("adam", 0.6,            (0.75, 0.95), 0.025, "shard"),
    "lm_head":      Rule("adam", 0.008,          (0.50, 0.95), 0.75,  "shard"),
    "embed":        Rule("adam", 0.008,          (0.50, 0.95), 0.75,  "shard"),     # trained from the untie step on
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
    attention: str = "auto"              # the fastest right one of flex, flex_small and varlen, else plain; or fa3
    kernels: bool = True                 # the kernels of triton_kernels.py, on CUDA
    float8: bool = True                  # products in float8, if the GPU and the kernels can; never in validation
    host_state: bool = False             # Adam's moments of tables in host memory; on by itself if the GPU is small
    compile: bool = True                 # torch.compile; off on the CPU
    graph_tokens: int = 16_384           # forwards of up to so many tokens become CUDA graphs, if memory allows
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

    def check_tables(self):
        """The part of harness.check_config that depends on the model; raises UserError."""
        check_layers(self.layers)

PRESETS = {
    "speedrun": Hyperparameters(),       # track 1, on eight GPUs
    "single": Hyperparameters(num_iterations=5080, val_every=1000, stages=SINGLE_STAGES, cooldown=0.5,      # on one
                              candidates=16_384),
    "tiny": Hyperparameters(             # learns to write Python-like text in three minutes on two cores
        train_files="data/local/train_*.bin", val_files="data/local/val_*.bin", val_tokens=65_536,
        val_stream_tokens=8192, slot_tokens=512, num_iterations=115, val_every=60, stages=TINY_STAGES,
        final_windows=(64, 256), layers=TINY_LAYERS, model_dim=192, head_dim=48, mlp_dim=768, gate_dim=16,
        bigram_rows=32_768, bigram_signs=256, vocab_multiple=1, precision="fp32", compile=False),
}

# -----------------------------------------------------------------------------
# Data (same in every train_*.py)

DOC_TOKENS = 64                          # padding is cut into documents of this length

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

# -----------------------------------------------------------------------------
# Model (same in every train_*.py)

def check_layers(layers: tuple[Layer, ...]):
    """Raises UserError if the model cannot be built from these rows."""
    rows = list(enumerate(layers))
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
        out = (F.linear(F.gelu(F.linear(x_TC, fc[net])), proj[part]) + bias[part]) * scale
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
        self.done = torch.zeros(batch, cfg.num_heads, dtype=torch.int32, device=like.device)    # see decode_attention
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
        return self.carry(self.cache.carried[name], x.view(*self.shape, *x.shape[1:])).flatten(0, 1)

    def attend(self, i: int, window: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (B * T, H, D) of layer i, whose ring takes in the new keys and values."""
        keys, values = self.cache.keys[i], self.cache.values[i]
        if self.kernel:
            return triton_kernels.decode_attention(q, k, v, keys, values, self.place[:, 0], self.starts,
                                                   self.cache.windows[window], self.cache.done)
        q, k, v = (x.view(*self.shape, *x.shape[1:]) for x in (q, k, v))
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
        self.model, self.rank, self.world_size = model, rank, world_size
        self.params, self.whole, self.state = dict(model.named_parameters()), {}, {}
        odd = sorted(self.params.keys() ^ PARAMETERS.keys())
        assert not odd, f"in one place only: {odd}"
        self.normuon, self.adam = normuon_update, adam_updates
        if model.cfg.compile:                                       # one graph a shape; the small parameters have one
            torch._dynamo.config.recompile_limit = 64
            self.normuon, self.adam = (torch.compile(rule, dynamic=False) for rule in (normuon_update, adam_updates))
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

    def share_rows(self, name: str) -> int:
        """Rows of a tensor of run_state of which each rank holds a share; 0 if each rank holds all of it."""
        param, _, key = name.partition(".")
        if key in ("", "count") or self.world_size == 1 or PARAMETERS[param].shared == "all":
            return 0
        return self.params[param].numel() // self.whole[param][0].numel()

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
        reduced, gathers = {name: self.reduce(name) for name in due}, []
        small = [name for name in due if PARAMETERS[name].rule == "adam" and PARAMETERS[name].shared == "all"]
        for names in [small] * bool(small) + [[name] for name in due if name not in small]:
            grads = []
            for grad, handle in map(reduced.pop, names):
                if handle:
                    handle.wait()
                grads.append(grad)
            rule = PARAMETERS[names[0]]
            (self.update_adam if rule.rule == "adam" else self.update_muon)(names, grads, step, apply)
            if self.world_size > 1 and rule.shared == "shard":
                gathers.append(ALL_GATHER(self.whole[names[0]], self.part(names[0]), async_op=True))
        for handle in gathers:
            handle.wait()
        if tied and step % 2:
            embed.copy_(head)
            if not is_tied(cfg, step + 2):                          # last update as one: they part with equal state
                for key, value in self.state["lm_head"].items():
                    self.state["embed"][key].copy_(value)

    def update_adam(self, names: list[str], grads: list[Tensor], step: int, apply: Tensor):
        """Adam on this rank's part of parameters: one table, or all the small ones."""
        cfg, updates = self.model.cfg, []
        for name, grad in zip(names, grads):
            rule, state, part = PARAMETERS[name], self.state[name], self.part(name)
            lr, (beta1, beta2) = rule.lr * cfg.lr * lr_factor(cfg, step), rule.betas
            state["count"] += 1
            corrected = lr * math.sqrt(1 - beta2 ** int(state["count"])) / (1 - beta1 ** int(state["count"]))
            tensors, scalars = (grad, part, state["m"], state["v"]), (scalar(corrected), scalar(lr * lr * rule.decay))
            updates.append((*tensors, *scalars, beta1, beta2))
        if not cfg.host_state or rule.shared == "all":
            return self.adam(updates, apply)
        for g, p, *kept in zip(*(tensor.split(HOST_ROWS) for tensor in tensors)):
            m, v = (tensor.to(p.device, non_blocking=True) for tensor in kept)
            self.adam([(g, p, m, v, *scalars, beta1, beta2)], apply)
            for tensor, new in zip(kept, (m, v)):
                tensor.copy_(new, non_blocking=True)

    def update_muon(self, names: list[str], grads: list[Tensor], step: int, apply: Tensor):
        """NorMuon on this rank's part of one bank."""
        cfg, rule, state, part = self.model.cfg, PARAMETERS[names[0]], self.state[names[0]], self.part(names[0])
        rates = rule.lr if isinstance(rule.lr, tuple) else (rule.lr,)
        first, factor = self.rank * part.size(0), cfg.lr * lr_factor(cfg, step)
        lr = torch.tensor([rates[(first + n) % len(rates)] * factor for n in range(part.size(0))])
        lr = lr.view(-1, 1, 1).to(part.device, non_blocking=True)
        self.normuon(grads[0], state["master"], state["m"], state["v"], lr, scalar(rule.decay * ATTN_LR * factor),
                     scalar(momentum(cfg, step)), rule.betas[0], apply)
        part.copy_(torch.where(apply, state["master"], part))

def scalar(value: float) -> Tensor:
    """A number as a tensor, for which compiled code is not made anew."""
    return torch.tensor(value, dtype=torch.float32)

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
# Training and validation (same in every train_*.py)

def training_step(backward: Backward, optimizer: Optimizer, batches: list, step: int, machine: Machine,
                  *wishes: bool) -> Tensor:
    """Trains on one batch; (its summed loss, how many ranks have each wish) over all ranks, on the device."""
    weights = torch.tensor(loss_weights(optimizer.model.cfg, step)).to(machine.device, non_blocking=True)
    total = torch.tensor([0.0, *map(float, wishes)]).to(machine.device, non_blocking=True)
    for batch in batches:
        with memory_advice(optimizer.model.cfg, "micro_batch_tokens", len(batch[0])):
            total[0] += backward(*to_device(batch, machine.device), weights)
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

def warm_up(backward: Backward, optimizer: Optimizer, machine: Machine, micro_slots: int, replays: bool):
    """Compiles all that the run will use, on made-up tokens, then puts everything back and checks that bit for bit."""
    cfg, raw, model = optimizer.model.cfg, optimizer.model, backward.model
    before = digest(run_state(raw, optimizer, machine))
    generator = np.random.default_rng(0)

    def synthetic(length):
        tokens = generator.integers(0, cfg.vocab_size, length, dtype=np.int32)
        tokens[::512] = cfg.bos_id
        return tokens, np.roll(tokens, -1).astype(np.int64)
    untied = round(cfg.untie * cfg.num_iterations) // 2 * 2 + 3
    micro_batch = synthetic(micro_slots * cfg.slot_tokens)
    for replay in (False, True) if replays else (False,):           # a graph can only be made of what is compiled
        backward.replays = replay
        for step in (0, 1, untied - 1, untied):                     # Adam rests at even steps and moves at odd ones
            training_step(backward, optimizer, [micro_batch] * 2, step, machine)
    # backends that take windows as numbers need a graph for each
    for stage in range(len(cfg.stages)) if not cfg.attention.startswith("flex") else [0]:
        raw.set_stage(stage)
        training_step(backward, optimizer, [micro_batch] * 2, 0, machine)
        validate(model, cfg, [synthetic(cfg.val_stream_tokens)] * machine.world_size, machine)
    raw.init_parameters()
    share_parameters(raw, machine)
    optimizer.reset()
    changed = [name for name, value in digest(run_state(raw, optimizer, machine)).items() if value != before[name]]
    assert not changed, f"warm-up changed the initial state of {changed}"

def train(cfg: Hyperparameters, argv: list[str]) -> int:
    """The experiment: build, warm up, start the clock, train, validate with the clock stopped, save. The exit code."""
    machine = setup_machine(cfg)
    train_shards, val_shards = open_shards(cfg.train_files, cfg.val_files)
    cfg = resolve_config(cfg, machine, train_shards[0], triton_kernels is not None)
    num_steps = min(cfg.stop_after or cfg.total_steps, cfg.total_steps)
    tokens, tokenizer = check_tokens(cfg, train_shards, num_steps), read_tokenizer(train_shards[0])
    cfg, tried = choose_backends(SCRIPT, cfg, machine)
    streams = validation_streams(cfg, val_shards)
    head_chunk = triton_kernels.HEAD_CHUNK if cfg.kernels else HEAD_CHUNK
    cfg, micro_slots, replays, plan = memory_plan(cfg, machine, head_chunk)

    identity = run_identity(SCRIPT, cfg, tokenizer, train_files=train_shards, val_files=val_shards)
    find = partial(find_checkpoint, SCRIPT, cfg, argv, num_steps, identity, was_restarted(machine))
    origin, meta, notes = first_rank(machine, find)

    run = Run(SCRIPT, cfg, machine, argv, origin, meta)
    if run.master:                       # so that a record can be held to its track's validation data
        run.save(data_sha256={shard.path: file_sha256(shard.path) for shard in val_shards})
    stopping, agreed = watch_signals(run)
    with torch.device(machine.device):
        model = GPT(cfg)
    share_parameters(model, machine)
    optimizer = Optimizer(model, machine.rank, machine.world_size)
    if cfg.compile:                      # a second start need not trace the float8 products again
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        torch._inductor.config.dynamic_scale_rblock = False         # its variants compile one by one, in this process
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model
    backward = Backward(forward)
    run.print(f"{SCRIPT.name}: {machine.world_size} x {machine.name}, {cfg.precision}, "
              f"{cfg.attention} attention, torch {torch.__version__}")
    run.print(f"parameters: {sum(param.numel() for param in model.parameters()) / 1e6:.1f} M, of which "
              f"{model.matmul_parameters / 1e6:.1f} M in matrix products")
    run.print(f"{tokens}; validation on {cfg.val_tokens:,}")
    run.print("\n".join([*tried, plan, *notes]))

    clock = Clock(machine)
    clock.start()
    if cfg.compile:
        warm_up(backward, optimizer, machine, micro_slots, replays)
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
        save_checkpoint(run, model, optimizer, done, stage, clock, tokenizer, everything, place=place,
                        identity=identity)

    def log(step):                       # whether ranks wish to stop, and to save
        loss, *wishes = pending.tolist()
        tokens = cfg.stages[stage_index(cfg, step - 1)].batch_tokens
        run.step(step, clock, model, loss / tokens / sum(loss_weights(cfg, step - 1)), tokens)
        return wishes
    stop, due, last_save = False, False, time.monotonic()
    pending = None                       # the loss of the last step, read one step late so that nothing waits
    while done < num_steps and not (stop and done % 2 == 0):        # even: no gradient waits for Adam's next step
        batches, place = next(loader)
        if stage != (stage := stage_index(cfg, done)):
            model.set_stage(stage)
        overdue = unit == "minutes" and machine.rank == 0 and time.monotonic() - last_save > 60 * every
        loss = training_step(backward, optimizer, batches, done, machine, stopping.is_set(), overdue)
        done += 1
        if pending is not None:
            stop, due = log(done - 1)
        pending = loss
        validating = cfg.val_every and done % cfg.val_every == 0 and done < num_steps
        saving = done % 2 == 0 and done < num_steps and (due or unit == "steps" and every and done % every < 2)
        if validating or saving:         # not before all losses so far are known to be finite
            stop, due = log(done)
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
        log(done)
    run.save(recompiles=compiled_graphs() - graphs, train_time_ms=round(1000 * clock.seconds))
    finished = done == num_steps
    if saved != done:                    # before the evaluation can fail
        save(everything=not finished or every > 0)
    run.writing.result()
    if finished:
        if done == cfg.total_steps:
            model.set_stage(stage, final=True)
        run.validated(done, clock, validate(forward, cfg, streams, machine), model)
    run.finish("finished" if finished else "interrupted", done, clock, train_shards + val_shards)
    return 0 if finished else 130

SCRIPT = Path(__file__)
parse_config = partial(harness.parse_config, presets=PRESETS)       # these two are for sample.py and records/guard.py
config_from_dict = partial(harness.config_from_dict, kind=Hyperparameters)

def main() -> int:
    """Runs the command line; the exit code, see run_main."""
    return run_main(SCRIPT, PRESETS, train)

# -----------------------------------------------------------------------------
# Kernels: appendix (same in every train_*.py)

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
        losses, dx, dweight = [], [], torch.zeros_like(weight_VC, dtype=torch.float32)
        for x, targets in zip(x_TC.split(HEAD_CHUNK), targets_TK.split(HEAD_CHUNK)):
            logits = map_logits(F.linear(x, weight_VC))
            wanted, places = weights_K * (targets >= 0), targets.clamp(min=0)
            counted = logits if counts_V is None else logits + counts_V.log()
            total = counted.logsumexp(dim=1, keepdim=True)
            losses.append(((total - logits.gather(1, places)) * wanted).sum())
            grad = (counted - total).exp() * wanted.sum(dim=1, keepdim=True)
            grad = grad.scatter_add(1, places, -wanted) * logits * (1 - logits / LOGIT_SCALE) / LOGIT_WIDTH
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

def probe_case(cfg: Hyperparameters, name: str, device: torch.device):
    """(function, the same in plain PyTorch, inputs that have gradients) of an attention or a kernel, to try it here."""
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

if __name__ == "__main__":
    sys.exit(main())
