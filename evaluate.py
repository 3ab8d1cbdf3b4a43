"""Scores of a trained model: loss, bits per byte, HellaSwag, CORE, chat tasks, long texts, with standard errors.

    python evaluate.py                                                      # the newest run under logs/, all scores
    python evaluate.py --checkpoint=logs/<run> --tasks=val,hellaswag
    torchrun --standalone --nproc_per_node=8 evaluate.py --tasks=core --items_out=items.jsonl
    python evaluate.py --model=gpt2 --tasks=hellaswag,core                  # the original weights, to calibrate
    python evaluate.py --tasks=chatcore                                     # a chat model, made by chat_sft.py

Fetch the questions first with python data/evals.py. This script downloads nothing but the weights that --model names.

val         the validation loss, as the training script computes it
bpb         bits per byte of the validation text
hellaswag   accuracy: the ending with the lowest summed loss (plain), or with the lowest mean loss (norm)
core        22 tasks, as nanochat computes them: the mean of (accuracy - baseline) / (1 - baseline)
arc, mmlu, gsm8k, spellingbee
            accuracy of a chat model's answers: a letter, or a number that it works out with the calculator
chatcore    these tasks, and the mean of (accuracy - chance) / (1 - chance)
humaneval   share of programming tasks whose tests pass; only with --allow_code, because it runs what the model writes
needle      accuracy of finding a number that is hidden in a text of 2,048 to 65,536 tokens
position    the loss by the position in long documents, with full and with cut context

The scores do not depend on the number of GPUs or on how prompts are packed. docs/evaluation.md explains each score.
"""
import argparse
import glob
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import chat_tasks
import contained
import long_tasks
import sample
from sample import GPT2_PATTERN, JOINED_PATTERNS, UserError

# PyTorch takes seconds to import, so only the functions that need it import it: --help and errors come at once.

# -----------------------------------------------------------------------------
# Tasks

@dataclass(frozen=True)
class Task:
    """One task of CORE."""
    label: str
    category: str                # folder of its file
    shots: int                   # solved examples before each question
    kind: str                    # choice: one prompt an answer; schema: one prompt a context; lm: the exact answer
    baseline: float              # accuracy of guessing: the v1 baselines, which the published scores use
    delimiter: str               # between question and answer
    gpt2: tuple                  # published accuracy of gpt2, -medium, -large, -xl
    file: str = ""               # name of its file, if it is not the label

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
# The figures of the three larger models look like those of 1,000 items a task. The score `hellaswag`, whose prompts
# have no activity label, is shown next to the published hellaswag_zeroshot.
HELLASWAG = replace(TASKS[0], label="hellaswag", kind="ending")
SHUFFLE_SEED = 1337                      # of the order of items
SHOTS_SEED = 1234                        # plus the number of the item: of its examples
BASE_SCORES = ("val", "bpb", "hellaswag", "core")
SCORES = (*BASE_SCORES, *chat_tasks.SCORES, *long_tasks.SCORES)
FETCH_AGAIN = "fetch it again with python data/evals.py --force"
QUESTIONS_BYTES, LINE_BYTES = 1 << 26, 1 << 20      # the largest file of questions and the longest line

# -----------------------------------------------------------------------------
# Command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as possible without a model; raises UserError."""
    parser = sample.make_parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=sample.path_flag, metavar="FOLDER", help="a checkpoint (step_...), or a run, whose latest "
        "checkpoint is taken; default: the newest run in --out_dir")
    add("--model", metavar="NAME", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with such a model, instead "
        "of a checkpoint (default: none)")
    add("--tasks", default=",".join(BASE_SCORES), metavar="LIST", help="the scores to compute, separated by commas, "
        f"from {','.join(SCORES)} (default: %(default)s)")
    add("--evals", type=sample.path_flag, default=Path("data/evals"), metavar="FOLDER",
        help="folder with the questions (default: %(default)s)")
    add("--shards", metavar="GLOB", help="token shards for val, bpb, needle and position (default: the validation "
        "shards of the training run)")
    add("--bpb_tokens", type=int, default=10_485_760, metavar="N", help="bpb reads the documents that begin in the "
        "first N tokens; 0: all documents (default: %(default)s)")
    add("--max_items", type=int, default=0, metavar="N", help="use only the first N items of each task after "
        "shuffling, also for the examples; 0: all items (default: %(default)s)")
    add("--items_out", type=sample.path_flag, metavar="FILE", help="write the result of every item to FILE, one JSON "
        "object a line (default: none)")
    add("--losses_out", type=sample.path_flag, metavar="FILE", help="write the loss of every token that bpb reads to "
        "FILE (.npz), for dev/loss_diff.py (default: none)")
    add("--max_tokens", type=int, default=512, metavar="N", help="longest answer of a chat task, in tokens with the "
        "calculator's results (default: %(default)s)")
    add("--batch", type=int, default=64, metavar="N", help="number of questions of chat tasks that are answered at the "
        "same time (default: %(default)s)")
    add("--longest", type=int, default=65_536, metavar="N", help="longest text of needle and position, in tokens "
        "(default: %(default)s)")
    add("--heat_map", type=sample.path_flag, metavar="FILE", help="write a picture of the needle scores to FILE, as "
        "svg (default: none)")
    add("--stream_tokens", type=int, default=0, metavar="N", help="length of a packed stream, a multiple of 128; "
        "default: 131072 on cuda, else as much as 1 GiB of logits allows")
    add("--allow_code", action="store_true", help="run the programs that the model writes for humaneval. What they can "
        "do is limited, see contained.py: against accidents, not against hostile code (default: off)")
    sample.add_model_flags(add, "evaluate.py")
    args = parser.parse_args(sample.command_line(argv))
    check_args(args)
    return args

def check_args(args: argparse.Namespace):
    """Splits --tasks into `tasks`; those of chat and of long texts also into `chat_tasks` and `long_tasks`.

    Raises UserError for a value out of range or for flags that contradict each other.
    """
    args.tasks = args.tasks.split(",")
    for name in args.tasks:
        if name not in SCORES:
            raise UserError(f"--tasks={name} does not exist; choose from {','.join(SCORES)}")
    args.chat_tasks = [name for name in args.tasks if name in chat_tasks.SCORES]
    args.long_tasks = [name for name in args.tasks if name in long_tasks.SCORES]

    def need(good, name, remedy):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} {remedy}")
    with_examples = {*args.tasks} - {*args.chat_tasks, *args.long_tasks}
    most = max(task.shots for task in TASKS) if with_examples else 0
    for name in ("checkpoint", "vocab_dir"):
        need(not args.model or not getattr(args, name), "model", f"and --{name}={getattr(args, name)} are both given, "
             f"but --{name} is for checkpoints; give one of them")
    need(not (args.model and "val" in args.tasks), "model", "has no training script to compute val; use bpb instead")
    for name in ("bpb", *args.long_tasks):
        need(not (args.model and name in args.tasks) or args.shards, "model", f"needs --shards=GLOB for {name}")
    need(not (args.model and args.chat_tasks), "model", f"has no tokens for conversations, which "
         f"{','.join(args.chat_tasks)} needs; name a chat model with --checkpoint= instead")
    if "humaneval" in args.tasks:
        if not args.allow_code:
            raise UserError("--tasks=humaneval runs programs that the model writes; contained.py says how they are "
                            "limited; allow it with --allow_code")
        if fault := contained.fault():
            raise UserError(f"--tasks=humaneval cannot run programs here: {fault}; leave it out")
    need(args.max_tokens >= 1, "max_tokens", "must be at least 1")
    need(256 <= args.longest <= 1 << 24, "longest", "must be between 256 and 16777216")
    need(not args.heat_map or "needle" in args.tasks, "heat_map", "is a picture of needle; add it to --tasks")
    need(args.batch >= 1, "batch", "must be at least 1")
    need(args.stream_tokens >= 0 and args.stream_tokens % 128 == 0, "stream_tokens", "must be a multiple of 128")
    need(args.bpb_tokens >= 0, "bpb_tokens", "must be 0 (all) or a positive number")
    need(args.max_items == 0 or args.max_items > most, "max_items", f"must be 0 (all) or above {most}" + (
        ", which is the number of examples before a question" if most else ""))
    need(0 <= args.threads <= 1024, "threads", "must be 0 (chosen by trying) or a number up to 1024")
    for name in ("items_out", "losses_out", "heat_map"):
        if path := getattr(args, name):
            need(path.absolute().parent.is_dir(), name, "is in a folder that does not exist; create it first")
            need(not path.is_dir(), name, "is a folder; name a file")
    need(not args.losses_out or "bpb" in args.tasks, "losses_out", "needs the score bpb; add it to --tasks")

def find_checkpoint(args: argparse.Namespace) -> Path:
    """The checkpoint folder that the flags name, by default the latest of the newest run; raises UserError."""
    if args.checkpoint:
        folder = sample.resolve_checkpoint(args.checkpoint)
    else:
        folder = sample.find_checkpoint(args.out_dir)
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} holds no checkpoint; name one with --checkpoint=")
    return folder

@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that torchrun started."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

def read_ranks() -> Ranks:
    """The ranks from the variables that torchrun sets; raises UserError for values that cannot come from torchrun."""
    env = os.environ
    remedy = "start evaluate.py with torchrun, or unset RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE"
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in env:
            if not re.fullmatch("[0-9]{1,9}", env[name], re.ASCII):
                raise UserError(f"{name}={env[name]!r} in the environment is not a number; {remedy}")
            values[name.lower()] = int(env[name])
    ranks = Ranks(**values)
    if max(ranks.rank, ranks.local_rank) >= ranks.world_size:
        raise UserError(f"RANK={ranks.rank} and LOCAL_RANK={ranks.local_rank} in the environment must be below "
                        f"WORLD_SIZE={ranks.world_size}; {remedy}")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if ranks.world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE={ranks.world_size} is in the environment without {', '.join(missing)}; {remedy}")
    return ranks

def shard_pattern(pattern: str) -> str:
    """The glob that finds what the user means: ~ is the home folder, and an existing path or folder means itself."""
    pattern = os.path.expanduser(pattern)
    folder, name = os.path.split(pattern)
    if os.path.exists(pattern):
        return glob.escape(pattern)
    return os.path.join(glob.escape(folder), name) if os.path.isdir(folder) else pattern

# -----------------------------------------------------------------------------
# Prompts

@dataclass
class Item:
    """One question with its options."""
    task: str
    kind: str
    line: int                    # in the data file, from 0
    gold: int                    # the right option; 0 if there is only one
    prompts: list                # for each option: the texts that the prompt is made of
    before: tuple = ()           # texts before the answer, if the whole answer may be scored

# of an item, by kind: question, answer, right option, other texts; a list has one text per option
FIELDS = {
    "choice": ("query", "choices", "gold"), "schema": ("context_options", "continuation", "gold"),
    "lm": ("context", "continuation", None), "ending": ("ctx", "endings", "label"),
    "mmlu": ("question", "choices", "answer"), "gsm8k": ("question", "answer", None),
    "humaneval": ("prompt", "test", None, "entry_point")}

def task_file(evals: Path, task: Task) -> Path | None:
    """The file with a task's items, or None if it is not there."""
    name = "hellaswag_val" if task.kind == "ending" else f"core/eval_data/{task.category}/{task.file or task.label}"
    return next((path for end in (".jsonl", ".jsonl.xz") if (path := evals / f"{name}{end}").is_file()), None)

def find_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks of --tasks that have a file; raises UserError for a score without any file."""
    found = []
    for name, tasks in (("hellaswag", (HELLASWAG,)), ("core", TASKS)):
        if name in args.tasks:
            here = [task for task in tasks if task_file(args.evals, task)]
            if not here:
                raise UserError(f"--evals={args.evals} has no data of {name}; fetch it with python data/evals.py, or choose "
                                "scores that need none: --tasks=val,bpb")
            found += here
    return found

def check_item(kind: str, row: dict) -> dict:
    """The fields of an item that are used; raises KeyError, IndexError, TypeError or ValueError if one is not sound."""
    asked, answered, gold, *others = FIELDS[kind]
    texts = [row[name] if isinstance(row[name], list) else [row[name]] for name in (asked, answered, *others)]
    for text in itertools.chain(*texts):
        text.encode()                    # fails for what UTF-8 cannot hold
    if gold and (type(row[gold]) is not int or not 0 <= row[gold] < max(map(len, texts))):
        raise IndexError(f"{gold} {str(row[gold]):.40} is not an option")
    return {name: row[name] for name in FIELDS[kind] if name}

def read_rows(path: Path, kind: str, max_items: int, remedy: str = FETCH_AGAIN) -> list[tuple[int, dict]]:
    """(line, item) of a task file in the order of the evaluation; raises UserError, or what check_item raises.

    remedy: the end of an error's text.
    """
    rows = []
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            while line := file.readline(LINE_BYTES):
                rows.append((len(rows), check_item(kind, json.loads(line))))
                if file.tell() > QUESTIONS_BYTES:
                    raise ValueError(f"more than {QUESTIONS_BYTES} bytes")
    except (OSError, ValueError, EOFError, lzma.LZMAError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows[:max_items or None]

def few_shot(i: int, count: int, shots: int) -> list[int]:
    """The numbers of the items, of `count`, that are the examples of item i."""
    drawn = random.Random(SHOTS_SEED + i).sample(range(count - 1), shots)
    return [other + (other >= i) for other in drawn]

def join(texts: list[str], cuts: bool) -> tuple[str, ...]:
    """The same text in pieces that can be encoded one by one; in one piece unless `cuts`.

    GPT-2's pattern always ends a word before whitespace that follows something else. So the examples of a task are
    encoded once each, and not again in every prompt.
    """
    pieces = []
    for text in texts:
        if not pieces or cuts and text[:1] in (" ", "\n") and not pieces[-1][-1:].isspace():
            pieces.append(text)
        else:
            pieces[-1] += text
    return tuple(pieces)

def pick(texts, option: int) -> str:
    """The text of an option; a single text belongs to all options."""
    return texts[option] if isinstance(texts, list) else texts

def one_begins_another(texts) -> bool:
    """Whether one of the texts begins with another one."""
    ordered = sorted(texts) if isinstance(texts, list) else []
    return any(later.startswith(earlier) for earlier, later in zip(ordered, ordered[1:]))

def split_answers(prompts: list[tuple[str, ...]], contexts: list[str]) -> list[tuple[str, str]]:
    """Each prompt in two texts: its context without the whitespace at the end, and the rest."""
    contexts = [context.rstrip() for context in contexts]
    return [(context, "".join(prompt)[len(context):]) for prompt, context in zip(prompts, contexts)]

def render(task: Task, rows: list, cuts: bool, apart: bool = False) -> list[Item]:
    """The items of a task: examples, each followed by a blank line, then the question and, for each option, the answer.

    rows: (line, item) of all items of the task, from which the examples come. cuts: see join. apart: the answer is a
    text of its own, because the tokenizer would merge it with the question. Raises KeyError, IndexError, TypeError,
    ValueError or AttributeError for an item that is not sound.
    """
    asked, answered, gold = FIELDS[task.kind]

    def question(row, option):
        return row[asked].strip() if task.kind == "lm" else pick(row[asked], option)

    def answer(row, option):
        return task.delimiter + pick(row[answered], option)
    lines, rows = zip(*rows)
    golds = [row[gold] if gold else 0 for row in rows]
    first = [question(*pair) for pair in zip(rows, golds)]          # of the examples
    later = ["\n\n" + text for text in first]                       # the same after another example
    answers = [answer(*pair) for pair in zip(rows, golds)]
    items = []
    for i, row in enumerate(rows):
        shots = few_shot(i, len(rows), task.shots)
        examples = [text for n, j in enumerate(shots) for text in (later[j] if n else first[j], answers[j])]
        gap = "\n\n" if shots else ""
        options = max(len(row[name]) if isinstance(row[name], list) else 1 for name in (asked, answered))
        prompts = [(*examples, gap + question(row, option), answer(row, option)) for option in range(options)]
        before = ()
        if task.kind == "ending":        # context and ending are encoded separately
            before = prompts[0][:1]
        elif apart:
            prompts = split_answers(prompts, ["".join([*examples, gap, question(row, option), task.delimiter])
                                              for option in range(options)])
        else:
            prompts = [join(prompt, cuts) for prompt in prompts]
        if task.kind == "lm" or task.kind == "choice" and one_begins_another(row[answered]):
            last = (gap + question(row, 0) + task.delimiter).rstrip()
            before = prompts[0][:1] if apart else join([*examples, last], cuts)
        items.append(Item(task.label, task.kind, lines[i], golds[i], prompts, before))
    return items

def read_items(args: argparse.Namespace, tasks: list[Task], cuts: bool, apart: bool = False) -> list[Item]:
    """The items of all tasks, one task after the other, made by `render`; raises UserError."""
    items = []
    for task in tasks:
        path = task_file(args.evals, task)
        try:
            items += render(task, read_rows(path, task.kind, args.max_items), cuts, apart)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not hold items of {task.label} ({type(error).__name__}: {error}); "
                            f"{FETCH_AGAIN}") from None
    return items

# -----------------------------------------------------------------------------
# Documents

def encode_all(tokenizer, texts: list[str], threads: int) -> dict[str, np.ndarray]:
    """text -> its tokens, int32. tiktoken releases the interpreter, so several threads are faster."""
    table = np.array([tokenizer.ids[bytes([byte])] for byte in range(256)], np.int32)

    def encode(part):
        if tokenizer.encoding is None:
            return [table[np.frombuffer(text.encode(), np.uint8)] for text in part]
        return [np.array(tokens, np.int32) for tokens in map(tokenizer.encoding.encode_ordinary, part)]
    parts = [texts[i:i + 256] for i in range(0, len(texts), 256)]
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(texts, itertools.chain.from_iterable(pool.map(encode, parts))))

def common_prefix(documents: list[np.ndarray]) -> int:
    """The number of tokens that all documents begin with."""
    shortest = min(map(len, documents))
    heads = np.stack([tokens[:shortest] for tokens in documents])
    differ = (heads != heads[0]).any(0)
    return int(differ.argmax()) if differ.any() else shortest

def item_documents(item: Item, encoded: dict, bos: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
    """(tokens, start, end) of each option: the answer that is scored is tokens[start:end]; raises UserError.

    choice: the tokens after those that all options begin with. If that leaves an option without a token, because
    another one goes on from it, whole answers are scored. schema: the tokens that all options end with. lm and ending:
    the whole answer.
    """
    documents = [np.concatenate([bos, *map(encoded.__getitem__, prompt)]) for prompt in item.prompts]
    before = np.concatenate([bos, *map(encoded.__getitem__, item.before)])
    if item.kind == "choice":
        start = common_prefix(documents)
        if item.before and start == min(map(len, documents)):
            start = common_prefix([*documents, before])
        starts = [start] * len(documents)
    elif item.kind == "schema":
        suffix = common_prefix([tokens[::-1] for tokens in documents])
        starts = [max(len(tokens) - suffix, 1) for tokens in documents]
    else:
        starts = [len(before)] * len(documents)
        if any(len(tokens) <= len(before) or (tokens[:len(before)] != before).any() for tokens in documents):
            raise UserError(f"item {item.line} of {item.task} merges question and answer into one token; choose a "
                            "model whose tokenizer does not")
    return [(tokens, start, len(tokens)) for tokens, start in zip(documents, starts)]

def document_ranges(ids: np.ndarray, bos_id: int):
    """(start, end) of every document in the tokens of a shard, in order."""
    parts = range(0, len(ids), 1 << 22)                             # a few million tokens in memory at a time
    starts = np.concatenate([low + np.flatnonzero(ids[low:low + (1 << 22)] == bos_id) for low in parts])
    return zip(starts, [*starts[1:], len(ids)])

def text_documents(subject, shards: list, limit_tokens: int):
    """Yields (tokens, 1, end) for the documents of shards; a document that is too long is split into several."""
    taken = 0
    step = subject.longest - 1
    for shard in shards:
        ids = shard.read()
        for start, end in document_ranges(ids, shard.bos_id):
            if limit_tokens and taken >= limit_tokens:
                return
            taken += end - start
            for low in range(start + 1, end, step):
                tokens = np.concatenate([ids[start:start + 1], ids[low:min(low + step, end)]]).astype(np.int32)
                highest = tokens.max()
                if highest >= subject.tokenizer.vocab_size:
                    raise UserError(f"{shard.path} holds id {highest}, outside the vocabulary of "
                                    f"{subject.tokenizer.vocab_size}; make the shard again")
                yield tokens, 1, len(tokens)

def cut(document: tuple, longest: int) -> tuple:
    """The document if the model can read it, else its first token and its last ones."""
    tokens, start, end = document
    extra = len(tokens) - longest
    if extra <= 0:
        return document
    return np.concatenate([tokens[:1], tokens[1 + extra:]]), max(start - extra, 1), end - extra

def pack(documents, stream_tokens: int):
    """Yields lists of (number, document), in order, each of which fits into one stream."""
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
    """(tokens, targets, spans): inputs and targets of `length`, and each document's number and range of targets."""
    tokens = np.full(length, bos_id, np.int32)
    targets = np.full(length, -1, np.int64)
    spans = np.empty((len(stream), 3), np.int64)
    filled = 0
    for i, (number, (ids, start, end)) in enumerate(stream):
        tokens[filled:filled + len(ids)] = ids
        targets[filled + start - 1:filled + end - 1] = ids[start:end]
        spans[i] = number, filled + start - 1, filled + end - 1
        filled += len(ids)
    return tokens, targets, spans

# -----------------------------------------------------------------------------
# Model

@dataclass
class Subject:
    """The model that is evaluated, and where it runs."""
    name: str
    model: object
    tokenizer: sample.Tokenizer | None     # None: the checkpoint has none, which is enough for val
    meta: dict
    cuts: bool                   # whether text can be cut before whitespace (see join)
    module: object               # the training script, which reads the shards
    machine: object              # device, rank, world_size, name
    stream_tokens: int
    apart: bool = False          # whether question and answer are encoded apart (see render)
    compile_seconds: float = 0.0
    score_seconds: float = 0.0   # without compilation and loading

    @property
    def longest(self) -> int:
        """The most tokens of a document."""
        return min(self.stream_tokens, getattr(self.model.cfg, "context_tokens", self.stream_tokens))

    def compiled(self, function, *arguments):
        """On CUDA the function compiled for such arguments, else the function itself; adds up the seconds."""
        import torch
        if self.machine.device.type != "cuda" or self.meta["script"] == "gpt2":     # gpt2.py needs no FlexAttention
            return function
        start = time.perf_counter()
        function = torch.compile(function, dynamic=False, fullgraph=True)
        with torch.no_grad():
            function(*self.module.to_device(arguments, self.machine.device))
        torch.cuda.synchronize()
        self.compile_seconds += time.perf_counter() - start
        return function

def load_subject(args: argparse.Namespace) -> Subject:
    """The model that the flags name, ready on this rank's device; raises UserError."""
    import torch
    ranks = read_ranks()
    path = None if args.model else find_checkpoint(args)
    device, precision = sample.choose_device(args.device, args.precision)
    if device == "cuda":
        if ranks.local_world_size > torch.cuda.device_count():
            raise UserError(f"torchrun starts {ranks.local_world_size} ranks here, but there are only "
                            f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(ranks.local_rank)
    if args.model:
        model, tokenizer, meta = sample.load_model(args.model, device, precision)
        script = sample.find_script("train_gpt", args.script)
    else:
        model, tokenizer, meta = sample.load_checkpoint(path, device, args.script, precision, args.vocab_dir,
                                                        needs_tokenizer=args.tasks != ["val"])
        script = sample.find_script(meta["script"], args.script)
        if device == "cuda":             # windows of long streams without T x T masks, as in training
            model.cfg = replace(model.cfg, attention="flex")
    module = sample.import_script(script)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    place = torch.device(device, ranks.local_rank) if device == "cuda" else torch.device(device)
    machine = module.Machine(place, ranks.rank, ranks.world_size, name)
    fits = min(1 << 15, (1 << 28) // model.cfg.vocab_size // 128 * 128)
    if device == "cuda":
        fits = 1 << 17 if path else 1 << 15     # the attention of --model is plain
    cuts = tokenizer is not None and tokenizer.pattern in ("", GPT2_PATTERN)
    apart = tokenizer is not None and tokenizer.pattern in JOINED_PATTERNS
    if args.long_tasks:
        limit = getattr(model.cfg, "context_tokens", args.longest)
        if limit < args.longest:
            raise UserError(f"--longest={args.longest} is more than the {limit} tokens that the model reads; lower it")
        fits = max(fits, -(-args.longest // 128) * 128)
        if 0 < args.stream_tokens < args.longest:
            raise UserError(f"--stream_tokens={args.stream_tokens} is below --longest={args.longest}; leave it out")
    return Subject(args.model or str(path), model, tokenizer, meta, cuts, module, machine, args.stream_tokens or fits,
                   apart)

def set_threads(args: argparse.Namespace, subject: Subject):
    """Sets the number of CPU threads that scores short streams fastest, and prints a choice on stderr."""
    import torch
    if subject.machine.device.type != "cpu" or subject.machine.world_size > 1 and not args.threads:
        return
    length = min(512, subject.longest)
    tokens = torch.full((length,), 32, dtype=torch.int32)
    tokens[0] = subject.model.cfg.bos_id

    def run():
        with torch.no_grad():
            subject.model.score(tokens, tokens.long())
    choice = sample.choose_threads(run, torch.get_num_threads(), args.threads)
    if choice:
        print(f"evaluate.py: {choice}", file=sys.stderr)

def join_ranks(machine):
    """Connects the ranks, if there are several; raises UserError if they cannot reach each other."""
    if machine.world_size == 1:
        return
    import torch.distributed as dist
    cuda = machine.device.type == "cuda"
    try:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=machine.device if cuda else None)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {machine.world_size} ranks cannot reach each other ({error}); start evaluate.py with "
                        "torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE") from None

def gather(machine, value) -> list:
    """The values of all ranks, in their order."""
    if machine.world_size == 1:
        return [value]
    import torch.distributed as dist
    values = [None] * machine.world_size
    dist.all_gather_object(values, value)
    return values

def prepare_ahead(items, depth: int):
    """The same items, made by a thread that is up to `depth` ahead; its exceptions are raised here."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        while waiting:
            item = waiting.popleft().result()
            if item is None:             # no more items
                return
            waiting.append(thread.submit(next, items, None))
            yield item

def score_documents(subject: Subject, score, documents, total_tokens: int, kept: dict | None = None,
                    keep: int = 0) -> np.ndarray:
    """(documents, 3): summed loss in nats over the scored tokens, their count, and how many were not the likeliest.

    score: the model's function of that name; documents: (tokens, start, end) each, with total_tokens together.
    kept: gets number -> loss of each scored token, float32, of the first `keep` documents, on this rank.
    """
    import torch
    from tqdm import tqdm
    begin = time.perf_counter()
    machine, device, length = subject.machine, subject.machine.device, subject.stream_tokens
    sums_on = torch.device("cpu") if device.type == "mps" else device           # mps has no float64

    def streams():
        for stream in itertools.islice(pack(documents, length), machine.rank, None, machine.world_size):
            filled = -(-sum(len(document[0]) for _, document in stream) // 128) * 128
            # compiled code takes one length only
            yield fill(stream, length if device.type == "cuda" else filled, subject.model.cfg.bos_id)
    bar = tqdm(total=total_tokens, unit=" tokens", unit_scale=True, disable=None if machine.rank == 0 else True)
    waiting = deque()
    results = []

    def collect():
        spans, sums, losses = waiting.popleft()
        results.append(np.column_stack([spans[:, 0], sums.cpu().numpy().T]))
        if losses is not None:
            by_token = losses.float().cpu().numpy()
            kept.update((number, by_token[start:end].copy()) for number, start, end in spans.tolist() if number < keep)
    with torch.no_grad(), bar:
        for *batch, spans in prepare_ahead(streams(), depth=4):
            tokens, targets, ends = subject.module.to_device((*batch, spans[:, 1:]), device)
            losses, likeliest = score(tokens, targets)
            counted = targets >= 0
            wrong = counted & (likeliest != targets)
            sums = torch.stack([part.to(sums_on, torch.float64) for part in (losses, counted, wrong)]).cumsum(1)
            sums = torch.nn.functional.pad(sums, (1, 0))
            ends = ends.to(sums_on)
            waiting.append((spans, sums[:, ends[:, 1]] - sums[:, ends[:, 0]], losses if keep else None))
            if len(waiting) > 2:         # reading results late keeps the GPU busy
                collect()
            bar.update(min(tokens.numel() * machine.world_size, total_tokens - bar.n))
        while waiting:
            collect()
    gathered = np.concatenate([part for parts in gather(machine, results) for part in parts] or [np.empty((0, 4))])
    subject.score_seconds += time.perf_counter() - begin
    if not np.isfinite(gathered).all():
        raise UserError(f"the losses of {subject.name} are not finite; choose another with --checkpoint=")
    return gathered[gathered[:, 0].argsort(), 1:]

# -----------------------------------------------------------------------------
# Scores

def ratio(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float | None]:
    """sum(sums) / sum(weights) and its standard error over the summed documents or streams; None for a single one."""
    mean = sums.sum() / weights.sum()
    n = len(sums)
    if n < 2:
        return float(mean), None
    spread = ((sums - mean * weights) ** 2).sum()
    return float(mean), float(math.sqrt(n / (n - 1) * spread) / weights.sum())

def rounded(number: float | None) -> float | None:
    """The number to six decimals."""
    return None if number is None else round(number, 6)

def has_ids_of(subject: Subject, shard) -> bool:
    """Whether the model has the vocabulary of a shard and more special tokens, as a model that learned to chat has."""
    try:
        content = subject.module.read_tokenizer(shard) or sample.gpt2_tokenizer()
    except subject.module.UserError:
        return False
    if not content or not subject.tokenizer:
        return False
    own, other = subject.tokenizer, sample.Tokenizer(json.loads(content))
    return ((own.ranks, own.pattern, own.bos_id) == (other.ranks, other.pattern, other.bos_id)
            and own.specials.items() >= other.specials.items())

def open_shards(subject: Subject, pattern: str) -> list:
    """The shards of a glob; raises UserError if there are none or their ids mean other text to the model."""
    found = shard_pattern(pattern)
    try:
        shards, _ = subject.module.open_shards(found, found)
    except subject.module.UserError as error:
        raise UserError(str(error).replace(found, pattern).replace("--train_files=", "--shards=")) from None
    wanted = subject.meta["tokenizer_sha256"]
    if shards[0].tokenizer != wanted and not has_ids_of(subject, shards[0]):
        raise UserError(f"{shards[0].path} is in another vocabulary than {subject.name} (sha256 of their tokenizers: "
                        f"{shards[0].tokenizer[:12]}, {wanted[:12]}); choose shards in its vocabulary with --shards=")
    return shards

def validation_loss(subject: Subject, cfg, streams: list) -> dict:
    """The loss that the training script reports, by its own function, and its standard error over streams."""
    totals = []
    machine = subject.machine
    forward = subject.compiled(subject.model, *streams[0])

    def recorded(tokens, targets):
        totals.append(forward(tokens, targets))
        return totals[-1]
    begin = time.perf_counter()
    loss = subject.module.validate(recorded, cfg, streams, machine)
    subject.score_seconds += time.perf_counter() - begin
    mine = [(float(total), int((targets >= 0).sum()))
            for total, (_, targets) in zip(totals, streams[machine.rank::machine.world_size])]
    sums, counts = np.array([row for rows in gather(machine, mine) for row in rows]).T
    if not math.isfinite(loss):
        raise UserError(f"the validation loss of {subject.name} is {loss}; choose another with --checkpoint=")
    return {"loss": round(loss, 6), "se": rounded(ratio(sums, counts)[1]), "tokens": cfg.val_tokens, "n": len(sums)}

def bits_per_byte(documents, results: np.ndarray, tokenizer) -> dict:
    """Bits per byte of documents as text_documents yields them."""
    lengths = np.array([len(text) for text in tokenizer.ranks] + [0] * (tokenizer.vocab_size - len(tokenizer.ranks)))
    sizes = np.array([lengths[tokens[1:]].sum() for tokens, _, _ in documents], np.float64)
    bpb, se = ratio(results[:, 0] / math.log(2), sizes)
    return {"bpb": round(bpb, 6), "se": rounded(se), "bytes": int(sizes.sum()), "tokens": int(results[:, 1].sum()),
            "n": len(results)}

def judge(items: list[Item], results: np.ndarray) -> list[dict]:
    """One record an item. The option with the lowest mean loss is chosen, the first of equals.

    For HellaSwag the record also says whether the option with the lowest summed loss is right. An option without a
    scored token is chosen only if no option has one.
    """
    records = []
    low = 0
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
    """Accuracy, its standard error over items (None for a single one), n, chance and the published accuracies."""
    mean, se = chat_tasks.share([record[key] for record in records])
    score = {"accuracy": round(mean, 6), "se": rounded(se), "n": len(records), "chance": task.baseline}
    return score | {"gpt2": task.gpt2} if key == "correct" else score

def core_score(scores: dict[str, dict]) -> dict:
    """CORE over the tasks that were scored, the missing tasks, and CORE of the published models over the same tasks."""
    here = [task for task in TASKS if task.label in scores]
    for task in here:
        score = scores[task.label]
        score["centered"] = round((score["accuracy"] - task.baseline) / (1 - task.baseline), 6)
    se = None
    if all(scores[task.label]["se"] is not None for task in here):
        spread = sum((scores[task.label]["se"] / (1 - task.baseline)) ** 2 for task in here)
        se = math.sqrt(spread) / len(here)
    published = [sum((task.gpt2[size] - task.baseline) / (1 - task.baseline) for task in here) for size in range(4)]
    return {"core": round(sum(score["centered"] for score in scores.values()) / len(here), 6),
            "se": rounded(se), "n": len(here), "chance": 0,
            "gpt2": [round(total / len(here), 6) for total in published],
            "missing": [task.label for task in TASKS if task.label not in scores], "tasks": scores}

# -----------------------------------------------------------------------------
# Evaluation

def read_streams(args: argparse.Namespace, subject: Subject):
    """(config, validation streams, documents of bpb), empty lists for scores not in --tasks; raises UserError."""
    cfg = subject.model.cfg
    streams, texts = [], []
    if "val" in args.tasks:
        cfg = replace(cfg, val_files=args.shards or cfg.val_files)
        try:
            streams = subject.module.validation_streams(cfg, open_shards(subject, cfg.val_files))
        except subject.module.UserError as error:
            raise UserError(str(error)) from None
    if "bpb" in args.tasks:
        texts = list(text_documents(subject, open_shards(subject, args.shards or cfg.val_files), args.bpb_tokens))
        if not texts:
            raise UserError(f"--shards={args.shards or cfg.val_files} holds no text; choose other shards")
    return cfg, streams, texts

def prepare_items(args: argparse.Namespace, tasks: list[Task], subject: Subject) -> tuple[list[Item], dict]:
    """The items of all tasks and the tokens of all their texts."""
    items = read_items(args, tasks, subject.cuts, subject.apart)
    if not items:                        # the model may have no tokenizer then
        return [], {}
    texts = {text for item in items for prompt in [*item.prompts, item.before] for text in prompt}
    threads = max(1, (os.cpu_count() or 1) // subject.machine.world_size)
    return items, encode_all(subject.tokenizer, sorted(texts), threads)

def read_questions(args: argparse.Namespace) -> chat_tasks.Questions:
    """The questions of the chat tasks in --tasks; raises UserError."""
    tasks, missing = chat_tasks.find_tasks(args.evals, args.chat_tasks)
    data = chat_tasks.load_data() if tasks else None
    items = []
    words = ""
    for task in tasks:
        if not task.file:
            path = chat_tasks.find_file(args.evals, "words_alpha.txt")
            words = path.name if path else "made up"
            count = min(chat_tasks.BEE_ITEMS, args.max_items or chat_tasks.BEE_ITEMS)
            items += chat_tasks.make_bee_items(chat_tasks.read_words(path, data) if path else [], count, data)
            continue
        path = chat_tasks.find_file(args.evals, f"{task.file}.jsonl")
        try:
            items += chat_tasks.make_items(task, read_rows(path, task.kind, args.max_items, task.remedy), data)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not hold items of {task.label} ({type(error).__name__}: {error}); "
                            f"{task.remedy}") from None
    return chat_tasks.Questions(tasks, missing, items, words)

def ask(args: argparse.Namespace, questions: chat_tasks.Questions, format: chat_tasks.Format,
        machine) -> tuple[dict, list[dict]]:
    """The scores of the chat tasks and the records of their items; the same on every rank. Raises UserError."""
    start = time.perf_counter()
    items = questions.items
    try:
        mine = chat_tasks.answer_items(format, items, args.batch, args.max_tokens, machine.rank, machine.world_size)
    except UserError as error:           # the other ranks wait for this one
        mine = error
    found = {}
    for part in gather(machine, mine):
        if isinstance(part, UserError):
            raise part
        found |= part
    records = [found[i] for i in range(len(items))]
    scores = chat_tasks.summarize(questions, records, "chatcore" in args.tasks)
    scores["chat"]["seconds"] = round(time.perf_counter() - start, 3)
    return scores, records

@dataclass
class LongTexts:
    """What needle and position read; empty lists for a score that was not asked for. See long_tasks.py."""
    items: list
    documents: list              # of position
    pieces: list
    owners: list

    def scored(self) -> list[tuple]:
        """The documents (tokens, start, end) for score_documents, those of needle first."""
        return [*map(long_tasks.item_document, self.items), *self.pieces]

def read_long_texts(args: argparse.Namespace, subject: Subject) -> LongTexts:
    """The texts of needle and position; raises UserError."""
    items, documents = [], []
    if args.long_tasks:
        shards = open_shards(subject, args.shards or subject.model.cfg.val_files)
    if "needle" in args.tasks:
        items = long_tasks.make_items(subject.tokenizer, shards, args.longest, args.max_items or long_tasks.ITEMS)
    if "position" in args.tasks:
        documents = long_tasks.long_documents(shards, args.longest, args.max_items or long_tasks.DOCUMENTS)
    return LongTexts(items, documents, *long_tasks.cut_documents(documents, args.longest))

def score_long_texts(args: argparse.Namespace, subject: Subject, score, texts: LongTexts,
                     results: np.ndarray) -> tuple[dict, list[dict]]:
    """The scores of needle and position, and the records of the needles; results: of texts.scored()."""
    start, machine, scores, records = time.perf_counter(), subject.machine, {}, []
    if texts.items:
        mine = long_tasks.write_answers(subject.model, subject.tokenizer.vocab_size, texts.items, machine.rank,
                                        machine.world_size)
        answers = {number: answer for part in gather(machine, mine) for number, answer in part.items()}
        records = long_tasks.judge(texts.items, answers, results[:len(texts.items)], subject.tokenizer)
        scores["needle"] = long_tasks.needle_score(records)
    if texts.documents:
        mine = long_tasks.full_losses(subject, score, texts.documents, args.longest, fill)
        full = {number: sums for part in gather(machine, mine) for number, sums in part.items()}
        full = np.stack([full[number] for number in range(len(texts.documents))])
        pieces = results[len(texts.items):]
        scores["position"] = long_tasks.position_score(full, pieces, texts.owners, args.longest, ratio)
    subject.score_seconds += time.perf_counter() - start
    return scores, records

def evaluate(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """All scores, and the records of all items; the same on every rank. Raises UserError."""
    start = time.perf_counter()
    if args.checkpoint:
        find_checkpoint(args)            # a wrong name is said before the lack of data, which takes time to fetch
    tasks = find_tasks(args)
    questions = read_questions(args)
    subject = load_subject(args)
    format = chat_tasks.Format(subject.model, subject.tokenizer, subject.name) if questions.items else None
    machine, longest, bos_id = subject.machine, subject.longest, subject.model.cfg.bos_id
    if not args.checkpoint and not args.model and machine.rank == 0:
        print(f"evaluate.py: {sample.one_line(subject.name)}", file=sys.stderr)
    if format and not subject.meta.get("chat") and machine.rank == 0:
        print(f"evaluate.py: note: {sample.one_line(subject.name)} has tokens for conversations, but has not learned "
              "to chat; chat_sft.py teaches it", file=sys.stderr)
    cfg, streams, texts = read_streams(args, subject)
    long_texts = read_long_texts(args, subject)
    scored = long_texts.scored()
    set_threads(args, subject)
    join_ranks(machine)
    scores = {}
    score = None
    too_long = 0
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(prepare_items, args, tasks, subject)           # while the model is compiled
        if streams:
            scores["val"] = validation_loss(subject, cfg, streams)
        if texts or tasks or args.long_tasks:
            score = subject.compiled(subject.model.score, *fill([], subject.stream_tokens, bos_id)[:2])
        items, encoded = prepared.result()

    def documents():
        nonlocal too_long
        yield from texts
        yield from scored
        for item in items:
            for document in item_documents(item, encoded, np.array([bos_id], np.int32)):
                too_long += len(document[0]) > longest
                yield cut(document, longest)
    total = sum(map(len, long_texts.documents)) + sum(len(tokens) for tokens, _, _ in [*texts, *scored]) + sum(
        min(1 + sum(len(encoded[text]) for text in prompt), longest) for item in items for prompt in item.prompts)
    kept, keep = {}, len(texts) if args.losses_out else 0
    results = score_documents(subject, score, documents(), total, kept, keep) if score else np.empty((0, 3))
    if keep:
        losses = {number: part for parts in gather(machine, kept) for number, part in parts.items()}
        if machine.rank == 0:
            write_losses(args.losses_out, subject, texts, losses)
    if texts:
        scores["bpb"] = bits_per_byte(texts, results[:len(texts)], subject.tokenizer)
    results = results[len(texts):]
    records = judge(items, results[len(scored):])
    scores |= summarize(tasks, records)
    found, answers = score_long_texts(args, subject, score, long_texts, results[:len(scored)])
    scores |= found
    records += answers
    if format:
        spoken, answers = ask(args, questions, format, machine)
        scores |= spoken
        records += answers
    seconds = time.perf_counter() - start - subject.compile_seconds
    return {"model": subject.name, "script": subject.meta["script"], "step": subject.meta["step"],
            "device": machine.name, "world_size": machine.world_size, "max_items": args.max_items,
            "answers_apart": subject.apart, "cut_documents": too_long,
            "tokens": total + (cfg.val_tokens if streams else 0),
            "compile_seconds": round(subject.compile_seconds, 1), "score_seconds": round(subject.score_seconds, 3),
            "seconds": round(seconds, 3),
            "scores": scores}, records

def write_file(path: Path, flag: str, content: bytes):
    """Writes a file, first under a temporary name; raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)           # it may be a link, which writing would follow
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written ({error.strerror}); choose another") from None

def write_items(path: Path, records: list[dict]):
    """Writes the records as JSON lines; raises UserError."""
    write_file(path, "items_out", "".join(json.dumps(record) + "\n" for record in records).encode())

def write_losses(path: Path, subject: Subject, texts: list, losses: dict[int, np.ndarray]):
    """Writes the losses of the documents of bpb as .npz, see docs/evaluation.md; raises UserError."""
    digests = [hashlib.sha256(b"".join(map(subject.tokenizer.token_bytes, tokens[1:].tolist()))).hexdigest()
               for tokens, _, _ in texts]
    file = io.BytesIO()
    np.savez(file, format=np.array(1), model=np.array(subject.name), text_sha256=np.array(digests, "S64"),
             lengths=np.array([len(tokens) - 1 for tokens, _, _ in texts], np.int64),
             tokens=np.concatenate([tokens[1:] for tokens, _, _ in texts]).astype(np.int32),
             losses=np.concatenate([losses[number] for number in range(len(texts))]).astype(np.float32))
    write_file(path, "losses_out", file.getvalue())

def summarize(tasks: list[Task], records: list[dict]) -> dict:
    """The scores of HellaSwag and CORE from the records of their items."""
    scores, core = {}, {}
    groups = itertools.groupby(records, lambda record: (record["task"], record["kind"]))
    by_task = {key: list(group) for key, group in groups}
    for task in tasks:
        mine = by_task[task.label, task.kind]
        if task.kind == "ending":
            scores["hellaswag"] = {"plain": task_score(task, mine, "plain_correct"), "norm": task_score(task, mine)}
        else:
            core[task.label] = task_score(task, mine)
    return scores | ({"core": core_score(core)} if core else {})

def short(seconds: float) -> str:
    """Seconds to about two digits, so that a short time is not shown as 0."""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2g} s"

def table(result: dict) -> str:
    """The table of all scores for the console."""
    lines = [sample.one_line(f"{result['model']}, {result['script']} after {result['step']} steps")]
    if result["scores"].keys() & {*BASE_SCORES}:
        lines.append(f"{'':34}{'score':>10}{'+-':>9}{'n':>9}{'chance':>9}   {'gpt2':>7}{'medium':>8}{'large':>8}"
                     f"{'xl':>8}")

    def row(name, value, score, digits=4):
        error = "-" if score["se"] is None else f"{score['se']:.{digits}f}"
        chance = f"{score['chance']:.3f}" if "chance" in score else "-"
        published = "".join(f"{number:8.{digits}f}" for number in score.get("gpt2", ()))
        lines.append(f"{name:34}{value:10.{digits}f}{error:>9}{score['n']:9,}{chance:>9}  {published}".rstrip())
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
            lines.append(f"CORE, also of GPT-2, is over {core['n']} of {len(TASKS)} tasks; missing: "
                         f"{', '.join(core['missing'])}")
    if "chat" in scores:
        lines += chat_tasks.table(scores)
    lines += long_tasks.table(scores)
    if result["max_items"]:
        lines.append(f"only {result['max_items']} items of each task: not comparable with the published scores")
    if result["answers_apart"] and "core" in scores:
        lines.append("question and answer were encoded apart, because this tokenizer joins words")
    if result["cut_documents"]:
        lines.append(f"{result['cut_documents']:,} prompts were too long and lost their first tokens")
    compilation = f"; compilation took {result['compile_seconds']} s more" if result["compile_seconds"] else ""
    times = []
    if "chat" in scores:
        times.append(f"{scores['chat']['n']:,} chat questions in {short(scores['chat']['seconds'])}")
    if result["tokens"]:
        times.append(f"{result['tokens']:,} tokens in {short(result['score_seconds'])}")
    lines.append(f"{', '.join(times)}, {short(result['seconds'])} with loading{compilation}")
    return "\n".join(lines)

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 an error that the user can correct, 130 interrupted."""
    rank = 0
    try:
        sample.prepare_stdout()
        rank = read_ranks().rank
        args = parse_args(argv)
        result, records = evaluate(args)
        if rank == 0:
            if args.items_out:
                write_items(args.items_out, records)
            if args.heat_map:
                write_file(args.heat_map, "heat_map", long_tasks.heat_map(result["scores"]["needle"]).encode())
            print(table(result))
            print(json.dumps(result), flush=True)
        return 0
    except UserError as error:
        if rank == 0:
            print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sample.close_stdout()
        return 0
    except OSError as error:             # on any rank: a name that is too long, a folder without access
        print(f"evaluate.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:                    # on any rank, too
        if not sample.lacks_memory(error):
            raise
        print(f"evaluate.py: the memory is used up ({UserError(error)}); use a smaller --batch or another machine",
              file=sys.stderr)
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
