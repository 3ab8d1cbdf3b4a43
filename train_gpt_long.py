"""Train a GPT on documents of up to 65,536 tokens. One file of plain PyTorch; docs/long.md shows what it reaches.

    python data/text.py FOLDER --out=data/long --join=folder --max_doc_tokens=65536 --needles=1000  # once: long text
    python train_gpt_long.py --preset=long --init_from=logs/<run>/checkpoint/step_002000                # one more stage
    python train_gpt_long.py --preset=tiny                          # minutes on two CPU cores

This is train_gpt_simple.py with far layers. A far layer sees its window and, of everything before it in the document,
every far_period-th block of 128 tokens. Each of its heads sees other blocks, and the heads of all far layers together
see all. The cost grows with T (window + T / far_period). Most functions and classes have the same text in both scripts;
tests/test_family.py lists the others.
Axes: T tokens, C channels or columns, R rows, H heads, D channels of a head, V vocabulary, B cache rows, N matrices.
"""
import glob, hashlib, inspect, json, math, os, shlex, signal, sys, time
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin
import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# -------------------- Hyperparameters and command line ----------------------------------------------------------------
@dataclass(frozen=True)
class Hyperparameters:                  # ranges in comments are usual values; LIMITS has those that are allowed
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"    # glob of training shards, read in the order of names
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"        # glob of validation shards
    val_tokens: int = 10_485_760        # the validation loss is the mean over this many tokens, the first ones
    val_stream_tokens: int = 32_768     # tokens of one forward pass in validation; memory grows with it
    pack_tokens: int = 32_768           # tokens of one forward pass in training; memory grows with it
    epochs: int = 1                     # times the text may be read; documents get a new order each time
    init_from: str = ""                 # start from these weights: of a run, a checkpoint or a .safetensors file
    depth: int = 12                     # layers, 2 to 32; --depth=N also lets the dial set width, batch, steps, rates
    model_dim: int = 0                  # residual channels, a multiple of head_dim; 0: from the depth
    head_dim: int = 128                 # channels of a head, even, 32 to 128
    windows: tuple[int, ...] = (512, 512, 512, 2048)    # tokens a layer looks back, in turn; last: most; 0: all
    far_layers: tuple[int, ...] = (3, 7, 10)    # layers without rotary positions that also see blocks before the window
    far_period: int = 8                 # one block of 128 tokens in so many is seen by a head; 4 to 16; 0: none
    far_shared: bool = True             # the heads of a far layer share one set of projections, see Block
    mlp: Literal["relu2", "swiglu"] = "relu2"           # swiglu (arXiv 2002.05202) has as many weights
    gate: Literal["none", "head", "element"] = "none"   # gated attention (arXiv 2505.06708)
    value_residual: bool = False        # mix the values of layer 0 into later layers (arXiv 2410.17897)
    norm_scaling: bool = False          # divide the input of layer i by sqrt(i + 1) (arXiv 2502.05795)
    softcap: float = 0.0                # squash logits to +-softcap by tanh, 10 to 30; 0: off
    z_loss: float = 0.0                 # weight of log(sum exp logits)^2, about 1e-4 (arXiv 2204.02311); 0: off
    vocab_size: int = 0                 # filled in from the shards
    bos_id: int = -1                    # filled in from the shards: the token that begins each document
    batch_tokens: int = 0               # tokens of a step over all GPUs, a multiple of pack_tokens; 0: from the depth
    num_iterations: int = 0             # steps of batch_tokens; 0: from the depth
    ratio: float = 10.5                 # training tokens per weight, used when num_iterations is 0; 8 to 20
    width_rule: Literal["nanochat", "mup", "none"] = "nanochat"     # how rates follow from sizes, see rate_factors
    optimizer: Literal["muon", "adamw", "prodigy"] = "muon"         # of matrices; the rest has AdamW, or Prodigy
    muon_lr: float = 0.02               # of matrices under Muon: size of a step, see muon_update; 0.005 to 0.05
    adamw_lr: float = 0.002             # of matrices under AdamW; 0.0003 to 0.005
    embed_lr: float = 0.3               # of the embedding; 0.05 to 0.5
    head_lr: float = 0.008              # of the head; 0.002 to 0.02
    weight_decay: float = 0.2           # of matrices, per unit of the learning rate; 0: off
    decay_rule: Literal["rate", "independent"] = "rate"     # independent: what scales the rate leaves the decay
    schedule: Literal["wsd", "cosine", "linear", "seesaw"] = "wsd"  # seesaw (arXiv 2510.14717) also grows the batch
    cooldown: float = 0.6               # last fraction of the run in which wsd falls, 0.2 to 1
    lr_floor: float = 0.05              # fraction of the rate that is left at the end; 0: none
    seed: int = 0                       # of the initial weights and, from the second epoch on, the order of documents
    device: Literal["auto", "cuda", "cpu"] = "auto"     # auto: cuda if there is a GPU
    precision: Literal["bf16", "fp32"] = "bf16"         # of the computation; weights are always fp32
    attention: Literal["auto", "flex", "plain"] = "auto"    # auto: flex if the model is compiled, else plain
    compile: bool = True                # use torch.compile; only on CUDA
    val_every: int = 250                # steps between validations; 0: only first and last
    out_dir: str = "logs"               # each run makes a folder in it
    stages = ("all",)                   # not a flag; for sample.py: this script has a single stage

    def __post_init__(self):            # a far layer that is not there would be ignored
        if self.far_period and not all(layer < self.depth for layer in self.far_layers):
            raise UserError(f"--far_layers={','.join(map(str, self.far_layers))} has a layer that --depth={self.depth} "
                            f"lacks; choose from 0 to {self.depth - 1}")

SMALL = Hyperparameters(model_dim=768, batch_tokens=65_536, num_iterations=2000, muon_lr=0.025, width_rule="none")
PRESETS = {
    "small": SMALL,
    "long": replace(SMALL, pack_tokens=65_536, val_stream_tokens=65_536, batch_tokens=131_072, num_iterations=150,
                    muon_lr=0.01, embed_lr=0.1, head_lr=0.003, cooldown=0.8),       # 0.4 of the usual rates
    "tiny": Hyperparameters("data/local/train_*.bin", "data/local/val_*.bin", val_tokens=65_536, val_stream_tokens=8192,
                            pack_tokens=2048, depth=4, model_dim=192, head_dim=48, windows=(64, 256), far_layers=(1, 2),
                            batch_tokens=2048, num_iterations=180, muon_lr=0.04, width_rule="none", precision="fp32")}
FROM_DEPTH = {"model_dim": 0, "batch_tokens": 0, "num_iterations": 0, "width_rule": "nanochat"}     # what --depth sets
LIMITS = {(1, 2**24): "val_tokens val_stream_tokens pack_tokens epochs depth head_dim", (0, 1): "lr_floor", (0, 2**24):
          "model_dim batch_tokens num_iterations windows far_layers far_period vocab_size seed val_every", (1e-9, 1e9):
          "ratio muon_lr adamw_lr embed_lr head_lr", (1e-9, 1): "cooldown", (0, 1e9): "softcap z_loss weight_decay"}
BASE_WIDTH, BASE_BATCH = 768, 2**19     # channels, and tokens of a batch, at which the width rules change no rate
WARMUP, ROPE_BASE, HEAD_CHUNK = 20, 10_000, 32_768      # in steps; of the rotary angles; tokens with logits at a time
BLOCK = 128                             # tokens of a block, also of FlexAttention
ALIGNED = 2048                          # longer documents begin at a multiple of BLOCK: their masks are cheaper
READ_TOKENS = 8192                      # tokens of a prompt that are read together, over all rows

class UserError(Exception): """An error that the user can fix. Its text names the thing, the value and the remedy."""

def parse_config(argv: list[str]) -> Hyperparameters:
    """The config of `--preset=NAME` and `--FIELD=VALUE` flags; raises UserError on anything else."""
    kinds = {field.name: field.type for field in fields(Hyperparameters)} | {"preset": Literal[tuple(PRESETS)]}
    given = {"preset": "small"}
    for flag in argv:
        name, _, text = flag.removeprefix("--").partition("=")
        if name not in kinds or not flag.startswith(f"--{name}="):
            raise UserError(f"{flag} is not a flag; write --NAME=VALUE with a name that --help lists")
        kind = Literal["false", "true"] if kinds[name] is bool else kinds[name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and text not in choices:
            raise UserError(f"{flag} is unknown; choose from {', '.join(choices)}")
        try:
            if not choices:
                text = tuple(int(number) for number in text.split(",")) if kind == tuple[int, ...] else kind(text)
        except ValueError:
            raise UserError(f"{flag} is no number; --help says what it should be") from None
        given[name] = text == "true" if kinds[name] is bool else text
    cfg = replace(PRESETS[given.pop("preset")], **(FROM_DEPTH | given if "depth" in given else given))
    for (low, high), name in ((limits, name) for limits, names in LIMITS.items() for name in names.split()):
        if not all(low <= number <= high for number in np.atleast_1d(getattr(cfg, name))):
            raise UserError(f"--{name}={getattr(cfg, name)} is out of range; choose from {low} to {high}")
    for name, unit in (("head_dim", 2), ("model_dim", cfg.head_dim), ("batch_tokens", cfg.pack_tokens)):
        if getattr(cfg, name) % unit:
            raise UserError(f"--{name}={getattr(cfg, name)} is no multiple of {unit}; see --head_dim, --pack_tokens")
    return cfg

def config_from_dict(values: dict) -> Hyperparameters:
    """The config in a checkpoint's meta.json; raises UserError on unknown, missing or impossible fields."""
    if not isinstance(values, dict) or values.keys() != asdict(Hyperparameters()).keys():
        raise UserError("the checkpoint's config has other fields than this script; use the script that made it")
    texts = {name: value if isinstance(value, str) else json.dumps(value).strip("[]") for name, value in values.items()}
    return parse_config([f"--{name}={text}" for name, text in texts.items()])

# -------------------- Data --------------------------------------------------------------------------------------------
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"

class Shard(NamedTuple):                # a file: a header of 256 int32, then token ids; bos_id begins each document
    path: str
    num_tokens: int
    vocab_size: int
    bos_id: int
    width: int                          # bytes per token
    tokenizer: str                      # sha256 of its tokenizer.json

    def read(self) -> np.ndarray:       # (num_tokens,) ids, mapped from the file
        ids = np.memmap(self.path, f"<u{self.width}", "r", offset=1024, shape=(self.num_tokens,))
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.path} holds id {ids.max()}, but has only {self.vocab_size} ids; make it again")
        return ids

def read_header(path: str) -> Shard:
    """Header of a shard, with zeros read as GPT-2's values; raises UserError if the file is not a whole shard."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(256, "<i4")
    magic, version, num_tokens, vocab_size, bos_id, width = map(int, header[:6])
    tokenizer = header[8:16].tobytes().hex() if header[8:16].any() else GPT2_TOKENIZER_SHA256
    shard = Shard(path, num_tokens, vocab_size or 50257, bos_id or 50256, width or 2, tokenizer)
    sound = shard.width in (2, 4) and 0 <= shard.bos_id < shard.vocab_size <= 256 ** shard.width
    if (magic, version) != (20240520, 1) or not sound or num_tokens < 1 or size != 1024 + num_tokens * shard.width:
        raise UserError(f"{path} is not a whole shard of version 1; make it with data/fineweb.py or data/text.py")
    return shard

def open_shards(train_files: str, val_files: str) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards of two globs; raises UserError if none match or tokenizers differ."""
    train, val = ([read_header(path) for path in sorted(glob.glob(files))] for files in (train_files, val_files))
    if not train or not val:
        flag = f"--val_files={val_files}" if train else f"--train_files={train_files}"
        raise UserError(f"{flag} matches no file; make some with data/fineweb.py or data/text.py")
    if len({(shard.tokenizer, shard.vocab_size, shard.bos_id) for shard in train + val}) > 1:
        raise UserError(f"--train_files={train_files} and --val_files={val_files} have several tokenizers; use one")
    return train, val

def read_tokenizer(shard: Shard) -> bytes:
    """tokenizer.json beside a shard; b"" for GPT-2's shards without one, whose vocabulary sample.py finds by itself."""
    path = Path(shard.path).parent / "tokenizer.json"
    text = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(text).hexdigest() != shard.tokenizer and (text or shard.tokenizer != GPT2_TOKENIZER_SHA256):
        raise UserError(f"{path} is not the tokenizer of {shard.path}; copy the right one there")
    return text

def documents(text: np.ndarray, bos_id: int) -> list[np.ndarray]:  # each with the token after it, its last target
    borders = [0, *(np.flatnonzero(text[1:-1] == bos_id) + 1), len(text) - 1]
    return [text[start:end + 1] for start, end in pairwise(borders)]

def streams(docs, length: int, bos_id: int, whole: bool):
    """Yields (inputs (length,) int32, targets (length,) int64) of documents; the last is filled with bos_id, -1.

    Unless documents must stay whole, those of more than ALIGNED tokens begin at a multiple of BLOCK, after padding.
    """
    inputs, room = None, 0
    for doc in docs:
        start, end = 0, len(doc) - 1
        if end > ALIGNED and not whole:
            room = max(0, room - (room - length) % BLOCK)
        while start < end:
            # a document that does not fit is cut, or moved to the next stream if documents must stay whole
            if room == 0 or (whole and room < min(end - start, length)):
                if inputs is not None:
                    yield inputs, targets
                inputs, targets, room = np.full(length, bos_id, np.int32), np.full(length, -1), length
            at, size = length - room, min(end - start, room)
            inputs[at:at + size] = doc[start:start + size]
            targets[at:at + size] = doc[start + 1:start + size + 1]
            start += size
            room -= size
    yield inputs, targets

def training_documents(cfg: Hyperparameters, shards: list[Shard]):  # in file order, then in a new order each epoch
    for epoch, (number, shard) in product(range(cfg.epochs), enumerate(shards)):
        ids = shard.read()
        docs = documents(np.append(ids, ids.dtype.type(shard.bos_id)), shard.bos_id)    # of the same width
        order = np.random.default_rng((cfg.seed, epoch, number)).permutation(len(docs))
        yield from (docs[i] for i in order) if epoch else docs

def validation_streams(cfg: Hyperparameters, shards: list[Shard]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) streams that hold each of the first val_tokens tokens once; only longer documents are cut."""
    if (found := sum(shard.num_tokens for shard in shards)) <= cfg.val_tokens:
        raise UserError(f"--val_files={cfg.val_files} holds {found} tokens; add text, or use --val_tokens={found - 1}")
    text = np.concatenate([shard.read() for shard in shards])[:cfg.val_tokens + 1]
    return list(streams(documents(text, shards[0].bos_id), cfg.val_stream_tokens, shards[0].bos_id, whole=True))

# -------------------- Model -------------------------------------------------------------------------------------------
def norm(x: Tensor) -> Tensor:          # RMS norm over the last axis, without a learned gain
    return F.rms_norm(x, (x.size(-1),))

def rotary(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:  # turns channel pairs (j, j + D/2)
    a, b = x_THD.chunk(2, dim=2)
    return x_THD * cos_TD[:, None] + torch.cat([-b, a], dim=2) * sin_TD[:, None]

def far_phase(cfg: Hyperparameters, layer: int) -> int | None:
    """The phase of the first head of a far layer; head h has this phase + h. None: the layer is not far.

    A head sees the blocks of its document whose number leaves its phase when divided by far_period. The phases of the
    far layers follow on each other, so that enough heads see each block once.
    """
    if not cfg.far_period or layer not in cfg.far_layers:
        return None
    return cfg.far_layers.index(layer) * (cfg.model_dim // cfg.head_dim) % cfg.far_period

def block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:  # of each row how many blocks it has, and which, those first
    row = torch.arange(blocks.size(-1), device=blocks.device)       # topk is called; a sort would compile for minutes
    return blocks.sum(-1).int(), torch.topk(blocks * len(row) - row, len(row)).indices.int()

def flex_mask(first_T: Tensor, block: int = 128) -> BlockMask:
    """Token i sees tokens first_T[i] to i. Made inside the compiled model: no recompilation, no (T, T) mask."""
    T, row = len(first_T), torch.arange(math.ceil(len(first_T) / block), device=first_T.device)
    full = (row < row[:, None]) & (row * block >= first_T[(row * block + block - 1).clamp(max=T - 1)][:, None])
    partly = (row <= row[:, None]) & (row >= (first_T[row * block] // block)[:, None]) & ~full  # first_T never falls
    lists = [x[None, None] for blocks in (partly, full, partly.mT, full.mT) for x in block_lists(blocks)]
    return BlockMask((T, T), *lists, (block, block), lambda b, h, query, key: (key <= query) & (key >= first_T[query]))

def far_scale(position: Tensor) -> Tensor:  # factor of far queries: log(tokens so far) / log(BLOCK) (arXiv 2501.19399)
    # Normalised queries and keys bound the logits, and with a bound no key stands out among very many.
    return ((position + 1).log() / math.log(BLOCK)).clamp(min=1)

def far_mask(first_T: Tensor, start_T: Tensor, phase: int, period: int, heads: int) -> BlockMask:
    """As flex_mask; head h also sees the blocks whose number in the document leaves phase + h when divided by `period`.

    The document of token i begins at start_T[i], which may be anywhere. Blocks have BLOCK tokens.
    """
    T, row = len(first_T), torch.arange(-(-len(first_T) // BLOCK), device=first_T.device)
    begin, last = row * BLOCK, (row * BLOCK + BLOCK - 1).clamp(max=T - 1)
    near = (row <= row[:, None]) & (row >= (first_T[begin] // BLOCK)[:, None])
    near_full = (row < row[:, None]) & (begin >= first_T[last][:, None])
    # a block of queries has keys before it only in the document of its first query
    start = start_T[begin][:, None]
    number = (begin - start).div(BLOCK, rounding_mode="floor")      # of the document's block in which each block begins
    head = torch.arange(heads, device=row.device)[:, None, None]
    def in_phase(number):
        return (number >= 0) & ((number - phase - head) % period == 0) & (row < row[:, None])
    straight = start % BLOCK == 0
    touched = near | in_phase(number) | ~straight & in_phase(number + 1)
    full = near_full | in_phase(number) & straight & (start_T[last][:, None] == start)
    def seen(b, h, query, key):
        place = key - start_T[query]
        far = (place >= 0) & ((place // BLOCK - phase - h) % period == 0)
        return (key <= query) & ((key >= first_T[query]) | far)
    partly = touched & ~full
    lists = [x[None] for blocks in (partly, full, partly.mT, full.mT) for x in block_lists(blocks)]
    return BlockMask((T, T), *lists, (BLOCK, BLOCK), seen)

class Stream:                           # where the documents of a stream begin, and attention that stays inside them
    def __init__(self, cfg: Hyperparameters, tokens_T: Tensor):
        self.cfg, self.flex = cfg, cfg.attention == "flex" or cfg.attention == "auto" and cfg.compile
        self.index = torch.arange(len(tokens_T), device=tokens_T.device)
        self.doc_start = torch.where(tokens_T == cfg.bos_id, self.index, 0).cummax(0).values
        self.position, self.masks = self.index - self.doc_start, {}

    def attend(self, layer: int, window: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attention (T, H, D): a token sees itself and the `window` tokens before it in its document.

        In a far layer it also sees blocks before them, see far_phase.
        """
        index, first = self.index, torch.maximum(self.doc_start, self.index - window)
        phase, period = far_phase(self.cfg, layer), self.cfg.far_period
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
        if phase is not None:
            q = q * far_scale(self.position)[:, None].to(q.dtype)
        if self.flex:
            if (window, phase) not in self.masks:
                self.masks[window, phase] = (flex_mask(first) if phase is None else
                                             far_mask(first, self.doc_start, phase, period, q.size(1)))
            return flex_attention(q, k, v, block_mask=self.masks[window, phase])[0].transpose(0, 1)
        parts, head = [], torch.arange(q.size(1), device=index.device)[None, :, None, None]
        for low in range(0, len(index), 512):   # 512 queries at a time, with the keys that they reach
            near, far = slice(low, low + 512), slice(max(0, low - window) if phase is None else 0, low + 512)
            seen = index[far] >= first[near, None]
            if phase is not None:
                chosen = (self.position[far] // BLOCK - phase - head) % period == 0     # (1, H, 1, keys)
                seen = seen | (index[far] >= self.doc_start[near, None]) & chosen
            seen = seen & (index[far] <= index[near, None])
            parts.append(F.scaled_dot_product_attention(q[:, :, near], k[:, :, far], v[:, :, far], attn_mask=seen))
        return torch.cat(parts, 2)[0].transpose(0, 1)

class Linear(nn.Linear):                # keeps its weight in fp32 and uses it in the precision of the input
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Block(nn.Module):
    """One layer: attention, then the MLP; each adds to the residual stream.

    Each head of a far layer sees other blocks. With projections of its own it had to learn from these alone how to look
    something up, and only about half of the heads did (docs/long.md). So they share one set, unless far_shared is off.
    """
    def __init__(self, cfg: Hyperparameters, layer: int):
        super().__init__()
        C, self.head_dim, self.layer = cfg.model_dim, cfg.head_dim, layer
        windows = [window or 2**24 for window in cfg.windows]
        self.window = max(windows) if layer == cfg.depth - 1 else windows[layer % len(windows)]
        self.scale = (layer + 1) ** -0.5 if cfg.norm_scaling else 1.0
        self.repeats = C // cfg.head_dim if cfg.far_shared and far_phase(cfg, layer) is not None else 1
        self.qkv = nn.Parameter(torch.empty(3, C // self.repeats, C))      # matrices of queries, keys and values
        self.attn_proj = Linear(C, C, bias=False)
        gates = {"none": 0, "head": C // cfg.head_dim, "element": C}[cfg.gate]
        self.gate = Linear(C, gates, bias=False) if gates else None
        self.v_lambda = nn.Parameter(torch.empty(())) if cfg.value_residual and layer else None
        self.swiglu = cfg.mlp == "swiglu"
        hidden = C // 6 * 16 if self.swiglu else 4 * C      # swiglu has three matrices instead of two
        self.fc = Linear(C, 2 * hidden if self.swiglu else hidden, bias=False)
        self.mlp_proj = Linear(hidden, C, bias=False)

    def forward(self, x_TC: Tensor, rope: tuple, context, v1: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream (T, C) after this layer, and the values (T, H, D) of layer 0; layer 0 itself gets None."""
        u = norm(x_TC) * self.scale
        qkv = F.linear(u, self.qkv.flatten(0, 1).to(u.dtype))      # one product is faster than three
        heads = qkv.view(len(u), 3, -1, self.head_dim)
        q, k, v = (heads.repeat(1, 1, self.repeats, 1) if self.repeats > 1 else heads).unbind(1)
        if self.v_lambda is not None:
            v = torch.lerp(v, v1, self.v_lambda.to(v.dtype))
        y = context.attend(self.layer, self.window, rotary(norm(q), *rope), rotary(norm(k), *rope), v)
        if self.gate is not None:       # starts as a factor of 1
            y = y * 2 * torch.sigmoid(self.gate(u)).view(*y.shape[:2], -1)
        x_TC = x_TC + self.attn_proj(y.flatten(1))
        h = self.fc(norm(x_TC) * self.scale)
        h = F.silu(h.chunk(2, 1)[0]) * h.chunk(2, 1)[1] if self.swiglu else h.relu().square()
        return x_TC + self.mlp_proj(h), v if v1 is None else v1

class GPT(nn.Module):                   # of a config in which everything is filled in, see resolve_config
    def __init__(self, cfg: Hyperparameters):
        super().__init__()
        self.cfg, self.dtype = cfg, torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        heads = cfg.model_dim // cfg.head_dim * len(set(cfg.far_layers))
        if cfg.far_period > heads:
            raise UserError(f"--far_period={cfg.far_period} is more than the {heads} heads of --far_layers, so that no "
                            "head would see some blocks; lower it or name more layers")
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.lm_head = Linear(cfg.model_dim, cfg.vocab_size, bias=False)
        self.matmul_parameters = sum(param.numel() for param in [*self.blocks.parameters(), self.lm_head.weight])
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self):          # the projections start at zero, so each block starts by adding nothing
        generator = torch.Generator(self.embed.weight.device).manual_seed(self.cfg.seed)
        for name, param in self.named_parameters():
            if name.endswith(("proj.weight", "gate.weight", "v_lambda")):
                param.fill_(0.5 if name.endswith("v_lambda") else 0)
            else:
                std = 0.02 if self.cfg.width_rule == "none" else param.size(-1) ** -0.5
                param.normal_(0, {"embed.weight": 1.0, "lm_head.weight": 0.001}.get(name, std), generator=generator)

    def set_stage(self, index: int, final: bool = False): pass      # for sample.py, as decode and Cache below

    def trunk(self, tokens_T: Tensor, context: "Stream | Cache") -> Tensor:  # what the head reads, (T, C)
        x, v1 = self.embed(tokens_T).to(self.dtype), None
        freq = ROPE_BASE ** -(torch.arange(0, self.cfg.head_dim, 2, device=x.device) / self.cfg.head_dim)
        angle = (context.position[:, None] * freq).repeat(1, 2)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        still = torch.ones_like(rope[0]), torch.zeros_like(rope[1])     # far layers turn no channels
        for layer, block in enumerate(self.blocks):
            x, v1 = block(x, still if layer in self.cfg.far_layers else rope, context, v1)
        return norm(x)

    def logits(self, x_TC: Tensor) -> Tensor:  # (..., V) in fp32, of what trunk returns
        logits = self.lm_head(x_TC).float() * (BASE_WIDTH / self.cfg.model_dim if self.cfg.width_rule == "mup" else 1.0)
        return cap * torch.tanh(logits / cap) if (cap := self.cfg.softcap) else logits

    def score(self, tokens_T: Tensor, targets_T: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy (T,) in nats, 0 where the target is -1, plus z-loss; and the likeliest token (T,)."""
        x, parts = self.trunk(tokens_T, Stream(self.cfg, tokens_T)), []
        for part, targets in zip(x.split(HEAD_CHUNK), targets_T.split(HEAD_CHUNK)):
            logits = self.logits(part)
            losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
            if z_loss:
                losses = losses + z_loss * logits.logsumexp(1).square() * (targets >= 0)
            parts.append((losses, logits.detach().argmax(1)))
        return tuple(torch.cat(column) for column in zip(*parts))

    def forward(self, tokens_T: Tensor, targets_T: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Logits (T, V) in fp32 of a stream of documents; with targets (T,) the sum of their losses, see score."""
        if targets_T is not None:
            return self.score(tokens_T, targets_T, z_loss)[0].sum()
        return self.logits(self.trunk(tokens_T, Stream(self.cfg, tokens_T)))

    @torch.no_grad()
    def kurtosis(self, tokens_T: Tensor) -> float:  # mean x^4 / (mean x^2)^2 over channels x of the last layer's output
        return self.trunk(tokens_T, Stream(replace(self.cfg, attention="plain"), tokens_T)).float().pow(4).mean().item()

    def new_cache(self, batch: int, max_tokens: int, chunk: int = 2048) -> "Cache":
        """For rows of one document each. Up to `chunk` tokens of a row are read at a time, fewer if rows are many."""
        return Cache(self, batch, max_tokens, max(1, min(chunk, READ_TOKENS // batch, max_tokens)))

    @torch.no_grad()
    def decode(self, tokens_BT: Tensor, cache: "Cache", lengths: Tensor | None = None, last: bool = False) -> Tensor:
        """Logits (B, T, V) after T more tokens, of which `lengths` (B,) are real; (B, 1, V) of the last if `last`."""
        B, T = tokens_BT.shape
        real = torch.full_like(cache.length, T) if lengths is None else lengths
        if T > 1 and lengths is None and (most := int(cache.length.max()) + T) > cache.max_tokens:
            raise ValueError(f"a row of {most} tokens is longer than the cache, made for {cache.max_tokens}")
        parts = []
        for low in range(0, T, cache.chunk):
            tokens, now = tokens_BT[:, low:low + cache.chunk], (real - low).clamp(0, min(cache.chunk, T - low))
            cache.begin(tokens.size(1), now)
            x = self.trunk(tokens.flatten(), cache).view(*tokens.shape, -1)
            cache.length.add_(now)
            if last and parts:           # a row that has ended keeps its last token
                parts = [x[cache.rows, now[:, None] - 1].where(now[:, None, None] > 0, parts[0])]
            else:
                parts.append(x[cache.rows, now[:, None] - 1] if last else x)
        return self.logits(torch.cat(parts, 1))

class Cache:
    """Keys and values of the tokens so far, for rows of one document each; `length` (B,) counts the tokens.

    A layer has a ring of cells for its window and the tokens that are read together, and a far layer a store behind it:
    in head h, the blocks that h sees for as long as the document lasts. The last cell takes what is not kept.
    """
    def __init__(self, model: GPT, batch: int, max_tokens: int, chunk: int):
        cfg, device, self.max_tokens, self.chunk = model.cfg, model.embed.weight.device, max_tokens, chunk
        self.far, self.period = [far_phase(cfg, layer) for layer in range(cfg.depth)], cfg.far_period
        self.rings = [min(block.window + chunk, max_tokens) for block in model.blocks]
        self.stores = [0 if phase is None else -(-max_tokens // (BLOCK * self.period)) * BLOCK for phase in self.far]
        heads, self.layers = cfg.model_dim // cfg.head_dim, []      # of each layer: keys and values (2, B, H, N + 1, D)
        for cells in map(sum, zip(self.rings, self.stores)):
            shape = 2, batch, heads, cells + 1, cfg.head_dim
            self.layers.append(torch.zeros(shape, dtype=model.dtype, device=device))
        self.rows, self.heads = torch.arange(batch, device=device)[:, None], torch.arange(heads, device=device)[:, None]
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)

    def bytes_read(self, tokens: int) -> int:  # in a step
        return sum(layer[..., :-1, :].nbytes for layer in self.layers)

    def begin(self, size: int, real_B: Tensor):  # the next `size` tokens of each row are read, of which real_B are real
        step = torch.arange(size, device=real_B.device)
        self.index = self.length[:, None] + step                    # (B, size): places in the document
        self.position, self.real, self.seen = self.index.flatten(), step < real_B[:, None], {}
        self.newest = (self.length + real_B - 1)[:, None]

    def ring_places(self, ring: int) -> Tensor:  # of the token in each cell of a ring (B, ring); negative: none
        return self.newest - (self.newest - torch.arange(ring, device=self.newest.device)) % ring

    def cells_seen(self, i: int, window: int) -> Tensor:  # (B, 1 or H, size, N) of layer i
        query = torch.minimum(self.index, self.newest)[:, None, :, None]     # padding sees what the newest token sees
        place = self.ring_places(self.rings[i])[:, None, None]
        seen = (place >= 0) & (place <= query) & (place >= query - window)
        if self.far[i] is None:
            return seen
        slot, phase = torch.arange(self.stores[i], device=seen.device), self.heads + self.far[i]
        place = (slot // BLOCK * self.period + phase % self.period) * BLOCK + slot % BLOCK          # (H, store)
        stored = place[:, None] < query - window
        return torch.cat([seen.expand(*stored.shape[:3], -1), stored], 3)

    def write(self, i: int, k: Tensor, v: Tensor):      # (B, H, size, D) into the ring, and into the store if kept
        last, place, rows = self.layers[i].size(3) - 1, self.index[:, None], self.rows[:, None]
        both = torch.stack([k, v])
        self.layers[i][:, rows, self.heads, torch.where(self.real[:, None], place % self.rings[i], last)] = both
        if self.far[i] is not None:
            block, phase = place // BLOCK, self.heads + self.far[i]
            cell = self.rings[i] + block // self.period * BLOCK + place % BLOCK
            kept = self.real[:, None] & ((block - phase) % self.period == 0) & (cell < last)
            self.layers[i][:, rows, self.heads, torch.where(kept, cell, last)] = both

    def attend(self, i: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # as Stream's, of B * size
        q, k, v = (x.view(*self.index.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        self.write(i, k, v)
        k, v = self.layers[i][..., :-1, :]
        if self.far[i] is not None:
            q = q * far_scale(self.index)[:, None, :, None].to(q.dtype)
        if (window, self.far[i]) not in self.seen:
            self.seen[window, self.far[i]] = self.cells_seen(i, window)
        seen = self.seen[window, self.far[i]]
        if q.size(2) > 1:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:                            # one query: products read the cells with the whole GPU
            scores = (q * q.size(3) ** -0.5 @ k.mT).float().masked_fill(~seen, -math.inf)
            y = scores.softmax(3).to(v.dtype) @ v
        return y.transpose(1, 2).flatten(0, 1)

    def fill(self, other: "Cache", rows_B: Tensor):  # row b becomes row rows_B[b] of another cache of the model
        self.length.copy_(other.length[rows_B])
        self.newest = self.length[:, None] - 1
        for i, (mine, theirs) in enumerate(zip(self.layers, other.layers)):
            ring, theirs_ring, store = self.rings[i], other.rings[i], min(self.stores[i], other.stores[i])
            cell = self.ring_places(ring).clamp(min=0) % theirs_ring
            mine[:, :, :, :ring] = theirs[:, rows_B[:, None, None], self.heads, cell[:, None]]
            mine[:, :, :, ring:ring + store] = theirs[:, rows_B, :, theirs_ring:theirs_ring + store]

# -------------------- Optimizers, schedule and dial -------------------------------------------------------------------
POLAR_EXPRESS = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061),
                 (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232))          # arXiv 2505.16932

def orthogonalize(g_NRC: Tensor) -> Tensor:  # N matrices with all singular values moved to about 1
    x, tall = g_NRC / (g_NRC.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6), g_NRC.size(1) > g_NRC.size(2)
    x = x.bfloat16() if x.is_cuda else x
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT                       # on the short side
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x.float()

def muon_update(params: list, grads: list, momentum_NRC: Tensor, lr: Tensor, mu: Tensor, decay: Tensor):
    """Muon (Jordan 2024) with cautious decay (arXiv 2510.12402), in place, for parameters of one shape (..., R, C)."""
    w, grad = (torch.cat([x.view(-1, *x.shape[-2:]) for x in group]) for group in (params, grads))
    momentum_NRC += (1 - mu) * (grad - momentum_NRC)
    update = orthogonalize(grad + mu * (momentum_NRC - grad))       # Nesterov: a look ahead along the momentum
    update = update * max(1, w.size(1) / w.size(2)) ** 0.5          # tall matrices take larger steps
    w = w - lr * (update + decay * w * (update * w > 0))
    for param, new in zip(params, w.split([math.prod(param.shape[:-2]) for param in params])):
        param.copy_(new.view_as(param))

class Muon(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            grads, state = [param.grad for param in group["params"]], self.state[group["params"][0]]
            if not state:
                state["momentum"] = torch.cat([torch.zeros_like(grad).view(-1, *grad.shape[-2:]) for grad in grads])
            numbers = [torch.tensor(group[name]) for name in ("lr", "momentum", "weight_decay")]
            group["update"](group["params"], grads, state["momentum"], *numbers)

def rate_factors(cfg: Hyperparameters) -> dict[str, float]:
    """Factors that follow from the sizes. mup (arXiv 2505.02222): none for Muon; GPT.logits divides by the width."""
    factors = dict.fromkeys(("muon_lr", "adamw_lr", "embed_lr", "head_lr", "weight_decay"), 1.0)
    width, batch, rule = cfg.model_dim / BASE_WIDTH, (cfg.batch_tokens / BASE_BATCH) ** 0.5, cfg.width_rule
    if rule == "mup":
        factors["adamw_lr"] = 1 / width
    elif rule == "nanochat":
        length = cfg.num_iterations * cfg.batch_tokens / (cfg.ratio * products(12, BASE_WIDTH, cfg.vocab_size))
        factors = dict.fromkeys(factors, batch * width ** -0.5) | {"muon_lr": batch, "weight_decay": batch / length}
    return factors

def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters; base_lr of a group is its learning rate before the schedule."""
    cfg, factors, shapes = model.cfg, rate_factors(model.cfg), {}
    matrix_rate = "muon_lr" if cfg.optimizer == "muon" else "adamw_lr"
    def group(params, rate, decay=0.0):
        decay *= factors["weight_decay"] / (factors[rate] if cfg.decay_rule == "independent" else 1.0)
        return {"params": params, "base_lr": getattr(cfg, rate) * factors[rate], "weight_decay": decay, "momentum": 0.0}
    for param in model.blocks.parameters():
        shapes.setdefault(param.shape[-2:], []).append(param)
    head = [model.lm_head.weight, *shapes.pop(torch.Size(()), [])]          # single numbers train like the head
    matrices = [group(params, matrix_rate, cfg.weight_decay) for params in shapes.values()]
    rest = [group([model.embed.weight], "embed_lr"), group(head, "head_lr")]
    adamw = partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-10, fused=model.embed.weight.is_cuda)
    if cfg.optimizer == "prodigy":      # finds one rate for all (arXiv 2306.06101)
        from prodigyopt import Prodigy
        return [Prodigy([entry | {"base_lr": 1.0} for entry in matrices + rest], betas=(0.9, 0.99))]
    update = torch.compile(muon_update, dynamic=False, fullgraph=True) if cfg.compile else muon_update
    return [Muon(matrices, {"update": update}), adamw(rest)] if cfg.optimizer == "muon" else [adamw(matrices + rest)]

@cache
def plan(cfg: Hyperparameters) -> tuple[tuple[float, int], ...]:  # (learning rate factor, tokens) of each step
    total, seen, rows = cfg.num_iterations * cfg.batch_tokens, 0, []
    while seen < total:
        left, batch = 1 - seen / total, cfg.batch_tokens
        cosine = (1 - math.cos(math.pi * left)) / 2
        shape = {"wsd": min(1, left / cfg.cooldown), "linear": left}.get(cfg.schedule, cosine)
        rate = cfg.lr_floor + (1 - cfg.lr_floor) * shape
        if cfg.schedule == "seesaw":    # each time a cosine has halved the rate: rate / sqrt(2) and batch x 2
            halved = int(-math.log2(max(rate, 1 / 32)))
            rate, batch = 2 ** (-halved / 2), min(batch * 2 ** halved, total - seen)
        rows.append((rate * min(1, (len(rows) + 1) / WARMUP), batch))
        seen += batch
    return tuple(rows)

def products(depth: int, width: int, vocab_size: int) -> int:  # weights: 12 C^2 a layer, and the head
    return 12 * depth * width ** 2 + vocab_size * width

def dial(cfg: Hyperparameters) -> Hyperparameters:
    """The config with width, batch and steps filled in from the depth where they are 0, by the rules of nanochat."""
    width = cfg.model_dim or math.ceil(64 * cfg.depth / cfg.head_dim) * cfg.head_dim
    size, base = products(cfg.depth, width, cfg.vocab_size), products(12, BASE_WIDTH, cfg.vocab_size)
    best = 2 ** round(math.log2(BASE_BATCH * (size / base) ** 0.383))           # tokens of a batch
    batch = cfg.batch_tokens or max(1, best // cfg.pack_tokens) * cfg.pack_tokens
    steps = cfg.num_iterations or max(1, int(cfg.ratio * size / batch))
    return replace(cfg, model_dim=width, batch_tokens=batch, num_iterations=steps)

# -------------------- The run -----------------------------------------------------------------------------------------
Machine = NamedTuple("Machine", [("device", torch.device), ("rank", int), ("world_size", int), ("name", str)])

def setup_machine(cfg: Hyperparameters) -> Machine:
    """Chooses the device and joins the other ranks if torchrun started some (NCCL between GPUs, else gloo)."""
    rank, world_size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available()
    if cuda and local_rank >= (count := torch.cuda.device_count()):
        raise UserError(f"--device={cfg.device}: rank {rank} needs GPU {local_rank} of {count}; use cpu or fewer ranks")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    torch.cuda.set_device(device) if cuda else None
    dist.init_process_group("nccl" if cuda else "gloo") if world_size > 1 else None
    return Machine(device, rank, max(world_size, 1), torch.cuda.get_device_name() if cuda else "cpu")

def resolve_config(cfg: Hyperparameters, machine: Machine, shards: list[Shard]) -> Hyperparameters:
    """The config with everything filled in that was left to machine, training shards and dial; raises UserError."""
    compiled = cfg.compile and machine.device.type == "cuda"
    vocab_size = math.ceil(shards[0].vocab_size / 64) * 64          # GPUs are slow with odd sizes
    cfg = dial(replace(cfg, vocab_size=vocab_size, bos_id=shards[0].bos_id, compile=compiled))
    if cfg.attention == "flex" and not compiled:
        raise UserError("--attention=flex needs a GPU and --compile=true; use --attention=plain")
    needed, found = cfg.num_iterations * cfg.batch_tokens, sum(shard.num_tokens for shard in shards)
    if needed > found * cfg.epochs:
        raise UserError(f"--num_iterations={cfg.num_iterations} needs {needed} tokens, --train_files holds {found}; "
                        f"add text, or use --epochs={math.ceil(needed / found)}")
    if machine.world_size > (packs := cfg.batch_tokens // cfg.pack_tokens):
        raise UserError(f"{machine.world_size} ranks share {packs} packs; lower --pack_tokens={cfg.pack_tokens}")
    return cfg

class Run:      # the folder of a run: log.txt, run.json, this script and the checkpoint; only rank 0 writes
    def __init__(self, cfg: Hyperparameters, machine: Machine, argv: list[str], shards: tuple):
        self.cfg, self.master, self.seconds = cfg, machine.rank == 0, 0.0
        source, now, name = Path(__file__).read_bytes(), time.localtime(), Path(__file__).name
        digest, gpu = hashlib.sha256(source).hexdigest(), machine.name if machine.device.type == "cuda" else ""
        self.info = {"format": 1, "status": "running", "script": name, "source_sha256": digest, "argv": argv,
                     "sources": {name: digest}, "config": asdict(cfg), "seed": cfg.seed, "device": machine.name,
                     "gpu": gpu, "world_size": machine.world_size, "step": 0, "stage": 0, "tokens_seen": 0,
                     "versions": {"torch": torch.__version__}, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", now),
                     "val_losses": [], "val_loss": None, "tokenizer_sha256": shards[0][0].tokenizer,
                     "data": {shard.path: shard.num_tokens for shard in shards[0] + shards[1]}, "data_sha256": {
                         shard.path: hashlib.sha256(Path(shard.path).read_bytes()).hexdigest() for shard in shards[1]}}
        self.folder = Path(cfg.out_dir, f"{time.strftime('%Y-%m-%d_%H-%M-%S', now)}_{name[:-3]}_{os.urandom(3).hex()}")
        try:
            self.write(name, source)
        except OSError as error:
            raise UserError(f"--out_dir={cfg.out_dir} cannot be written ({error}); choose another") from None
        self.log(source.decode() + "\n" + "=" * 100, console=False)

    def write(self, name: str, content: bytes):  # renamed when whole, so that a reader never sees half a file
        if self.master:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.tmp").write_bytes(content)
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def log(self, text: str, console: bool = True, **changes):  # a line of the log, and changes of run.json
        self.info |= changes
        self.write("run.json", json.dumps(self.info, indent=1).encode())
        if self.master:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                print(text, file=file)
            print(text, flush=True) if console else None

    def log_loss(self, name: str, loss: float, console: bool = True):  # FloatingPointError if it is not finite
        step, ms, steps = self.info["step"], round(1000 * self.seconds), len(plan(self.cfg))
        if name == "val_loss" and math.isfinite(loss):
            point = {"step": step, "train_time_ms": ms, "val_loss": loss, "tokens": self.cfg.val_tokens}
            self.info |= {"val_losses": [*self.info["val_losses"], point], "val_loss": loss}
        self.log(f"step:{step}/{steps} {name}:{loss:.6f} train_time:{ms}ms step_avg:{ms / max(step, 1):.2f}ms", console,
                 train_time_ms=ms, status="running" if math.isfinite(loss) else "diverged")
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {name} of step {step} is {loss}; lower the learning rates")

    def write_checkpoint(self, model: GPT, tokenizer: bytes) -> Path:  # a folder, and `latest`, which names it
        final = self.folder / f"checkpoint/step_{self.info['step']:06d}"
        self.write("checkpoint/.new/meta.json", json.dumps(self.info | {"script": Path(__file__).stem}).encode())
        if tokenizer:
            self.write("checkpoint/.new/tokenizer.json", tokenizer)
        save_file(model.state_dict(), self.folder / "checkpoint/.new/model.safetensors")
        os.replace(self.folder / "checkpoint/.new", final)
        self.write("checkpoint/latest", final.name.encode())
        return final

def to_device(batch: tuple, device: torch.device) -> tuple[Tensor, ...]:
    pin = Tensor.pin_memory if device.type == "cuda" else Tensor.contiguous     # lets the copy run beside the step
    return tuple(pin(torch.from_numpy(array)).to(device, non_blocking=True) for array in batch)

def batches(cfg: Hyperparameters, shards: list[Shard], machine: Machine):  # yields this rank's packs of each step
    packs = streams(training_documents(cfg, shards), cfg.pack_tokens, cfg.bos_id, whole=False)
    for _, tokens in plan(cfg):
        batch = list(islice(packs, tokens // cfg.pack_tokens))
        yield [to_device(pack, machine.device) for pack in batch[machine.rank::machine.world_size]]

def training_step(forward, optimizers, packs, step: int, cfg: Hyperparameters, machine: Machine, stop: bool) -> Tensor:
    """Trains on this rank's packs (tokens, targets) of a batch. Returns (2,): mean loss, how many ranks `stop`."""
    rate, batch_tokens = plan(cfg)[step]
    totals = torch.zeros(2, device=machine.device)
    totals[1].fill_(float(stop))         # an assignment would wait for the GPU
    for tokens, targets in packs:
        loss = forward(tokens, targets, cfg.z_loss) / batch_tokens
        loss.backward()
        totals[0] += loss.detach()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if machine.world_size > 1:          # the same sums on all ranks, and so the same weights
        for tensor in [totals, *(param.grad for group in groups for param in group["params"])]:
            dist.all_reduce(tensor)
    for group in groups:
        group["lr"] = group["base_lr"] * rate
        group["momentum"] = 0.85 + 0.1 * min(1, step / 300)         # of Muon: early gradients are soon outdated
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return totals

@torch.no_grad()
def validate(model, cfg: Hyperparameters, val_streams: list, machine: Machine) -> float:
    """Mean cross-entropy in nats over the val_tokens targets, summed in float64; the same for any number of ranks."""
    total = torch.zeros((), dtype=torch.float64, device=machine.device)
    for stream in val_streams[machine.rank::machine.world_size]:
        total += model(*to_device(stream, machine.device)).to(total)
    if machine.world_size > 1:
        dist.all_reduce(total)
    return total.item() / cfg.val_tokens

def train(cfg: Hyperparameters, argv: list[str]) -> int:
    """The experiment: build, compile, train, validate with the clock stopped, save. Returns the exit code."""
    machine, shards = setup_machine(cfg), open_shards(cfg.train_files, cfg.val_files)
    cfg, tokenizer = resolve_config(cfg, machine, shards[0]), read_tokenizer(shards[0][0])
    val_streams, steps = validation_streams(cfg, shards[1]), len(plan(cfg))
    model = GPT(cfg).to(machine.device)
    if cfg.init_from:
        file = max(Path(cfg.init_from).glob("**/model.safetensors"), default=cfg.init_from)     # of a run: its last
        try:
            model.load_state_dict(load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--init_from={cfg.init_from} cannot be used with the other flags: {error}") from None
    optimizers, run, began = make_optimizers(model), Run(cfg, machine, argv, shards), time.perf_counter()
    run.log(f"{machine.world_size} x {machine.name}: {model.matmul_parameters / 1e6:.1f} M weights in products, width "
            f"{cfg.model_dim}, {steps} steps of {cfg.batch_tokens} tokens, factors {rate_factors(cfg)}")
    forward, start = model, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if cfg.compile:                     # now and not on the clock: one step on an empty batch, then back to the start
        forward = torch.compile(model, dynamic=False, fullgraph=True)
        empty = np.zeros(cfg.pack_tokens, np.int32), np.zeros(cfg.pack_tokens, np.int64)
        training_step(forward, optimizers, [to_device(empty, machine.device)], 0, cfg, machine, False)
        model.load_state_dict(start)
        for optimizer in optimizers:
            optimizer.state.clear()
    def log_validation():
        run.log_loss("val_loss", validate(forward, cfg, val_streams, machine))
        kurtosis = model.kurtosis(to_device(val_streams[0], machine.device)[0][:2048])
        run.log(f"step:{run.info['step']}/{steps} kurtosis:{kurtosis:.3f}", console=False, kurtosis=kurtosis)
    log_validation()
    run.info["compile_seconds"] = (time.perf_counter() - began) * cfg.compile
    graphs, unread, interrupted = torch._dynamo.utils.counters["stats"]["unique_graphs"], [], []
    for name in (signal.SIGINT, signal.SIGTERM):                    # save what there is; a second signal kills
        signal.signal(name, lambda number, _: interrupted.append(signal.signal(number, signal.SIG_DFL)))
    began = time.perf_counter()
    for step, batch in enumerate(batches(cfg, shards[0], machine), 1):
        unread.append(training_step(forward, optimizers, batch, step - 1, cfg, machine, bool(interrupted)))
        validates = step == steps or cfg.val_every and step % cfg.val_every == 0
        if cfg.compile and step % 10 and not validates:
            continue                    # a GPU waits while results are read, so they are read ten at a time
        results, stop = torch.stack(unread).tolist(), unread[-1][1] > 0
        seconds = (time.perf_counter() - began) / len(unread)
        for done, (loss, _) in enumerate(results, step - len(results) + 1):
            run.seconds += seconds
            run.info |= {"step": done, "tokens_seen": run.info["tokens_seen"] + plan(cfg)[done - 1][1]}
            run.log_loss("train_loss", loss, console=done % 10 == 0)
        log_validation() if validates else None
        if stop:
            break
        unread, began = [], time.perf_counter()
    run.info["val_loss"] = run.info["val_loss"] if step == steps else None
    if machine.rank == 0:
        flag = shlex.quote(f"--checkpoint={run.write_checkpoint(model, tokenizer)}")
        memory = torch.cuda.max_memory_allocated() / 2**30
        run.log(f"{step} steps in {run.seconds:.1f} s, {run.info['tokens_seen'] / run.seconds:,.0f} tokens/s\n"
                f"next: python sample.py {flag}", status="finished" if step == steps else "interrupted",
                peak_memory_gib=memory, recompiles=torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs)
    return 0 if step == steps else 130

def main() -> int:
    """Runs the command line. Exit code: 0 done, 2 the user can fix it, 3 diverged, 130 interrupted."""
    try:
        if "--help" in sys.argv or "-h" in sys.argv:
            return print(__doc__, inspect.getsource(Hyperparameters), sep="\n")
        return train(parse_config(sys.argv[1:]), sys.argv[1:])
    except (UserError, FloatingPointError, OSError, RuntimeError, ImportError, KeyboardInterrupt) as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "to allocate" in str(error)       # of a GPU or a CPU
        if isinstance(error, RuntimeError) and not memory:
            raise
        line = " ".join(str(error).split()) or "interrupted before the first step; nothing to save"
        line += f"; pip install {error.name}" if isinstance(error, ImportError) else ""
        line += "; use a smaller model or smaller --pack_tokens" if memory else ""
        print(f"{Path(__file__).name}: {line}", file=sys.stderr)
        return {FloatingPointError: 3, KeyboardInterrupt: 130}.get(type(error), 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
