"""The chat tasks of evaluate.py: questions that a chat model answers in a conversation of one turn.

    python evaluate.py --tasks=chatcore                     # all of them, and their mean
    python evaluate.py --tasks=gsm8k,spellingbee --items_out=items.jsonl

arc, mmlu      multiple choice: the choice is the letter that the model finds likeliest as the beginning of its answer
gsm8k          school mathematics: the model writes an answer, with the calculator; the number after #### counts
spellingbee    how often a letter occurs in a word: in the same way
chatcore       the mean of (accuracy - chance) / (1 - chance) over these five tasks
humaneval      programming: the model writes a function, and its tests are run; only with --allow_code

The conversation format, the questions' form and the calculator are those of data/chat.py; answers end as in chat.py.
"""
if __name__ == "__main__":               # before the imports, so that the text comes at once
    print(__doc__.strip())
    raise SystemExit

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import contained
import sample
from sample import HERE, UserError

# -----------------------------------------------------------------------------
# Tasks

@dataclass(frozen=True)
class Task:
    """A chat task."""
    label: str
    score: str                   # the name in --tasks that asks for it
    kind: str                    # of its rows, see evaluate.FIELDS; spellingbee: it makes its questions
    chance: float                # accuracy of guessing
    file: str = ""               # under --evals, without .jsonl
    remedy: str = "fetch it with python data/evals.py --force"      # for a file that is missing or damaged

    @property
    def by_letter(self) -> bool:
        """Whether the answer is a letter; else it is a text with a number."""
        return self.kind in ("choice", "mmlu")

TASKS = (
    Task("arc_easy", "arc", "choice", .25, "core/eval_data/world_knowledge/arc_easy"),
    Task("arc_challenge", "arc", "choice", .25, "core/eval_data/world_knowledge/arc_challenge"),
    Task("mmlu", "mmlu", "mmlu", .25, "mmlu/test", "docs/evaluation.md describes it"),
    Task("gsm8k", "gsm8k", "gsm8k", 0, "gsm8k/test"),
    Task("spellingbee", "spellingbee", "spellingbee", 0),
)
# not among those of chatcore, because it runs what the model writes
HUMANEVAL = Task("humaneval", "humaneval", "humaneval", 0, "humaneval/HumanEval", "docs/chat.md describes it")
SCORES = ("arc", "mmlu", "gsm8k", "spellingbee", "chatcore", "humaneval")
LETTERS = "ABCDEFGHIJ"
RATES = ("in_form", "tool_calls", "results", "cut_off")
BEE_ITEMS = 256                          # questions of spellingbee
BEE_SEED = "evaluate"
# Tokens of multiple-choice questions that are read together. A CPU is faster when they stay in its cache (+40 %).
CPU_TOKENS, GPU_TOKENS = 1 << 12, 1 << 15

@dataclass(frozen=True)
class Item:
    """A question."""
    task: str
    line: int                    # in the data file, from 0; of spellingbee: its number
    question: str                # the user's message
    gold: str                    # the right letter or number; of humaneval the tests, as a program
    letters: str = ""            # of the choices; "": the answer is a text

@dataclass(frozen=True)
class Questions:
    """All questions of an evaluation."""
    tasks: list                  # those that have questions
    missing: list                # labels of tasks whose file is missing
    items: list                  # task by task
    words: str                   # where the words of spellingbee come from; "": it is not among the tasks

class Format:
    """What the tasks use of data/chat.py and chat.py for one model; raises UserError for a model that cannot chat."""

    def __init__(self, model, tokenizer: sample.Tokenizer, name: str):
        page = sample.import_script(HERE / "chat.py", ("Chat", "Answer", "CHAT_TOKENS"),
                                    "use the chat.py that belongs to evaluate.py")
        if any(token not in tokenizer.specials for token in page.CHAT_TOKENS):
            raise UserError(f"{name} is a base model, which has no tokens for conversations, so it has no chat tasks; "
                            f"teach it to chat first: python chat_sft.py --checkpoint={name} --data=data/chat")
        self.data = load_data()
        self.chat = page.Chat(model, tokenizer, name, self.data, context=0)     # for its tool and its ends
        self.Answer = page.Answer

    def prompt(self, item: Item) -> list[int]:
        """What the model reads: the conversation up to the beginning of the answer."""
        return self.data.prime([{"role": "user", "content": item.question}], self.chat.tokenizer)

def load_data():
    """The module data/chat.py; raises UserError."""
    return sample.import_script(HERE / "data" / "chat.py", ("prime", "multiple_choice", "gsm8k_answer"),
                                "use the data/chat.py that belongs to evaluate.py")

def find_file(evals: Path, name: str) -> Path | None:
    """The file of that name, or the same packed as .xz; None if neither is there. Raises UserError if evals is a file."""
    if evals.is_file():
        raise UserError(f"--evals={evals} is a file; name the folder that data/evals.py made")
    return next((path for end in ("", ".xz") if (path := evals / f"{name}{end}").is_file()), None)

def find_tasks(evals: Path, scores: list[str]) -> tuple[list[Task], list[str]]:
    """(the tasks that belong to the scores and have their file, labels of those without); raises UserError.

    A score that is asked for by its own name must have a file.
    """
    wanted = [task for task in (*TASKS, HUMANEVAL) if task.score in scores or "chatcore" in scores and task in TASKS]
    here = [task for task in wanted if not task.file or find_file(evals, f"{task.file}.jsonl")]
    for task in wanted:
        if task.score in scores and not any(other.score == task.score for other in here):
            raise UserError(f"--evals={evals} has no {task.file}.jsonl, which {task.score} needs; {task.remedy}")
    return here, [task.label for task in wanted if task not in here]

# -----------------------------------------------------------------------------
# Questions

def make_items(task: Task, rows: list[tuple[int, dict]], data) -> list[Item]:
    """The questions of (line, row) of a task's file; raises ValueError if there is none, or for an unsound row.

    data: the module data/chat.py.
    """
    if not rows:
        raise ValueError("it is empty")
    items = []
    for line, row in rows:
        text = row[{"choice": "query", "humaneval": "prompt"}.get(task.kind, "question")]
        if not isinstance(text, str):
            raise ValueError(f"the question in line {line} is not a text")
        if task.kind == "humaneval":
            if not row["entry_point"].isidentifier():
                raise ValueError(f"the entry_point in line {line} is not the name of a function")
            items.append(Item(task.label, line, text, f"{row['test']}\ncheck({row['entry_point']})\n"))
            continue
        if not task.by_letter:
            gold = data.gsm8k_answer(row["answer"])
            if gold is None:
                raise ValueError(f"line {line} has no number after ####")
            items.append(Item(task.label, line, text, gold))
            continue
        choices = row["choices"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"line {line} has no list of 2 to {len(LETTERS)} choices")
        letters = LETTERS[:len(choices)]
        message = data.multiple_choice(text.removeprefix("Question: "), letters, choices)     # as CORE has it
        items.append(Item(task.label, line, message, letters[row["gold" if task.kind == "choice" else "answer"]],
                          letters))
    return items

def read_words(path: Path, data) -> list[str]:
    """The words of 2 to 20 letters a-z in a file with one word a line; raises UserError if there are none."""
    skipped = {}
    try:
        words = {line.strip().lower() for line in data.read_lines(path, skipped)}
    except data.InputError as error:
        raise UserError(str(error)) from None
    if skipped:                          # another machine may read other words from it
        raise UserError(f"{path} has lines that are not UTF-8; write it in UTF-8")
    words = sorted(word for word in words if re.fullmatch("[a-z]{2,20}", word))
    if not any(map(data.is_held_out, words)):
        raise UserError(f"{path} has no word of 2 to 20 letters a-z that is kept for evaluation; give more words, one "
                        "a line")
    return words

def make_long_words(count: int, letters: tuple[int, int], data, held_out: bool) -> list[str]:
    """`count` made-up words of letters[0] to letters[1] letters, of one side of data.is_held_out. They may repeat.

    Each is made of words like those in the training data, one after the other, cut to its length.
    """
    found, number = [], 0
    while len(found) < count:
        rng = random.Random(f"long word {number}")
        number += 1
        size, word = rng.randint(*letters), ""
        while len(word) < size:
            word += data.make_word(rng)
        if data.is_held_out(word[:size]) == held_out:
            found.append(word[:size])
    return found

def make_bee_items(words: list[str], count: int, data, held_out: bool = True,
                   letters: tuple[int, int] | None = None) -> list[Item]:
    """`count` questions of spellingbee, about different words.

    words: where they come from; if there are none, words are made up, as many letters long as `letters` says. A short
    list gives fewer questions. held_out: words that the training data of data/chat.py never has, else only others.
    """
    seed = BEE_SEED if held_out else f"{BEE_SEED} train"
    if letters:
        words = make_long_words(2 * count, letters, data, held_out)
    items = {}
    for word, letter in data.spelling_word_tasks(4 * count, seed, held_out, words=words):
        if word not in items and len(items) < count:
            question = data.spellingbee_item(word, letter, f"{seed} {len(items)}")[0]["content"]
            items[word] = Item("spellingbee", len(items), question, str(word.count(letter)))
    return list(items.values())

# -----------------------------------------------------------------------------
# Answers

def sorted_batches(lengths: list[int], rows: int, tokens: float = math.inf) -> list[list[int]]:
    """Indices in batches of similar lengths: up to `rows` each, and up to `tokens` with their padding."""
    batches = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or len(batches[-1]) == rows or (len(batches[-1]) + 1) * lengths[index] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches

def choose_letters(model, tokenizer: sample.Tokenizer, prompts: list[list[int]], items: list[Item]) -> list[dict]:
    """The records of multiple-choice items whose prompts are read together.

    The choice is the likeliest of the item's letters, the first of equals. in_form: no other token is likelier.
    """
    import torch
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int32)
    for line, prompt in zip(tokens, prompts):
        line[:len(prompt)] = torch.tensor(prompt)
    logits = model.decode(tokens.to(device), model.new_cache(*tokens.shape), lengths.to(device), last=True)[:, 0]
    logprobs = logits[:, :tokenizer.vocab_size].float().log_softmax(1)
    columns = [tokenizer.encode(letter)[0] for letter in LETTERS]   # a single letter is always one token
    found = torch.cat([logprobs[:, columns], logprobs.amax(1, keepdim=True)], 1).tolist()
    records = []
    for item, (*values, most) in zip(items, found):
        values = values[:len(item.letters)]
        if any(map(math.isnan, values)):
            raise UserError(f"the model's logits are not finite; {sample.CHOOSE_ANOTHER}")
        choice = item.letters[values.index(max(values))]
        records.append({"task": item.task, "kind": "letters", "line": item.line, "letters": item.letters,
                        "logprobs": [round(value, 5) for value in values], "gold": item.gold, "choice": choice,
                        "correct": choice == item.gold, "in_form": max(values) >= most})
    return records

def judge_answer(format: Format, item: Item, text: sample.Text) -> dict:
    """The record of an answer that the model wrote.

    Only its text counts, not what stands in calls and their results: choice is the number after its first ####, or for
    humaneval the program that is run, whose `reason` says why it failed.
    """
    answer = format.Answer(format.chat.tool)
    for token, logprob in zip(text.tokens, text.logprobs):
        answer.add(token, logprob is None)
    answer.close()
    said = "".join(part["text"] for part in answer.parts if part["type"] == "text")
    if item.task == "humaneval":
        choice = make_program(item, said)
        outcome = contained.run(f"{choice}\n\n{item.gold}")
        judged = {"choice": choice, "correct": outcome.passed, "in_form": "```" in said, "reason": outcome.reason}
    else:
        choice = format.data.gsm8k_answer(said)
        judged = {"choice": choice, "correct": choice == item.gold, "in_form": choice is not None}
    return {"task": item.task, "kind": "answer", "line": item.line, "question": item.question,
            "answer": answer.content(), "gold": item.gold, **judged, "calls": text.calls.made,
            "results": text.calls.answered, "cut_off": text.finish == "length", "tokens": len(text.tokens)}

def make_program(item: Item, said: str) -> str:
    """The program that an answer to a question of humaneval means, without the tests.

    It is the first fenced block of the answer, or else all of it, after the imports of the question. If it does not
    define the function, it is taken for what follows the question.
    """
    fenced = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", said, re.S)
    code = fenced[1] if fenced else said
    entry_point = re.search(r"check\((\w+)\)\n\Z", item.gold)[1]
    if not re.search(rf"^\s*(?:async\s+)?def\s+{entry_point}\b", code, re.M):
        return item.question + code
    imports = [line for line in item.question.splitlines() if re.match(r"(?:import|from)\s", line)]
    return "\n".join([*imports, code])

def write_answers(format: Format, items: list[Item], prompts: list[list[int]], engine: sample.Engine,
                  max_tokens: int, bar) -> list[dict]:
    """The records of items that the model answers in writing, always by its likeliest token."""
    texts = [sample.Text(format.chat.tokenizer, prompt=i) for i in range(len(items))]
    for _ in sample.generate(engine, prompts, texts, max_tokens, format.chat.ends, format.chat.tool):
        bar.update(sum(text.finish is not None for text in texts) - bar.n)
    return [judge_answer(format, item, text) for item, text in zip(items, texts)]

def answer_items(format: Format, items: list[Item], batch: int, max_tokens: int, rank: int = 0,
                 world_size: int = 1, quiet: bool = False) -> dict[int, dict]:
    """Index of an item -> its record, for those items that this rank takes; raises UserError.

    batch: items read or answered at the same time. Ranks take batches of items with prompts of similar length in turn.
    quiet: without progress bars.
    """
    from tqdm import tqdm
    model, tokenizer = format.chat.model, format.chat.tokenizer
    prompts = [format.prompt(item) for item in items]
    records = {}
    letters = [i for i, item in enumerate(items) if item.letters]
    tokens = CPU_TOKENS if next(model.parameters()).device.type == "cpu" else GPU_TOKENS
    batches = sorted_batches([len(prompts[i]) for i in letters], batch, tokens)[rank::world_size]
    quiet = True if quiet or rank else None      # None: a bar if it is a terminal
    for part in tqdm(batches, unit=" batches", disable=quiet):
        part = [letters[i] for i in part]
        found = choose_letters(model, tokenizer, [prompts[i] for i in part], [items[i] for i in part])
        records |= zip(part, found)
    written = [i for i, item in enumerate(items) if not item.letters]
    batch = min(batch, -(-len(written) // world_size))
    batches = sorted_batches([len(prompts[i]) for i in written], batch)[rank::world_size] if written else []
    mine = [written[i] for part in batches for i in part]
    if mine:
        longest = max(len(prompts[i]) for i in mine)
        try:
            engine = sample.Engine(model, tokenizer.vocab_size, sample.Draw(temperature=0), batch,
                                   longest + max_tokens, forcing=True)
        except ValueError as error:
            raise UserError(f"a question of {longest} tokens and --max_tokens={max_tokens} are too much for the model "
                            f"({error}); lower --max_tokens") from None
        with tqdm(total=len(mine), unit=" answers", disable=quiet) as bar:
            records |= zip(mine, write_answers(format, [items[i] for i in mine], [prompts[i] for i in mine], engine,
                                               max_tokens, bar))
    return records

# -----------------------------------------------------------------------------
# Scores

def share(flags: list[bool]) -> tuple[float, float | None]:
    """The share of the true ones, and its standard error; None for a single one."""
    n = len(flags)
    mean = sum(flags) / n
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None

def task_score(task: Task, records: list[dict]) -> dict:
    """The scores of a task from the records of its items. Shares are rounded to six decimals.

    in_form: share of items whose answer has the asked form. Of written answers also: tool_calls, the share with a call;
    results, the share of calls that have a result, None without a call; cut_off, the share that had no end.
    """
    accuracy, se = share([record["correct"] for record in records])
    score = {"accuracy": accuracy, "se": se, "n": len(records), "chance": task.chance,
             "centered": (accuracy - task.chance) / (1 - task.chance),
             "in_form": share([record["in_form"] for record in records])[0]}
    if not task.by_letter:
        calls = sum(record["calls"] for record in records)
        results = sum(record["results"] for record in records)
        score |= {"tool_calls": share([record["calls"] > 0 for record in records])[0],
                  "results": results / calls if calls else None,
                  "cut_off": share([record["cut_off"] for record in records])[0]}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in score.items()}

def chatcore(scores: dict[str, dict]) -> dict:
    """The mean of the centred scores, its standard error (None if a task has none), and the number of tasks."""
    n = len(scores)
    mean = sum(score["centered"] for score in scores.values()) / n
    errors = [score["se"] for score in scores.values()]
    se = None
    if None not in errors:
        se = math.sqrt(sum((score["se"] / (1 - score["chance"])) ** 2 for score in scores.values())) / n
        se = round(se, 6)
    return {"chatcore": round(mean, 6), "se": se, "n": n, "chance": 0}

def summarize(questions: Questions, records: list[dict], with_chatcore: bool) -> dict:
    """The scores of the tasks by their labels, the labels of the missing ones, and "chatcore" if it is asked for."""
    scores = {task.label: task_score(task, [record for record in records if record["task"] == task.label])
              for task in questions.tasks}
    chat = {"n": len(records), "tasks": scores, "missing": questions.missing, "words": questions.words}
    in_chatcore = {task.label: scores[task.label] for task in questions.tasks if task in TASKS}
    return {"chat": chat} | ({"chatcore": chatcore(in_chatcore)} if with_chatcore else {})

def table(scores: dict) -> list[str]:
    """The lines of the console's table for what `summarize` returned."""
    lines = [f"{'chat task':34}{'accuracy':>10}{'+-':>9}{'n':>9}{'chance':>9}   {'in form':>7}{'calls':>8}"
             f"{'results':>9}{'cut off':>9}"]

    def row(name, value, score):
        error = "-" if score["se"] is None else f"{score['se']:.4f}"
        rates = {name: "-" if score[name] is None else f"{score[name]:.3f}" for name in RATES if name in score}
        shown = [rates.get(name, "") for name in RATES]
        lines.append(f"{name:34}{value:10.4f}{error:>9}{score['n']:9,}{score['chance']:9.3f}   {shown[0]:>7}"
                     f"{shown[1]:>8}{shown[2]:>9}{shown[3]:>9}".rstrip())
    tasks, missing = scores["chat"]["tasks"], scores["chat"]["missing"]
    for label, score in tasks.items():
        row(label, score["accuracy"], score)
    if "chatcore" in scores:
        core = scores["chatcore"]
        row(f"ChatCORE, {core['n']} of {len(TASKS)} tasks", core["chatcore"], core)
    if missing:
        lines.append(f"left out, because their files are missing: {', '.join(missing)}")
    return lines
