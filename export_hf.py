"""Writes a checkpoint of train_gpt_simple.py as a Hugging Face model folder: what --export_hf of sample.py does.

    python sample.py --checkpoint=logs/<run> --export_hf=my_model
    python export_hf.py --import=my_model --out=weights         # back, for train_gpt_simple.py --init_from=weights

With --mlp=swiglu the model of train_gpt_simple.py is the one that Hugging Face's transformers calls Qwen3: norms before
attention and MLP, normalised queries and keys, rotary positions, SwiGLU, no biases. The gains of all norms are 1. Other
settings change the function that the model computes, so they are refused.

The new folder is compared with the model before it is moved to its place: a short PyTorch version of Qwen3 reads what
was written and must give the same logits. docs/formats.md describes the files.

--import reads such a folder, writes model.safetensors under the names of train_gpt_simple.py, and prints the flags of a
run that begins with these weights. The text of that run must be in the vocabulary of the model.
"""
import sys

if __name__ == "__main__" and (len(sys.argv) == 1 or "--help" in sys.argv):     # before the slow imports
    print(__doc__.strip())
    raise SystemExit

import argparse
import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

SCRIPT = "train_gpt_simple"
# Settings of the model that Qwen3 has no place for, with the only value that can be exported.
NEEDED = {"mlp": "swiglu", "gate": "none", "value_residual": False, "norm_scaling": False, "softcap": 0.0}
OTHER_PARTS = dict.fromkeys(("train_gpt", "train_gpt_medium"), "relu2 MLPs, gates, value embeddings and capped logits")
UNLIMITED = 2**24                        # window of a layer that looks back any number of tokens
EPSILON = torch.finfo(torch.float32).eps    # what F.rms_norm adds to the mean square
TOLERANCE = 1e-3                         # largest difference of logits, relative to 1 + the largest logit
TURN_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

# render() and prime() of data/chat.py in the language of chat templates.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set turns = messages -%}{%- endif -%}
{%- if not turns -%}{{- raise_exception('there is no user message') -}}{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- set role = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
    {%- if message['role'] != role -%}
        {{- raise_exception('turn ' ~ loop.index ~ ' is not of ' ~ role ~ '; the two take turns') -}}
    {%- endif -%}
    {{- '<|' ~ role ~ '_start|>' -}}
    {%- if loop.first and messages[0]['role'] == 'system' -%}
        {%- if messages[0]['content'] is string -%}{{- messages[0]['content'] -}}
        {%- else -%}{%- for part in messages[0]['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
        {{- '\\n\\n' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}{{- part['text'] -}}
            {%- elif role == 'assistant' and part['type'] == 'python' -%}
                {{- '<|python_start|>' ~ part['text'] ~ '<|python_end|>' -}}
            {%- elif role == 'assistant' and part['type'] == 'python_output' -%}
                {{- '<|output_start|>' ~ part['text'] ~ '<|output_end|>' -}}
            {%- else -%}{{- raise_exception('a part of ' ~ role ~ ' has type ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|' ~ role ~ '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if turns[-1]['role'] != 'user' -%}
        {{- raise_exception('the last message is not of user, so there is nothing to answer') -}}
    {%- endif -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}"""

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT of {parameters:.1f} million parameters, made with minutegpt ({scripts}).

Its weights are in fp32, in the layout of Qwen3.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
{example}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

| | |
| --- | --- |
| layers, channels, heads | {layers}, {channels}, {heads} |
| vocabulary | {vocabulary} tokens |
| longest text | {context} tokens{reason} |
| a token sees | {windows} |
| training | {training} |
| knows conversations | {chat} |

A text begins with `{bos}`, as the documents did in training. The tokenizer adds it by itself.
Text that spells a special token becomes that token here; in minutegpt it stays ordinary text.
"""
BASE_EXAMPLE = 'inputs = tokenizer("The", return_tensors="pt")'
CHAT_EXAMPLE = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
TOOL_NOTE = """
The model writes `<|python_start|>48/2<|python_end|>` when it wants a result. It then reads
`<|output_start|>24<|output_end|>`. minutegpt runs this calculator. transformers does not: your program has to compute
the result and append it.
"""

class UserError(Exception):
    """A mistake that the user can correct. The text names the thing, the value and the remedy."""

# -----------------------------------------------------------------------------
# What can be exported

def check_meta(meta: dict):
    """Raises UserError unless the model of a checkpoint with this meta.json is a Qwen3."""
    if meta["script"] != SCRIPT:
        parts = OTHER_PARTS.get(meta["script"], "a model of its own")
        raise UserError(f"--export_hf: {meta['script']}.py has {parts}, which is not a Qwen3; export a checkpoint of "
                        f"{SCRIPT}.py that was trained with --mlp=swiglu")
    for name, needed in NEEDED.items():
        value = meta["config"].get(name, needed)
        if value != needed:
            shown = str(needed).lower()
            raise UserError(f"--export_hf: the model was trained with --{name}={str(value).lower()}, which Qwen3 does "
                            f"not have; train one with --{name}={shown}")

def check_folder(folder: Path, flag: str = "--export_hf"):
    """Raises UserError if `folder` is a file or has something in it."""
    if os.path.lexists(folder) and (not folder.is_dir() or folder.is_symlink()):
        raise UserError(f"{flag}={folder} is not a folder; choose another name")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{flag}={folder} is not empty; choose another folder, or empty this one")

def layer_windows(model) -> tuple[list[str], int | None, int]:
    """(layer_types, sliding_window, longest text in tokens) of a model; raises UserError.

    Here a token sees itself and `window` tokens before it. Qwen3 counts the token itself, so its window is one larger.
    Qwen3 has one size of windows. If there are two, the layers with the larger one become layers that see everything.
    This is the same for texts that fit into the larger window.
    """
    windows = [block.window for block in model.blocks]
    sizes = sorted(set(windows))
    if len(sizes) > 2:
        raise UserError(f"--export_hf: the model has windows of {', '.join(map(str, sizes))} tokens ({UNLIMITED}: no "
                        "limit), but Qwen3 has one size beside no limit; train one with fewer sizes in --windows=")
    sliding = sizes[0] if len(sizes) == 2 or sizes[0] != UNLIMITED else None
    types = ["sliding_attention" if window == sliding else "full_attention" for window in windows]
    limited = len(sizes) == 2 and sizes[1] != UNLIMITED
    return types, None if sliding is None else sliding + 1, sizes[1] + 1 if limited else model.cfg.pack_tokens

# -----------------------------------------------------------------------------
# Weights and settings

def query_key_value(weights: dict, block: str) -> tuple:
    """The three matrices (C, C) of a layer, stored one by one or as one tensor (3, C, C); raises KeyError."""
    if f"{block}.qkv" in weights:
        return tuple(weights.pop(f"{block}.qkv"))
    return tuple(weights.pop(f"{block}.{name}.weight") for name in "qkv")

def convert_weights(model, vocab_size: int) -> dict:
    """The weights under Qwen3's names, in fp32, with the rows of `vocab_size` tokens; raises UserError.

    Rows beyond these only fill up the vocabulary: no text has such a token. Under --width_rule=mup the model multiplies
    its logits by a factor. Here the head holds it.
    """
    script = sys.modules[type(model).__module__]
    head_factor = script.BASE_WIDTH / model.cfg.model_dim if model.cfg.width_rule == "mup" else 1.0
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    channels, head_dim = model.cfg.model_dim, model.cfg.head_dim
    found = {}
    try:
        found["model.embed_tokens"] = weights.pop("embed.weight")[:vocab_size]
        found["lm_head"] = weights.pop("lm_head.weight")[:vocab_size] * head_factor
        for layer in range(model.cfg.depth):
            block, name = f"blocks.{layer}", f"model.layers.{layer}"
            for letter, weight in zip("qkv", query_key_value(weights, block)):
                found[f"{name}.self_attn.{letter}_proj"] = weight
            found[f"{name}.self_attn.o_proj"] = weights.pop(f"{block}.attn_proj.weight")
            gate, up = weights.pop(f"{block}.fc.weight").chunk(2)
            found |= {f"{name}.mlp.gate_proj": gate, f"{name}.mlp.up_proj": up}
            found[f"{name}.mlp.down_proj"] = weights.pop(f"{block}.mlp_proj.weight")
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{name}.{norm}"] = torch.ones(channels)
            for norm in ("q_norm", "k_norm"):
                found[f"{name}.self_attn.{norm}"] = torch.ones(head_dim)
    except KeyError as error:
        raise UserError(f"--export_hf: the model has no weight {error}; use the export_hf.py that belongs to its "
                        "script") from None
    if weights:
        raise UserError(f"--export_hf: Qwen3 has no place for the weights {', '.join(weights)[:200]}; use the "
                        "export_hf.py that belongs to the script")
    found["model.norm"] = torch.ones(channels)
    # a copy each: safetensors refuses tensors that share memory
    return {f"{name}.weight": weight.clone(memory_format=torch.contiguous_format) for name, weight in found.items()}

def make_config(model, weights: dict, bos_id: int, ends: list[int]) -> dict:
    """The content of config.json; raises UserError."""
    cfg = model.cfg
    layer_types, sliding_window, context = layer_windows(model)
    heads = cfg.model_dim // cfg.head_dim
    rope_base = sys.modules[type(model).__module__].ROPE_BASE
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float32",
            "vocab_size": len(weights["lm_head.weight"]), "hidden_size": cfg.model_dim, "head_dim": cfg.head_dim,
            "intermediate_size": len(weights["model.layers.0.mlp.up_proj.weight"]), "hidden_act": "silu",
            "num_hidden_layers": cfg.depth, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": context, "rope_theta": float(rope_base), "rms_norm_eps": EPSILON,
            "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "use_cache": True,
            "use_sliding_window": sliding_window is not None, "sliding_window": sliding_window,
            "max_window_layers": cfg.depth, "layer_types": layer_types, "bos_token_id": bos_id, "eos_token_id": ends}

@torch.no_grad()
def qwen3_logits(config: dict, weights: dict, tokens):
    """Logits (T, V) of one text, by the definition of Qwen3."""
    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], config["rms_norm_eps"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def turn(x):                         # (T, H, D), by rotary positions
        half = config["head_dim"] // 2
        freq = config["rope_theta"] ** -(torch.arange(half) / half)
        angle = (torch.arange(len(x))[:, None] * freq)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 2)

    x = weights["model.embed_tokens.weight"][tokens]
    distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    for layer, kind in enumerate(config["layer_types"]):
        name = f"model.layers.{layer}"
        seen = (distance >= 0) & (distance < (config["sliding_window"] if kind == "sliding_attention" else UNLIMITED))
        u = norm(x, f"{name}.input_layernorm")
        q, k, v = (linear(u, f"{name}.self_attn.{part}_proj").view(len(x), -1, config["head_dim"]) for part in "qkv")
        q, k = turn(norm(q, f"{name}.self_attn.q_norm")), turn(norm(k, f"{name}.self_attn.k_norm"))
        y = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (q, k, v)), attn_mask=seen)
        x = x + linear(y.transpose(0, 1).flatten(1), f"{name}.self_attn.o_proj")
        u = norm(x, f"{name}.post_attention_layernorm")
        hidden = F.silu(linear(u, f"{name}.mlp.gate_proj")) * linear(u, f"{name}.mlp.up_proj")
        x = x + linear(hidden, f"{name}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")

def check_logits(model, config: dict, weights: dict):
    """Raises UserError unless the exported weights give the model's logits on a text that is longer than the window."""
    ids, bos_id = config["vocab_size"], config["bos_token_id"]
    length = min((config["sliding_window"] or 32) + 32, config["max_position_embeddings"])
    others = torch.randint(1, ids, (length,), generator=torch.Generator().manual_seed(0))
    tokens = (bos_id + others) % ids                                # any token but the one that begins a document
    tokens[0] = bos_id
    with torch.no_grad():
        wanted = model(tokens)[:, :ids]
    difference = (qwen3_logits(config, weights, tokens) - wanted).abs().max().item()
    if not difference <= TOLERANCE * (1 + wanted.abs().max().item()):
        raise UserError(f"--export_hf: as a Qwen3 the model has other logits (by {difference:.2g}), so {SCRIPT}.py "
                        "computes something that export_hf.py does not know; use the two files of one version")

# -----------------------------------------------------------------------------
# Tokenizer

def add_begin(content: bytes, bos: str, bos_id: int) -> bytes:
    """A tokenizer.json of Hugging Face that also puts the begin-of-document token before each text."""
    data = json.loads(content)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}
    return json.dumps(data, ensure_ascii=False).encode()

def has_turns(special: dict) -> bool:
    """Whether a vocabulary with these special tokens can write conversations."""
    return all(name in special for name in (*TURN_TOKENS, *TOOL_TOKENS))

def tokenizer_settings(special: dict, bos: str, end: str, context: int) -> dict:
    """The content of tokenizer_config.json."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": end, "pad_token": bos,
                "add_bos_token": True, "clean_up_tokenization_spaces": False, "model_max_length": context,
                "model_input_names": ["input_ids", "attention_mask"]}
    return settings | ({"chat_template": CHAT_TEMPLATE} if has_turns(special) else {})

def generation_settings(chat: bool, bos_id: int, ends: list[int]) -> dict:
    """The content of generation_config.json: what chat.py does for a chat model, and sample.py for others.

    There is no pad_token_id: transformers would take the first token of a text for padding, and hide it.
    """
    drawing = {"temperature": 0.6, "top_k": 50} if chat else {"temperature": 1.0, "top_k": 0, "top_p": 0.95}
    return {"bos_token_id": bos_id, "eos_token_id": ends, "do_sample": True} | drawing

# -----------------------------------------------------------------------------
# The folder

def training(meta: dict) -> str:
    """How the weights were trained, in a few words. Of the path of the shards, only the last two names are shown."""
    files = "/".join(Path(meta["config"]["train_files"]).parts[-2:])
    loss, tokens = meta.get("val_loss"), meta.get("tokens_seen")
    words = f"{meta['step']} steps" + (f", {tokens} tokens" if isinstance(tokens, int) else "")
    words += f", validation loss {loss:.4f}" if isinstance(loss, float) else ""
    return f"on `{files}`, then on conversations: {words}" if "parent" in meta else f"on `{files}`: {words}"

def model_card(name: str, model, meta: dict, config: dict, bos: str, chat: bool, parameters: int) -> str:
    """The text of README.md."""
    types, sliding, context = config["layer_types"], config["sliding_window"], config["max_position_embeddings"]
    windows = "all before it"
    if sliding:
        limited = types.count("sliding_attention")
        others = f" in {limited} of {len(types)} layers, all before it in the others" if limited < len(types) else ""
        windows = f"itself and {sliding - 1} before it{others}"
    reason = ", as in training"
    if context != model.cfg.pack_tokens:
        reason = "; in longer ones the model differs from the one that was trained"
    scripts = [meta["script"], *(["chat_sft"] if "parent" in meta else [])]
    card = MODEL_CARD.format(
        name=name, parameters=parameters / 1e6, scripts=", ".join(f"`{script}.py`" for script in scripts),
        layers=len(types), channels=config["hidden_size"], heads=config["num_attention_heads"],
        vocabulary=config["vocab_size"], context=context, reason=reason, windows=windows, training=training(meta),
        chat="yes" if chat else "no", bos=bos, example=CHAT_EXAMPLE if chat else BASE_EXAMPLE)
    return card + TOOL_NOTE * chat

@contextlib.contextmanager
def new_folder(folder: Path):
    """Gives a folder beside `folder` that takes its name in the end. After an error nothing is left."""
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.absolute().parent) as building:
            (Path(building) / "model").mkdir()
            yield Path(building) / "model"
            os.replace(Path(building) / "model", folder)
    except BaseException:
        with contextlib.suppress(OSError):                          # another program may have put something there
            for parent in made:
                parent.rmdir()
        raise

def export(model, tokenizer_json: bytes, meta: dict, huggingface_json, folder: Path) -> dict:
    """Writes the model folder and returns its config.json; raises UserError, after which nothing is there.

    model: on the CPU, in fp32; tokenizer_json, meta: of its checkpoint; huggingface_json: of data/tokenizer.py.
    """
    spec = json.loads(tokenizer_json)
    special, bos_id = spec["special_tokens"], spec["bos_id"]
    bos = next(name for name, token in special.items() if token == bos_id)
    chat = bool(meta.get("chat")) and has_turns(special)
    ends = [special[name] for name in ("<|assistant_end|>", "<|user_start|>") if chat] + [bos_id]
    weights = convert_weights(model, len(spec["ranks"]) + len(special))
    config = make_config(model, weights, bos_id, ends)
    tokenizer = add_begin(huggingface_json(tokenizer_json), bos, bos_id)
    settings = {"config.json": config,
                "tokenizer_config.json": tokenizer_settings(special, bos, "<|assistant_end|>" if chat else bos,
                                                            config["max_position_embeddings"]),
                "generation_config.json": generation_settings(chat, bos_id, ends)}
    parameters = sum(weight.numel() for weight in weights.values())
    with new_folder(folder) as building:
        for name, content in settings.items():
            (building / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (building / "tokenizer.json").write_bytes(tokenizer)
        card = model_card(folder.absolute().name, model, meta, config, bos, chat, parameters)
        (building / "README.md").write_bytes(card.encode(errors="replace"))     # a name need not be text
        try:
            save_file(weights, building / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:                            # as on a full disk
            raise UserError(f"--export_hf={folder} cannot be written ({error}); choose another disk") from None
        # safetensors lets only its owner read the file, whatever the umask is
        (building / "model.safetensors").chmod((building / "config.json").stat().st_mode & 0o777)
        check_logits(model, config, load_file(building / "model.safetensors"))
    return config

# -----------------------------------------------------------------------------
# And back

def check_qwen3(config: dict):
    """Raises UserError unless the model of a config.json is one that train_gpt_simple.py can hold; names the value."""
    if not isinstance(config, dict) or config.get("model_type") != "qwen3":
        raise UserError("--import: config.json is not that of a model of type qwen3; choose such a model")
    rope = config.get("rope_parameters") or {}
    channels, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 0)
    found = {"rope_theta": rope.get("rope_theta", config.get("rope_theta"))} | config
    wanted = {"num_key_value_heads": heads, "head_dim": channels // max(1, heads), "rope_theta": 10_000,
              "intermediate_size": channels // 6 * 16, "hidden_act": "silu", "attention_bias": False}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(f"--import: the model has {name}={found.get(name)}, but {SCRIPT}.py needs {value}; choose "
                            "a model that was made with --export_hf")

def import_windows(config: dict) -> tuple[int, ...]:
    """The shortest --windows of a config.json; raises UserError if there is none. 0 means no limit."""
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    windows = [config["sliding_window"] - 1 if kind == "sliding_attention" else 0 for kind in kinds]
    largest = 0 if 0 in windows else windows[-1]
    if windows[-1] != largest:
        raise UserError(f"--import: the last layer has a window of {windows[-1]} tokens, but others have none; in "
                        f"{SCRIPT}.py the last layer has the largest one, so choose another model")
    for length in range(1, len(windows) + 1):
        pattern = windows[:length]
        repeated = [pattern[layer % length] for layer in range(len(windows) - 1)] + [0 if 0 in pattern else pattern[-1]]
        if repeated == windows:
            return tuple(pattern)

def import_weights(config: dict, weights: dict) -> dict:
    """The weights of a Qwen3 under the names of train_gpt_simple.py, in fp32; raises UserError.

    Gains before products become part of the products. Tables get rows of zeros up to a multiple of 64, as in a run.
    """
    weights = {name.removesuffix(".weight"): weight.float() for name, weight in weights.items()}
    found = {}
    try:
        embed = weights.pop("model.embed_tokens")
        head = weights.pop("lm_head", embed) * weights.pop("model.norm")
        for layer in range(config["num_hidden_layers"]):
            block, name = f"blocks.{layer}", f"model.layers.{layer}"
            gains = torch.cat([weights.pop(f"{name}.self_attn.{letter}_norm") for letter in "qk"])
            if not (gains == 1).all():
                raise UserError(f"--import: {name} has gains of queries or keys, which {SCRIPT}.py does not have; "
                                "choose a model that was made with --export_hf")
            gain = weights.pop(f"{name}.input_layernorm")
            found[f"{block}.qkv"] = torch.stack([weights.pop(f"{name}.self_attn.{x}_proj") for x in "qkv"]) * gain
            found[f"{block}.attn_proj.weight"] = weights.pop(f"{name}.self_attn.o_proj")
            gain = weights.pop(f"{name}.post_attention_layernorm")
            parts = [weights.pop(f"{name}.mlp.{part}_proj") for part in ("gate", "up")]
            found[f"{block}.fc.weight"] = torch.cat(parts) * gain
            found[f"{block}.mlp_proj.weight"] = weights.pop(f"{name}.mlp.down_proj")
    except KeyError as error:
        raise UserError(f"--import: the model has no weight {error}; choose a whole model") from None
    if weights:
        raise UserError(f"--import: {SCRIPT}.py has no place for {', '.join(weights)[:200]}; choose another model")
    rows = math.ceil(len(embed) / 64) * 64 - len(embed)
    found |= {"embed.weight": F.pad(embed, (0, 0, 0, rows)), "lm_head.weight": F.pad(head, (0, 0, 0, rows))}
    return {name: weight.contiguous() for name, weight in found.items()}

def import_folder(source: Path, out: Path) -> list[str]:
    """Writes out/model.safetensors, and returns the flags of train_gpt_simple.py that fit it; raises UserError."""
    check_folder(out, "--out")
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        weights = load_file(source / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--import={source} cannot be read ({error}); name a folder with config.json and "
                        "model.safetensors") from None
    check_qwen3(config)
    windows = import_windows(config)
    weights = import_weights(config, weights)
    with new_folder(out) as building:
        save_file(weights, building / "model.safetensors", {"format": "pt"})
    return [f"--init_from={out}", "--mlp=swiglu", f"--depth={config['num_hidden_layers']}",
            f"--model_dim={config['hidden_size']}", f"--head_dim={config['head_dim']}",
            f"--windows={','.join(map(str, windows))}"]

def main(argv: list[str]) -> int:
    """The command --import. Exit code: 0 done, 2 the user can fix it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="export_hf.py --import=FOLDER --out=FOLDER")
    parser.add_argument("--import", dest="source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        flags = import_folder(args.source, args.out)
    except (UserError, OSError) as error:
        print(f"export_hf.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"next: python {SCRIPT}.py {' '.join(flags)}")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
