"""Scores of a trained model: validation loss, bits per byte, HellaSwag, CORE; each with its standard error.

    python evaluate.py                                                      # the one run under logs/, all four
    python evaluate.py --checkpoint=logs/<run> --tasks=val,hellaswag
    torchrun --standalone --nproc_per_node=8 evaluate.py --tasks=core --items_out=items.jsonl
    python evaluate.py --model=gpt2 --tasks=hellaswag,core                  # the original weights, to calibrate

python data/evals.py fetches the questions first; nothing is downloaded here but the weights that --model names.
val is the loss of the training script, on its tokens with its windows. bpb counts the bytes of the text and no special
token. hellaswag takes the ending with the lowest summed (plain) or mean (norm) loss. core is DCLM's, 22 tasks with the
v1 baselines: the mean of (accuracy - baseline) / (1 - baseline). A prompt longer than the model reads keeps the
begin-of-document id and its last tokens. Every prompt is a document of its own in a long packed stream, and ranks take
streams in turn, so neither the number of ranks nor the packing changes what a document is given.
"""
import argparse
import hashlib
import itertools
import json
import lzma
import math
import os
import random
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import sample
from sample import UserError

# PyTorch takes seconds to import, so the functions that need it do it: --help and mistakes are answered at once

# -----------------------------------------------------------------------------
# Tasks

@dataclass(frozen=True)
class Task:                      # one row a task of CORE
    label: str
    category: str                # folder of its file
    shots: int                   # solved examples before each question
    kind: str                    # choice: one prompt an answer; schema: one prompt a context; lm: the exact answer
    baseline: float              # of guessing; DCLM's v1, on which the published scores rest
    delimiter: str               # between question and answer
    gpt2: tuple                  # published accuracy of gpt2, -medium, -large, -xl
    file: str = ""               # if not the label

LANGUAGE, WORLD, COMMON = "language_understanding", "world_knowledge", "commonsense_reasoning"
SYMBOLS, READING = "symbolic_problem_solving", "reading_comprehension"
SPACE, ANSWER = " ", "\nAnswer: "

TASKS = (
    Task("hellaswag_zeroshot", LANGUAGE, 0, "choice", .25, SPACE, (.308504, .390, .440, .502), "hellaswag"),
    Task("jeopardy", WORLD, 10, "lm", 0, ANSWER, (.001889, .044, .045, .092), "jeopardy_all"),
    Task("bigbench_qa_wikidata", WORLD, 10, "lm", 0, SPACE, (.282663, .428, .480, .531)),
    Task("arc_easy", WORLD, 10, "choice", .25, ANSWER, (.412458, .480, .535, .595)),
    Task("arc_challenge", WORLD, 10, "choice", .25, ANSWER, (.221843, .262, .264, .299)),
    Task("copa", COMMON, 0, "choice", .5, SPACE, (.600, .660, .670, .670)),
    Task("commonsense_qa", COMMON, 10, "choice", .2, SPACE, (.224406, .196, .270, .227)),
    Task("piqa", COMMON, 10, "choice", .5, ANSWER, (.622960, .670, .698, .725)),
    Task("openbook_qa", COMMON, 0, "choice", .25, SPACE, (.278, .308, .318, .346)),
    Task("lambada_openai", LANGUAGE, 0, "lm", 0, SPACE, (.322919, .426, .488, .523)),
    Task("hellaswag", LANGUAGE, 10, "choice", .25, SPACE, (.307907, .395, .444, .512)),
    Task("winograd", LANGUAGE, 0, "schema", .5, SPACE, (.578755, .655678, .688645, .714286), "winograd_wsc"),
    Task("winogrande", LANGUAGE, 0, "schema", .5, SPACE, (.486188, .521, .541, .569)),
    Task("bigbench_dyck_languages", SYMBOLS, 10, "lm", 0, SPACE, (.155, .170, .225, .247)),
    Task("agi_eval_lsat_ar", SYMBOLS, 3, "choice", .2, SPACE, (.226087, .230435, .256522, .273913)),
    Task("bigbench_cs_algorithms", SYMBOLS, 10, "lm", 0, SPACE, (.419697, .456, .440, .417)),
    Task("bigbench_operators", SYMBOLS, 10, "lm", 0, SPACE, (.085714, .100, .114286, .157143)),
    Task("bigbench_repeat_copy_logic", SYMBOLS, 10, "lm", 0, SPACE, (.031250, .0625, .0625, .09375)),
    Task("squad", READING, 10, "lm", 0, SPACE, (.058278, .169, .235, .309)),
    Task("coqa", READING, 0, "lm", 0, SPACE, (.133659, .227, .230, .280)),
    Task("boolq", READING, 10, "choice", .62, ANSWER, (.552294, .606, .567, .619)),
    Task("bigbench_language_identification", LANGUAGE, 10, "choice", .091, SPACE, (.2566, .269, .261, .250)),
)
# The three larger columns have the look of 1,000 items a task. `hellaswag` alone, whose prompts have no activity label,
# is shown beside the published hellaswag_zeroshot.
HELLASWAG = replace(TASKS[0], label="hellaswag", kind="ending")
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234    # of the order of items, and (plus its number) of the examples of each item
SCORES = ("val", "bpb", "hellaswag", "core")
QUESTIONS_BYTES, LINE_BYTES = 1 << 26, 1 << 20      # a larger file of questions, or a longer line, is none
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")

# -----------------------------------------------------------------------------
# Command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as it goes without a model; raises UserError."""
    parser = argparse.ArgumentParser(prog="evaluate.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{message}; --help lists the flags")
    parser.error = refuse
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint (step_...), or a run: then its latest one; "
        "default: the only run under --out_dir")
    add("--model", metavar="NAME", help="or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with such weights")
    add("--tasks", default=",".join(SCORES), metavar="LIST", help="any of %(default)s (default: all)")
    add("--evals", type=Path, default=Path("data/evals"), metavar="FOLDER", help="the questions (default: %(default)s)")
    add("--shards", metavar="GLOB", help="token shards of val and bpb (default: the checkpoint's validation shards)")
    add("--bpb_tokens", type=int, default=10_485_760, metavar="N", help="bpb is of the documents that begin in the "
        "first N tokens, 0: of all (default: %(default)s)")
    add("--max_items", type=int, default=0, metavar="N", help="only the first N items of each task after shuffling, of "
        "which the examples are, too; 0: all (default: %(default)s)")
    add("--items_out", type=Path, metavar="FILE", help="write the result of every item there, one JSON object a line")
    add("--stream_tokens", type=int, default=0, metavar="N", help="length of a packed stream, a multiple of 128; "
        "default: 131072 on cuda, elsewhere what 1 GiB of logits allows")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="(default: cuda where there is one)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="(default: bf16 on cuda, fp32 elsewhere)")
    add("--script", type=Path, metavar="PATH", help="training script with the model, run as it is; default: the one of "
        "that name beside evaluate.py")
    add("--out_dir", type=Path, default=Path("logs"), metavar="FOLDER",
        help="where the runs are (default: %(default)s)")
    args = parser.parse_args(sample.words(argv))
    args.tasks = args.tasks.split(",")
    for name in args.tasks:
        if name not in SCORES:
            raise UserError(f"--tasks={name} does not exist; choose from {','.join(SCORES)}")

    def need(good, name, remedy):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} {remedy}")
    most = max(task.shots for task in TASKS)
    need(not (args.checkpoint and args.model), "model", f"and --checkpoint={args.checkpoint} are two models; name one")
    need(not (args.model and "val" in args.tasks), "model", "has no training script, whose loss val is; take bpb")
    need(not (args.model and "bpb" in args.tasks) or args.shards, "model", "needs --shards=GLOB for bpb")
    need(args.stream_tokens >= 0 and args.stream_tokens % 128 == 0, "stream_tokens", "must be a multiple of 128")
    need(args.bpb_tokens >= 0, "bpb_tokens", "must be 0 (all) or a positive number")
    need(args.max_items == 0 or args.max_items > most, "max_items",
         f"must be 0 (all) or above {most}, the examples before a question")
    need(not args.items_out or args.items_out.absolute().parent.is_dir(), "items_out",
         "is in a folder that does not exist; make it first")
    return args

def find_checkpoint(args: argparse.Namespace) -> Path:
    """The one checkpoint folder that the flags mean; raises UserError for none and for several."""
    several = not args.checkpoint and len(list(args.out_dir.glob("*/checkpoint/latest"))) > 1
    path = args.checkpoint or (args.out_dir if several else sample.find_checkpoint(args.out_dir))
    folder = sample.resolve_checkpoint(path)
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} holds no checkpoint; name one with --checkpoint=")
    return folder

# -----------------------------------------------------------------------------
# Prompts

@dataclass
class Item:
    task: str
    kind: str
    line: int                    # of the data file, from 0
    gold: int                    # the right option; 0 where there is only one
    prompts: list                # of each option: the texts that the prompt is made of
    before: tuple = ()           # what comes before the answer, where all of that is scored

FIELDS = {                       # of an item, by kind: question, answer, right option; a list has one text an option
    "choice": ("query", "choices", "gold"), "schema": ("context_options", "continuation", "gold"),
    "lm": ("context", "continuation", None), "ending": ("ctx", "endings", "label")}

def task_file(evals: Path, task: Task) -> Path | None:
    """The file with a task's items, or None if it is not there."""
    name = "hellaswag_val" if task.kind == "ending" else f"core/eval_data/{task.category}/{task.file or task.label}"
    return next((path for end in (".jsonl", ".jsonl.xz") if (path := evals / f"{name}{end}").is_file()), None)

def find_tasks(args: argparse.Namespace) -> list[Task]:
    """The asked tasks that have a file; raises UserError if one of the scores would have none."""
    found = []
    for name, tasks in (("hellaswag", (HELLASWAG,)), ("core", TASKS)):
        if name in args.tasks:
            here = [task for task in tasks if task_file(args.evals, task)]
            if not here:
                raise UserError(f"--evals={args.evals} has no data of {name}; fetch it with python data/evals.py")
            found += here
    return found

def check_item(kind: str, row: dict) -> dict:
    """What the evaluation needs of an item; raises an error of Python's if it has no texts, or no right option."""
    asked, answered, gold = FIELDS[kind]
    texts = [row[name] if isinstance(row[name], list) else [row[name]] for name in (asked, answered)]
    for text in itertools.chain(*texts):
        text.encode()                    # nor is text what UTF-8 cannot hold
    if gold and (type(row[gold]) is not int or not 0 <= row[gold] < max(map(len, texts))):
        raise IndexError(f"{gold} {str(row[gold]):.40} is no option")
    return {name: row[name] for name in FIELDS[kind] if name}

def read_rows(path: Path, kind: str, max_items: int) -> list[tuple[int, dict]]:
    """(line, item) of a task file in the order of the evaluation; raises UserError, or what check_item raises."""
    rows = []
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            while line := file.readline(LINE_BYTES):
                rows.append((len(rows), check_item(kind, json.loads(line))))
                if file.tell() > QUESTIONS_BYTES:
                    raise ValueError(f"more than {QUESTIONS_BYTES} bytes")
    except (OSError, ValueError, EOFError, lzma.LZMAError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again with python data/evals.py --force") from None
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows[:max_items or None]

def few_shot(i: int, count: int, shots: int) -> list[int]:
    """Which other items of `count` are the examples of item i."""
    drawn = random.Random(SHOTS_SEED + i).sample(range(count - 1), shots)
    return [other + (other >= i) for other in drawn]

def join(texts: list[str], cuts: bool) -> tuple[str, ...]:
    """The same text in the pieces that can be encoded one by one; if not `cuts`, in one piece.

    The pattern of GPT-2 always ends a word before whitespace that follows something else. So the examples of a task are
    encoded once each, and not once in every prompt.
    """
    pieces = []
    for text in texts:
        if not pieces or cuts and text[:1] in (" ", "\n") and not pieces[-1][-1:].isspace():
            pieces.append(text)
        else:
            pieces[-1] += text
    return tuple(pieces)

def render(task: Task, rows: list, cuts: bool) -> list[Item]:
    """The items of a task: examples, each followed by a blank line, then the question and, for each option, the answer.

    rows: (line, item) of all items of the task, from which the examples come. Raises an error of Python's for an item
    that is none.
    """
    asked, answered, gold = FIELDS[task.kind]

    def pick(texts, option):
        return texts[option] if isinstance(texts, list) else texts

    def question(row, option):
        return row[asked].strip() if task.kind == "lm" else pick(row[asked], option)

    def answer(row, option):
        return task.delimiter + pick(row[answered], option)
    lines, rows = zip(*rows)
    golds = [row[gold] if gold else 0 for row in rows]
    first = [question(*pair) for pair in zip(rows, golds)]          # of the examples, and after an example
    later, answers = ["\n\n" + text for text in first], [answer(*pair) for pair in zip(rows, golds)]
    items = []
    for i, row in enumerate(rows):
        shots = few_shot(i, len(rows), task.shots)
        examples = [text for n, j in enumerate(shots) for text in (later[j] if n else first[j], answers[j])]
        gap = "\n\n" if shots else ""
        options = max(len(row[name]) if isinstance(row[name], list) else 1 for name in (asked, answered))
        prompts = [(*examples, gap + question(row, option), answer(row, option)) for option in range(options)]
        before = ()
        if task.kind == "ending":        # context and ending are encoded apart
            before = prompts[0][:1]
        else:
            prompts = [join(prompt, cuts) for prompt in prompts]
        if task.kind == "lm":
            before = join([*examples, (gap + question(row, 0) + task.delimiter).rstrip()], cuts)
        items.append(Item(task.label, task.kind, lines[i], golds[i], prompts, before))
    return items

def read_items(args: argparse.Namespace, tasks: list[Task], cuts: bool) -> list[Item]:
    """The items of all tasks, one task after the other; raises UserError."""
    items = []
    for task in tasks:
        path = task_file(args.evals, task)
        try:
            items += render(task, read_rows(path, task.kind, args.max_items), cuts)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not hold items of {task.label} ({type(error).__name__}: {error}); fetch it "
                            "again with python data/evals.py --force") from None
    return items

# -----------------------------------------------------------------------------
# Documents

def encode_all(tokenizer, texts: list[str], threads: int) -> dict[str, np.ndarray]:
    """text -> its tokens, int32; on several threads, as tiktoken lets others run meanwhile."""
    table = np.array([tokenizer.ids[bytes([byte])] for byte in range(256)], np.int32)

    def encode(part):
        if tokenizer.encoding is None:
            return [table[np.frombuffer(text.encode(), np.uint8)] for text in part]
        return [np.array(tokens, np.int32) for tokens in map(tokenizer.encoding.encode_ordinary, part)]
    parts = [texts[i:i + 256] for i in range(0, len(texts), 256)]
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(texts, itertools.chain.from_iterable(pool.map(encode, parts))))

def common_prefix(documents: list[np.ndarray]) -> int:
    """How many tokens all documents begin with."""
    shortest = min(map(len, documents))
    heads = np.stack([tokens[:shortest] for tokens in documents])
    differ = (heads != heads[0]).any(0)
    return int(differ.argmax()) if differ.any() else shortest

def item_documents(item: Item, encoded: dict, bos: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
    """(tokens, start, end) of each option: the answer that is scored is tokens[start:end]; raises UserError."""
    documents = [np.concatenate([bos, *map(encoded.__getitem__, prompt)]) for prompt in item.prompts]
    if item.kind == "choice":
        starts = [common_prefix(documents)] * len(documents)
    elif item.kind == "schema":
        suffix = common_prefix([tokens[::-1] for tokens in documents])
        starts = [max(len(tokens) - suffix, 1) for tokens in documents]
    else:
        before = np.concatenate([bos, *map(encoded.__getitem__, item.before)])
        starts = [len(before)] * len(documents)
        if any(len(tokens) <= len(before) or (tokens[:len(before)] != before).any() for tokens in documents):
            raise UserError(f"item {item.line} of {item.task} merges question and answer into one token; choose a "
                            "tokenizer that does not")
    return [(tokens, start, len(tokens)) for tokens, start in zip(documents, starts)]

def text_documents(subject, shards: list, limit_tokens: int):
    """Yields (tokens, 1, end) for the text of shards; of a document that is too long the rest is one of its own."""
    taken, step = 0, subject.longest - 1
    for ids, start, end in subject.module.documents(shards):
        if limit_tokens and taken >= limit_tokens:
            return
        taken += end - start
        for low in range(start + 1, end, step):
            tokens = np.concatenate([ids[start:start + 1], ids[low:min(low + step, end)]]).astype(np.int32)
            if (highest := tokens.max()) >= subject.tokenizer.vocab_size:
                raise UserError(f"{ids.filename} holds id {highest}, outside the vocabulary of "
                                f"{subject.tokenizer.vocab_size}; make the shard again")
            yield tokens, 1, len(tokens)

def cut(document: tuple, longest: int) -> tuple:
    """The document without what is too much for the model: of the prompt only the last tokens stay, after the first."""
    tokens, start, end = document
    extra = len(tokens) - longest
    if extra <= 0:
        return document
    return np.concatenate([tokens[:1], tokens[1 + extra:]]), max(start - extra, 1), end - extra

def pack(documents, stream_tokens: int):
    """Yields lists of (number, document) that fit a stream, in order."""
    stream, room = [], stream_tokens
    for number, document in enumerate(documents):
        if len(document[0]) > room:
            yield stream
            stream, room = [], stream_tokens
        stream.append((number, document))
        room -= len(document[0])
    if stream:
        yield stream

def fill(stream: list, length: int, bos_id: int) -> tuple[np.ndarray, ...]:
    """(tokens, targets) of `length` as a model takes them, and of each document (number, first, last) target."""
    tokens, targets = np.full(length, bos_id, np.int32), np.full(length, -1, np.int64)
    spans, filled = np.empty((len(stream), 3), np.int64), 0
    for i, (number, (ids, start, end)) in enumerate(stream):
        tokens[filled:filled + len(ids)] = ids
        targets[filled + start - 1:filled + end - 1] = ids[start:end]
        spans[i] = number, filled + start - 1, filled + end - 1
        filled += len(ids)
    return tokens, targets, spans

# -----------------------------------------------------------------------------
# Model

@dataclass
class Subject:                   # what is evaluated, and where
    name: str
    model: object
    tokenizer: sample.Tokenizer
    meta: dict
    cuts: bool                   # whether text can be cut before whitespace (see join)
    module: object               # the training script, whose shards these are
    machine: object              # device, rank, world_size, name
    stream_tokens: int
    compile_seconds: float = 0.0

    @property
    def longest(self) -> int:
        """The most tokens of a document."""
        return min(self.stream_tokens, getattr(self.model.cfg, "context_tokens", self.stream_tokens))

    def compiled(self, function, *arguments):
        """The function compiled for such arguments, on CUDA; the seconds are noted."""
        import torch
        if self.machine.device.type != "cuda" or self.meta["script"] == "gpt2":     # FlexAttention needs it, GPT-2 not
            return function
        start, function = time.perf_counter(), torch.compile(function, dynamic=False, fullgraph=True)
        with torch.no_grad():
            function(*self.module.to_device(arguments, self.machine.device))
        torch.cuda.synchronize()
        self.compile_seconds += time.perf_counter() - start
        return function

def load_subject(args: argparse.Namespace) -> Subject:
    """The model that the flags name, ready on this rank's device; raises UserError."""
    import torch
    env = os.environ
    rank, world_size, local = (int(env.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    path = None if args.model else find_checkpoint(args)
    device, precision = sample.choose_device(args.device, args.precision)
    if device == "cuda":
        if int(env.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UserError(f"torchrun starts more ranks than the {torch.cuda.device_count()} GPUs here; lower "
                            "--nproc_per_node")
        torch.cuda.set_device(local)
    if args.model:
        import gpt2
        try:
            model, content, meta = gpt2.load(args.model, device, precision)
        except gpt2.UserError as error:
            raise UserError(str(error)) from None
        tokenizer, script = sample.Tokenizer(json.loads(content)), sample.find_script("train_gpt", args.script)
    else:
        model, tokenizer, meta = sample.load_checkpoint(path, device, args.script, precision)
        content, script = (path / "tokenizer.json").read_bytes(), sample.find_script(meta["script"], args.script)
        if device == "cuda":             # windows of long streams without T x T masks, as in training
            model.cfg = replace(model.cfg, attention="flex")
    module = sample.import_script(script)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    machine = module.Machine(place, rank, world_size, name)
    fits = min(1 << 15, (1 << 28) // model.cfg.vocab_size // 128 * 128)
    if device == "cuda":
        fits = 1 << 17 if path else 1 << 15     # the attention of --model is plain
    cuts = json.loads(content)["pattern"] in ("", GPT2_PATTERN)
    return Subject(args.model or str(path), model, tokenizer, meta, cuts, module, machine, args.stream_tokens or fits)

def gather(machine, value) -> list:
    """The values of all ranks, in their order."""
    if machine.world_size == 1:
        return [value]
    import torch.distributed as dist
    values = [None] * machine.world_size
    dist.all_gather_object(values, value)
    return values

def score_documents(subject: Subject, score, documents, total_tokens: int) -> np.ndarray:
    """(documents, 3): summed loss in nats over the scored tokens, their count, and how many were not the likeliest.

    score is the model's function of that name; documents are (tokens, start, end) of together total_tokens.
    """
    import torch
    from tqdm import tqdm
    machine, device, length = subject.machine, subject.machine.device, subject.stream_tokens
    sums_on = torch.device("cpu") if device.type == "mps" else device           # which has no float64

    def streams():
        for stream in itertools.islice(pack(documents, length), machine.rank, None, machine.world_size):
            filled = -(-sum(len(document[0]) for _, document in stream) // 128) * 128
            # a compiled graph is of one length
            yield fill(stream, length if device.type == "cuda" else filled, subject.model.cfg.bos_id)
    bar = tqdm(total=total_tokens, unit=" tokens", unit_scale=True, disable=None if machine.rank == 0 else True)
    waiting, results = deque(), []

    def collect():
        numbers, sums = waiting.popleft()
        results.append(np.column_stack([numbers, sums.cpu().numpy().T]))
    with torch.no_grad(), bar:
        for *batch, spans in subject.module.prefetch(streams(), depth=4):
            tokens, targets, ends = subject.module.to_device((*batch, spans[:, 1:]), device)
            losses, likeliest = score(tokens, targets)
            counted = targets >= 0
            wrong = counted & (likeliest != targets)
            sums = torch.stack([part.to(sums_on, torch.float64) for part in (losses, counted, wrong)]).cumsum(1)
            sums, ends = torch.nn.functional.pad(sums, (1, 0)), ends.to(sums_on)
            waiting.append((spans[:, 0], sums[:, ends[:, 1]] - sums[:, ends[:, 0]]))
            if len(waiting) > 2:         # reading results late keeps the GPU busy
                collect()
            bar.update(min(tokens.numel() * machine.world_size, total_tokens - bar.n))
        while waiting:
            collect()
    gathered = np.concatenate([part for parts in gather(machine, results) for part in parts] or [np.empty((0, 4))])
    if not np.isfinite(gathered).all():
        raise UserError(f"the losses of {subject.name} are not finite; choose another with --checkpoint=")
    return gathered[gathered[:, 0].argsort(), 1:]

# -----------------------------------------------------------------------------
# Scores

def ratio(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(weights) and its standard error over the documents or streams that were summed."""
    mean, n = sums.sum() / weights.sum(), len(sums)
    spread = ((sums - mean * weights) ** 2).sum()
    return float(mean), float(math.sqrt(n / max(n - 1, 1) * spread) / weights.sum())

def open_shards(subject: Subject, pattern: str) -> list:
    """The shards of a glob; raises UserError if there are none or the model has another tokenizer."""
    try:
        shards, _ = subject.module.open_shards(pattern, pattern)
    except subject.module.UserError as error:
        raise UserError(str(error).replace("--train_files=", "--shards=")) from None
    if shards[0].tokenizer != subject.meta["tokenizer_sha256"]:
        raise UserError(f"{shards[0].path} has tokenizer {shards[0].tokenizer[:12]}, {subject.name} "
                        f"{subject.meta['tokenizer_sha256'][:12]}; choose shards of the same one with --shards=")
    return shards

def validation_loss(subject: Subject, cfg, streams: list) -> dict:
    """The loss that the training script reports, by its own function; its error is over streams."""
    totals, machine = [], subject.machine
    forward = subject.compiled(subject.model, *streams[0])

    def noted(tokens, targets):
        totals.append(forward(tokens, targets))
        return totals[-1]
    loss = subject.module.validate(noted, cfg, streams, machine)
    mine = [(float(total), int((targets >= 0).sum()))
            for total, (_, targets) in zip(totals, streams[machine.rank::machine.world_size])]
    sums, counts = np.array([row for rows in gather(machine, mine) for row in rows]).T
    if not math.isfinite(loss):
        raise UserError(f"the validation loss of {subject.name} is {loss}; choose another with --checkpoint=")
    return {"loss": round(loss, 6), "se": round(ratio(sums, counts)[1], 6), "tokens": cfg.val_tokens, "n": len(sums)}

def bits_per_byte(documents, results: np.ndarray, tokenizer) -> dict:
    """Bits per byte of documents as text_documents yields them."""
    lengths = np.array([len(text) for text in tokenizer.ranks] + [0] * (tokenizer.vocab_size - len(tokenizer.ranks)))
    sizes = np.array([lengths[tokens[1:]].sum() for tokens, _, _ in documents], np.float64)
    bpb, se = ratio(results[:, 0] / math.log(2), sizes)
    return {"bpb": round(bpb, 6), "se": round(se, 6), "bytes": int(sizes.sum()), "tokens": int(results[:, 1].sum()),
            "n": len(results)}

def judge(items: list[Item], results: np.ndarray) -> list[dict]:
    """One record an item: which option has the lowest mean (for HellaSwag also summed) loss, the first of equals."""
    records, low = [], 0
    for item in items:
        rows = results[low:low + len(item.prompts)]
        low += len(rows)
        record = {"task": item.task, "kind": item.kind, "line": item.line, "losses": [round(x, 5) for x in rows[:, 0]],
                  "tokens": [int(x) for x in rows[:, 1]]}
        if item.kind == "lm":
            records.append(record | {"correct": bool(rows[0, 2] == 0)})
            continue
        rows = rows[[item.prompts.index(prompt) for prompt in item.prompts]]    # the same answer twice is a tie
        means = np.where(rows[:, 1] > 0, rows[:, 0] / rows[:, 1].clip(1), np.inf)
        choice = int(means.argmin())
        record |= {"gold": item.gold, "choice": choice, "correct": choice == item.gold}
        if item.kind == "ending":
            record["plain_correct"] = int(rows[:, 0].argmin()) == item.gold
        records.append(record)
    return records

def task_score(task: Task, records: list[dict], key: str = "correct") -> dict:
    """Accuracy with everything one needs to judge it."""
    mean, n = sum(record[key] for record in records) / len(records), len(records)
    score = {"accuracy": round(mean, 6), "se": round(math.sqrt(mean * (1 - mean) / max(n - 1, 1)), 6), "n": n,
             "chance": task.baseline}
    return score | {"gpt2": task.gpt2} if key == "correct" else score

def core_score(scores: dict[str, dict]) -> dict:
    """CORE over the tasks that were scored, what is missing, and CORE of the published models over the same tasks."""
    here = [task for task in TASKS if task.label in scores]
    for task in here:
        score = scores[task.label]
        score["centered"] = round((score["accuracy"] - task.baseline) / (1 - task.baseline), 6)
    spread = sum((scores[task.label]["se"] / (1 - task.baseline)) ** 2 for task in here)
    published = [sum((task.gpt2[size] - task.baseline) / (1 - task.baseline) for task in here) for size in range(4)]
    return {"core": round(sum(score["centered"] for score in scores.values()) / len(here), 6),
            "se": round(math.sqrt(spread) / len(here), 6), "n": len(here), "chance": 0,
            "gpt2": [round(total / len(here), 6) for total in published],
            "missing": [task.label for task in TASKS if task.label not in scores], "tasks": scores}

# -----------------------------------------------------------------------------
# Evaluation

def read_streams(args: argparse.Namespace, subject: Subject):
    """(config, its validation streams or [], documents of bpb or []), as far as asked for; raises UserError."""
    cfg, streams, texts = subject.model.cfg, [], []
    if "val" in args.tasks:
        cfg = replace(cfg, val_files=args.shards or cfg.val_files)
        try:
            streams = subject.module.validation_streams(cfg, open_shards(subject, cfg.val_files))
        except subject.module.UserError as error:
            raise UserError(str(error)) from None
    if "bpb" in args.tasks:
        texts = list(text_documents(subject, open_shards(subject, args.shards or cfg.val_files), args.bpb_tokens))
        if not texts:
            raise UserError(f"--shards={args.shards or cfg.val_files} holds no text; choose others")
    return cfg, streams, texts

def prepare_items(args: argparse.Namespace, tasks: list[Task], subject: Subject) -> tuple[list[Item], dict]:
    """The items of all tasks and the tokens of all their texts."""
    items = read_items(args, tasks, subject.cuts)
    texts = {text for item in items for prompt in [*item.prompts, item.before] for text in prompt}
    threads = max(1, (os.cpu_count() or 1) // subject.machine.world_size)
    return items, encode_all(subject.tokenizer, sorted(texts), threads)

def evaluate(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """All scores, and the records of all items; the same on every rank. Raises UserError."""
    import torch
    start, tasks = time.perf_counter(), find_tasks(args)
    subject = load_subject(args)
    machine, longest, bos_id = subject.machine, subject.longest, subject.model.cfg.bos_id
    cfg, streams, texts = read_streams(args, subject)
    if machine.world_size > 1:
        cuda = machine.device.type == "cuda"
        torch.distributed.init_process_group("nccl" if cuda else "gloo", device_id=machine.device if cuda else None)
    scores, score, too_long = {}, None, 0
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(prepare_items, args, tasks, subject)           # while the model is compiled
        if streams:
            scores["val"] = validation_loss(subject, cfg, streams)
        if texts or tasks:
            score = subject.compiled(subject.model.score, *fill([], subject.stream_tokens, bos_id)[:2])
        items, encoded = prepared.result()

    def documents():
        nonlocal too_long
        yield from texts
        for item in items:
            for document in item_documents(item, encoded, np.array([bos_id], np.int32)):
                too_long += len(document[0]) > longest
                yield cut(document, longest)
    total = sum(len(tokens) for tokens, _, _ in texts) + sum(
        min(1 + sum(len(encoded[text]) for text in prompt), longest) for item in items for prompt in item.prompts)
    scoring = time.perf_counter()
    results = score_documents(subject, score, documents(), total)
    end = time.perf_counter()
    if texts:
        scores["bpb"] = bits_per_byte(texts, results[:len(texts)], subject.tokenizer)
    records = judge(items, results[len(texts):])
    return {"model": subject.name, "script": subject.meta["script"], "step": subject.meta["step"],
            "device": machine.name, "world_size": machine.world_size, "max_items": args.max_items,
            "cut_documents": too_long, "tokens": total, "compile_seconds": round(subject.compile_seconds, 1),
            "score_seconds": round(end - scoring, 1), "seconds": round(end - start - subject.compile_seconds, 1),
            "scores": scores | summarize(tasks, records)}, records

def write_items(path: Path, records: list[dict]):
    """Writes the records as JSONL, under a temporary name first; raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)           # it may be a link, which writing would follow
        with open(temporary, "x") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--items_out={path} cannot be written ({error.strerror}); choose another") from None

def summarize(tasks: list[Task], records: list[dict]) -> dict:
    """The scores of HellaSwag and CORE from the records of their items."""
    scores, core, groups = {}, {}, itertools.groupby(records, lambda record: (record["task"], record["kind"]))
    by_task = {key: list(group) for key, group in groups}
    for task in tasks:
        mine = by_task[task.label, task.kind]
        if task.kind == "ending":
            scores["hellaswag"] = {"plain": task_score(task, mine, "plain_correct"), "norm": task_score(task, mine)}
        else:
            core[task.label] = task_score(task, mine)
    return scores | ({"core": core_score(core)} if core else {})

def table(result: dict) -> str:
    """The console's table of all scores."""
    lines = [f"{'':34}{'score':>10}{'+-':>9}{'n':>9}{'chance':>9}   {'gpt2':>7}{'medium':>8}{'large':>8}{'xl':>8}"]

    def row(name, value, score, digits=4):
        chance = f"{score['chance']:.3f}" if "chance" in score else "-"
        published = "".join(f"{number:8.{digits}f}" for number in score.get("gpt2", ()))
        lines.append(f"{name:34}{value:10.{digits}f}{score['se']:9.{digits}f}{score['n']:9,}{chance:>9}  {published}")
    scores = result["scores"]
    if "val" in scores:
        row(f"val loss, {scores['val']['tokens']:,} tokens", scores["val"]["loss"], scores["val"], 6)
    if "bpb" in scores:
        row(f"bits per byte, {scores['bpb']['bytes']:,} bytes", scores["bpb"]["bpb"], scores["bpb"], 6)
    for name, score in scores.get("hellaswag", {}).items():
        row(f"hellaswag {name}", score["accuracy"], score)
    if "core" in scores:
        core = scores["core"]
        for label, score in core["tasks"].items():
            row(f"  {label}", score["accuracy"], score)
        row("CORE", core["core"], core)
        if core["missing"]:
            lines.append(f"CORE, GPT-2's too: {core['n']} of {len(TASKS)} tasks: {', '.join(core['missing'])} missing")
    if result["max_items"]:
        lines.append(f"only {result['max_items']} items of each task: not comparable with the published scores")
    if result["cut_documents"]:
        lines.append(f"{result['cut_documents']:,} prompts were too long and lost their first tokens")
    lines.append(f"{result['tokens']:,} tokens in {result['score_seconds']} s, with loading {result['seconds']} s; "
                 f"compilation, not counted: {result['compile_seconds']} s")
    return "\n".join(lines)

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 the user can put it right, 130 interrupted."""
    rank = int(os.environ.get("RANK", 0))
    try:
        args = parse_args(argv)
        result, records = evaluate(args)
        if rank == 0:
            if args.items_out:
                write_items(args.items_out, records)
            print(table(result))
            print(json.dumps(result), flush=True)
        return 0
    except UserError as error:
        if rank == 0:
            print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:             # of any rank: a name that is too long, a folder that is closed
        print(f"evaluate.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print("\nevaluate.py: stopped", file=sys.stderr)
        return 130
    finally:
        dist = sys.modules.get("torch.distributed")
        if dist and dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
