"""Train a small GPT whose MLPs are mixtures of experts. Read train_gpt_simple.py first: the rest is as there.

    python data/text.py --tokenizer=bytes                           # once: the text of the preset tiny
    python train_gpt_moe.py --preset=tiny                           # minutes on two CPU cores
    python train_gpt_moe.py                                         # size of GPT-2 small, FineWeb text, one GPU
    torchrun --standalone --nproc_per_node=4 train_gpt_moe.py --pack_tokens=8192 --expert_ranks=4 --capacity=1.5

In the layers of --expert_layers a router chooses top_k of num_experts MLPs for each token, never from later ones. A
bias on its choice keeps experts equally busy (arXiv 2408.15664). docs/moe.md says what this gains and costs.
Axes: T tokens, C channels or columns, R rows, H heads, D channels of a head, V vocabulary, B cache rows, N matrices,
E experts; of experts, R is T * top_k choices in the order of tokens.
"""
import glob, hashlib, inspect, json, math, os, shlex, signal, sys, time
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin
import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save as safetensors_bytes, save_file
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
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
    mlp: Literal["relu2", "swiglu"] = "relu2"           # swiglu (arXiv 2002.05202) has as many weights
    expert_layers: int = 2              # every n-th layer has experts; 1: every layer, 0: none
    num_experts: int = 8                # MLPs of such a layer; 1 is a dense layer
    top_k: int = 1                      # experts that a token uses
    expert_dim: int = 0                 # hidden channels of an expert, a multiple of 16; 0: as much work as a dense MLP
    shared_dim: int = 0                 # hidden channels of an MLP that all tokens use beside their experts; 0: none
    router: Literal["centroids", "learned", "hash"] = "centroids"   # hash of the token's id (arXiv 2106.04426)
    router_lr: float = 0.0005           # of learned routers; 0.0002 to 0.002
    balance: Literal["bias", "loss", "none"] = "bias"   # what keeps experts equally busy
    balance_rate: float = 0.01          # step of the bias, or weight of the loss (arXiv 2101.03961)
    router_z: float = 0.0               # weight of log(sum exp router logits)^2, about 0.001 (arXiv 2202.08906); 0: off
    jitter: float = 0.0                 # a hash of at most this is added to scores in training, about 0.01; 0: off
    capacity: float = 0.0               # in training an expert takes at most this times the mean load; 0: takes all
    expert_ranks: int = 1               # ranks that share the experts of a layer; more than 1 needs a capacity
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
    save_every: int = 0                 # steps between checkpoints from which a run can go on; 0: only if interrupted
    resume: str = ""                    # go on from the last such checkpoint of this run, in a new folder
    out_dir: str = "logs"               # each run makes a folder in it
    stages = ("all",)                   # not a flag; for sample.py: this script has a single stage

PRESETS = {
    "small": Hyperparameters(model_dim=768, batch_tokens=65_536, num_iterations=2000, muon_lr=0.025, width_rule="none"),
    "tiny": Hyperparameters("data/local/train_*.bin", "data/local/val_*.bin", val_tokens=65_536, val_stream_tokens=8192,
                            pack_tokens=2048, depth=4, model_dim=192, head_dim=48, windows=(64, 256), batch_tokens=2048,
                            num_iterations=180, muon_lr=0.04, width_rule="none", precision="fp32")}
FROM_DEPTH = {"model_dim": 0, "batch_tokens": 0, "num_iterations": 0, "width_rule": "nanochat"}     # what --depth sets
LIMITS = {(1, 2**24): "val_tokens val_stream_tokens pack_tokens epochs depth head_dim num_experts top_k expert_ranks",
          (0, 2**24): "model_dim batch_tokens num_iterations windows vocab_size seed val_every save_every "
          "expert_layers expert_dim shared_dim", (1e-9, 1e9): "ratio muon_lr adamw_lr embed_lr head_lr router_lr",
          (1e-9, 1): "cooldown", (0, 1): "lr_floor balance_rate jitter",
          (0, 1e9): "softcap z_loss weight_decay router_z capacity"}
BASE_WIDTH, BASE_BATCH = 768, 2**19     # channels, and tokens of a batch, at which the width rules change no rate
WARMUP, ROPE_BASE, HEAD_CHUNK = 20, 10_000, 32_768      # in steps; of the rotary angles; tokens with logits at a time

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
                text = tuple(int(number) for number in text.split(",")) if name == "windows" else kind(text)
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
    """Yields (inputs (length,) int32, targets (length,) int64) of documents; the last is filled with bos_id, -1."""
    inputs, room = None, 0
    for doc in docs:
        start, end = 0, len(doc) - 1
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

class Stream:                           # where the documents of a stream begin, and attention that stays inside them
    def __init__(self, cfg: Hyperparameters, tokens_T: Tensor):
        self.flex = cfg.attention == "flex" or cfg.attention == "auto" and cfg.compile
        self.index = torch.arange(len(tokens_T), device=tokens_T.device)
        self.doc_start = torch.where(tokens_T == cfg.bos_id, self.index, 0).cummax(0).values
        self.position, self.masks = self.index - self.doc_start, {}             # masks of flex attention by window

    def attend(self, layer: int, window: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attention (T, H, D): a token sees itself and the `window` tokens before it in its document."""
        index, first = self.index, torch.maximum(self.doc_start, self.index - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
        if self.flex:
            if window not in self.masks:
                self.masks[window] = flex_mask(first)
            return flex_attention(q, k, v, block_mask=self.masks[window])[0].transpose(0, 1)
        parts = []
        for low in range(0, len(index), 512):   # 512 queries at a time, with the keys that their windows reach
            near, far = slice(low, low + 512), slice(max(0, low - window), low + 512)
            seen = (index[far] <= index[near, None]) & (index[far] >= first[near, None])
            parts.append(F.scaled_dot_product_attention(q[:, :, near], k[:, :, far], v[:, :, far], attn_mask=seen))
        return torch.cat(parts, 2)[0].transpose(0, 1)

class Linear(nn.Linear):                # keeps its weight in fp32 and uses it in the precision of the input
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Move(torch.autograd.Function):     # row i of the result is row take[i] of x, or 0 if x has no such row
    @staticmethod
    def rows(x_NC: Tensor, take: Tensor) -> Tensor:
        return torch.where((take < len(x_NC))[:, None], x_NC[take.clamp(max=len(x_NC) - 1)], 0)

    @staticmethod
    def forward(ctx, x_NC: Tensor, take: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)      # the inverse map: gradients are moved, not added up in an order that varies
        return Move.rows(x_NC, take)

    @staticmethod
    def backward(ctx, grad_NC: Tensor) -> tuple:
        return Move.rows(grad_NC, *ctx.saved_tensors), None, None

def hidden_sizes(cfg: Hyperparameters) -> tuple[int, int]:
    """Hidden channels of a dense MLP and of an expert; raises UserError if the fields for experts are impossible."""
    dense = cfg.model_dim // 6 * 16 if cfg.mlp == "swiglu" else 4 * cfg.model_dim   # three matrices
    for name in ("model_dim", "expert_dim"):
        if cfg.expert_layers and getattr(cfg, name) % 16:
            raise UserError(f"--{name}={getattr(cfg, name)} is no multiple of 16, which experts need")
    if cfg.expert_layers > cfg.depth:
        raise UserError(f"--expert_layers={cfg.expert_layers} gives none of {cfg.depth} layers experts; lower it")
    if cfg.top_k > cfg.num_experts:
        raise UserError(f"--top_k={cfg.top_k} is more than --num_experts={cfg.num_experts}; lower it")
    if cfg.num_experts % cfg.expert_ranks:
        raise UserError(f"--num_experts={cfg.num_experts} is no multiple of --expert_ranks={cfg.expert_ranks}")
    if cfg.expert_ranks > 1 and not cfg.capacity:
        raise UserError(f"--expert_ranks={cfg.expert_ranks} needs a capacity; try --capacity=1.5")
    idle = {"balance=loss": cfg.balance == "loss" and cfg.router != "learned", f"jitter={cfg.jitter}": cfg.jitter and
            cfg.router == "hash", f"router_z={cfg.router_z}": cfg.router_z and cfg.router != "learned"}
    for flag in (flag for flag, idles in idle.items() if idles):
        raise UserError(f"--{flag} does nothing with --router={cfg.router}; add --router=learned")
    if cfg.expert_layers and cfg.shared_dim >= dense and not cfg.expert_dim:
        raise UserError(f"--shared_dim={cfg.shared_dim} leaves no work to experts, since a dense MLP has {dense} "
                        "channels; lower it, or set --expert_dim")
    return dense, cfg.expert_dim or max(16, (dense - cfg.shared_dim) // cfg.top_k // 16 * 16)

class Experts(nn.Module):                # a bank of MLPs and the router that chooses top_k of them for each token
    def __init__(self, cfg: Hyperparameters, layer: int):
        super().__init__()
        E, C, hidden = cfg.num_experts, cfg.model_dim, hidden_sizes(cfg)[1]
        self.cfg, self.layer, self.group = cfg, layer, None
        self.kind = cfg.router if E > 1 else "hash"                 # one expert needs no router
        self.router = Linear(C, E, bias=False) if self.kind == "learned" else None
        if self.kind == "centroids":
            self.register_buffer("centroids", torch.zeros(E, C))    # directions, of length 1
            self.register_buffer("center", torch.zeros(C))          # mean of the inputs of late
            self.register_buffer("sums", torch.zeros(E + 1, C), persistent=False)   # of this step, see `choose`
        self.fc = nn.Parameter(torch.empty(E, 2 * hidden if cfg.mlp == "swiglu" else hidden, C))
        self.proj = nn.Parameter(torch.empty(E, C, hidden))
        self.register_buffer("bias", torch.zeros(E))                # added to the scores when they are compared
        self.register_buffer("load", torch.zeros(E + 1), persistent=False)  # choices in this step, and those dropped

    def choose(self, u_TC: Tensor, context) -> tuple[Tensor, Tensor, Tensor]:
        """Experts (T, top_k) of each token, their weights (T, top_k), and the router's logits (T, E)."""
        cfg, ids = self.cfg, torch.arange(self.cfg.num_experts, device=u_TC.device)
        if self.kind == "hash":          # of the token's id: one expert and its neighbours
            first = (context.tokens * 2_654_435_761 + self.layer * 40_503 >> 8) % len(ids)
            chosen = (first[:, None] + ids[:cfg.top_k]) % len(ids)
            return chosen, torch.ones_like(chosen, dtype=torch.float32), u_TC.new_zeros(len(u_TC), 1)
        if self.kind == "centroids":     # the nearest by angle, without a gradient
            direction_TC = F.normalize(u_TC.detach().float() - self.center, dim=1)
            logits = F.linear(direction_TC, self.centroids)         # cosines
            scores, ranking = torch.ones_like(logits), logits + self.bias
        else:
            logits = F.linear(u_TC.float(), self.router.weight.float())
            logits = logits - logits.mean(1, keepdim=True)          # only differences count
            scores, ranking = 2 * logits.sigmoid(), logits.detach().sigmoid() + self.bias
        if context.training and cfg.jitter:     # a hash, so that it is the same on any number of ranks
            place = (context.tokens * 127 + context.position * 311)[:, None] + self.layer * 17 + ids * 74_747
            ranking = ranking + cfg.jitter * ((place * 2_654_435_761 >> 8 & 0xFFFF) / 2**15 - 1)
        chosen, weights = [], []
        for _ in range(cfg.top_k):       # on a GPU faster than topk, and the first of equals wins everywhere
            chosen.append(ranking.argmax(1, keepdim=True))
            weights.append((scores * (ids == chosen[-1])).sum(1, keepdim=True))
            ranking = ranking.masked_fill(ids == chosen[-1], -math.inf)
        chosen, weights = torch.cat(chosen, 1), torch.cat(weights, 1)
        if self.kind == "centroids" and context.training:           # what `learn` needs
            members_TE = (chosen[:, :, None] == ids).sum(1).float()
            self.sums[:-1] += members_TE.mT @ direction_TC
            self.sums[-1] += u_TC.detach().float().sum(0)
        # Several experts share a fixed sum: a gradient that wants less of all would blur the choice. One has a gate.
        return chosen, weights / weights.mean(1, keepdim=True) if cfg.top_k > 1 else weights, logits

    @torch.no_grad()
    def learn(self, load: Tensor, batch_tokens: int, step: int):
        """After a step: moves the bias against the load, and each centroid towards the tokens that chose it."""
        if self.cfg.balance == "bias":
            self.bias += self.cfg.balance_rate * torch.sign(load.mean() - load)
        if self.kind == "centroids":
            self.center.lerp_(self.sums[-1] / batch_tokens, 0.1 if step else 1.0)
            self.centroids.copy_(F.normalize(self.centroids + 0.1 * F.normalize(self.sums[:-1], dim=1), dim=1))
            self.sums.zero_()
        self.load.zero_()

    def forward(self, u_TC: Tensor, context) -> Tensor:
        """What the experts add to the stream, (T, C). No wait for the GPU, and no shape that depends on the choices."""
        cfg, E = self.cfg, self.cfg.num_experts
        chosen, weights, logits = self.choose(u_TC, context)
        chosen_R, take_first = chosen.flatten(), context.training and cfg.capacity
        ends = (chosen_R[:, None] <= torch.arange(E, device=u_TC.device)).sum(0, dtype=torch.int32)
        counts = ends.diff(prepend=ends.new_zeros(1))               # choices of each expert; `ends` are their sums
        if context.training:
            self.load[:-1] += counts
            if cfg.balance == "loss" and self.router:               # least if the router wants all experts equally
                wanted = F.normalize(logits.sigmoid(), p=1, dim=1) * counts / counts.sum()
                context.extra = context.extra + cfg.balance_rate * E * wanted.sum(1)
            if cfg.router_z and self.router:
                context.extra = context.extra + cfg.router_z * logits.logsumexp(1).square()
        if u_TC.dtype == torch.float32 and (u_TC.is_cuda or torch.compiler.is_compiling()) and not take_first:
            return self.loop(u_TC, chosen, weights)                 # there grouped_mm takes only bf16
        order = chosen_R.int().argsort(stable=True)                 # choices sorted by expert, then by token
        place = torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        if take_first:                   # each expert has `size` slots for the first tokens of a pack that chose it
            share = min(cfg.capacity / E, 1 / cfg.top_k)            # of the choices; no token chooses an expert twice
            size, begin = math.ceil(share * len(order) / 8) * 8, ends - counts
            queue, at = place - begin[chosen_R], torch.arange(size, device=order.device)
            place = torch.where(queue < size, chosen_R * size + queue, E * size)
            order = torch.where(at < counts[:, None], order[(begin[:, None] + at) % len(order)], len(order))
            self.load[-1] += (counts - size).clamp(min=0).sum()
        x = Move.apply(u_TC[:, None].expand(-1, cfg.top_k, -1).flatten(0, 1), order.flatten(), place)
        y = self.fixed(x) if take_first else self.mlps(x, partial(F.grouped_mm, offs=ends), True)
        y = Move.apply(y, place, order.flatten())
        return (y.view(len(u_TC), cfg.top_k, -1) * weights[:, :, None].to(y.dtype)).sum(1)

    def mlps(self, x: Tensor, product, whole: bool) -> Tensor:
        fc, proj = self.banks(x.dtype, whole)
        return product(activation(product(x, fc.mT), self.cfg.mlp), proj.mT)

    def fixed(self, x: Tensor) -> Tensor:  # as many slots for each expert; those of other ranks travel there and back
        ranks, local, C = self.cfg.num_experts // len(self.fc), len(self.fc), x.size(1)
        x = all_to_all_single_autograd(x, None, None, self.group) if self.group else x
        x = x.view(ranks, local, -1, C).transpose(0, 1).flatten(1, 2)               # the slots of each expert
        y = self.mlps(x, torch.matmul, False).view(local, ranks, -1, C).transpose(0, 1).reshape(-1, C)
        return all_to_all_single_autograd(y, None, None, self.group) if self.group else y

    def loop(self, u_TC: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:    # every expert works for all tokens
        fc, proj = self.banks(u_TC.dtype, True)
        return sum((weights * (chosen == i)).sum(1, keepdim=True).to(u_TC.dtype) *
                   F.linear(activation(F.linear(u_TC, fc[i]), self.cfg.mlp), proj[i]) for i in range(len(fc)))

    def banks(self, dtype: torch.dtype, whole: bool) -> list[Tensor]:  # (E, hidden, C), (E, C, hidden) of all or mine
        found = [self.fc.to(dtype), self.proj.to(dtype)]
        for i, part in enumerate(found if whole and self.group else ()):
            found[i] = part.new_empty(self.cfg.num_experts, *part.shape[1:])
            dist.all_gather([*found[i].split(len(part))], part, group=self.group)
        return found

def activation(h: Tensor, mlp: str) -> Tensor:
    return h.relu().square() if mlp == "relu2" else F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]

class Block(nn.Module):                 # one layer: attention, then the MLP; each adds to the residual stream
    def __init__(self, cfg: Hyperparameters, layer: int):
        super().__init__()
        C, self.head_dim, self.layer, self.mlp = cfg.model_dim, cfg.head_dim, layer, cfg.mlp
        windows = [window or 2**24 for window in cfg.windows]
        self.window = max(windows) if layer == cfg.depth - 1 else windows[layer % len(windows)]
        self.scale = (layer + 1) ** -0.5 if cfg.norm_scaling else 1.0
        self.qkv = nn.Parameter(torch.empty(3, C, C))       # matrices of queries, keys and values
        self.attn_proj = Linear(C, C, bias=False)
        gates = {"none": 0, "head": C // cfg.head_dim, "element": C}[cfg.gate]
        self.gate = Linear(C, gates, bias=False) if gates else None
        self.v_lambda = nn.Parameter(torch.empty(())) if cfg.value_residual and layer else None
        self.experts = Experts(cfg, layer) if cfg.expert_layers and (layer + 1) % cfg.expert_layers == 0 else None
        hidden = cfg.shared_dim if self.experts else hidden_sizes(cfg)[0]
        self.fc = Linear(C, 2 * hidden if cfg.mlp == "swiglu" else hidden, bias=False) if hidden else None
        self.mlp_proj = Linear(hidden, C, bias=False) if hidden else None

    def forward(self, x_TC: Tensor, rope: tuple, context, v1: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream (T, C) after this layer, and the values (T, H, D) of layer 0; layer 0 itself gets None."""
        u = norm(x_TC) * self.scale
        qkv = F.linear(u, self.qkv.flatten(0, 1).to(u.dtype))      # one product is faster than three
        q, k, v = qkv.view(len(u), 3, -1, self.head_dim).unbind(1)
        if self.v_lambda is not None:
            v = torch.lerp(v, v1, self.v_lambda.to(v.dtype))
        y = context.attend(self.layer, self.window, rotary(norm(q), *rope), rotary(norm(k), *rope), v)
        if self.gate is not None:       # starts as a factor of 1
            y = y * 2 * torch.sigmoid(self.gate(u)).view(*y.shape[:2], -1)
        x_TC = x_TC + self.attn_proj(y.flatten(1))
        u = norm(x_TC) * self.scale
        if self.experts is not None:
            x_TC = x_TC + self.experts(u, context)
        if self.fc is not None:
            x_TC = x_TC + self.mlp_proj(activation(self.fc(u), self.mlp))
        return x_TC, v if v1 is None else v1

class GPT(nn.Module):                   # of a config in which everything is filled in, see resolve_config
    def __init__(self, cfg: Hyperparameters):
        super().__init__()
        self.cfg, self.dtype = cfg, torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.lm_head = Linear(cfg.model_dim, cfg.vocab_size, bias=False)
        self.matmul_parameters = sum(param.numel() for param in [*self.blocks.parameters(), self.lm_head.weight])
        for bank in self.experts:       # of which a token uses top_k
            self.matmul_parameters -= bank.fc[cfg.top_k:].numel() + bank.proj[cfg.top_k:].numel()
        self.init_parameters()

    @property
    def experts(self) -> list[Experts]:  # of the layers that have some
        return [block.experts for block in self.blocks if block.experts is not None]

    @torch.no_grad()
    def init_parameters(self):          # the projections start at zero, so each block starts by adding nothing
        generator = torch.Generator(self.embed.weight.device).manual_seed(self.cfg.seed)
        for name, param in self.named_parameters():
            if name.endswith(("proj.weight", "experts.proj", "gate.weight", "v_lambda")):
                param.fill_(0.5 if name.endswith("v_lambda") else 0)
            else:
                std = 0.02 if self.cfg.width_rule == "none" and "router" not in name else param.size(-1) ** -0.5
                param.normal_(0, {"embed.weight": 1.0, "lm_head.weight": 0.001}.get(name, std), generator=generator)
        for bank in self.experts:
            if bank.kind == "centroids":
                bank.centroids.copy_(F.normalize(bank.centroids.normal_(generator=generator), dim=1))

    def share_experts(self):            # with expert_ranks each rank keeps a part of every bank; raises UserError
        ranks, packs = self.cfg.expert_ranks, self.cfg.batch_tokens // self.cfg.pack_tokens
        if ranks == 1:
            return
        if (world := dist.get_world_size() if dist.is_initialized() else 1) % ranks or packs % world:
            raise UserError(f"--expert_ranks={ranks} must divide the {world} ranks, and they the {packs} packs "
                            "of a step; see --nproc_per_node and --pack_tokens")
        table = np.arange(world).reshape(-1, ranks)     # in a row are ranks that share, in a column those with the same
        group, same = (dist.new_subgroups_by_enumeration(rows.tolist())[0] for rows in (table, table.T))
        low = dist.get_rank(group) * (size := self.cfg.num_experts // ranks)
        for bank in self.experts:
            bank.group = group
            bank.fc, bank.proj = (nn.Parameter(whole[low:low + size].clone()) for whole in (bank.fc, bank.proj))
            bank.fc.replicas = bank.proj.replicas = same    # the ranks whose gradients are added up

    @torch.no_grad()
    def gather_experts(self):           # the other way, for the checkpoint; all ranks call it
        for bank in self.experts:
            bank.fc, bank.proj = map(nn.Parameter, bank.banks(torch.float32, True))

    def set_stage(self, index: int, final: bool = False): pass      # for sample.py, as decode and Cache below

    def trunk(self, tokens_T: Tensor, context: "Stream | Cache") -> Tensor:  # what the head reads, (T, C)
        x, v1 = self.embed(tokens_T).to(self.dtype), None
        freq = ROPE_BASE ** -(torch.arange(0, self.cfg.head_dim, 2, device=x.device) / self.cfg.head_dim)
        angle = (context.position[:, None] * freq).repeat(1, 2)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        context.tokens, context.extra = tokens_T.long(), 0.0        # what the experts read and add
        context.training = self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x, v1 = block(x, rope, context, v1)
        return norm(x)

    def logits(self, x_TC: Tensor) -> Tensor:  # (..., V) in fp32, of what trunk returns
        logits = self.lm_head(x_TC).float() * (BASE_WIDTH / self.cfg.model_dim if self.cfg.width_rule == "mup" else 1.0)
        return cap * torch.tanh(logits / cap) if (cap := self.cfg.softcap) else logits

    def score(self, tokens_T: Tensor, targets_T: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy (T,) in nats, 0 where the target is -1, plus other losses; and the likeliest token (T,)."""
        x, parts = self.trunk(tokens_T, context := Stream(self.cfg, tokens_T)), []
        for part, targets in zip(x.split(HEAD_CHUNK), targets_T.split(HEAD_CHUNK)):
            logits = self.logits(part)
            losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
            if z_loss:
                losses = losses + z_loss * logits.logsumexp(1).square() * (targets >= 0)
            parts.append((losses, logits.detach().argmax(1)))
        losses, likeliest = (torch.cat(column) for column in zip(*parts))
        return losses + context.extra, likeliest

    def forward(self, tokens_T: Tensor, targets_T: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Logits (T, V) in fp32 of a stream of documents; with targets (T,) the sum of their losses, see score."""
        if targets_T is not None:
            return self.score(tokens_T, targets_T, z_loss)[0].sum()
        return self.logits(self.trunk(tokens_T, Stream(self.cfg, tokens_T)))

    @torch.no_grad()
    def kurtosis(self, tokens_T: Tensor) -> float:  # mean x^4 / (mean x^2)^2 over channels x of the last layer's output
        return self.trunk(tokens_T, Stream(replace(self.cfg, attention="plain"), tokens_T)).float().pow(4).mean().item()

    def new_cache(self, batch: int, max_tokens: int, chunk: int = 256) -> "Cache":  # for rows of one document each
        return Cache(self, batch, max_tokens)

    @torch.no_grad()
    def decode(self, tokens_BT: Tensor, cache: "Cache", lengths: Tensor | None = None, last: bool = False) -> Tensor:
        """Logits (B, T, V) after T more tokens, of which `lengths` (B,) are real; (B, 1, V) of the last if `last`."""
        B, T = tokens_BT.shape
        real = torch.full_like(cache.length, T) if lengths is None else lengths
        if T > 1 and lengths is None and (most := int(cache.length.max()) + T) > cache.max_tokens:
            raise ValueError(f"a row of {most} tokens is longer than the cache, made for {cache.max_tokens}")
        cache.index = cache.length[:, None] + torch.arange(T, device=real.device)
        cache.position = cache.index.flatten()
        x = self.trunk(tokens_BT.flatten(), cache).view(B, T, -1)
        cache.length.add_(real)
        return self.logits(x[cache.rows, real[:, None] - 1] if last else x)

class Cache:    # keys and values (layers, B, max_tokens + 1, H, D) of the tokens so far; `length` (B,) counts them
    def __init__(self, model: GPT, batch: int, max_tokens: int):
        cfg, device, self.max_tokens = model.cfg, model.embed.weight.device, max_tokens
        shape = 2, cfg.depth, batch, max_tokens + 1, cfg.model_dim // cfg.head_dim, cfg.head_dim
        self.keys, self.values = torch.zeros(shape, dtype=model.dtype, device=device)   # last cell: padding
        self.rows, self.cells = torch.arange(batch, device=device)[:, None], torch.arange(max_tokens + 1, device=device)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)

    def bytes_read(self, tokens: int) -> int:  # in a step
        return self.keys.nbytes + self.values.nbytes

    def attend(self, layer: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # as Stream's, of B * T
        q, k, v = (x.view(*self.index.shape, *x.shape[1:]) for x in (q, k, v))
        cell, query = self.index.clamp(max=self.max_tokens), self.index[:, None, :, None]
        self.keys[layer, self.rows, cell], self.values[layer, self.rows, cell] = k, v
        q, k, v = (x.transpose(1, 2) for x in (q, self.keys[layer], self.values[layer]))
        seen = (self.cells <= query) & (self.cells >= query - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(0, 1)

    def fill(self, other: "Cache", rows_B: Tensor):  # row b becomes row rows_B[b] of another cache of the model
        size = min(self.max_tokens, other.max_tokens)
        self.keys[:, :, :size], self.values[:, :, :size] = other.keys[:, rows_B, :size], other.values[:, rows_B, :size]
        self.length.copy_(other.length[rows_B])

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
    factors["router_lr"] = factors["head_lr"]                       # a router is a small head
    for name, param in model.blocks.named_parameters():
        shapes.setdefault("router" if "router" in name else param.shape[-2:], []).append(param)
    routers = [group(shapes.pop("router"), "router_lr")] if "router" in shapes else []
    head = [model.lm_head.weight, *shapes.pop(torch.Size(()), [])]          # single numbers train like the head
    matrices = [group(params, matrix_rate, cfg.weight_decay) for params in shapes.values()]
    rest = [group([model.embed.weight], "embed_lr"), group(head, "head_lr"), *routers]
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
    """Trains on this rank's packs of a batch. Returns the mean loss, how many ranks `stop`, and the banks' loads."""
    rate, batch_tokens = plan(cfg)[step]
    totals = torch.zeros(2, device=machine.device)
    totals[1].fill_(float(stop))         # an assignment would wait for the GPU
    for tokens, targets in packs:
        loss = forward(tokens, targets, cfg.z_loss) / batch_tokens
        loss.backward()
        totals[0] += loss.detach()
    totals = torch.cat([totals, *(bank.load for bank in forward.experts)])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if machine.world_size > 1:          # the same sums on all ranks, and so the same weights
        dist.all_reduce(totals)
        for bank in (bank for bank in forward.experts if bank.kind == "centroids"):
            dist.all_reduce(bank.sums)
        for param in (param for group in groups for param in group["params"]):
            dist.all_reduce(param.grad, group=getattr(param, "replicas", None))
    for bank, load in zip(forward.experts, totals[2:].split(cfg.num_experts + 1)):
        bank.learn(load[:-1], batch_tokens, step)
    for group in groups:
        group["lr"] = group["base_lr"] * rate
        group["momentum"] = 0.85 + 0.1 * min(1, step / 300)         # of Muon: early gradients are soon outdated
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return totals

def log_loads(run: Run, model: GPT, loads: list[np.ndarray]):  # of the last 100 steps in the log, of all in load.svg
    if loads and model.experts:
        total = np.sum(loads[-100:], axis=0)
        shares = total[:, :-1] / total[:, :-1].mean(1, keepdims=True)
        run.log(f"load of the experts over the mean, last {min(100, len(loads))} steps: busiest {shares.max():.3f}, "
                f"least busy {shares.min():.3f}, dropped {total[:, -1].sum() / total[:, :-1].sum():.6f} of all choices")
        for bank, row in zip(model.experts, shares):
            run.log(f"  layer {bank.layer}: {np.round(row, 3).tolist()}", console=False)
        run.write("load.svg", load_picture(model, loads).encode())

def load_picture(model: GPT, loads: list[np.ndarray]) -> str:   # SVG: a panel for each bank, a line for each expert
    parts, chunks = [], np.array_split(np.array(loads), min(100, len(loads)))
    for panel, bank in enumerate(model.experts):
        counts = np.array([chunk[:, panel, :-1].sum(0) for chunk in chunks])
        heights = 120 - 40 * (counts / counts.mean(1, keepdims=True)).clip(0, 3)            # of (time, expert)
        lines = "".join('<polyline points="' + " ".join(f"{900 * (t + 0.5) / len(column):.0f},{y:.1f}" for t, y in
                        enumerate(column)) + f'" stroke="hsl({360 * i // len(heights.T)},70%,45%)"/>'
                        for i, column in enumerate(heights.T))
        parts.append(f'<g transform="translate(9 {160 * panel + 30})"><text y="-8" fill="#000">layer {bank.layer}: '
                     f'load over the mean, 0 to 3</text><path d="M0 0v120h900M0 80h900" stroke="#bbb"/>{lines}</g>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {160 * len(model.experts)}" fill="none" '
            'font-family="sans-serif" font-size="12">' + "".join(parts) + "</svg>\n")

def load_initial(cfg: Hyperparameters, model: GPT):  # the weights of --init_from; raises UserError
    if cfg.init_from:
        file = max(Path(cfg.init_from).glob("**/model.safetensors"), default=cfg.init_from)     # of a run: its last
        try:
            model.load_state_dict(load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--init_from={cfg.init_from} cannot be used with the other flags: {error}") from None

FREE = {"val_every", "save_every", "resume", "device", "attention", "compile", "out_dir"}    # may differ when resumed

@cache
def sha256_of(path: Path) -> str:        # of a whole file; cached, since the text is the same in each checkpoint
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def load_resumed(cfg: Hyperparameters, model: GPT, shards: tuple, rank: int) -> tuple[dict, dict, list]:
    """Loads the weights of --resume; returns its meta.json, and tensors and numbers of `save`. Raises UserError."""
    flag, name = f"--resume={cfg.resume}", f"optimizer-{rank % cfg.expert_ranks}.safetensors"
    found = sorted(Path(cfg.resume).glob("**/step_*/meta.json")) or [Path(cfg.resume, "meta.json")]
    folder, config, steps = found[-1].parent, json.loads(json.dumps(asdict(cfg))), len(plan(cfg))
    if len({path.parent.parent for path in found}) > 1:
        raise UserError(f"{flag} holds several runs; name the folder of one")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        differ = [f"--{key}" for key, value in config.items() if value != meta["config"][key] and key not in FREE]
        if sha256_of(Path(__file__)) != meta["source_sha256"]:
            differ.append("the script")
        if differ:
            raise UserError(f"{flag} differs in {', '.join(differ)}; give all flags of that run and use the script in "
                            "its folder")
        if meta["step"] >= steps:
            raise UserError(f"{flag} has done all of its {steps} steps; leave --resume out")
        if not (folder / name).is_file():
            raise FileNotFoundError
        if [sha256_of(Path(shard.path)) for shard in shards[0]] != meta["train_sha256"]:
            raise UserError(f"{flag} was trained on another text than --train_files={cfg.train_files}; use its files")
        if sha256_of(folder / name) != meta["optimizers_sha256"][name]:
            raise ValueError(f"{name} is not what the run wrote")
        if not (meta["step"] > 0 and meta["tokens_seen"] > 0 and meta["train_time_ms"] >= 0 and "val_loss" in meta and
                meta["val_losses"] and all(0 <= point["step"] <= meta["step"] for point in meta["val_losses"])):
            raise ValueError("meta.json has impossible numbers")
        model.load_state_dict(load_file(folder / "model.safetensors"))
        with safe_open(folder / name, "pt", str(model.embed.weight.device)) as file:
            numbers = json.loads(file.metadata()["numbers"])
            return meta, {key: file.get_tensor(key) for key in file.keys()}, numbers
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{flag} has no checkpoint from which a run can go on; --save_every writes some, and so does "
                        "interrupting a run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{flag}: {folder} cannot be used: {error}; name an earlier step_* folder") from None

def go_on(run: Run, optimizers: list, loads: list, meta: dict, tensors: dict, numbers: list):  # from load_resumed
    loads.extend(tensors.pop("loads").cpu().numpy())
    states = [optimizer.state_dict() | {"state": {}} for optimizer in optimizers]
    for name, tensor in tensors.items():
        number, param, key = name.split(".")
        states[int(number)]["state"].setdefault(int(param), {})[key] = tensor
    for optimizer, state, saved in zip(optimizers, states, numbers):
        for group, values in zip(state["param_groups"], saved["groups"]):
            group |= values
        for param, values in saved["state"].items():
            state["state"][int(param)] |= values
        optimizer.load_state_dict(state)
    run.seconds = meta["train_time_ms"] / 1000
    run.info |= {name: meta[name] for name in ("step", "tokens_seen", "val_losses", "val_loss")}
    run.log(f"resumed after step {meta['step']} of {run.cfg.resume}", resumed=run.cfg.resume)

def optimizer_file(optimizers: list, loads: list) -> bytes:  # tensors OPTIMIZER.PARAMETER.KEY and, as JSON, numbers
    tensors, numbers = {"loads": torch.tensor(np.array(loads))}, []
    for number, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        tensors |= {f"{number}.{param}.{key}": value for param, values in whole["state"].items()
                    for key, value in values.items() if isinstance(value, Tensor)}
        numbers.append({"groups": [{key: value for key, value in group.items() if isinstance(value, (int, float))}
                                   for group in whole["param_groups"]],
                        "state": {param: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
                                  for param, values in whole["state"].items()}})
    return safetensors_bytes(tensors, {"numbers": json.dumps(numbers)})

def save(run: Run, model: GPT, optimizers: list, loads: list, tokenizer: bytes, machine: Machine) -> Path | None:
    """Writes a checkpoint, of an unfinished run with what --resume needs. All ranks call it; rank 0 gets its path."""
    step, shas = run.info["step"], {}
    if run.info["val_losses"][-1]["step"] < step:                   # that is the loss of other weights
        run.info["val_loss"] = None
    if step < len(plan(run.cfg)):
        content = optimizer_file(optimizers, loads)
        run.write("checkpoint/.new/optimizer-0.safetensors", content)
        shas["optimizer-0.safetensors"] = hashlib.sha256(content).hexdigest()
        for rank in range(1, run.cfg.expert_ranks if machine.world_size > 1 else 1):    # which has experts of its own
            size = torch.tensor(len(content), device=machine.device)
            dist.broadcast(size, rank)
            part = torch.frombuffer(bytearray(content), dtype=torch.uint8) if machine.rank == rank else torch.empty(
                size.item(), dtype=torch.uint8)
            dist.broadcast(part := part.to(machine.device), rank)
            name, part = f"optimizer-{rank}.safetensors", part.cpu().numpy().tobytes()
            run.write(f"checkpoint/.new/{name}", part)
            shas[name] = hashlib.sha256(part).hexdigest()
        if machine.rank == 0:            # the only one that writes
            data = [sha256_of(Path(path)) for path in sorted(glob.glob(run.cfg.train_files))]
            run.info |= {"optimizers_sha256": shas, "train_sha256": data}
    else:
        run.info.pop("optimizers_sha256", None)
    mine = [(bank.fc, bank.proj) for bank in model.experts]
    model.gather_experts()
    path = run.write_checkpoint(model, tokenizer) if machine.rank == 0 else None
    for bank, (fc, proj) in zip(model.experts, mine):
        bank.fc, bank.proj = fc, proj
    return path

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
    val_streams += [(val_streams[0][0], np.full(cfg.val_stream_tokens, -1))] * (-len(val_streams) % machine.world_size)
    model = GPT(cfg).to(machine.device)
    resumed = load_resumed(cfg, model, shards, machine.rank) if cfg.resume else None
    load_initial(cfg, model) if not resumed else None
    model.share_experts()               # ranks that share run as many passes: hence streams without targets above
    optimizers, run, began = make_optimizers(model), Run(cfg, machine, argv, shards), time.perf_counter()
    run.log(f"{machine.world_size} x {machine.name}: {model.matmul_parameters / 1e6:.1f} M weights in products, width "
            f"{cfg.model_dim}, {steps} steps of {cfg.batch_tokens} tokens, factors {rate_factors(cfg)}")
    forward, loads, start = model, [], {name: tensor.clone() for name, tensor in model.state_dict().items()}
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
        log_loads(run, model, loads)
    go_on(run, optimizers, loads, *resumed) if resumed else None
    validate(forward, cfg, val_streams, machine) if resumed else log_validation()   # after resuming only to compile it
    run.info["compile_seconds"] = (time.perf_counter() - began) * cfg.compile
    graphs, interrupted = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    for name in (signal.SIGINT, signal.SIGTERM):                    # save what there is; a second signal kills
        signal.signal(name, lambda number, _: interrupted.append(signal.signal(number, signal.SIG_DFL)))
    unread, began = [], time.perf_counter()
    for step, batch in islice(enumerate(batches(cfg, shards[0], machine), 1), run.info["step"], None):
        unread.append(training_step(forward, optimizers, batch, step - 1, cfg, machine, bool(interrupted)))
        validates = step == steps or cfg.val_every and step % cfg.val_every == 0
        saves = step < steps and cfg.save_every and step % cfg.save_every == 0
        if cfg.compile and step % 10 and not (validates or saves):
            continue                    # a GPU waits while results are read, so they are read ten at a time
        results, stop = torch.stack(unread).tolist(), unread[-1][1] > 0
        seconds = (time.perf_counter() - began) / len(unread)
        for done, (loss, _, *load) in enumerate(results, step - len(results) + 1):
            loads.append(np.reshape(load, (len(model.experts), cfg.num_experts + 1)))
            run.seconds += seconds
            run.info |= {"step": done, "tokens_seen": run.info["tokens_seen"] + plan(cfg)[done - 1][1]}
            run.log_loss("train_loss", loss, console=done % 10 == 0)
        log_validation() if validates else None
        if stop:
            break
        save(run, model, optimizers, loads, tokenizer, machine) if saves else None
        unread, began = [], time.perf_counter()
    path, memory = save(run, model, optimizers, loads, tokenizer, machine), torch.cuda.max_memory_allocated() / 2**30
    if machine.rank == 0:
        flag = shlex.quote(f"--checkpoint={path}" if step == steps else f"--resume={run.folder}")
        more = f"python sample.py {flag}" if step == steps else f"the same with {flag}"
        run.log(f"{step} steps in {run.seconds:.1f} s, {run.info['tokens_seen'] / run.seconds:,.0f} tokens/s\n"
                f"next: {more}", status="finished" if step == steps else "interrupted", peak_memory_gib=memory,
                recompiles=torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs)
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
