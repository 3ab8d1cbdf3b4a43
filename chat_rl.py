"""Improves a chat model by reinforcement learning (RL) on questions whose answers can be checked.

    python chat_rl.py --checkpoint=logs/<run of chat_sft.py> --task=spellingbee --letters=13-16
    python chat_rl.py --checkpoint=logs/<run of chat_sft.py> --task=gsm8k --evals=data/evals
    torchrun --standalone --nproc_per_node=gpu chat_rl.py --checkpoint=logs/<run> --task=spellingbee

A step samples several answers to each of some questions, with the calculator. An answer is worth 1 if its number is
right and it ended within --max_tokens, else 0. Its advantage is this reward minus the mean of the answers to the same
question (REINFORCE with a group baseline). The loss is the sum over all tokens that the model drew of advantage x
-log(probability), divided by the number of tokens drawn in the step. What the calculator wrote is not trained. A
question whose answers are all right or all wrong teaches nothing; it is skipped and counted. If all of them are so, the
step changes no weight.

Every --eval_every steps the model answers a fixed set of questions that are never trained. The run folder has these
scores, a curve, some answers, and an ordinary checkpoint.
"""
import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import chat_sft
import chat_tasks
import evaluate
import sample
from sample import UserError

# PyTorch takes seconds to import, so it is imported after the flags were checked.

POOL = 20_000                            # questions of spellingbee to train on
PASSES = 8                               # answers drawn to each fixed question
SHOWN = 8                                # fixed questions whose answers go to samples.jsonl
SPARSE = 0.95                            # share of questions without signal above which a note says so

# -----------------------------------------------------------------------------
# Command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as possible without a model; raises UserError."""
    parser = sample.make_parser("chat_rl.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=sample.path_flag, metavar="FOLDER", help="the chat model to improve: a checkpoint or a "
        "run (default: the newest chat model in --out_dir)")
    add("--task", choices=sorted(TASKS), required=True, help="gsm8k: school mathematics, from files in --evals; "
        "spellingbee: how often a letter occurs in a made-up word")
    add("--letters", default="", metavar="LOW-HIGH", help="words of spellingbee have so many letters; longer words are "
        "harder (default: words of 3 to 12 letters, like those that chat_sft.py learns from)")
    add("--evals", type=sample.path_flag, default=Path("data/evals"), metavar="FOLDER", help="folder with "
        "gsm8k/train.jsonl and gsm8k/test.jsonl, also packed as .xz (default: %(default)s)")
    add("--steps", type=int, default=100, help="steps; 0: only measure (default: %(default)s)")
    add("--questions", type=int, default=64, metavar="N", help="questions of a step over all ranks (default: "
        "%(default)s)")
    add("--samples", type=int, default=8, metavar="N", help="answers to each question (default: %(default)s)")
    add("--max_tokens", type=int, default=256, metavar="N", help="longest answer, in tokens with the calculator's "
        "results (default: %(default)s)")
    add("--std", action="store_true", help="divide advantages by the standard deviation of the question's rewards "
        "(default: off)")
    add("--kl", type=float, default=0.0, metavar="B", help="add B times the KL divergence from the first model to the "
        "loss, token by token; 0: off (default: %(default)s)")
    add("--eval_every", type=int, default=20, metavar="STEPS", help="steps between measurements on the fixed "
        "questions; 0: only first and last (default: %(default)s)")
    add("--eval_questions", type=int, default=256, metavar="N", help="number of fixed questions (default: %(default)s)")
    add("--micro_tokens", type=int, default=0, metavar="N", help="tokens that are trained at one time, which decides "
        "the memory needed (default: 16384 on cuda, else 4096)")
    add("--compile", action="store_true", help="compile the drawing of tokens, which takes some seconds at the start "
        "and saves about half of the sampling time on a GPU (default: off)")
    add("--seed", type=int, default=0, help="of the order of questions and of the answers (default: %(default)s)")
    chat_sft.add_run_flags(add, "chat_rl.py", lr=0.05, warmup=5)
    args = parser.parse_args(sample.command_line(argv))
    most = 1 << 30
    chat_sft.check_ranges(args, (
        ("steps", 0, most), ("questions", 1, most), ("samples", 2, 4096), ("max_tokens", 1, 1 << 20), ("kl", 0, 1000),
        ("eval_every", 0, most), ("eval_questions", 1, 10_000), ("micro_tokens", 0, most), ("seed", 0, most),
        ("lr", 1e-9, 1000), ("warmup", 0, most), ("save_every", 0, most), ("keep", 1, most), ("stop_after", 0, most)))
    if args.questions * args.samples > 1 << 20:
        raise UserError(f"--questions={args.questions} with --samples={args.samples} are more than a million answers "
                        "in a step; lower one")
    found = re.fullmatch(r"(\d{1,3})-(\d{1,3})", args.letters, re.ASCII)
    args.letters_range = tuple(map(int, found.groups())) if found else None
    if args.letters and (not found or not 3 <= args.letters_range[0] <= args.letters_range[1] <= 100):
        raise UserError(f"--letters={args.letters} must be two numbers from 3 to 100, as in 13-16")
    return args

# -----------------------------------------------------------------------------
# Questions

def spellingbee_items(args, data) -> tuple[list, list]:
    """(questions to train on, fixed questions) about made-up words; no word is in both."""
    sides = []
    for held_out, count in ((False, POOL), (True, args.eval_questions)):
        sides.append(chat_tasks.make_bee_items([], count, data, held_out, args.letters_range))
    return tuple(sides)

def gsm8k_items(args, data) -> tuple[list, list]:
    """(questions to train on, fixed questions) of GSM8K's files; raises UserError.

    A training question that is in a known test set is left out.
    """
    task = next(task for task in chat_tasks.TASKS if task.label == "gsm8k")
    sides = []
    for path in gsm8k_files(args):
        try:
            rows = evaluate.read_rows(path, task.kind, 0, task.remedy)
            sides.append(chat_tasks.make_items(task, rows, data))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not hold items of gsm8k ({type(error).__name__}: {error}); {task.remedy}"
                            ) from None
    refused = data.test_items()
    train = [item for item in sides[0] if data.hash_question(item.question) not in refused]
    return train, sides[1][:args.eval_questions]

def gsm8k_files(args) -> list[Path]:
    """GSM8K's training and test file; raises UserError if one is missing."""
    found = [chat_tasks.find_file(args.evals, f"gsm8k/{side}.jsonl") for side in ("train", "test")]
    for side, path in zip(("train", "test"), found):
        if path is None:
            raise UserError(f"--evals={args.evals} has no gsm8k/{side}.jsonl, which --task=gsm8k needs; fetch it "
                            "with python data/evals.py")
    return found

# name -> (function that makes the questions, function that names the files they come from)
TASKS = {"spellingbee": (spellingbee_items, lambda args: []), "gsm8k": (gsm8k_items, gsm8k_files)}

def step_questions(number: int, questions: int, seed: int, step: int) -> list[int]:
    """Indexes of a step's questions among `number`: each epoch takes all of them once, in an order of its own."""
    places = range(step * questions, (step + 1) * questions)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(number)
              for epoch in {place // number for place in places}}
    return [int(orders[place // number][place % number]) for place in places]

# -----------------------------------------------------------------------------
# Sampling

@dataclass
class Rollout:
    """An answer that the model wrote.

    tokens: with the one that ends it. logprobs: of the drawn ones; None for what the calculator wrote. finish: "end",
    or "length" if it was cut off.
    """
    calls: sample.ToolCalls
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish: str | None = None

def write_rollouts(engine: sample.Engine, format: chat_tasks.Format, prompts: list[list[int]],
                   rows: list[tuple[int, str]], max_tokens: int) -> list[Rollout]:
    """The answers to rows of (index of the prompt, seed), `engine.batch` at a time."""
    ends, tool, found = format.chat.ends, format.chat.tool, []
    for low in range(0, len(rows), engine.batch):
        part = rows[low:low + engine.batch]
        rollouts = [Rollout(sample.ToolCalls(tool)) for _ in part]

        def force(row, token, rollouts=rollouts):
            return None if rollouts[row].finish else rollouts[row].calls.follow(token)
        for tokens, logprobs in engine.steps(prompts, part, max_tokens, force):
            unfinished = 0
            for rollout, token, logprob in zip(rollouts, tokens, logprobs):
                if rollout.finish:
                    continue
                rollout.tokens.append(token)
                rollout.logprobs.append(logprob)
                if token in ends:
                    rollout.finish = "end"
                else:
                    unfinished += 1
            if not unfinished:
                break
        for rollout in rollouts:
            rollout.finish = rollout.finish or "length"
        found += rollouts
    return found

def judge(format: chat_tasks.Format, item: chat_tasks.Item, answer: Rollout) -> dict:
    """The record of an answer, see chat_tasks.judge_answer; one that did not end within --max_tokens is wrong.

    Otherwise a model learns to go on writing behind the right number: at --lr=0.15 it never ended.
    """
    record = chat_tasks.judge_answer(format, item, answer)
    return record | {"correct": record["correct"] and not record["cut_off"]}

def make_engine(args, model, vocab_size: int, draw: sample.Draw, batch: int, longest: int) -> sample.Engine:
    """An engine for `batch` answers, of up to `longest` tokens with their prompts; --compile: its drawing compiled."""
    class Engine(sample.Engine):
        if args.compile:
            import torch
            choose = torch.compile(sample.Engine.choose, dynamic=False, fullgraph=True)
    try:
        return Engine(model, vocab_size, draw, batch, longest, forcing=True)
    except ValueError as error:
        raise UserError(f"a question and --max_tokens={args.max_tokens} are too much for the model ({error}); lower "
                        "--max_tokens") from None

class Sampler:
    """Engines that answer questions with the weights that the model has, and the questions' prompts.

    The answers depend on the seeds, not on the number of ranks.
    """

    def __init__(self, args, model, format: chat_tasks.Format, train: list, fixed: list, machine):
        self.args, self.model, self.format, self.machine = args, model, format, machine
        self.train, self.fixed = train, fixed
        self.train_prompts = [format.prompt(item) for item in train]
        self.fixed_prompts = [format.prompt(item) for item in fixed]
        self.longest = args.max_tokens + max(map(len, self.train_prompts + self.fixed_prompts))
        share = math.ceil(args.questions / machine.world_size)
        vocab_size = format.chat.tokenizer.vocab_size
        self.drawing = make_engine(args, model, vocab_size, sample.Draw(), share * args.samples, self.longest)
        self.greedy = make_engine(args, model, vocab_size, sample.Draw(temperature=0), share, self.longest)

    def refresh(self):
        """Gives the engines the model's weights of now. They read all of them from the model but those of a cache."""
        import torch
        with torch.no_grad():
            for cache in (self.drawing.cache, self.greedy.cache):
                for i, kept in getattr(cache, "projections", {}).items():
                    for old, new in zip(kept, self.model.projections(i, *self.model.matrices()[i])):
                        old.copy_(new)           # in place: a CUDA graph reads them where they are

    def step(self, step: int) -> list[tuple[list[int], list[Rollout], list[dict]]]:
        """(prompt, answers, their records) of each question of a step that this rank takes."""
        args = self.args
        chosen = step_questions(len(self.train), args.questions, args.seed, step)
        mine = list(enumerate(chosen))[self.machine.rank::self.machine.world_size]
        rows = [(index, f"{args.seed} {step} {place} {n}") for place, index in mine for n in range(args.samples)]
        rollouts = write_rollouts(self.drawing, self.format, self.train_prompts, rows, args.max_tokens)
        groups = []
        for i, (_, index) in enumerate(mine):
            answers = rollouts[i * args.samples:(i + 1) * args.samples]
            records = [judge(self.format, self.train[index], answer) for answer in answers]
            groups.append((self.train_prompts[index], answers, records))
        return groups

    def fixed_answers(self) -> dict[int, tuple[dict, list[dict]]]:
        """Index of a fixed question -> (record of the likeliest answer, records of PASSES drawn ones); this rank's."""
        mine = range(self.machine.rank, len(self.fixed), self.machine.world_size)
        prompts, limit = self.fixed_prompts, self.args.max_tokens
        rows = [(index, f"fixed {n}") for index in mine for n in range(PASSES)]
        drawn = write_rollouts(self.drawing, self.format, prompts, rows, limit)
        likeliest = write_rollouts(self.greedy, self.format, prompts, [(index, "") for index in mine], limit)
        found = {}
        for i, index in enumerate(mine):
            best, *others = (judge(self.format, self.fixed[index], answer)
                             for answer in [likeliest[i], *drawn[i * PASSES:(i + 1) * PASSES]])
            found[index] = best, others
        return found

# -----------------------------------------------------------------------------
# Training

def advantages(rewards: list[float], std: bool) -> list[float]:
    """Rewards of the answers to one question minus their mean; divided by their standard deviation if `std`."""
    values = np.array(rewards, np.float64)
    spread = values.std()
    values = values - values.mean()
    return (values / spread if std and spread else values).tolist()

def has_signal(records: list[dict]) -> bool:
    """Whether the answers to a question have different rewards."""
    return len({record["correct"] for record in records}) > 1

def pack(samples: list[tuple[chat_sft.Conversation, float]], micro_tokens: int, bos_id: int) -> list[tuple]:
    """Micro-batches (inputs, targets, weights), three arrays of one length each, of conversations and their weights.

    A micro-batch has whole conversations, each a document, up to micro_tokens tokens; one that is longer is alone.
    """
    longest = max((len(one.ids) for one, _ in samples), default=0)
    batches = []
    for slot in chat_sft.pack_slots([len(one.ids) for one, _ in samples], max(micro_tokens, longest)):
        inside = [samples[i] for i in slot]
        filled = sum(len(one.ids) for one, _ in inside)
        length = math.ceil(filled / 128) * 128
        weights = np.zeros(length, np.float32)
        weights[:filled] = np.concatenate([np.full(len(one.ids), weight) for one, weight in inside])
        batches.append((*chat_sft.fill_slot([one for one, _ in inside], length, bos_id), weights))
    return batches

def training_batches(args, groups: list, drawn: int, micro_tokens: int, bos_id: int) -> list[tuple]:
    """Micro-batches of this rank's questions with a signal; at least one, without targets if need be.

    drawn: tokens that all ranks drew in the step, by which the sum over tokens is divided.
    """
    samples = []
    for prompt, answers, records in groups:
        if not has_signal(records):
            continue
        for answer, advantage in zip(answers, advantages([record["correct"] for record in records], args.std)):
            ids = np.array([*prompt, *answer.tokens], np.int32)
            mask = np.array([0] * len(prompt) + [logprob is not None for logprob in answer.logprobs], np.uint8)
            samples.append((chat_sft.Conversation(ids, mask), advantage / drawn))
    nothing = np.full(128, bos_id, np.int32), np.full(128, -1, np.int64), np.zeros(128, np.float32)
    return pack(samples, micro_tokens, bos_id) or [nothing]

def policy_loss(model, inputs, targets, weights, reference=None, kl: float = 0.0):
    """Sum over targets of weight x -log(probability), a fp32 scalar; of no target where it is -1.

    With a reference model also kl / 2 x (difference of the two models' log-probabilities) squared. Its gradient on
    tokens that the model drew is that of kl x the KL divergence from the reference, token by token.
    """
    import torch
    losses = model.score(inputs, targets)[0]
    loss = (weights * losses).sum()
    if reference is not None:
        with torch.no_grad():
            before = reference.score(inputs, targets)[0]
        loss = loss + kl / 2 * (losses - before).square().sum()
    return loss

def shorten_windows(model, longest: int):
    """Makes attention windows no longer than `longest` tokens, a document's most: the same result, in less time."""
    limit = math.ceil(longest / 64) * 64
    if hasattr(model, "window_lengths"):
        model.window_lengths = {name: min(window, limit) for name, window in model.window_lengths.items()}

class OwnPolicy(chat_sft.OwnOptimizer):
    """Training with the Optimizer of train_gpt.py and its like, without compilation."""

    def __init__(self, module, cfg, machine, log, tools):
        self.module, self.cfg, self.machine = module, cfg, machine
        _, self.optimizer = module.build(cfg, machine)
        self.model = self.optimizer.model

    def update(self, step: int, factor: float, loss):
        """Moves all weights by the gradients of all ranks, which are dropped; not if the loss is not finite."""
        import torch
        odd = 1                          # at even steps some weights would wait for the next gradient
        self.optimizer.step(odd, self.plan(step, factor), torch.isfinite(loss))

def learn(args, trainer, groups: list, drawn: int, step: int, reference, micro_tokens: int, tools) -> tuple[float, int]:
    """Trains on the answers of a step; (loss over all ranks, tokens that this rank trained with their prompts)."""
    import torch
    import torch.distributed as dist
    machine, model = trainer.machine, trainer.model
    loss = torch.zeros(1, device=machine.device)
    tokens = 0
    for batch in training_batches(args, groups, drawn, micro_tokens, model.cfg.bos_id):
        tokens += len(batch[0])
        part = policy_loss(model, *tools.to_device(batch, machine.device), reference, args.kl / drawn)
        part.backward()
        loss += part.detach()
    if machine.world_size > 1:
        dist.all_reduce(loss)
    trainer.update(step, chat_sft.rate_factor(args, args.steps, step), loss[0])
    return loss.item(), tokens

# -----------------------------------------------------------------------------
# Measuring

def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error; 0 for a single value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)

def measure(sampler: Sampler, tools) -> tuple[dict, list[dict]]:
    """Scores on the fixed questions, and the records of the first of them; the same on every rank.

    pass1: share of right answers among PASSES drawn ones; pass8: share of questions with a right one among them;
    greedy: share of right answers when the likeliest token is taken each time. The standard errors are over questions.
    rights: for each question how many of its drawn answers are right, as one text.
    """
    found = {}
    for part in tools.all_gather_object(sampler.machine, sampler.fixed_answers()):
        found |= part
    rights = [[record["correct"] for record in found[i][1]] for i in range(len(found))]
    records = [record for i in range(len(found)) for record in found[i][1]]
    scores = {}
    for name, values in (("pass1", [np.mean(row) for row in rights]), ("pass8", [float(any(row)) for row in rights]),
                         ("greedy", [float(found[i][0]["correct"]) for i in range(len(found))])):
        scores[name], scores[f"{name}_se"] = mean_and_error(values)
    scores |= {"length": np.mean([record["tokens"] for record in records]),
               "tool_calls": np.mean([record["calls"] > 0 for record in records]),
               "cut_off": np.mean([record["cut_off"] for record in records])}
    shown = [record for i in range(min(SHOWN, len(found))) for record in (found[i][0], found[i][1][0])]
    scores = {name: round(float(value), 6) for name, value in scores.items()}
    return scores | {"rights": " ".join(str(sum(row)) for row in rights)}, shown

def step_statistics(groups: list) -> dict:
    """Sums over this rank's answers of a step, which add up over ranks."""
    answers = [answer for _, of_question, _ in groups for answer in of_question]
    records = [record for _, _, of_question in groups for record in of_question]
    return {"rewards": [float(np.mean([record["correct"] for record in of_question])) for _, _, of_question in groups],
            "signals": sum(has_signal(of_question) for _, _, of_question in groups), "answers": len(answers),
            "tokens": sum(len(answer.tokens) for answer in answers),
            "drawn": sum(logprob is not None for answer in answers for logprob in answer.logprobs),
            "calls": sum(record["calls"] > 0 for record in records),
            "cut_off": sum(record["cut_off"] for record in records)}

# -----------------------------------------------------------------------------
# The run

class Run(chat_sft.Run):
    """The run folder, with the scores on the fixed questions and samples.jsonl. history: (step, seconds, pass1)."""
    own_sources = tuple(Path(__file__).resolve().with_name(name) for name in ("chat_rl.py", "chat_sft.py",
                                                                             "chat_tasks.py"))
    flags = ("task", "letters", "steps", "questions", "samples", "max_tokens", "std", "kl", "eval_questions", "lr",
             "warmup", "seed", "micro_tokens", "compile")
    program = (*chat_sft.Run.program, "data/chat.py", "data/test_items.bin")

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.evaluations = self.meta.get("evaluations", [])

    def data_files(self) -> list[Path]:
        return TASKS[self.args.task][1](self.args)

    def open(self):
        super().open()
        path = self.folder / "samples.jsonl"
        if self.origin and path.is_file():          # answers from after the checkpoint are written once more
            whole = re.finditer(rb'^\{"step": (\d{1,9}), .*\}\n', path.read_bytes(), re.M)
            kept = [line[0] for line in whole if int(line[1]) <= self.meta["step"]]
            self.tools.write_atomically(path, b"".join(kept))

    def results(self) -> dict:
        return {"evaluations": self.evaluations}

    def scores(self, step: int) -> dict:
        return {"val_loss": None, "best_val_loss": None, "evaluations": self.evaluations}

    def step(self, step: int, totals: dict, loss: float | None, sampling: float, training: float, trained: int,
             seconds: float):
        """Logs a step; loss None: it changed no weight. sampling, training: seconds; trained: tokens."""
        reward, error = mean_and_error(totals["rewards"])
        self.tokens_seen += totals["tokens"]
        self.train_losses.append((step, seconds, reward))
        n = totals["answers"]
        text = (f"step:{step}/{self.args.steps} reward:{reward:.4f} se:{error:.4f} "
                f"no_signal:{1 - totals['signals'] / len(totals['rewards']):.3f} length:{totals['tokens'] / n:.1f} "
                f"tool_calls:{totals['calls'] / n:.3f} cut_off:{totals['cut_off'] / n:.3f} "
                f"loss:{'none' if loss is None else f'{loss:.5f}'} sampling_ms:{1000 * sampling:.0f} "
                f"training_ms:{1000 * training:.0f} sampled_per_s:{totals['tokens'] / sampling:.0f} "
                f"trained_per_s:{trained / training:.0f} {self.tools.train_time(seconds, step)}")
        self.progress(text, f"  {seconds / step * (self.args.steps - step):.0f} s left")

    def measured(self, step: int, seconds: float, scores: dict, shown: list[dict]):
        """Logs the scores on the fixed questions, and writes some answers to samples.jsonl."""
        self.history.append((step, seconds, scores["pass1"]))
        self.evaluations.append({"step": step, "train_time_ms": round(1000 * seconds)} | scores)
        values = " ".join(f"{name}:{value:.4f}" for name, value in scores.items() if name != "rights")
        self.print(f"step:{step}/{self.args.steps} {values} {self.tools.train_time(seconds, max(step, 1))}")
        self.save()
        if self.master:
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | record) + "\n" for record in shown)

    def plot(self):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        figure = Figure((8, 4), layout="constrained")
        axis = figure.subplots()
        rewards, found = np.array(self.train_losses).reshape(-1, 3), self.evaluations
        steps = [one["step"] for one in found]
        axis.plot(rewards[:, 0], rewards[:, 2], color="0.65", linewidth=0.8, label="reward in training")
        for name, label, style in (("pass8", "pass@8", "s--"), ("pass1", "pass@1", "o-"), ("greedy", "greedy", "^:")):
            axis.errorbar(steps, [one[name] for one in found], [one[f"{name}_se"] for one in found], fmt=style,
                          color="black", markersize=4, linewidth=1, capsize=2, label=label)
        axis.set(xlabel="step", ylabel=f"share of right answers, {self.args.task}", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
        FigureCanvasSVG(figure).print_svg(self.folder / "curve.svg")

def load(args, tools):
    """(parent, machine, trainer, what checkpoints save as config, format of the chat tasks); raises UserError."""
    import torch
    parent = chat_sft.find_parent(args, chat=True)
    tokenizer = sample.Tokenizer(json.loads(parent.tokenizer))
    if not parent.meta.get("chat"):
        raise UserError(f"{parent.folder} has not learned to chat; teach it first: python chat_sft.py "
                        f"--checkpoint={parent.folder} --data=data/chat")
    machine = chat_sft.find_machine(args, tools)
    vocabulary = SimpleNamespace(vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, path=parent.folder)
    cfg, saved = chat_sft.choose_config(args, parent, machine, vocabulary, compiled=False)
    chat_sft.check_resumable(args, parent)
    own = hasattr(parent.module, "Optimizer")
    trainer = (OwnPolicy if own else chat_sft.TorchOptimizers)(parent.module, cfg, machine, None, tools)
    with torch.no_grad():
        chat_sft.load_parent(trainer.model, parent, parent.tokenizer)
    trainer.begin()
    return parent, machine, trainer, saved, chat_tasks.Format(trainer.model, tokenizer, str(parent.folder))

def load_reference(args, trainer, parent):
    """A copy of the first model for --kl, None without it."""
    import torch
    if not args.kl:
        return None
    with torch.no_grad(), torch.device(trainer.machine.device):
        reference = parent.module.GPT(trainer.model.cfg).requires_grad_(False)
        chat_sft.load_parent(reference, parent, parent.tokenizer)
    return reference

def add_up(parts: list[dict]) -> dict:
    """The statistics of all ranks together."""
    return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}

def train(args: argparse.Namespace, argv: list[str]) -> int:
    """Loads, samples, trains, measures, saves. Returns the exit code."""
    tools = chat_sft.find_tools()
    data = chat_tasks.load_data()
    items = TASKS[args.task][0](args, data)
    parent, machine, trainer, saved, format = load(args, tools)
    reference = load_reference(args, trainer, parent)
    run = Run(args, argv, parent, saved, machine, parent.tokenizer, tools, args.steps)
    tools.on_rank0(machine, run.open)
    step = run.meta.get("step", 0)
    if run.origin:
        run.train_losses = trainer.restore(run.origin, run.meta)
    sampler = Sampler(args, trainer.model, format, *items, machine)
    for model in (trainer.model, reference):
        shorten_windows(model, sampler.longest)
    run.print(f"chat_rl.py: {machine.world_size} x {machine.name}, from {parent.folder}\n{args.task}: "
              f"{len(items[0]):,} questions to train on, {len(items[1]):,} fixed ones to measure")
    clock = tools.Clock(machine, run.meta.get("train_time", 0.0))
    if run.origin:
        run.print(f"goes on from {run.origin}")
    else:
        run.measured(0, clock.seconds, *measure(sampler, tools))
    last_step, stop, stopping = min(args.stop_after or args.steps, args.steps), False, tools.stop_on_signals()
    signals = []                         # share of the questions of each step that had a signal
    while step < last_step and not stop:
        clock.start()
        totals, stop = train_one(args, run, trainer, sampler, reference, clock, step, stopping, tools)
        clock.stop()
        step += 1
        signals.append(totals["signals"] / len(totals["rewards"]))
        if len(signals) == 10 and np.mean(signals) < 1 - SPARSE:
            run.print(f"note: {1 - np.mean(signals):.1%} of the questions had answers that were all right or all "
                      "wrong, so there is little to learn from; choose easier or harder questions")
        if step < args.steps and args.eval_every and step % args.eval_every == 0:
            run.measured(step, clock.seconds, *measure(sampler, tools))
        if step < last_step and trainer.resumable and args.save_every and step % args.save_every == 0:
            run.save_checkpoint(step, trainer, clock.seconds, everything=True)
    finished = step == args.steps
    if finished and args.steps:
        run.measured(step, clock.seconds, *measure(sampler, tools))
    if args.steps:
        run.save_checkpoint(step, trainer, clock.seconds, trainer.resumable and (not finished or bool(args.save_every)))
    run.finish(finished, step, clock.seconds, trainer.resumable)
    return 0 if finished else 130

def train_one(args, run: Run, trainer, sampler: Sampler, reference, clock, step: int, stopping, tools):
    """Samples and trains one step and logs it; (statistics over all ranks, whether a rank was told to stop)."""
    machine = trainer.machine
    begin = time.perf_counter()
    groups = sampler.step(step)
    totals = add_up(tools.all_gather_object(machine, step_statistics(groups) | {"stops": int(stopping.is_set())}))
    sampled = time.perf_counter()
    loss, trained = None, 0
    if totals["signals"]:
        micro_tokens = args.micro_tokens or (16384 if machine.device.type == "cuda" else 4096)
        loss, trained = learn(args, trainer, groups, totals["drawn"], step, reference, micro_tokens, tools)
        run.need_finite(loss, f"the loss of step {step + 1}")
        sampler.refresh()
        clock.synchronize()
    end = time.perf_counter()
    run.step(step + 1, totals, loss, sampled - begin, end - sampled, trained * machine.world_size, clock.seconds)
    return totals, totals["stops"] > 0

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code, see chat_sft.run_command."""
    return chat_sft.run_command("chat_rl.py", parse_args, train, argv)

if __name__ == "__main__":
    sys.exit(main())
