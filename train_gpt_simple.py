"""Train a GPT: the script to read first. One file, plain PyTorch, any device.

    python data/text.py --tokenizer=bytes                           # once: the text of the preset tiny
    python train_gpt_simple.py --preset=tiny                        # minutes on two CPU cores
    python train_gpt_simple.py                                      # GPT-2 small's size on one GPU, FineWeb's text
    torchrun --standalone --nproc_per_node=8 train_gpt_simple.py    # the same run on eight GPUs
    python train_gpt_simple.py --preset=tiny --depth=4 --ratio=1    # the dial: sizes and rates follow from the depth

The recipe: a pre-norm decoder with rotary positions, normalised queries and keys, sliding windows and an untied head;
Muon for matrices, AdamW for the rest; a stream of whole documents that do not see each other. Each idea to try is one
field of Hyperparameters and the line where it acts. train_gpt.py is the fast relative, which can also resume.
Shapes: T tokens, H heads, D channels per head, C residual channels, V vocabulary, N matrices, B rows.
"""
# -----------------------------------------------------------------------------
# Imports

import glob
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# -----------------------------------------------------------------------------
# Hyperparameters

@dataclass(frozen=True)
class Hyperparameters:
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"    # training shards (a glob), read in the order of names
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"        # validation shards (a glob)
    val_tokens: int = 10_485_760         # the validation loss is the mean over the first so many tokens
    val_stream_tokens: int = 32_768      # length of a forward pass in validation
    pack_tokens: int = 32_768            # length of a forward pass in training; ranks share out whole packs
    epochs: int = 1                      # how often the text may be read, each time with documents in another order
    # model
    depth: int = 12                      # layers; given as a flag, sizes and rates follow from it (see dial)
    model_dim: int = 0                   # residual channels; 0: from the depth
    head_dim: int = 128                  # channels of a head
    windows: tuple[int, ...] = (512, 512, 512, 2048)    # tokens that each layer looks back, in turn; 0: any number
    rope_base: float = 10_000.0          # longest rotary period, in tokens per radian
    mlp: Literal["relu2", "swiglu"] = "relu2"           # swiglu has 2/3 of the hidden units, so as many weights
    gate: Literal["none", "head", "element"] = "none"   # gated attention (arXiv 2505.06708)
    value_residual: bool = False         # mix the first layer's values into the others' (arXiv 2410.17897)
    norm_scaling: bool = False           # divide a layer's normalised input by sqrt(its number) (arXiv 2502.05795)
    softcap: float = 0.0                 # squash logits to +-softcap by tanh; 0: off
    z_loss: float = 0.0                  # weight of log(sum exp logits)^2 in training (PaLM: 1e-4); 0: off
    vocab_size: int = 0                  # 0: from the shards, rounded up to a multiple of 64
    bos_id: int = -1                     # begin-of-document id; -1: from the shards
    # training
    batch_tokens: int = 0                # per step, over all ranks; 0: from the depth
    num_iterations: int = 0              # steps of batch_tokens; 0: from the depth
    ratio: float = 10.5                  # of the dial: training tokens per weight in matrix products
    width_rule: Literal["nanochat", "mup", "none"] = "nanochat"     # how rates follow from sizes, see rate_factors
    optimizer: Literal["muon", "adamw"] = "muon"        # of matrices; the rest has AdamW
    muon_lr: float = 0.02                # of matrices under Muon: spectral norm per step
    adamw_lr: float = 0.002              # of matrices under AdamW
    embed_lr: float = 0.3                # of the embedding
    head_lr: float = 0.008               # of the head
    weight_decay: float = 0.2            # of matrices
    decay_rule: Literal["rate", "independent"] = "rate"     # decay times the rate with its factors, or without them
    schedule: Literal["wsd", "cosine", "linear", "seesaw"] = "wsd"  # of the rate; seesaw (arXiv 2510.14717): and batch
    warmup: int = 20                     # steps until the full learning rate
    cooldown: float = 0.6                # last fraction of the run, over which wsd falls
    lr_floor: float = 0.05               # learning rate factor at the end
    # machine
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one, else cpu
    precision: Literal["bf16", "fp32"] = "bf16"         # of the computation; weights are always fp32
    attention: Literal["auto", "flex", "plain"] = "auto"    # auto: flex if the model is compiled
    compile: bool = True                 # torch.compile, on CUDA only
    seed: int = 0                        # of the initial weights, and of the order of documents after the first epoch
    val_every: int = 250                 # steps between validations; 0: only first and last
    out_dir: str = "logs"                # each run makes a folder in it

    @property
    def stages(self) -> tuple:           # other scripts change along the run
        return ("the only one",)

    @property
    def total_steps(self) -> int:
        return len(plan(self))

PRESETS = {"small": Hyperparameters(model_dim=768, batch_tokens=131_072, num_iterations=1000, width_rule="none"),
           "tiny": Hyperparameters("data/local/train_*.bin", "data/local/val_*.bin", 65_536, 8192, pack_tokens=2048,
                                   depth=4, model_dim=192, head_dim=48, windows=(64, 256), batch_tokens=4096,
                                   num_iterations=120, width_rule="none", val_every=60, precision="fp32")}
DIAL = {"model_dim": 0, "batch_tokens": 0, "num_iterations": 0, "width_rule": "nanochat"}       # what --depth=N means
BASE_WIDTH, BASE_BATCH = 768, 2**19      # for which the learning rates are meant under nanochat and mup
LIMITS = {"val_stream_tokens pack_tokens depth epochs val_tokens head_dim": (1, 2**24),
          "model_dim batch_tokens vocab_size warmup seed val_every windows": (0, 2**32), "num_iterations": (0, 10**7),
          "ratio muon_lr adamw_lr embed_lr head_lr rope_base cooldown": (1e-9, 1e9),
          "softcap z_loss weight_decay lr_floor": (0, 1e9)}

# -----------------------------------------------------------------------------
# Command line

class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""

def parse_value(name: str, text: str, kind):
    """Value of `--name=text` with the type of the annotation; raises UserError."""
    options = {"true": True, "false": False} if kind is bool else {option: option for option in get_args(kind)}
    is_tuple = get_origin(kind) is tuple
    try:
        return tuple(map(int, text.split(","))) if is_tuple else options[text] if options else kind(text)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number"}.get(kind, "like 64,256" if is_tuple else f"in {[*options]}")
        raise UserError(f"--{name}={text} is not {wanted}; --help lists the flags and their defaults") from None

def parse_config(argv: list[str]) -> Hyperparameters:
    """The config of `--preset=name`, by default the first, and `--field=value` flags; UserError on anything else."""
    flags, kinds = {"preset": next(iter(PRESETS))}, {field.name: field.type for field in fields(Hyperparameters)}
    for arg in argv:
        name, equals, flags[name] = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals or name not in kinds.keys() | {"preset"}:
            raise UserError(f"{arg!r} is not a flag; flags look like --field=value, --help lists them")
    if (preset := flags.pop("preset")) not in PRESETS:
        raise UserError(f"--preset={preset} does not exist; choose from {', '.join(PRESETS)}")
    values = {name: parse_value(name, text, kinds[name]) for name, text in flags.items()}
    cfg = replace(PRESETS[preset], **(DIAL if "depth" in flags else {}) | values)
    for names, (low, high) in LIMITS.items():
        for name, value in ((name, getattr(cfg, name)) for name in names.split()):
            if not all(low <= item <= high for item in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"--{name}={str(value).strip('(,)')} is out of range; choose from {low} to {high}")
    for name, unit in (("head_dim", 2), ("model_dim", cfg.head_dim), ("batch_tokens", cfg.pack_tokens)):
        if getattr(cfg, name) % unit:
            raise UserError(f"--{name}={getattr(cfg, name)} is no multiple of {unit}; see --head_dim, --pack_tokens")
    return cfg

def config_from_dict(values: dict) -> Hyperparameters:
    """The config in a checkpoint's meta.json; raises UserError on unknown, missing or impossible fields."""
    if not isinstance(values, dict) or values.keys() != asdict(Hyperparameters()).keys():
        raise UserError("the checkpoint's config has other fields than this script; use the script that made it")
    return parse_config([f"--{name}=" + (",".join(map(str, value)) if isinstance(value, (list, tuple)) else
                         str(value).lower() if isinstance(value, bool) else f"{value}") for name, value in values.items()])

# -----------------------------------------------------------------------------
# Data

GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"

@dataclass(frozen=True)
class Shard:
    """One file of tokens: a header of 256 int32, then the ids of documents, each of which begins with bos_id."""
    path: str
    num_tokens: int
    vocab_size: int
    bos_id: int
    width: int                           # bytes per token
    tokenizer: str                       # sha256 of its tokenizer.json

    def read(self) -> np.ndarray:
        """(num_tokens,) uint16 or uint32, mapped from the file; raises UserError if an id is not in the vocabulary."""
        ids = np.memmap(self.path, f"<u{self.width}", "r", offset=1024, shape=(self.num_tokens,))
        if (highest := ids.max()) >= self.vocab_size:
            raise UserError(f"{self.path} holds id {highest}, but has only {self.vocab_size} ids; make it again")
        return ids

def read_header(path: str) -> Shard:
    """Header of a shard, with zeros read as GPT-2's values; raises UserError if the file is not a whole shard."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(256, "<i4")
    magic, version, num_tokens, vocab_size, bos_id, width = map(int, header[:6])
    vocab_size, bos_id, width = vocab_size or 50257, bos_id or 50256, width or 2
    if ((magic, version) != (20240520, 1) or width not in (2, 4) or not 0 <= bos_id < vocab_size <= 256 ** width
            or num_tokens < 1 or size != 1024 + num_tokens * width):
        raise UserError(f"{path} is not a whole shard of version 1; make it with data/fineweb.py or data/text.py")
    tokenizer = header[8:16].tobytes().hex() if header[8:16].any() else GPT2_TOKENIZER_SHA256
    return Shard(path, num_tokens, vocab_size, bos_id, width, tokenizer)

def open_shards(train_files: str, val_files: str) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards of two globs; raises UserError if none match or tokenizers differ."""
    groups = []
    for flag, pattern in (("train_files", train_files), ("val_files", val_files)):
        folder, name = os.path.split(pattern)                       # a folder's name may have signs of a glob
        inside = os.path.join(glob.escape(folder), name) if os.path.isdir(folder) else pattern
        groups.append([read_header(path) for path in sorted(glob.glob(inside)) or glob.glob(glob.escape(pattern))])
        if not groups[-1]:
            raise UserError(f"--{flag}={pattern} matches no file; make some with data/fineweb.py or data/text.py")
    if len({(shard.tokenizer, shard.vocab_size, shard.bos_id) for group in groups for shard in group}) > 1:
        raise UserError(f"--train_files={train_files} and --val_files={val_files} have several tokenizers; use one")
    return groups[0], groups[1]

def read_tokenizer(shard: Shard, vocab_dir: str = "") -> bytes:
    """tokenizer.json beside a shard; b"" for GPT-2's shards without one, whose vocabulary sample.py finds by itself."""
    path = Path(shard.path).parent / "tokenizer.json"
    text = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(text).hexdigest() != shard.tokenizer and (text or shard.tokenizer != GPT2_TOKENIZER_SHA256):
        raise UserError(f"{path} is not the tokenizer of {shard.path}; copy the right one there")
    return text

def documents(text: np.ndarray, bos_id: int) -> list[np.ndarray]:
    """The documents of a text, each with the token that follows it, so that every token has its target."""
    borders = [0, *(np.flatnonzero(text[1:-1] == bos_id) + 1), len(text) - 1]
    return [text[start:end + 1] for start, end in zip(borders, borders[1:])]

def streams(docs, length: int, bos_id: int, whole: bool):
    """Yields (inputs (length,) int32, targets (length,) int64): documents one after the other, the end padded with -1.
    What does not fit goes on in the next stream, where it sees nothing before; with `whole` all of the document does."""
    inputs, room = None, 0
    for doc in docs:
        start, end = 0, len(doc) - 1
        while start < end:
            if room == 0 or (whole and room < min(end - start, length)):
                if inputs is not None:
                    yield inputs, targets
                inputs, targets, room = np.full(length, bos_id, np.int32), np.full(length, -1), length
            at, size = length - room, min(end - start, room)
            inputs[at:at + size] = doc[start:start + size]
            targets[at:at + size] = doc[start + 1:start + size + 1]
            start, room = start + size, room - size
    yield inputs, targets

def training_documents(cfg: Hyperparameters, shards: list[Shard]):
    """Yields the documents of all epochs: first as they lie in the files, then in another order each time."""
    for epoch, (number, shard) in itertools.product(range(cfg.epochs), enumerate(shards)):
        docs = documents(np.append(shard.read(), shard.bos_id), shard.bos_id)
        order = np.random.default_rng((cfg.seed, epoch, number)).permutation(len(docs))
        yield from (docs[i] for i in order) if epoch else docs

def validation_streams(cfg: Hyperparameters, shards: list[Shard]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) streams that hold each of the first val_tokens tokens once; only longer documents are cut."""
    found = sum(shard.num_tokens for shard in shards)
    if found <= cfg.val_tokens:
        raise UserError(f"--val_files={cfg.val_files} holds {found} tokens, --val_tokens={cfg.val_tokens} needs more; "
                        f"add text or use --val_tokens={max(found - 1, 1)}")
    text = documents(np.concatenate([shard.read() for shard in shards])[:cfg.val_tokens + 1], shards[0].bos_id)
    return list(streams(text, cfg.val_stream_tokens, shards[0].bos_id, whole=True))

# -----------------------------------------------------------------------------
# Model

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without gain."""
    return F.rms_norm(x, (x.size(-1),))

def rotary(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates channel pairs (j, j + D/2) by the angles of each token's position."""
    a, b = x_THD.chunk(2, dim=2)
    return x_THD * cos_TD[:, None] + torch.cat([-b, a], dim=2) * sin_TD[:, None]

class Stream:
    """Positions and attention of one stream of documents, of which each begins with bos_id and sees no other."""
    def __init__(self, cfg: Hyperparameters, tokens_T: Tensor):
        self.flex, self.masks = cfg.attention == "flex", {}
        self.index = torch.arange(len(tokens_T), device=tokens_T.device, dtype=torch.int32)
        self.doc_start = torch.where(tokens_T == cfg.bos_id, self.index, 0).cummax(0).values.int()
        self.position = self.index - self.doc_start

    def attend(self, i: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D) of q, k, v (T, H, D): each token sees itself and the `window` ones before, of its document."""
        T, index, first = len(q), self.index, torch.maximum(self.doc_start, self.index - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if self.flex:
            if window not in self.masks:
                self.masks[window] = create_block_mask(lambda b, h, query, key: (key <= query) & (key >= first[query]),
                                                       None, None, T, T, device=q.device)
            return flex_attention(q, k, v, block_mask=self.masks[window])[0].transpose(0, 1)
        parts = []
        for low in range(0, T, 512):     # so many queries at a time, with the keys that their windows reach
            near, far = slice(low, low + 512), slice(max(0, low - window), low + 512)
            seen = (index[far] <= index[near, None]) & (index[far] >= first[near, None])
            parts.append(F.scaled_dot_product_attention(q[:, :, near], k[:, :, far], v[:, :, far], attn_mask=seen))
        return torch.cat(parts, 2)[0].transpose(0, 1)

class Linear(nn.Linear):
    """A matrix, kept in fp32 and used in the precision of its input."""
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Block(nn.Module):
    """One layer: what attention and then the MLP add to the stream."""
    def __init__(self, cfg: Hyperparameters, layer: int):
        super().__init__()
        C, self.head_dim, self.layer, self.swiglu = cfg.model_dim, cfg.head_dim, layer, cfg.mlp == "swiglu"
        hidden = C // 6 * 16 if self.swiglu else 4 * C
        self.scale = (layer + 1) ** -0.5 if cfg.norm_scaling else 1.0
        windows = [window or 2**24 for window in cfg.windows]       # the last layer looks back the furthest
        self.window = max(windows) if layer == cfg.depth - 1 else windows[layer % len(windows)]
        self.q, self.k, self.v, self.attn_proj = (Linear(C, C, bias=False) for _ in range(4))
        self.fc, self.mlp_proj = Linear(C, hidden * (1 + self.swiglu), bias=False), Linear(hidden, C, bias=False)
        self.gate = Linear(C, C // {"head": C // cfg.head_dim}.get(cfg.gate, 1), bias=False) if cfg.gate != "none" else None
        self.v_lambda = nn.Parameter(torch.empty(())) if cfg.value_residual and layer else None

    def forward(self, x_TC: Tensor, rope: tuple, context, v1: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream after this layer, and the values of the first layer, which gets None for them."""
        u = norm(x_TC) * self.scale
        q, k, v = (linear(u).view(len(u), -1, self.head_dim) for linear in (self.q, self.k, self.v))
        v1 = v if v1 is None else v1
        if self.v_lambda is not None:
            v = torch.lerp(v, v1, self.v_lambda.to(v.dtype))
        y = context.attend(self.layer, self.window, rotary(norm(q), *rope), rotary(norm(k), *rope), v)
        if self.gate is not None:        # starts as a factor of 1
            y = y * 2 * torch.sigmoid(self.gate(u)).view(*y.shape[:2], -1)
        x_TC = x_TC + self.attn_proj(y.flatten(1))
        hidden = self.fc(norm(x_TC) * self.scale)
        if self.swiglu:
            gate, hidden = hidden.chunk(2, dim=1)
        return x_TC + self.mlp_proj(F.silu(gate) * hidden if self.swiglu else hidden.relu().square()), v1

class GPT(nn.Module):
    """The model of a config in which nothing is left to the shards and the dial (see resolve_config)."""
    def __init__(self, cfg: Hyperparameters):
        super().__init__()
        self.cfg, self.dtype = cfg, {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.precision]
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.lm_head = Linear(cfg.model_dim, cfg.vocab_size, bias=False)
        self.matmul_parameters = sum(param.numel() for param in [*self.blocks.parameters(), self.lm_head.weight])
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self):
        """The initial state, the same for the same seed and kind of device. Every block starts by adding nothing."""
        generator = torch.Generator(self.embed.weight.device).manual_seed(self.cfg.seed)
        for name, param in self.named_parameters():
            if name.endswith(("v_lambda", "proj.weight", "gate.weight")):
                param.fill_(0.5 if name.endswith("v_lambda") else 0)
            else:
                std = 0.02 if self.cfg.width_rule == "none" else param.size(1) ** -0.5
                param.normal_(0, {"embed.weight": 1.0, "lm_head.weight": 0.001}.get(name, std), generator=generator)

    def set_stage(self, index: int, final: bool = False):
        """Does nothing: other scripts change their windows along the run."""

    def trunk(self, tokens_T: Tensor, context) -> Tensor:
        """What the head reads, (T, C). context: a Stream, or the Cache in decoding."""
        x, v1 = self.embed(tokens_T).to(self.dtype), None
        freq = self.cfg.rope_base ** -torch.linspace(0, 1, self.cfg.head_dim // 2, device=x.device)
        angle = (context.position[:, None] * freq).repeat(1, 2)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x, v1 = block(x, rope, context, v1)
        return norm(x)

    def logits(self, x_TC: Tensor) -> Tensor:
        """fp32 logits (..., V) of what trunk returns."""
        scale, cap = BASE_WIDTH / self.cfg.model_dim if self.cfg.width_rule == "mup" else 1.0, self.cfg.softcap
        logits = self.lm_head(x_TC).float() * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def score(self, tokens_T: Tensor, targets_T: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target (T,) in nats, fp32, 0 where it is -1; and the likeliest token (T,) int64.
        z_loss: weight of the squared logarithm of the softmax's denominator, which is added to the cross-entropy."""
        logits = self(tokens_T)
        losses = F.cross_entropy(logits, targets_T, ignore_index=-1, reduction="none")
        if z_loss:
            losses = losses + z_loss * logits.logsumexp(1).square() * (targets_T >= 0)
        return losses, logits.detach().argmax(1)

    def forward(self, tokens_T: Tensor, targets_T: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Logits (T, V) fp32 of one stream of documents; with targets (T,) the sum of their losses, see score."""
        if targets_T is not None:
            return self.score(tokens_T, targets_T, z_loss)[0].sum()
        return self.logits(self.trunk(tokens_T, Stream(self.cfg, tokens_T)))

    def new_cache(self, batch: int, max_tokens: int, chunk: int = 256) -> "Cache":
        """An empty cache for `batch` rows of up to max_tokens tokens."""
        return Cache(self, batch, max_tokens)

    @torch.no_grad()
    def decode(self, tokens_BT: Tensor, cache: "Cache", lengths: Tensor | None = None, last: bool = False) -> Tensor:
        """Logits (B, T, V) fp32 of the next tokens (B, T) of each row, a stream of its own; they enter the cache.
        lengths (B,): the real tokens of each row; those after them do nothing. last: only logits of the last real one."""
        real = torch.full_like(cache.length, tokens_BT.size(1)) if lengths is None else lengths
        if tokens_BT.size(1) > 1 and (most := int((cache.length + real).max())) > cache.max_tokens:
            raise ValueError(f"a row of {most} tokens is longer than the cache, made for {cache.max_tokens}")
        cache.enter(tokens_BT, real)
        x = self.trunk(tokens_BT.flatten(), cache).view(*tokens_BT.shape, -1)
        return self.logits(x[cache.rows, real[:, None] - 1] if last else x)

class Cache:
    """Keys and values (layers, B, max_tokens + 1, H, D) of the tokens so far; see GPT.new_cache and GPT.decode."""
    def __init__(self, model: GPT, batch: int, max_tokens: int):
        self.max_tokens, self.bos_id, device = max_tokens, model.cfg.bos_id, model.embed.weight.device
        shape = 2, model.cfg.depth, batch, max_tokens + 1, model.cfg.model_dim // model.cfg.head_dim, model.cfg.head_dim
        self.keys, self.values = torch.zeros(shape, dtype=model.dtype, device=device)   # the last cell: for what is not real
        self.rows, self.cells = torch.arange(batch, device=device)[:, None], torch.arange(max_tokens + 1, device=device)
        self.length, self.doc_start = torch.zeros(2, batch, dtype=torch.int64, device=device)

    def enter(self, tokens_BT: Tensor, real_B: Tensor):
        """Makes room for the next tokens (B, T) of each row, of which real_B are real."""
        self.index = self.length[:, None] + torch.arange(tokens_BT.size(1), device=tokens_BT.device)
        self.starts = torch.where(tokens_BT == self.bos_id, self.index, self.doc_start[:, None]).cummax(1).values
        self.position = (self.index - self.starts).flatten()
        self.doc_start.copy_(torch.cat([self.doc_start[:, None], self.starts], 1)[self.rows[:, 0], real_B])
        self.length.add_(real_B)

    def attend(self, i: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Stream.attend, for the tokens (B * T, ...) that entered last; their keys and values are kept."""
        q, k, v = (x.view(*self.index.shape, *x.shape[1:]) for x in (q, k, v))
        cell = self.index.clamp(max=self.max_tokens)
        self.keys[i, self.rows, cell], self.values[i, self.rows, cell] = k, v
        first = torch.maximum(self.starts, self.index - window)[:, None, :, None]
        seen = (self.cells <= self.index[:, None, :, None]) & (self.cells >= first)
        q, k, v = (x.transpose(1, 2) for x in (q, self.keys[i], self.values[i]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(0, 1)

    def fill(self, other: "Cache", rows_B: Tensor):
        """Makes row b what row rows_B[b] of another cache of the model is, whatever the size of that."""
        size = min(self.max_tokens, other.max_tokens)
        self.keys[:, :, :size], self.values[:, :, :size] = other.keys[:, rows_B, :size], other.values[:, rows_B, :size]
        self.length.copy_(other.length[rows_B])
        self.doc_start.copy_(other.doc_start[rows_B])

    def bytes_read(self, tokens: int) -> int:
        """Bytes of keys and values that a step reads over all rows, however few tokens there are yet."""
        return self.keys.nbytes + self.values.nbytes

# -----------------------------------------------------------------------------
# Optimizer

POLAR_EXPRESS = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061),
                 (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232))          # arXiv 2505.16932

def orthogonalize(g_NRC: Tensor) -> Tensor:
    """Each matrix with all its singular values moved to about 1, by five steps of a polynomial."""
    x = g_NRC / (g_NRC.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    x, tall = x.bfloat16() if x.is_cuda else x, x.size(1) > x.size(2)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT                       # on the short side
        poly = b * gram + c * gram @ gram
        x = a * x + (x @ poly if tall else poly @ x)
    return x.float()

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan 2024), with rows or columns of equal size (NorMuon, arXiv 2510.05491). A group
    holds matrices of one shape; lr is the spectral norm of a step. Weight decay acts only where the step shrinks a
    weight (cautious, arXiv 2411.16085)."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, mu = group["params"], group["lr"], group["momentum"]
            grad, w = torch.stack([param.grad for param in params]), torch.stack([param.data for param in params])
            axis, state = 2 if w.size(1) >= w.size(2) else 1, self.state[params[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(grad)).lerp_(grad, 1 - mu)
            x = orthogonalize(grad.lerp(momentum, mu))
            size = x.square().mean(axis, keepdim=True)
            second = state.setdefault("second", torch.zeros_like(size)).lerp_(size, 0.1)
            equal = x * second.clamp(min=1e-10).rsqrt()
            x = equal * (x.norm(dim=(1, 2), keepdim=True) / equal.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10))
            w -= lr * (max(1, w.size(1) / w.size(2)) ** 0.5 * x + group["weight_decay"] * w * (x * w > 0))
            torch._foreach_copy_(params, list(w.unbind()))

def rate_factors(cfg: Hyperparameters) -> dict[str, float]:
    """Factors on rates and decay, by width_rule. none: 1. nanochat: rates by sqrt(batch), of AdamW also by 1/sqrt(width),
    decay by 1/tokens. mup with Muon (arXiv 2505.02222): as none, since GPT.logits divides logits by the width."""
    width, names = cfg.model_dim / BASE_WIDTH, ("muon_lr", "adamw_lr", "embed_lr", "head_lr", "weight_decay")
    if cfg.width_rule != "nanochat":
        return dict.fromkeys(names, 1.0) | {"adamw_lr": 1 / width if cfg.width_rule == "mup" else 1.0}
    batch = (cfg.batch_tokens / BASE_BATCH) ** 0.5
    length = cfg.num_iterations * cfg.batch_tokens / (cfg.ratio * products(12, BASE_WIDTH, cfg.vocab_size))
    return dict.fromkeys(names, batch * width ** -0.5) | {"muon_lr": batch, "weight_decay": batch / length}

def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters; base_lr of a group is its learning rate before the schedule."""
    cfg, factor = model.cfg, rate_factors(model.cfg)

    def group(params, rate, decay=0.0):
        decay *= factor["weight_decay"] / (factor[rate] if cfg.decay_rule == "independent" else 1.0)
        return {"params": params, "base_lr": getattr(cfg, rate) * factor[rate], "weight_decay": decay, "momentum": 0.0}
    shapes, rate = {}, "muon_lr" if cfg.optimizer == "muon" else "adamw_lr"
    for param in model.blocks.parameters():
        shapes.setdefault(param.shape, []).append(param)
    rest = [group([model.embed.weight], "embed_lr"),
            group([model.lm_head.weight, *shapes.pop(torch.Size(()), [])], "head_lr")]
    matrices = [group(params, rate, cfg.weight_decay) for params in shapes.values()]
    adamw = partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-10, fused=model.embed.weight.is_cuda)
    return [Muon(matrices, {"lr": 0.0}), adamw(rest)] if cfg.optimizer == "muon" else [adamw(matrices + rest)]

# -----------------------------------------------------------------------------
# Schedule and dial: pure functions of the config

@cache
def plan(cfg: Hyperparameters) -> tuple[tuple[float, int], ...]:
    """(learning rate factor, tokens) of each step."""
    total, seen, rows = cfg.num_iterations * cfg.batch_tokens, 0, []
    while seen < total:
        left, batch = 1 - seen / total, cfg.batch_tokens
        shape = {"wsd": min(1, left / cfg.cooldown), "linear": left}.get(cfg.schedule, (1 - math.cos(math.pi * left)) / 2)
        rate = cfg.lr_floor + (1 - cfg.lr_floor) * shape
        if cfg.schedule == "seesaw":     # each time a cosine has halved the rate: rate / sqrt(2) and batch x 2
            halved = int(-math.log2(max(rate, 1 / 32)))
            rate, batch = 2 ** (-halved / 2), min(batch * 2 ** halved, total - seen)
        rows.append((rate * min(1, (len(rows) + 1) / max(1, cfg.warmup)), batch))
        seen += batch
    return tuple(rows)

def products(depth: int, width: int, vocab_size: int) -> int:
    """Weights in matrix products: 12 C^2 a layer, and the head."""
    return 12 * depth * width ** 2 + vocab_size * width

def dial(cfg: Hyperparameters) -> Hyperparameters:
    """The config with width, batch and steps filled in from the depth where they are 0, by the rules of nanochat."""
    width = cfg.model_dim or math.ceil(64 * cfg.depth / cfg.head_dim) * cfg.head_dim
    size = products(cfg.depth, width, cfg.vocab_size)
    longer = size / products(12, BASE_WIDTH, cfg.vocab_size)        # tokens of the run / of one of depth 12
    packs = max(1, 2 ** round(math.log2(BASE_BATCH * longer ** 0.383)) // cfg.pack_tokens)
    batch = cfg.batch_tokens or packs * cfg.pack_tokens
    return replace(cfg, model_dim=width, batch_tokens=batch,
                   num_iterations=cfg.num_iterations or max(1, int(cfg.ratio * size / batch)))

# -----------------------------------------------------------------------------
# Machine and run folder

@dataclass(frozen=True)
class Machine:
    """Where this process runs: its device, its rank among world_size, and the name of the device."""
    device: torch.device
    rank: int
    world_size: int
    name: str

def setup_machine(cfg: Hyperparameters) -> Machine:
    """Chooses the device and joins the other ranks if torchrun started some (NCCL between GPUs, else gloo)."""
    rank, world_size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = cfg.device if cfg.device != "auto" else "cuda" if there["cuda"] else "cpu"
    if not there[kind]:
        raise UserError(f"--device={kind}, but PyTorch sees no such device; use --device=cpu or another build of torch")
    device, name = torch.device(kind), kind
    if kind == "cuda":
        device, name = torch.device(kind, local_rank), torch.cuda.get_device_name(local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return Machine(device, rank, max(world_size, 1), name)

def to_device(batch: tuple, device: torch.device) -> tuple[Tensor, ...]:
    """Arrays to tensors on the device."""
    return tuple(torch.from_numpy(array).to(device) for array in batch)

def resolve_config(cfg: Hyperparameters, machine: Machine, shards: list[Shard]) -> Hyperparameters:
    """The config with everything filled in that was left to machine, training shards and dial; raises UserError."""
    compiled, vocab_size = cfg.compile and machine.device.type == "cuda", shards[0].vocab_size
    attention = cfg.attention if cfg.attention != "auto" else "flex" if compiled else "plain"
    cfg = dial(replace(cfg, vocab_size=math.ceil(vocab_size / 64) * 64 if compiled else vocab_size,
                       bos_id=shards[0].bos_id, compile=compiled, attention=attention))
    needed, found = cfg.num_iterations * cfg.batch_tokens, sum(shard.num_tokens for shard in shards)
    if needed > found * cfg.epochs:
        raise UserError(f"--num_iterations={cfg.num_iterations} needs {needed} tokens, --train_files={cfg.train_files} "
                        f"holds {found}; add text, or read it more often (--epochs={-(-needed // found)})")
    if machine.world_size > cfg.batch_tokens // cfg.pack_tokens:
        raise UserError(f"{machine.world_size} ranks share --batch_tokens={cfg.batch_tokens}, less than a pack each; "
                        f"lower --pack_tokens={cfg.pack_tokens}")
    return cfg

def write_file(path: Path, content: str | bytes):
    """Writes under a temporary name, then renames, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)

class Run:
    """The folder of a run: log.txt, run.json, the script, curve.svg and the checkpoint. Only the first rank writes."""
    def __init__(self, cfg: Hyperparameters, machine: Machine, argv: list[str], shards: tuple):
        script, source, cuda = Path(__file__).name, Path(__file__).read_bytes(), machine.device.type == "cuda"
        self.cfg, self.master, digest = cfg, machine.rank == 0, hashlib.sha256(source).hexdigest()
        self.step, self.tokens, self.seconds, self.train_losses, self.val_losses = 0, 0, 0.0, [], []
        self.info = {"format": 1, "script": script, "source_sha256": digest, "sources": {script: digest}, "argv": argv,
                     "config": asdict(cfg), "seed": cfg.seed, "device": machine.name, "gpu": machine.name if cuda else "",
                     "world_size": machine.world_size, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                     "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
                     "data": {shard.path: shard.num_tokens for group in shards for shard in group}}
        self.folder = Path(cfg.out_dir, f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{script[:-3]}_{os.urandom(3).hex()}")
        if self.master:
            self.folder.mkdir(parents=True)
            write_file(self.folder / script, source)
            self.log(source.decode() + "\n" + "=" * 100, console=False)

    def log(self, text: str, console: bool = True):
        """A line to the log, and to the console unless told otherwise."""
        if self.master:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(text + "\n")
            if console:
                print(text, flush=True)

    def save(self, **changes):
        """Updates run.json."""
        self.info |= changes | {"tokens_seen": self.tokens, "train_time_ms": round(1000 * self.seconds)}
        if self.master:
            write_file(self.folder / "run.json", json.dumps(self.info | {"val_losses": self.val_losses}, indent=1))

    def loss(self, name: str, loss: float, console: bool = True):
        """Logs a loss after `step` steps; raises FloatingPointError if it is not finite."""
        ms = 1000 * self.seconds
        self.log(f"step:{self.step}/{self.cfg.total_steps} {name}:{loss:.6f} train_time:{ms:.0f}ms "
                 f"step_avg:{ms / max(self.step, 1):.2f}ms", console)
        if not math.isfinite(loss):
            self.save(status="diverged")
            raise FloatingPointError(f"the {name} of step {self.step} is {loss}; lower the learning rates")
        if name == "val_loss":
            self.val_losses.append({"step": self.step, "train_time_ms": round(ms), "val_loss": loss,
                                    "tokens": self.cfg.val_tokens, "tokens_seen": self.tokens})
            self.save(status="running")

    def write_checkpoint(self, model: GPT, shard: Shard, val_loss: float | None) -> Path:
        """Writes the folder checkpoint/step_<n> and then `latest`, which names it."""
        final = self.folder / "checkpoint" / f"step_{self.step:06d}"
        temporary = final.with_name(f".{final.name}.tmp")
        temporary.mkdir(parents=True)
        save_file(model.state_dict(), temporary / "model.safetensors")
        if tokenizer := read_tokenizer(shard):
            write_file(temporary / "tokenizer.json", tokenizer)
        meta = {name: self.info[name] for name in ("format", "source_sha256", "sources", "config")} | {
            "script": Path(__file__).stem, "step": self.step, "stage": 0, "val_loss": val_loss,
            "tokenizer_sha256": shard.tokenizer}
        write_file(temporary / "meta.json", json.dumps(meta, indent=1))
        os.replace(temporary, final)
        write_file(final.with_name("latest"), final.name)
        return final

    def plot(self):
        """curve.svg: the losses over training time, if matplotlib is there."""
        try:
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
        except ImportError:
            return
        axis = (figure := Figure((7, 4), layout="constrained")).subplots()
        axis.plot(*zip(*self.train_losses), color="0.65", label="training")
        axis.plot([point["train_time_ms"] / 1000 for point in self.val_losses],
                  [point["val_loss"] for point in self.val_losses], "ko", label="validation")
        axis.set(xlabel="training time in seconds", ylabel="loss in nats per token", yscale="log")
        axis.legend()
        FigureCanvasSVG(figure).print_svg(self.folder / "curve.svg")

# -----------------------------------------------------------------------------
# Training

def training_step(forward, optimizers: list, packs: list, step: int, cfg: Hyperparameters, machine: Machine,
                  stop: bool) -> list[float]:
    """Trains on the packs of one batch, shared out over the ranks. Returns the mean loss, and how many ranks `stop`."""
    rate, batch_tokens = plan(cfg)[step]
    totals = torch.tensor([0.0, stop], device=machine.device)
    for pack in packs[machine.rank::machine.world_size]:
        loss = forward(*to_device(pack, machine.device), cfg.z_loss) / batch_tokens
        loss.backward()
        totals[0] += loss.detach()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if machine.world_size > 1:           # the same sums on all ranks, and so the same weights
        for tensor in [totals, *(param.grad for group in groups for param in group["params"])]:
            dist.all_reduce(tensor)
    for group in groups:
        group["lr"] = group["base_lr"] * rate
        group["momentum"] = 0.85 + 0.1 * min(1, step / 300)         # of Muon; short runs want a short memory
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return totals.tolist()

@torch.no_grad()
def validate(model, cfg: Hyperparameters, streams: list, machine: Machine) -> float:
    """Mean cross-entropy in nats over the val_tokens targets, summed in float64; the same for any number of ranks."""
    total = torch.zeros((), dtype=torch.float64, device="cpu" if machine.device.type == "mps" else machine.device)
    for stream in streams[machine.rank::machine.world_size]:
        total += model(*to_device(stream, machine.device)).to(total)
    if machine.world_size > 1:
        dist.all_reduce(total)
    return total.item() / cfg.val_tokens

def train(cfg: Hyperparameters, argv: list[str]) -> int:
    """The experiment: build, compile, start the clock, train, validate with the clock stopped, save. The exit code."""
    machine = setup_machine(cfg)
    shards = open_shards(cfg.train_files, cfg.val_files)
    cfg = resolve_config(cfg, machine, shards[0])
    val_streams, _ = validation_streams(cfg, shards[1]), read_tokenizer(shards[0][0])   # errors now, not in the end
    with torch.device(machine.device):
        model = GPT(cfg)
    optimizers, begin, interrupted = make_optimizers(model), time.perf_counter(), []
    run = Run(cfg, machine, argv, shards)
    run.log(f"{machine.world_size} x {machine.name}, {model.matmul_parameters / 1e6:.1f} M weights in products: "
            f"{cfg.total_steps} steps of {cfg.batch_tokens} tokens, {cfg.depth} layers of {cfg.model_dim}; {rate_factors(cfg)}")
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model
    if cfg.compile:                      # now, not on the clock; the gradient is dropped
        pack = next(streams([np.full(cfg.pack_tokens + 1, cfg.bos_id)], cfg.pack_tokens, cfg.bos_id, whole=False))
        forward(*to_device(pack, machine.device), cfg.z_loss).backward()
        model.zero_grad()
    run.loss("val_loss", validate(forward, cfg, val_streams, machine))
    run.save(compile_seconds=round(time.perf_counter() - begin, 1) if cfg.compile else 0.0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: interrupted.append(True))
    packs = streams(training_documents(cfg, shards[0]), cfg.pack_tokens, cfg.bos_id, whole=False)
    begin, printed, stop = time.perf_counter(), 0.0, 0.0
    while run.step < cfg.total_steps and not stop:
        batch = [next(packs) for _ in range(plan(cfg)[run.step][1] // cfg.pack_tokens)]
        loss, stop = training_step(forward, optimizers, batch, run.step, cfg, machine, bool(interrupted))
        end = time.perf_counter()        # the loss has been read: this device and all ranks are done
        run.step, run.tokens, run.seconds = run.step + 1, run.tokens + len(batch) * cfg.pack_tokens, run.seconds + end - begin
        run.train_losses.append((run.seconds, loss))
        run.loss("train_loss", loss, console=end - printed > 10)
        printed = end if end - printed > 10 else printed
        if run.step == cfg.total_steps or cfg.val_every and run.step % cfg.val_every == 0:
            run.loss("val_loss", validate(forward, cfg, val_streams, machine))
        begin = time.perf_counter()
    finished = run.step == cfg.total_steps
    if machine.rank == 0:
        path = run.write_checkpoint(model, shards[0][0], run.val_losses[-1]["val_loss"] if finished else None)
        memory = torch.cuda.max_memory_allocated() / 2**30 if machine.device.type == "cuda" else 0.0
        run.save(status="finished" if finished else "interrupted", peak_memory_gib=round(memory, 2),
                 recompiles=torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs)
        run.plot()
        run.log(f"{run.info['status']}: {run.step} steps, {run.tokens:,} tokens in {run.seconds:.1f} s of training "
                f"({run.tokens / run.seconds:,.0f} tokens/s)\nnext: python sample.py --checkpoint={path}")
    return 0 if finished else 130

def main() -> int:
    """Runs the command line. Exit code: 0 done, 2 the user can put it right, 3 diverged, 130 interrupted."""
    if "--help" in sys.argv or "-h" in sys.argv:
        flags = Path(__file__).read_text(encoding="utf-8").split("class Hyperparameters:\n")[1].split("\n    @property")[0]
        print(f"{__doc__}\nFlags look like --field=value. Presets, as --preset=tiny: {', '.join(PRESETS)}\n\n{flags}")
        return 0
    try:
        return train(parse_config(sys.argv[1:]), sys.argv[1:])
    except (UserError, FloatingPointError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        line = " ".join(str(error).split()) or "interrupted before the first step; nothing to save"
        print(f"{Path(__file__).name}: {line}", file=sys.stderr)
        return {FloatingPointError: 3, KeyboardInterrupt: 130}.get(type(error), 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
