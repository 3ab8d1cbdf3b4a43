"""Teaches a trained model to answer: supervised fine-tuning (SFT) on the conversations of data/chat.py.

    python chat_sft.py --checkpoint=logs/<run> --data=data/chat
    torchrun --standalone --nproc_per_node=gpu chat_sft.py --checkpoint=logs/<run> --data=data/chat

It loads any checkpoint through its training script, gives it the special tokens of the data if it lacks them, and saves
an ordinary checkpoint in a new run folder. sample.py, chat.py and evaluate.py take that one like any other. The first
checkpoint stays as it is.

Whole conversations are packed as documents, and no conversation sees another. Only what the assistant writes is
trained. The steps follow from the data and --epochs. A step has no average that could divide by zero, and a loss that
is not finite changes no weight and ends the run.
"""
import argparse
import errno
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import time
from bisect import bisect_right, insort
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import chat_tasks
import evaluate
import sample
from sample import HERE, UserError

# PyTorch takes seconds to import, so it is imported after the flags were checked.

READ_AHEAD = 256                         # conversations among which the packer chooses
NEEDS = ("GPT", "config_from_dict", "UserError")
ANSWER_TOKENS = 256                      # longest answer of a chat task during training

# -----------------------------------------------------------------------------
# Command line

def add_run_flags(add, script: str, lr: float, warmup: int):
    """Adds the flags of a run that begins with a checkpoint, the same for chat_sft.py and chat_rl.py."""
    add("--lr", type=float, default=lr, help="factor on the highest learning rates of pretraining (default: "
        "%(default)s)")
    add("--warmup", type=int, default=warmup, metavar="STEPS", help="steps over which the learning rate rises; after "
        "them it falls to 0 in a straight line (default: %(default)s)")
    add("--save_every", type=int, default=0, metavar="STEPS", help="steps between checkpoints from which --resume goes "
        "on; 0: only at the end and when interrupted (default: %(default)s)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints to keep (default: %(default)s)")
    add("--resume", type=sample.path_flag, metavar="FOLDER", help="go on with this run, with the same flags otherwise")
    add("--stop_after", type=int, default=0, metavar="STEPS", help="end after this many steps, with the learning rate "
        "as it is there; 0: off (default: %(default)s)")
    add("--out_dir", type=sample.path_flag, default=Path("logs"), metavar="FOLDER", help="folder with the runs "
        "(default: %(default)s)")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="(default: cuda if there is a GPU, "
        "else cpu)")
    add("--script", type=sample.path_flag, metavar="PATH", help="run this training script to build the model; default: "
        f"the script of the same name beside {script}")
    add("--vocab_dir", type=sample.path_flag, metavar="FOLDER", help="folder with GPT-2's encoder.json, for a "
        "checkpoint that has no tokenizer.json")

def check_ranges(args: argparse.Namespace, ranges: tuple):
    """Raises UserError for a flag outside its range (name, lowest, highest)."""
    for name, low, high in ranges:
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name}={getattr(args, name)} must be {low} to {high}")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as possible without a model; raises UserError."""
    parser = sample.make_parser("chat_sft.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=sample.path_flag, metavar="FOLDER", help="the model to teach: a checkpoint or a run "
        "(default: the newest base model in --out_dir)")
    add("--data", type=sample.path_flag, default=Path("data/chat"), metavar="FOLDER", help="shards and masks of "
        "data/chat.py (default: %(default)s)")
    add("--epochs", type=int, default=1, help="how often each conversation is read (default: %(default)s)")
    add("--batch_tokens", type=int, default=0, metavar="N", help="tokens of a step over all ranks (default: those of "
        "the last steps of pretraining)")
    add("--val_every", type=int, default=100, metavar="STEPS", help="steps between validations; 0: only first and last "
        "(default: %(default)s)")
    add("--evals", type=sample.path_flag, default=Path("data/evals"), metavar="FOLDER", help="folder with the questions "
        "of evaluate.py; at each validation the model answers some of each chat task (default: %(default)s)")
    add("--chat_items", type=int, default=64, metavar="N", help="questions of each chat task at a validation; 0: none "
        "(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of conversations in the second epoch and later (default: "
        "%(default)s)")
    add_run_flags(add, "chat_sft.py", lr=0.3, warmup=20)
    args = parser.parse_args(sample.command_line(argv))
    most = 1 << 30
    check_ranges(args, (("epochs", 1, 1000), ("batch_tokens", 0, most), ("lr", 1e-9, 1000), ("warmup", 0, most),
                        ("val_every", 0, most), ("chat_items", 0, most), ("save_every", 0, most), ("keep", 1, most),
                        ("stop_after", 0, most), ("seed", 0, most)))
    if args.save_every % 2 or args.stop_after % 2:
        name = "save_every" if args.save_every % 2 else "stop_after"
        raise UserError(f"--{name}={getattr(args, name)} must be even: half of the weights move at every other step")
    return args

# -----------------------------------------------------------------------------
# Conversations

@dataclass(frozen=True)
class Conversation:
    """ids and mask (T,) of one conversation; mask 1: the token is trained, as the target of the one before it."""
    ids: np.ndarray
    mask: np.ndarray

def read_mask(shard) -> np.ndarray:
    """(num_tokens,) uint8 of 0 and 1, from the mask beside a shard; raises UserError if it does not belong to it."""
    path = Path(shard.path).with_suffix(".mask")
    try:
        header = np.fromfile(path, "<i4", 256)
        mask = np.fromfile(path, "u1", offset=1024)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); make the shards again with data/chat.py") from None
    tokenizer = header[8:16].tobytes().hex() if len(header) == 256 else ""
    if (len(header) < 256 or header[[0, 1, 2, 5]].tolist() != [20240520, 1, shard.num_tokens, 1]
            or len(mask) != shard.num_tokens or tokenizer != shard.tokenizer or mask.max(initial=0) > 1):
        raise UserError(f"{path} is not the mask of {shard.path}; make the shards again with data/chat.py")
    return mask

def read_conversations(shards: list) -> list[Conversation]:
    """All conversations of some shards, in their order."""
    found = []
    for shard in shards:
        ids, mask = shard.read(), read_mask(shard)
        ends = [*np.flatnonzero(ids == shard.bos_id).tolist(), len(ids)]
        found += [Conversation(ids[low:high], mask[low:high]) for low, high in zip(ends, ends[1:])]
    return found

def fit(found: list[Conversation], limit: int) -> tuple[list[Conversation], dict[str, int]]:
    """The conversations in at most `limit` tokens each, and what that cost: cut, tokens_cut, untrained (left out).

    A longer one ends with the last answer that ends within the limit, or else at the limit. One in which nothing is
    trained is left out, and so are its tokens.
    """
    kept, counts = [], dict.fromkeys(("cut", "tokens_cut", "untrained"), 0)
    for one in found:
        length = len(one.ids)
        if length > limit:
            ends = np.flatnonzero(one.mask[:limit].astype(bool) & (one.mask[1:limit + 1] == 0)) + 1
            length = int(ends[-1]) if len(ends) else limit
            counts["cut"] += 1
            counts["tokens_cut"] += len(one.ids) - length
        one = Conversation(one.ids[:length], one.mask[:length])
        if one.mask[1:].any():
            kept.append(one)
        else:
            counts["untrained"] += 1
    return kept, counts

def pack_slots(lengths: list[int], slot_tokens: int) -> list[list[int]]:
    """Indexes of the conversations of each slot, of at most slot_tokens tokens in all; each index once.

    Best fit: of the next READ_AHEAD conversations the longest that fits goes into the slot, until none does.
    """
    slots, waiting, following = [], [], 0            # waiting: (length, -index), ascending
    while waiting or following < len(lengths):
        room, slot = slot_tokens, []
        while True:
            while len(waiting) < READ_AHEAD and following < len(lengths):
                assert 0 < lengths[following] <= slot_tokens, "conversations were cut to the slot"
                insort(waiting, (lengths[following], -following))
                following += 1
            place = bisect_right(waiting, (room, 0)) - 1
            if place < 0:
                break
            length, index = waiting.pop(place)
            slot.append(-index)
            room -= length
        slots.append(slot)
    return slots

def plan_slots(found: list[Conversation], slot_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """Slots of all epochs: the first in the order of the file, the others each in an order of its own."""
    slots = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(found)) if epoch else np.arange(len(found))
        packed = pack_slots([len(found[i].ids) for i in order], slot_tokens)
        slots += [[int(order[i]) for i in slot] for slot in packed]
    return slots

def fill_slot(found: list[Conversation], length: int, bos_id: int, doc_tokens: int = 64) -> tuple:
    """Inputs (int32) and targets (int64) of one slot: conversations, then documents without targets.

    A target is the next token of the conversation where that is trained, else -1.
    """
    inputs = np.zeros(length, np.int32)
    targets = np.full(length, -1, np.int64)
    filled = 0
    for one in found:
        size = len(one.ids)
        inputs[filled:filled + size] = one.ids
        targets[filled:filled + size - 1] = np.where(one.mask[1:], one.ids[1:].astype(np.int64), -1)
        filled += size
    inputs[filled::doc_tokens] = bos_id
    return inputs, targets

def num_steps(slots: int, slots_per_step: int) -> int:
    """Steps of at most so many slots: an even number of them, since half of the weights move at odd steps only."""
    return 2 * math.ceil(slots / slots_per_step / 2)

def step_batches(job: "Job", machine, step: int) -> tuple[list[tuple], int]:
    """This rank's micro-batches of a step, and the trained targets of the step over all ranks.

    The slots are shared out evenly over the steps, and those of a step over the ranks. Every rank has equally many
    micro-batches; empty slots fill them.
    """
    def share(number, parts, index):
        return range(index * number // parts, (index + 1) * number // parts)
    of_step = share(len(job.slots), job.steps, step)
    mine = share(len(of_step), machine.world_size, machine.rank)
    wanted = math.ceil(math.ceil(len(of_step) / machine.world_size) / job.micro_slots) * job.micro_slots
    filled = [fill_slot([job.train[i] for i in job.slots[of_step[n]]], job.slot_tokens, job.bos_id) for n in mine]
    filled += [fill_slot([], job.slot_tokens, job.bos_id)] * (wanted - len(filled))
    targets = sum(int(job.train[i].mask[1:].sum()) for n in of_step for i in job.slots[n])
    groups = [filled[i:i + job.micro_slots] for i in range(0, wanted, job.micro_slots)]
    return [tuple(map(np.concatenate, zip(*group))) for group in groups], targets

# -----------------------------------------------------------------------------
# The model and its tokenizer

@dataclass(frozen=True)
class Parent:
    """The checkpoint that the run begins with."""
    folder: Path
    meta: dict
    tokenizer: bytes                     # its tokenizer.json
    module: object                       # its training script
    source: Path

def find_parent(args, chat: bool = False) -> Parent:
    """The checkpoint that --checkpoint means, and its script, imported; raises UserError.

    Without --checkpoint it is the newest model that has learned to chat, or with `chat` false that has not.
    """
    given = args.checkpoint
    folder = sample.resolve_checkpoint(given) if given else sample.find_checkpoint(args.out_dir, chat)
    meta = sample.read_meta(folder)
    sample.read_tokenizer(folder, meta, args.vocab_dir)             # checks it
    source = sample.find_script(meta["script"], args.script, sample.kept_source(folder, meta))
    module = sample.import_script(source, NEEDS)
    if not hasattr(module, "Optimizer") and not hasattr(module, "make_optimizers"):
        raise UserError(f"{source} has neither Optimizer nor make_optimizers, so its models cannot be trained here; "
                        f"{sample.CHOOSE_ANOTHER}")
    return Parent(folder, meta, sample.tokenizer_content(folder, meta, args.vocab_dir), module, source)

def read_data_tokenizer(args, parent: Parent) -> bytes:
    """The tokenizer.json of --data: the checkpoint's, or that with more special tokens; else raises UserError."""
    path = args.data / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"--data={args.data} has no tokenizer.json; make it with data/chat.py, which is told the "
                        f"vocabulary by --tokenizer={parent.folder / 'tokenizer.json'}")
    content = sample.read_file(path, sample.TOKENIZER_BYTES)
    data, own = sample.read_json(path, content), json.loads(parent.tokenizer)
    same = all(data.get(key) == own[key] for key in ("ranks", "pattern", "bos_id"))
    special = data.get("special_tokens")
    if not same or not isinstance(special, dict) or not own["special_tokens"].items() <= special.items():
        raise UserError(f"--data={args.data} is in another vocabulary than the model's; make it again with "
                        f"data/chat.py --tokenizer={parent.folder / 'tokenizer.json'}")
    return content

def check_resumable(args, parent: Parent):
    """Raises UserError for --resume and --save_every if the model's script has no state that can be saved."""
    for flag in ("resume", "save_every"):
        if getattr(args, flag) and not hasattr(parent.module, "Optimizer"):
            raise UserError(f"--{flag}={getattr(args, flag)}: runs with a model of {parent.source.name} cannot be "
                            "resumed; leave the flag out")

def choose_config(args, parent: Parent, machine, shard, compiled: bool = True):
    """(config for this machine, config to save) of the checkpoint, with room for the data's vocabulary.

    shard: says vocab_size and bos_id of the data. compiled: False for a model that must not be compiled. Raises
    UserError.
    """
    cfg = parent.module.config_from_dict(parent.meta["config"])
    vocab_size, multiple = cfg.vocab_size, getattr(cfg, "vocab_multiple", 1)
    if shard.vocab_size > vocab_size:
        vocab_size = math.ceil(shard.vocab_size / multiple) * multiple
    saved = replace(cfg, vocab_size=vocab_size)
    # `saved` stays what the checkpoint is: its stage table gives the rotary frequencies
    changes = {"device": args.device, "attention": "auto", "init_from": "", "resume": "", "sampled_vocab": 0}
    if not compiled:
        changes |= {"compile": False, "attention": "plain"}
    cfg = replace(saved, **{name: value for name, value in changes.items() if hasattr(saved, name)})
    if hasattr(parent.module, "choose_attention"):
        cfg = parent.module.resolve_config(cfg, machine, shard)
        cfg, _ = parent.module.choose_attention(cfg, machine)
    else:
        compiled = cfg.compile and machine.device.type == "cuda"
        cfg = replace(cfg, compile=compiled, attention="auto" if compiled else "plain")
    return cfg, saved

def load_parent(model, parent: Parent, tokenizer: bytes):
    """Gives the model the checkpoint's weights; raises UserError if they do not fit.

    The special tokens that the data adds have never been trained, and pretraining has pushed their rows of the head
    down. So their rows of all tables become the mean of the rows that text uses. So do rows that are new.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    file = parent.folder / "model.safetensors"
    sample.check_plain(file)
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {sample.CHOOSE_ANOTHER}") from None
    state = model.state_dict()
    spec, own = json.loads(tokenizer), json.loads(parent.tokenizer)
    used = len(own["ranks"])
    before, now = parent.meta["config"]["vocab_size"], model.cfg.vocab_size
    fresh = [] if parent.meta.get("chat") else [i for i in spec["special_tokens"].values() if i != spec["bos_id"]]
    fresh = sorted({*fresh, *range(before, now)})
    if state.keys() != found.keys():
        raise UserError(f"{file} does not fit the model of {parent.source.name}: they differ in "
                        f"{sorted(state.keys() ^ found.keys())}; name the script that made it with --script=PATH")
    for name, tensor in state.items():
        value = found[name]
        is_table = tensor.dim() >= 2 and "bigram" not in name and tensor.size(-2) == now and value.size(-2) == before
        rows = tensor[..., :before, :] if is_table else tensor
        if rows.shape != value.shape or rows.is_floating_point() != value.is_floating_point():
            raise UserError(f"{file} does not fit the model of {parent.source.name}: {name} is {tuple(value.shape)}, "
                            f"not {tuple(tensor.shape)}; name the script that made it with --script=PATH")
        rows.copy_(value)
        if is_table and fresh:
            index = torch.tensor(fresh, device=tensor.device)
            tensor[..., index, :] = tensor[..., :used, :].float().mean(-2, keepdim=True).to(tensor.dtype)
    model.set_stage(parent.meta["stage"], final=True)

# -----------------------------------------------------------------------------
# Training

class OwnOptimizer:
    """Training with the Optimizer of train_gpt.py and its like."""
    resumable = True

    def __init__(self, module, cfg, machine, log, tools):
        self.module, self.cfg, self.machine = module, cfg, machine
        self.backward, self.optimizer = module.build(cfg, machine)
        self.model, self.forward = self.optimizer.model, self.backward.model
        if cfg.compile:
            self.micro_slots = module.warm_up(self.backward, self.optimizer, machine, SimpleNamespace(print=log))
        else:
            self.micro_slots = module.largest_micro_batch(self.backward, self.optimizer, machine)

    def begin(self):
        """Takes the weights that the model has now as those to start from."""
        self.optimizer.reset()

    def plan(self, step: int, factor: float):
        """What the schedule says of a step, with the highest rates of pretraining times `factor`."""
        low, high = self.cfg.momentum
        momentum = low + (high - low) * min(1.0, step / max(1, self.cfg.momentum_warmup))
        rate = self.cfg.lr * max(stage.lr for stage in self.cfg.stages) * factor
        return self.module.StepSchedule(rate, momentum, [1.0, 0.0, 0.0, 0.0], tied=False, splits=False)

    def step(self, batches, step: int, factor: float, votes: tuple):
        """One step; (1 + votes,) over all ranks: the summed loss, and how many ranks are for each vote."""
        return self.module.training_step(self.backward, self.optimizer, batches, step, self.plan(step, factor),
                                         self.machine, votes)

    def gather(self, everything: bool) -> dict:
        """The model's tensors by name, or everything that training changes, in CPU memory of the first rank."""
        return self.module.gather_state(self.model, self.optimizer, self.machine, everything)

    def restore(self, folder: Path, meta: dict) -> list:
        """Makes model and optimizer what the checkpoint holds; returns the training losses until then."""
        return self.module.restore_state(folder, meta, self.model, self.optimizer, self.machine)

class TorchOptimizers:
    """Training with the torch.optim optimizers of a script that has make_optimizers. A run cannot be resumed."""
    resumable = False
    micro_slots = 1

    def __init__(self, module, cfg, machine, log, tools):
        import torch
        self.machine, self.tools = machine, tools
        with torch.device(machine.device):
            self.model = module.GPT(cfg)
        self.optimizers = module.make_optimizers(self.model)
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if cfg.compile else self.model

    def groups(self) -> list[dict]:
        """The parameter groups of all optimizers; base_lr is the peak rate of each."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def begin(self):
        """The optimizers have no state of their own before the first step."""

    def step(self, batches, step: int, factor: float, votes: tuple):
        """As OwnOptimizer.step."""
        import torch
        import torch.distributed as dist
        device = self.machine.device
        loss = torch.zeros(1, device=device)
        for batch in batches:
            part = self.forward(*self.tools.to_device(batch, device))
            part.backward()
            loss += part.detach()
        totals = torch.cat([loss, torch.tensor(votes, dtype=torch.float32).to(device)])
        if self.machine.world_size > 1:
            dist.all_reduce(totals)
        if batches:                      # with less text than steps a step may have none, on any rank
            self.update(step, factor, totals[0])
        return totals

    def update(self, step: int, factor: float, loss):
        """Moves the weights by the gradients of all ranks, which are dropped; not if the loss of all is not finite."""
        import torch
        import torch.distributed as dist
        if self.machine.world_size > 1:
            for param in self.model.parameters():
                dist.all_reduce(param.grad)
        for group in self.groups():
            group["lr"] = group["base_lr"] * factor
            group["momentum"] = 0.85 + 0.1 * min(1, step / 300)     # of Muon, as in pretraining
        for optimizer in self.optimizers if torch.isfinite(loss) else ():
            optimizer.step()
        self.model.zero_grad()

    def gather(self, everything: bool) -> dict:
        """The model's tensors by name, in CPU memory."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}

def rate_factor(args, steps: int, step: int) -> float:
    """Factor on the peak rates: up over the warm-up, then down in a straight line to 0 after the last step."""
    warmup = min(args.warmup, steps // 2)
    return args.lr * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))

@dataclass(frozen=True)
class Job:
    """What is trained: conversations, their slots for all epochs, and the steps that share them out."""
    train: list
    slots: list
    steps: int
    slot_tokens: int
    micro_slots: int
    bos_id: int
    val: list                            # (inputs, targets) of each slot of validation
    val_targets: int
    val_bytes: int
    summary: list[str]

def make_job(args, parent: Parent, cfg, shards: tuple, tokenizer: bytes, micro_slots: int, machine) -> Job:
    """Reads and packs the conversations; raises UserError if they give nothing to train on."""
    slot_tokens, lines = cfg.pack_tokens, []
    sides = []
    for name, of_side in zip(("train", "val"), shards):
        found = read_conversations(of_side)
        kept, counts = fit(found, slot_tokens)
        if not kept:
            raise UserError(f"--data={args.data} has no {name} conversation with an answer in its first {slot_tokens} "
                            "tokens; make it again with data/chat.py")
        lines.append(f"{name}: {len(kept):,} conversations, {sum(len(one.ids) for one in kept):,} tokens, of which "
                     f"{sum(int(one.mask[1:].sum()) for one in kept):,} are trained")
        if counts["cut"]:
            lines.append(f"  cut to {slot_tokens} tokens: {counts['cut']:,} conversations, which lost "
                         f"{counts['tokens_cut']:,} tokens")
        if counts["untrained"]:
            lines.append(f"  left out: {counts['untrained']:,} conversations in which nothing is trained")
        sides.append(kept)
    train, val = sides
    slots = plan_slots(train, slot_tokens, args.epochs, args.seed)
    batch_tokens = args.batch_tokens or last_batch(cfg)
    per_step = batch_tokens // slot_tokens
    if not per_step:
        raise UserError(f"--batch_tokens={batch_tokens} must be at least {slot_tokens}, the tokens of one slot")
    steps = num_steps(len(slots), per_step)
    filled = sum(len(train[i].ids) for slot in slots for i in slot)
    padding = 1 - filled / len(slots) / slot_tokens
    lines.append(f"{len(slots):,} slots of {slot_tokens} tokens, {padding:.1%} padding, in {steps:,} steps")
    val_tokens = cfg.val_stream_tokens if cfg.compile else slot_tokens      # of this length the script has compiled it
    val_slots = [fill_slot([val[i] for i in slot], val_tokens, cfg.bos_id)
                 for slot in plan_slots(val, val_tokens, 1, 0)]
    spec = json.loads(tokenizer)
    sizes = np.zeros(cfg.vocab_size, np.int64)
    sizes[:len(spec["ranks"])] = [len(sample.base64.b64decode(rank)) for rank in spec["ranks"]]
    wanted = np.concatenate([targets[targets >= 0] for _, targets in val_slots])
    if not cfg.compile:                  # compiled code is for micro-batches of one size; else they need no padding
        micro_slots = min(micro_slots, math.ceil(math.ceil(len(slots) / steps) / machine.world_size))
    return Job(train, slots, steps, slot_tokens, micro_slots, cfg.bos_id, val_slots, len(wanted),
               int(sizes[wanted].sum()), lines)

def last_batch(cfg) -> int:
    """Tokens of the last step of pretraining."""
    return cfg.stages[-1].batch_tokens if hasattr(cfg.stages[-1], "batch_tokens") else cfg.batch_tokens

# -----------------------------------------------------------------------------
# Measuring

def validate(model, job: Job, machine, tools) -> tuple[float, float]:
    """(nats per trained token, bits per byte of them) of the validation conversations; the same for any ranks."""
    import torch
    with torch.no_grad():
        loss = tools.validate(model, SimpleNamespace(val_tokens=1), job.val, machine)
    return loss / job.val_targets, loss / math.log(2) / max(1, job.val_bytes)

def read_questions(args: argparse.Namespace) -> chat_tasks.Questions:
    """The first --chat_items questions of each chat task whose file is in --evals; raises UserError."""
    return evaluate.read_questions(argparse.Namespace(evals=args.evals, chat_tasks=["chatcore"],
                                                      max_items=args.chat_items))

def chat_test(model, tokenizer: sample.Tokenizer, questions: chat_tasks.Questions, count: int) -> str:
    """The model's ChatCORE over those questions, and its accuracy in each task, as text for the log."""
    format = chat_tasks.Format(model, tokenizer, "the model")
    records = chat_tasks.answer_items(format, questions.items, count, ANSWER_TOKENS, quiet=True)
    scores = chat_tasks.summarize(questions, list(records.values()), with_chatcore=True)
    tasks = scores["chat"]["tasks"]
    text = f"chatcore:{scores['chatcore']['chatcore']:.4f} of {len(tasks)} tasks: "
    text += " ".join(f"{label}:{score['accuracy']:.3f}" for label, score in tasks.items())
    return text + f" tool_calls:{tasks['spellingbee']['tool_calls']:.3f} "

# -----------------------------------------------------------------------------
# The run

class Run:
    """The run folder: log.txt, run.json, the sources, the curve, checkpoints. Written as the run goes, by rank 0."""
    own_sources = (Path(__file__).resolve(),)       # the first one names the run
    flags = ("epochs", "batch_tokens", "lr", "warmup", "seed")      # a resumed run needs the same ones
    program = ("train_gpt.py", "sample.py")         # and so are these files, which are not kept with the run

    def __init__(self, args, argv: list[str], parent: Parent, saved, machine, tokenizer: bytes, tools, steps: int):
        self.args, self.argv, self.parent, self.saved, self.steps = args, argv, parent, saved, steps
        self.machine, self.tokenizer, self.tools = machine, tokenizer, tools
        self.master = machine.rank == 0
        self.has_markers = "<|assistant_end|>" in json.loads(tokenizer)["special_tokens"]       # not the plain template
        self.script = self.own_sources[0].name
        self.sources = [*self.own_sources, parent.source]
        self.history, self.train_losses = [], []
        self.tokens_seen, self.live, self.wrote, self.log_file, self.checkpoint = 0, False, 0.0, None, None
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{self.own_sources[0].stem}_{os.urandom(3).hex()}"
        self.folder = args.out_dir / name
        self.identity, self.origin, self.meta = tools.on_rank0(machine, self.find_origin)
        if self.origin:
            self.folder = self.origin.parent.parent
            self.history = [tuple(point) for point in self.meta["history"]]
            self.tokens_seen = self.meta["tokens_seen"]

    def find_origin(self) -> tuple[dict, Path | None, dict]:
        """(identity of the run, checkpoint to go on from or None, its meta.json); raises tools.UserError."""
        args, tools = self.args, self.tools
        identity = {name: getattr(args, name) for name in self.flags} | {
            "data": {path.name: tools.file_sha256(path) for path in self.data_files()},
            "parent": tools.file_sha256(self.parent.folder / "model.safetensors"),
            "config": hashlib.sha256(json.dumps(self.parent.meta["config"], sort_keys=True).encode()).hexdigest(),
            "sources": {path.name: tools.file_sha256(path) for path in self.sources},
            "program": {name: tools.file_sha256(HERE / name) for name in self.program}}
        if not args.resume:
            return identity, None, {}
        flag, folder = f"--resume={args.resume}", next(iter(tools.newest_checkpoint(args.resume)), None)
        if not folder or not folder.is_dir():
            raise tools.UserError(f"{flag} has no checkpoint of {self.script}; name another run")
        meta = tools.read_json(folder / "meta.json")
        script = tools.read_json(folder.parent.parent / "run.json").get("script")
        before = meta.get("identity")
        if not meta:
            raise tools.UserError(f"{flag}: {folder} has no sound meta.json; name an earlier step_* folder of the run")
        if not isinstance(before, dict) or "parent" not in meta or script != self.script:
            raise tools.UserError(f"{flag} has no checkpoint of {self.script}; name another run")
        changed = [name for name in sorted(identity.keys() | before.keys()) if identity.get(name) != before.get(name)]
        if changed:
            more = ", and --checkpoint, which was left out" if "parent" in changed and not args.checkpoint else ""
            raise tools.UserError(f"{flag} is another run: {', '.join(changed)} differ; give the same flags, data, "
                                  f"checkpoint and program files{more}")
        if isinstance(meta.get("step"), int) and meta["step"] >= self.steps:
            raise tools.UserError(f"{flag} has done all of its {self.steps} steps; leave --resume out")
        fault = tools.find_fault(folder, meta, 1 << 62)
        if fault:
            raise tools.UserError(f"{flag}: {folder} is not used: {fault}; name an earlier step_* folder of the run")
        return identity, folder, meta

    def data_files(self) -> list[Path]:
        """The files that the run reads, which a resumed run needs unchanged."""
        return [path for path in sorted(self.args.data.glob("*")) if path.suffix in (".bin", ".mask")]

    def open(self):
        """Makes the folder with the log and copies of the sources; raises tools.UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log_file = open(self.folder / "log.txt", "a", buffering=1, encoding="utf-8", errors="backslashreplace")
            for source in self.own_sources:
                shutil.copyfile(source, self.folder / source.name)
            shutil.copyfile(self.parent.source, self.folder / f"{self.parent.meta['script']}.py")
        except OSError as error:
            raise self.tools.UserError(f"--out_dir={self.args.out_dir} cannot be written ({error}); choose another"
                                       ) from None
        self.info = {"format": 1, "script": self.script, "argv": self.argv, "parent": self.origin_of_weights(),
                     "world_size": self.machine.world_size, "device": self.machine.name,
                     "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "identity": self.identity}
        self.save(status="running")

    def save(self, **changes):
        """Updates run.json, so that it is whole at any moment."""
        if self.master:
            self.info |= changes | {"tokens_seen": self.tokens_seen} | self.results()
            self.tools.write_atomically(self.folder / "run.json", json.dumps(self.info, indent=1).encode())

    def results(self) -> dict:
        """What run.json says of the quality of the model so far."""
        return {"val_losses": [{"step": s, "train_time_ms": round(1000 * t), "val_loss": round(v, 6)}
                               for s, t, v in self.history]}

    def print(self, text: str, console: bool = True):
        """A line to the log, and to the console unless told otherwise."""
        if self.master:
            self.log_file.write(text + "\n")
            if console:
                print(("\r\033[K" if self.live else "") + text, flush=True)
                self.live = False

    def step(self, step: int, job: Job, seconds: float, loss: float):
        """Logs a step and its loss in nats per trained token; on a terminal live, else a line now and then."""
        self.train_losses.append((step, seconds, loss))
        text = f"step:{step}/{job.steps} train_loss:{loss:.4f} {self.tools.train_time(seconds, step)}"
        self.progress(text, f"  {self.tokens_seen / seconds / 1000:.1f}k tokens/s  "
                            f"{seconds / step * (job.steps - step):.0f} s left")

    def progress(self, text: str, more: str):
        """A line to the log. With `more` also to the console: on a terminal live, else now and then."""
        self.print(text, console=False)
        terminal = sys.stdout.isatty()
        if self.master and time.time() - self.wrote > (0.1 if terminal else 10):
            text += more
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)
            self.live, self.wrote = terminal, time.time()

    def need_finite(self, loss: float, what: str):
        """Raises FloatingPointError if a loss is NaN or infinite."""
        if not math.isfinite(loss):
            text = f"{what} is {loss}; lower --lr={self.args.lr}; last good checkpoint: {self.checkpoint or 'none'}"
            self.save(status="diverged", error=text)
            raise FloatingPointError(text)

    def validated(self, step: int, job: Job, seconds: float, measured: tuple, test: str):
        """Logs a validation. test: what chat_test returned, or nothing."""
        loss, bits = measured
        self.history.append((step, seconds, loss))
        text = f"step:{step}/{job.steps} val_loss:{loss:.6f} bpb:{bits:.4f} "
        self.print(text + test + self.tools.train_time(seconds, step))
        self.save()

    def origin_of_weights(self) -> dict:
        """What the checkpoint says of its parent."""
        return {"path": str(self.parent.folder), "script": self.parent.meta["script"], "step": self.parent.meta["step"],
                "model_sha256": self.identity["parent"]}

    def save_checkpoint(self, step: int, trainer, seconds: float, everything: bool):
        """Writes checkpoint/step_<n>, an ordinary checkpoint of the parent's script."""
        import torch
        tensors = trainer.gather(everything)
        if not self.master:
            return
        finite = all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
        self.need_finite(0.0 if finite else math.nan, f"a parameter after step {step}")
        names = self.tools.FILES
        files = {names[0]: {name: tensors.pop(name) for name in trainer.model.state_dict()}}
        if everything:
            files[names[1]] = tensors | {"train_losses": torch.tensor(self.train_losses, dtype=torch.float64)}
        meta = {"format": 1, "script": self.parent.meta["script"], "config": asdict(self.saved),
                "sources": {f"{self.parent.meta['script']}.py": self.tools.file_sha256(self.parent.source)},
                "source_sha256": self.tools.file_sha256(self.parent.source),
                "step": step, "stage": self.parent.meta["stage"],
                "chat": self.has_markers, "parent": self.origin_of_weights(), "history": self.history,
                "tokenizer_sha256": hashlib.sha256(self.tokenizer).hexdigest(), "train_time": seconds,
                "tokens_seen": self.tokens_seen, "identity": self.identity, "loader_position": [0, 0]}
        meta |= self.scores(step)
        self.checkpoint = self.tools.write_checkpoint(self.folder / "checkpoint", meta, files, self.tokenizer,
                                                      self.args.keep)

    def scores(self, step: int) -> dict:
        """What meta.json says of the quality of the model."""
        return {"val_loss": self.history[-1][2] if self.history[-1][0] == step else None,
                "best_val_loss": min(loss for _, _, loss in self.history)}

    def plot(self):
        """curve.svg."""
        self.tools.Run.plot(SimpleNamespace(train_losses=self.train_losses, history=self.history, folder=self.folder))

    def finish(self, finished: bool, step: int, seconds: float, resumable: bool):
        """The last lines of the log, the curve, and the final run.json; resumable: whether the run can go on."""
        if not self.master:
            return
        status = "finished" if finished else "interrupted"
        self.save(status=status, train_time_ms=round(1000 * seconds))
        try:
            self.plot()
        except Exception as error:       # whatever drawing comes up with: the run is over and well
            self.print(f"no curve.svg ({type(error).__name__}: {error})")
        self.print(f"{status}: {step} steps, {self.tokens_seen:,} tokens in {seconds:.1f} s of training "
                   f"({self.tokens_seen / max(seconds, 1e-9):,.0f} tokens/s)")
        self.print(f"log, curve and checkpoint are in {self.folder}")
        if finished and self.checkpoint:
            words = ["python", os.path.relpath(HERE / "chat.py"), f"--checkpoint={self.checkpoint}"]
            self.print(f"next: {shlex.join(words)}")
        elif resumable and not finished:
            flags = [f"--resume={self.folder}"]
            if not self.args.checkpoint:                            # another base model may be the newest by then
                flags.append(f"--checkpoint={self.parent.folder}")
            without = " without --stop_after," if self.args.stop_after else ""
            self.print(f"next: the same command{without} with {shlex.join(flags)}")

def measure(run: Run, job: Job, trainer, clock, step: int, tokenizer: sample.Tokenizer,
            questions: chat_tasks.Questions | None):
    """Validates, and has the model answer the questions if there are some and its vocabulary has the tokens for it."""
    measured = validate(trainer.forward, job, run.machine, run.tools)
    run.need_finite(measured[0], f"the validation loss of step {step}")
    test = ""
    if run.master and run.has_markers and questions:
        trainer.model.eval()
        test = chat_test(trainer.model, tokenizer, questions, run.args.chat_items)
        trainer.model.train()
    run.validated(step, job, clock.seconds, measured, test)

def find_tools():
    """The module train_gpt.py, whose functions serve models of all scripts; raises UserError."""
    return sample.import_script(HERE / "train_gpt.py", ("setup_machine", "write_checkpoint"), "use the train_gpt.py "
                                "that belongs to chat_sft.py")

def find_machine(args, tools):
    """Where this process runs, one of as many ranks as there are; raises tools.UserError."""
    one_slot = SimpleNamespace(batch_tokens=1 << 30)
    return tools.setup_machine(SimpleNamespace(device=args.device, pack_tokens=1, compile_cache="", stages=[one_slot]))

def train(args: argparse.Namespace, argv: list[str]) -> int:
    """Loads, packs, trains, validates, saves. Returns the exit code."""
    import torch
    tools = find_tools()
    parent = find_parent(args)
    questions = read_questions(args) if args.chat_items else None
    tokenizer_json = read_data_tokenizer(args, parent)
    shards = tools.open_shards(*(f"{glob.escape(str(args.data))}/{side}_*.bin" for side in ("train", "val")))
    if shards[0][0].tokenizer != hashlib.sha256(tokenizer_json).hexdigest():
        raise UserError(f"{args.data / 'tokenizer.json'} is not the one of {shards[0][0].path}; make the data again "
                        "with data/chat.py")
    machine = find_machine(args, tools)
    cfg, saved = choose_config(args, parent, machine, shards[0][0])
    check_resumable(args, parent)
    lines = []
    kind = OwnOptimizer if hasattr(parent.module, "Optimizer") else TorchOptimizers
    trainer = kind(parent.module, cfg, machine, lines.append, tools)
    with torch.no_grad():
        load_parent(trainer.model, parent, tokenizer_json)
    trainer.begin()
    job = make_job(args, parent, cfg, shards, tokenizer_json, trainer.micro_slots, machine)
    run = Run(args, argv, parent, saved, machine, tokenizer_json, tools, job.steps)
    tools.on_rank0(machine, run.open)
    run.print("\n".join([f"chat_sft.py: {machine.world_size} x {machine.name}, from {parent.folder}", *job.summary,
                         *lines]))
    tokenizer = sample.Tokenizer(json.loads(tokenizer_json))
    clock = tools.Clock(machine, run.meta.get("train_time", 0.0))
    step = run.meta.get("step", 0)
    if run.origin:
        run.train_losses = trainer.restore(run.origin, run.meta)
        run.print(f"goes on from {run.origin}")
    else:
        measure(run, job, trainer, clock, 0, tokenizer, questions)
    stopping = tools.stop_on_signals()
    last_step = min(args.stop_after or job.steps, job.steps)
    stop = False
    clock.start()
    loader = tools.prefetch(step_batches(job, machine, number) for number in range(step, last_step))
    while step < last_step and not (stop and step % 2 == 0):
        batches, targets = next(loader)
        totals = trainer.step(batches, step, rate_factor(args, job.steps, step), (stopping.is_set(),)).tolist()
        step += 1
        loss, stop = totals[0] / max(1, targets), totals[1] > 0
        run.need_finite(loss, f"the loss of step {step}")
        run.tokens_seen += len(job.slots) * step // job.steps * job.slot_tokens - (
            len(job.slots) * (step - 1) // job.steps * job.slot_tokens)
        run.step(step, job, clock.seconds, loss)
        if step < job.steps and args.val_every and step % args.val_every == 0:
            clock.stop()
            measure(run, job, trainer, clock, step, tokenizer, questions)
            clock.start()
        if step < last_step and trainer.resumable and args.save_every and step % args.save_every == 0:
            run.save_checkpoint(step, trainer, clock.seconds, everything=True)
    clock.stop()
    finished = step == job.steps
    if finished:
        measure(run, job, trainer, clock, step, tokenizer, questions)
    run.save_checkpoint(step, trainer, clock.seconds, trainer.resumable and (not finished or bool(args.save_every)))
    run.finish(finished, step, clock.seconds, trainer.resumable)
    return 0 if finished else 130

def run_command(name: str, parse, train, argv: list[str] | None) -> int:
    """Runs train(parse(argv), argv). Exit code: 0 done, 2 the user can put it right, 3 diverged, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def say(text):
        print(f"{name}: {sample.one_line(str(text))}", file=sys.stderr)
    try:
        return train(parse(argv), argv)
    except KeyboardInterrupt:
        say("interrupted before the first step; nothing was saved")
        return 130
    except Exception as error:           # each module has a UserError of its own
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        memory = sample.lacks_memory(error)
        if not (full or memory or type(error).__name__ in ("UserError", "RankError", "FloatingPointError")):
            raise
        if os.environ.get("RANK", "0") == "0" or type(error).__name__ == "RankError":
            say(f"the memory is used up ({error}); use smaller batches or a smaller model" if memory else error)
        return 3 if isinstance(error, FloatingPointError) else 2
    finally:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code, see run_command."""
    return run_command("chat_sft.py", parse_args, train, argv)

if __name__ == "__main__":
    sys.exit(main())
