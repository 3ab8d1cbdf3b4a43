"""The original GPT-2 weights as a model with the interface of the training scripts, to compare with published scores.

This is a module, not a program. sample.py and evaluate.py use it:

    python sample.py --model=gpt2 --prompt="The moon"       # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
    python evaluate.py --model=gpt2 --tasks=hellaswag

From Python:

    model, tokenizer_json, meta = gpt2.load("gpt2", "cuda", "bf16")

A folder is in the Hugging Face layout: config.json, and model.safetensors or the files that
model.safetensors.index.json lists. The vocabulary is vocab.json and merges.txt there (or encoder.json and vocab.bpe),
else that in tiktoken's cache. Published models are downloaded once from the hub that HF_ENDPOINT names, into the cache
of huggingface_hub.

Each document of a packed stream begins with bos_id at position 0 and sees only itself. A document may have at most
1,024 tokens, the positions that GPT-2 has. (In GPT-2's own training <|endoftext|> stood between documents and did not
start a new position.)

Shape suffixes: B sequences, T tokens, H heads, D channels per head, C residual channels, V vocabulary.
"""
if __name__ == "__main__":               # before the imports, so that the text comes at once
    print(__doc__.strip())
    raise SystemExit

import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HEAD_CHUNK = 8192                        # tokens whose logits exist at one time in `score`
MAX_LAYERS, MAX_SIZE = 256, 1 << 20      # larger numbers in config.json are refused
MAX_BYTES = 1 << 20                      # longest config.json or model.safetensors.index.json
VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))    # the same two files have two names

class UserError(Exception):
    """A mistake that the user can correct. Its text names the thing, the value and the remedy; the exit code is 2."""

@dataclass(frozen=True)
class Config:
    vocab_size: int
    context_tokens: int                  # positions that were trained; no document may be longer
    num_layers: int
    num_heads: int
    model_dim: int
    norm_eps: float
    bos_id: int

# -----------------------------------------------------------------------------
# Model

class Block(nn.Module):
    """One layer; its parts are named as in the published weights."""

    def __init__(self, cfg: Config):
        super().__init__()
        C = cfg.model_dim
        self.ln_1, self.ln_2 = nn.LayerNorm(C, cfg.norm_eps), nn.LayerNorm(C, cfg.norm_eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor, attend) -> Tensor:
        """x (..., C) after this layer; attend(q, k, v), each (..., C), mixes the tokens."""
        x = x + self.attn["c_proj"](attend(*self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))

class Cache:
    """Keys and values of each row's tokens so far; made by GPT2.new_cache, changed by GPT2.decode."""

    def __init__(self, cfg: Config, batch: int, max_tokens: int, like: Tensor):
        head_dim, self.max_tokens = cfg.model_dim // cfg.num_heads, max_tokens
        # position p lies in slot p; tokens that are not real go to the last slot, which no token sees
        self.kv = like.new_zeros(cfg.num_layers, 2, batch, max_tokens + 1, cfg.num_heads, head_dim)
        self.rows = torch.arange(batch, device=like.device)[:, None]
        self.position = torch.zeros(batch, dtype=torch.int64, device=like.device)   # of each row's next token
        self.start = torch.zeros_like(self.position)                                # of its document

    def fill(self, other: "Cache", rows_B: Tensor):
        """Copies row rows_B[b] of another cache to row b; its tokens must fit into this cache."""
        both = min(self.max_tokens, other.max_tokens)
        self.kv[:, :, :, :both] = other.kv[:, :, rows_B, :both]
        self.position.copy_(other.position[rows_B])
        self.start.copy_(other.start[rows_B])

    def bytes_read(self, tokens: int) -> int:
        """Bytes of keys and values that the next token of every row reads: all slots, filled or not."""
        return self.kv.nbytes

class GPT2(nn.Module):
    """GPT-2 with forward, score, new_cache and decode as the training scripts' GPT has them."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.wpe = nn.Embedding(cfg.context_tokens, cfg.model_dim)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.ln_f = nn.LayerNorm(cfg.model_dim, cfg.norm_eps)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads, (T, C), for one packed stream of tokens (T,)."""
        T, H, size = tokens.numel(), self.cfg.num_heads, min(self.cfg.context_tokens, tokens.numel())
        index = torch.arange(T, device=tokens.device)
        start = torch.where(tokens == self.cfg.bos_id, index, 0).cummax(0).values
        position = index - start
        if not torch.compiler.is_compiling() and (longest := int(position.max()) + 1) > self.cfg.context_tokens:
            raise UserError(f"a document has {longest} tokens, but GPT-2 reads {self.cfg.context_tokens}; cut it")
        # chunks as long as the longest document; each sees itself and the one before
        n = -(-T // size)
        rows = torch.arange(n * size, device=tokens.device)
        first = torch.cat([start, rows[T:]]).view(n, size, 1)       # padding sees itself
        rows = rows.view(n, size)
        keys = torch.cat([rows - size, rows], 1)[:, None]
        mask = ((keys <= rows[:, :, None]) & (keys >= first))[:, None]

        def chunks(x_TC):
            return F.pad(x_TC, (0, 0, 0, n * size - T)).view(n, size, H, -1).transpose(1, 2)

        def attend(q, k, v):
            k, v = (torch.cat([x.roll(1, 0), x], 2) for x in (chunks(k), chunks(v)))
            y = F.scaled_dot_product_attention(chunks(q), k, v, attn_mask=mask)
            return y.transpose(1, 2).reshape(n * size, -1)[:T]
        x = self.wte(tokens) + self.wpe(position.clamp(max=self.cfg.context_tokens - 1))
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)

    def score(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target (T,) in nats, fp32, 0 where it is -1; and the likeliest token (T,) int64."""
        losses, likeliest = [], []
        for x, part in zip(self.hidden(tokens).split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
            logits_TV = F.linear(x, self.wte.weight).float()
            losses.append(F.cross_entropy(logits_TV, part, ignore_index=-1, reduction="none"))
            likeliest.append(logits_TV.argmax(1))
        return torch.cat(losses), torch.cat(likeliest)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (T, V) fp32 of one packed stream; with targets (-1: none) the sum of the cross-entropies in nats."""
        if targets is None:
            return F.linear(self.hidden(tokens), self.wte.weight).float()
        return self.score(tokens, targets)[0].sum()

    @property
    def matmul_parameters(self) -> int:
        """Number of weights that each token is multiplied with."""
        return sum(param.numel() for param in self.parameters() if param.dim() == 2) - self.wpe.weight.numel()

    def new_cache(self, batch: int, max_tokens: int, chunk: int = 0) -> Cache:
        """An empty cache for `batch` rows of up to max_tokens tokens.

        `chunk` is not used; the training scripts' GPT has it. Raises ValueError if the model cannot read max_tokens.
        """
        if max_tokens > self.cfg.context_tokens:
            raise ValueError(f"GPT-2 reads {self.cfg.context_tokens} tokens, not {max_tokens}")
        return Cache(self.cfg, batch, max_tokens, self.wte.weight)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache, lengths: Tensor | None = None, last: bool = False) -> Tensor:
        """Logits (B, T, V) fp32 of the next tokens (B, T) of each row, which are added to the cache.

        Each row is its own stream. lengths (B,) int64: how many tokens of a row are real; the others change nothing,
        and their logits mean nothing; the caller keeps count of them. last: only the logits of each row's last
        token, (B, 1, V). Raises ValueError if several tokens a row are given without lengths and exceed the cache.
        """
        (B, T), heads = tokens.shape, self.cfg.num_heads
        if T > 1 and lengths is None and (most := int(cache.position.max()) + T) > cache.max_tokens:
            raise ValueError(f"a row of {most} tokens is longer than the cache, which was made for {cache.max_tokens}")
        lengths = torch.full_like(cache.position, T) if lengths is None else lengths
        ahead = torch.arange(T, device=tokens.device)
        position = cache.position[:, None] + ahead
        start = torch.where(tokens == self.cfg.bos_id, position, 0).cummax(1).values
        start = torch.maximum(start, cache.start[:, None])
        slot = torch.where(ahead < lengths[:, None], position, cache.max_tokens).clamp(max=cache.max_tokens)
        keys = torch.arange(cache.max_tokens + 1, device=tokens.device)
        mask = ((keys <= position[:, :, None]) & (keys >= start[:, :, None]) & (keys < cache.max_tokens))[:, None]
        mask = mask | ((keys == cache.max_tokens) & (ahead >= lengths[:, None])[:, None, :, None])      # not none
        x = self.wte(tokens) + self.wpe((position - start).clamp(max=self.cfg.context_tokens - 1))
        for block, layer in zip(self.h, cache.kv):
            def attend(q, k, v):
                layer[0, cache.rows, slot], layer[1, cache.rows, slot] = (p.view(B, T, heads, -1) for p in (k, v))
                y = F.scaled_dot_product_attention(q.view(B, T, heads, -1).transpose(1, 2), *layer.transpose(2, 3),
                                                   attn_mask=mask)
                return y.transpose(1, 2).reshape(B, T, -1)
            x = block(x, attend)
        newest = (lengths - 1).clamp(min=0)[:, None]
        cache.start.copy_(torch.where(lengths > 0, start[cache.rows, newest][:, 0], cache.start))
        cache.position += lengths
        x = x[cache.rows, newest] if last else x
        return F.linear(self.ln_f(x), self.wte.weight).float()

# -----------------------------------------------------------------------------
# Loading

def fetch(name: str) -> Path:
    """The folder with the files of a published model, from the hub or its local cache; raises UserError."""
    from huggingface_hub import snapshot_download
    files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=files))
    except Exception as error:           # no network, no such hub, no space: these have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "socks" in reason.lower():    # the HTTP library needs a package that it does not install by itself
            reason = f"a SOCKS proxy is set and its Python package is missing: pip install socksio; {reason}"
        raise UserError(f"--model={name} cannot be downloaded ({reason}); name a folder with its config.json and "
                        "model.safetensors instead") from None

def check_file(path: Path) -> Path:
    """The path; raises FileNotFoundError if it is not a file (reading a pipe would wait for its writer)."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    return path

def read_config(folder: Path) -> Config:
    """What config.json says; raises UserError if it is missing or describes another kind of model."""
    path = folder / "config.json"
    try:
        with open(check_file(path), "rb") as file:
            said = json.loads(file.read(MAX_BYTES))
        sizes = [said[name] for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
        cfg = Config(*sizes, said["layer_norm_epsilon"], said["bos_token_id"])
        if (not all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes) or cfg.num_layers > MAX_LAYERS
                or cfg.model_dim % cfg.num_heads or type(cfg.norm_eps) is not float or not 0 < cfg.norm_eps < 1
                or type(cfg.bos_id) is not int or not 0 <= cfg.bos_id < cfg.vocab_size):
            raise ValueError(f"numbers out of range: {cfg}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); --model= takes a folder with "
                        f"GPT-2's config.json and model.safetensors, or one of {', '.join(NAMES)}") from None
    expected = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False,
                "n_inner": None, "scale_attn_weights": True, "tie_word_embeddings": True}
    odd = [f"{name}={said[name]}" for name, value in expected.items() if said.get(name, value) != value]
    if odd:
        raise UserError(f"{path} is not that of a GPT-2 ({', '.join(odd)}); choose another model")
    return cfg

def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the files that model.safetensors.index.json lists; raises UserError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    try:
        with open(check_file(index), "rb") as file:
            names = sorted({*json.loads(file.read(MAX_BYTES))["weight_map"].values()})
        for name in names:               # a name with a folder in it could lead anywhere
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII):
                raise ValueError(f"{name!r} is not the name of a safetensors file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read ({type(error).__name__}: {error}); download it again") from None
    return [folder / name for name in names]

def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weight files by their names without the prefix `transformer.`; raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    found = {}
    for path in weight_files(folder):
        try:
            tensors = load_file(check_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); --model= takes a folder with model.safetensors, or with "
                            "model.safetensors.index.json and the files it lists") from None
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            if name in found:
                raise UserError(f"{path} holds {name}, which is in the files of {folder} twice; download them again")
            found[name] = tensor
    return found

def read_weights(folder: Path, cfg: Config, dtype: torch.dtype) -> GPT2:
    """The model with the weights of a folder, on the CPU; raises UserError if they do not fit."""
    with torch.device("meta"):           # no storage and no random numbers for tensors that are replaced at once
        model = GPT2(cfg)
    wanted, found = model.state_dict(), read_tensors(folder)
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(found.setdefault("wte.weight", head), head):     # GPT-2 shares the two
        raise UserError(f"{folder} has an lm_head.weight that is not wte.weight, so it is not GPT-2; choose another")
    for name in list(found):
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            del found[name]              # the causal mask
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            found[name] = found[name].T  # published as (in, out)
    odd = [name for name in wanted.keys() | found.keys() if name not in wanted or name not in found
           or wanted[name].shape != found[name].shape or not found[name].is_floating_point()]
    if odd:
        raise UserError(f"the weights in {folder} do not fit its config.json: {', '.join(sorted(odd)[:8])}; download "
                        "both again")
    model.load_state_dict({name: tensor.to(dtype).contiguous() for name, tensor in found.items()}, assign=True)
    return model.requires_grad_(False)

def read_tokenizer(folder: Path) -> bytes:
    """GPT-2's tokenizer.json, made from the vocabulary in the folder, else from that in tiktoken's cache; UserError."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
    try:
        from text import gpt2_tokenizer_json
    finally:
        del sys.path[0]
    names = next((pair for pair in VOCABULARIES if all((folder / name).is_file() for name in pair)), None)
    try:
        if not names:
            return gpt2_tokenizer_json()
        with tempfile.TemporaryDirectory() as links:                # under the names that text.py reads
            for name, link in zip(names, ("encoder.json", "vocab.bpe")):
                Path(links, link).symlink_to((folder / name).absolute())
            return gpt2_tokenizer_json(Path(links))
    except LookupError as error:
        raise UserError(f"{folder} has no vocabulary of GPT-2 ({error}); put vocab.json and merges.txt there") from None

def load(name_or_folder: str | Path, device: str, precision: str) -> tuple[GPT2, bytes, dict]:
    """(model on `device`, its tokenizer.json, meta) of a published name or a folder; raises UserError.

    precision: bf16 or fp32. meta has script, step, config and tokenizer_sha256, as that of a checkpoint.
    """
    text = str(name_or_folder)
    folder = Path(text if os.path.exists(text) else os.path.expanduser(text))
    if not text or not folder.is_dir():
        if text not in NAMES:
            raise UserError(f"--model={text} is neither a folder nor one of {', '.join(NAMES)}; choose one of them")
        folder = fetch(text)
    cfg, tokenizer = read_config(folder), read_tokenizer(folder)
    if (bos_id := json.loads(tokenizer)["bos_id"]) != cfg.bos_id:
        raise UserError(f"{folder / 'config.json'} has vocab_size={cfg.vocab_size} and bos_token_id={cfg.bos_id}, but "
                        f"GPT-2 begins documents with {bos_id}; choose another model")
    model = read_weights(folder, cfg, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    meta = {"script": "gpt2", "step": 0, "config": asdict(cfg)}
    meta["tokenizer_sha256"] = hashlib.sha256(tokenizer).hexdigest()
    return model.to(device).eval(), tokenizer, meta
