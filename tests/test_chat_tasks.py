"""evaluate.py's chat tasks: a planted answer gets the score that it deserves, in any batch, on any number of ranks.

Against: answers and logits that are planted in a stand-in for a model; plain references written here, which read one
question at a time and decode by whole forward passes; scores worked out by hand. Small sets are written here; the
whole development sets are read where they are (those tests skip without them).
Run: python -m pytest tests/test_chat_tasks.py
"""
import hashlib
import json
import lzma
import math
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import chat_tasks
import contained
import evaluate
import sample
import train_gpt

SHARED = ROOT.parent / "shared" / "data" / "eval"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="no development data beside the project")
data = chat_tasks.load_data()
BOS, USER, USER_END, ASSISTANT, END, CALL, CALLED, OUTPUT, SHOWN = range(256, 265)
MERGES = [b" a", b"th", b"the", b"=A", b"\n- ", b"12", b"####"]     # some cross what a question is made of


def chat_json(merges=()):
    """The content of a tokenizer.json of bytes and merges with the tokens for conversations."""
    spec = json.loads(tokenizer_json([*(bytes([i]) for i in range(256)), *merges]))
    spec |= {"pattern": sample.GPT2_PATTERN if merges else "", "name": "chat", "bos_id": len(spec["ranks"]),
             "special_tokens": {name: len(spec["ranks"]) + i for i, name in enumerate(data.SPECIAL_TOKENS)}}
    return (json.dumps(spec, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode()


TOKENIZER = sample.Tokenizer(json.loads(chat_json()))
ARC, _, MMLU, GSM8K, BEE = chat_tasks.TASKS


def prompt(question):
    """What a model of bytes reads for a question, written out by hand."""
    return [BOS, USER, *question.encode(), USER_END, ASSISTANT]


class Planted(torch.nn.Module):
    """Stands in for a model: after a prompt it writes the tokens planted for it, or has the logits planted for it."""

    def __init__(self, planted):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.cfg = SimpleNamespace(bos_id=BOS, vocab_size=300)      # more rows than tokens, as in padded tables
        self.planted = {tuple(prompt(question)): answer for question, answer in planted.items()}
        self.batches = []

    def new_cache(self, batch, max_tokens, chunk=256):
        cache = SimpleNamespace(answers=[[]] * batch, at=0)

        def fill(other, rows):
            cache.answers = [other.answers[row] for row in rows]
            cache.at = other.at
        cache.fill = fill
        return cache

    def decode(self, tokens, cache, lengths=None, last=False):
        logits = torch.zeros(len(tokens), 1, self.cfg.vocab_size)
        logits[:, :, 265:] = 1e4                                    # no token has these ids
        if lengths is not None:
            assert last
            self.batches.append(tuple(tokens.shape))
            cache.answers = [self.planted[tuple(row[:n])] for row, n in zip(tokens.tolist(), lengths.tolist())]
            cache.at = -1
        cache.at += 1
        for row, answer in enumerate(cache.answers):
            if isinstance(answer, torch.Tensor):
                logits[row, 0, :len(answer)] = answer
            else:
                logits[row, 0, answer[min(cache.at, len(answer) - 1)]] = 99
        return logits


def ask(model, items, batch=64, max_tokens=40, **ranks):
    """The records of items, by their index."""
    return chat_tasks.answer_items(chat_tasks.Format(model, TOKENIZER, "a model"), items, batch, max_tokens, **ranks)


# -----------------------------------------------------------------------------
# Multiple choice

def logits_of(**values):
    """Logits over 265 tokens: those of letters, "other" for that of a token which is no letter, 0 for all others."""
    logits = torch.zeros(265)
    for letter, value in values.items():
        logits[ord("!") if letter == "other" else ord(letter)] = value
    return logits


@pytest.mark.parametrize("values, letters, choice, in_form", [
    ({"A": 1, "B": 3, "C": 2}, "ABC", "B", True),
    ({"A": 1, "B": 3, "C": 2, "other": 4}, "ABC", "B", False),
    ({"B": 3, "C": 3}, "ABC", "B", True),                           # the first of equals
    ({"D": 2, "E": 9}, "ABCD", "D", False),                         # a letter of no choice
    ({"E": 9}, "ABCDE", "E", True),
    ({"A": -5, "B": -4}, "AB", "B", False),
], ids=str)
@pytest.mark.parametrize("gold", ["A", "B"])
def test_the_letter_with_the_highest_logit_is_chosen(values, letters, choice, in_form, gold):
    logits = logits_of(**values)
    record = ask(Planted({"q": logits}), [chat_tasks.Item("mmlu", 7, "q", gold, letters)])[0]
    logprobs = [round(float(logits.log_softmax(0)[ord(letter)]), 5) for letter in letters]
    assert record.pop("logprobs") == pytest.approx(logprobs, abs=2e-5)
    assert record == {"task": "mmlu", "kind": "letters", "line": 7, "letters": letters, "gold": gold, "choice": choice,
                      "correct": choice == gold, "in_form": in_form}


def test_questions_of_all_lengths_keep_their_own_answers_in_any_batch():
    rng = random.Random(0)
    letters = [rng.choice("ABCD") for _ in range(30)]
    questions = [f"{i}" + "x" * rng.randrange(60) for i in range(30)]
    planted = {question: logits_of(**{letter: 5}) for question, letter in zip(questions, letters)}
    items = [chat_tasks.Item("mmlu", i, question, "A", "ABCD") for i, question in enumerate(questions)]
    for batch in (1, 7, 64):
        model = Planted(planted)
        found = ask(model, items, batch)
        assert [found[i]["choice"] for i in range(30)] == letters
        assert max(rows for rows, _ in model.batches) <= batch and sum(rows for rows, _ in model.batches) == 30


def test_logits_that_are_not_finite_are_refused():
    item = chat_tasks.Item("mmlu", 0, "q", "A", "AB")
    with pytest.raises(sample.UserError, match="logits are not finite"):
        ask(Planted({"q": logits_of(A=math.nan)}), [item])
    with pytest.raises(sample.UserError, match="logits are not finite"):
        ask(Planted({"q": logits_of(A=math.nan)}), [replace(item, letters="")])


def test_questions_read_together_stay_within_the_limit_of_tokens(monkeypatch):
    planted = {f"{i}" + 10 * "x": logits_of(A=1) for i in range(10)}
    items = [chat_tasks.Item("mmlu", i, question, "A", "AB") for i, question in enumerate(planted)]
    monkeypatch.setattr(chat_tasks, "CPU_TOKENS", 3 * len(prompt(items[0].question)))
    model = Planted(planted)
    assert len(ask(model, items)) == 10
    assert [rows for rows, _ in model.batches] == [3, 3, 3, 1]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 9), st.integers(300, 900))
@settings(max_examples=100, deadline=None)
def test_batches_hold_every_item_once_and_stay_within_their_limits(lengths, rows, tokens):
    batches = chat_tasks.sorted_batches(lengths, rows, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= rows and len(batch) * max(lengths[i] for i in batch) <= tokens
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(in_order)
    for batch, later in zip(batches, batches[1:]):                  # none has room for the next item
        assert len(batch) == rows or (len(batch) + 1) * lengths[later[0]] > tokens


# -----------------------------------------------------------------------------
# Written answers

RIGHT = [*b"####", *b" 12", END]
CALLING = [*b"So ", CALL, *b"3*4", CALLED, OUTPUT, *b"12", SHOWN, *b"\n#### 12", END]
ANSWERS = {                              # question -> tokens that the model would write, and parts of its record
    "right": (RIGHT, {"answer": "#### 12", "choice": "12", "correct": True, "in_form": True, "tokens": 7}),
    "wrong": ([*b"#### 13", END], {"choice": "13", "correct": False, "in_form": True}),
    "other form": ([*b"12", END], {"answer": "12", "choice": None, "correct": False, "in_form": False}),
    "with a comma": ([*b"#### 1,2", END], {"choice": "12", "correct": True}),
    "the first one counts": ([*b"#### 12\n#### 13", END], {"choice": "12", "correct": True}),
    "a call": (CALLING, {"answer": [
        {"type": "text", "text": "So "}, {"type": "python", "text": "3*4"}, {"type": "python_output", "text": "12"},
        {"type": "text", "text": "\n#### 12"}], "choice": "12", "correct": True, "calls": 1, "results": 1}),
    "the true result comes": ([CALL, *b"3*5", CALLED, OUTPUT, *b"12", SHOWN, *b"#### 12", END], {"answer": [
        {"type": "python", "text": "3*5"}, {"type": "python_output", "text": "15"},
        {"type": "text", "text": "#### 12"}], "correct": True, "calls": 1, "results": 1}),
    "no result": ([CALL, *b"3*", CALLED, *RIGHT], {"correct": True, "calls": 1, "results": 0}),
    "two calls": ([CALL, *b"1/0", CALLED, CALL, *b"1", CALLED, OUTPUT, *b"1", SHOWN, END],
                  {"correct": False, "in_form": False, "calls": 2, "results": 1}),
    "an open call": ([CALL, *b"#### 12", END], {"choice": None, "in_form": False, "calls": 0}),
    "only in a call": ([CALL, *b"#### 12", CALLED, END], {"choice": None, "in_form": False, "calls": 1, "results": 0}),
    "its own output": ([OUTPUT, *b"#### 12", SHOWN, END], {"answer": "#### 12", "correct": True, "calls": 0}),
    "ends with bos": ([*b"#### 12", BOS, 51], {"answer": "#### 12", "correct": True, "cut_off": False}),
    "ends with a user": ([*b"#### 12", USER, 51], {"answer": "#### 12", "correct": True, "cut_off": False}),
    "never ends": ([*b"#### 12 "], {"answer": "#### 12" + 33 * " ", "correct": True, "cut_off": True, "tokens": 40}),
    "says nothing": ([END], {"answer": "", "choice": None, "cut_off": False, "tokens": 0}),
}
ITEMS = [chat_tasks.Item("gsm8k", i, question, "12") for i, question in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def records():
    model = Planted({question: tokens for question, (tokens, _) in ANSWERS.items()})
    return ask(model, ITEMS, batch=5)


@pytest.mark.parametrize("i", range(len(ITEMS)), ids=list(ANSWERS))
def test_a_planted_answer_gets_its_record(records, i):
    expected = {"task": "gsm8k", "kind": "answer", "line": i, "question": ITEMS[i].question, "gold": "12", "calls": 0,
                "results": 0, "cut_off": False} | ANSWERS[ITEMS[i].question][1]
    assert {name: records[i][name] for name in expected} == expected
    assert set(records[i]) == {*expected, "answer", "choice", "correct", "in_form", "tokens"}


@pytest.mark.parametrize("batch", [1, 64])
def test_the_batch_changes_no_record(records, batch):
    model = Planted({question: tokens for question, (tokens, _) in ANSWERS.items()})
    assert ask(model, ITEMS, batch) == records


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_ranks_share_the_items_and_find_the_same(records, world_size):
    letters = [chat_tasks.Item("mmlu", i, f"{i}", "A", "AB") for i in range(5)]
    planted = {question: tokens for question, (tokens, _) in ANSWERS.items()}
    planted |= {item.question: logits_of(A=1) for item in letters}
    parts = [ask(Planted(planted), [*ITEMS, *letters], 2, rank=rank, world_size=world_size)
             for rank in range(world_size)]
    together = {i: record for part in parts for i, record in part.items()}
    assert sum(map(len, parts)) == len(together) == len(ITEMS) + 5
    assert {i: together[i] for i in range(len(ITEMS))} == records


TOKENS = st.sampled_from([*b"#1,+. x'", 0xc3, 0xa9, BOS, USER, USER_END, ASSISTANT, END, CALL, CALLED, OUTPUT, SHOWN])
PIECES = st.one_of(TOKENS.map(lambda token: [token]), st.sampled_from([[*b"#### 1"], [CALL, *b"1+1", CALLED]]))


@given(st.lists(st.lists(PIECES, max_size=12), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_whatever_a_model_writes_has_a_sound_record(answers, batch):
    planted = {f"{i}": [*sum(pieces, []), END] for i, pieces in enumerate(answers)}
    items = [chat_tasks.Item("gsm8k", i, question, "1") for i, question in enumerate(planted)]
    records = ask(Planted(planted), items, batch)
    assert list(map(records.get, range(len(items)))) == [ask(Planted(planted), [item])[0] for item in items]
    for record in records.values():
        assert json.loads(json.dumps(record)) == record
        parts = record["answer"] if isinstance(record["answer"], list) else []
        assert parts == [] or {"python", "python_output"} & {part["type"] for part in parts}
        outputs = [part for part in parts if part["type"] == "python_output"]
        assert len(outputs) == record["results"] <= record["calls"] or record["cut_off"]
        assert record["correct"] == (record["choice"] == "1") and record["in_form"] == (record["choice"] is not None)
        assert 0 <= record["tokens"] <= 40 and (record["tokens"] == 40 or not record["cut_off"])
    score = chat_tasks.task_score(GSM8K, list(records.values()))
    assert all(value is None or 0 <= value <= 1 for name, value in score.items() if name != "n")
    assert score["accuracy"] <= score["in_form"]


def test_an_error_on_one_rank_is_raised_on_all(monkeypatch):
    letter = chat_tasks.Item("mmlu", 0, "q", "A", "AB")
    questions = chat_tasks.Questions([MMLU], [], [letter], "")
    args = SimpleNamespace(batch=1, max_tokens=5, tasks=["mmlu"])
    format = chat_tasks.Format(Planted({"q": logits_of(A=1)}), TOKENIZER, "a model")
    machine = SimpleNamespace(rank=0, world_size=2)
    monkeypatch.setattr(evaluate, "gather", lambda machine, mine: [mine, {}])
    scores, records = evaluate.ask(args, questions, format, machine)
    assert scores["chat"]["tasks"]["mmlu"]["accuracy"] == 1 and len(records) == 1
    monkeypatch.setattr(evaluate, "gather", lambda machine, mine: [mine, sample.UserError("on the other rank")])
    with pytest.raises(sample.UserError, match="on the other rank"):
        evaluate.ask(args, questions, format, machine)
    shared = []
    format = chat_tasks.Format(Planted({"q": logits_of(A=math.nan)}), TOKENIZER, "a model")
    monkeypatch.setattr(evaluate, "gather", lambda machine, mine: shared.append(mine) or [mine])
    with pytest.raises(sample.UserError, match="not finite"):
        evaluate.ask(args, questions, format, machine)
    assert len(shared) == 1              # the others were told


def test_scores_of_planted_answers_are_those_worked_out_by_hand(records):
    score = chat_tasks.task_score(GSM8K, list(records.values()))
    right = 10 / 16
    assert score == {"accuracy": right, "se": round(math.sqrt(right * (1 - right) / 15), 6), "n": 16, "chance": 0,
                     "centered": right, "in_form": 11 / 16, "tool_calls": 5 / 16, "results": 0.5, "cut_off": 1 / 16}


def test_without_a_call_there_is_no_rate_of_results():
    record = {"correct": True, "in_form": True, "calls": 0, "results": 0, "cut_off": False}
    score = chat_tasks.task_score(BEE, [record])
    assert (score["results"], score["se"], score["tool_calls"]) == (None, None, 0)
    lines = chat_tasks.table({"chat": {"tasks": {"spellingbee": score}, "missing": [], "words": ""}})
    assert lines[1].split() == "spellingbee 1.0000 - 1 0.000 1.000 0.000 - 0.000".split()


# -----------------------------------------------------------------------------
# Means

def test_chatcore_is_the_mean_of_centred_scores():
    def score(task, right, n):
        return chat_tasks.task_score(task, [
            {"correct": i < right, "in_form": True, "calls": 1, "results": 1, "cut_off": False} for i in range(n)])
    scores = {"mmlu": score(MMLU, 5, 10), "gsm8k": score(GSM8K, 1, 5)}
    assert [one["centered"] for one in scores.values()] == [0.333333, 0.2]
    errors = [math.sqrt(.5 * .5 / 9) / .75, math.sqrt(.2 * .8 / 4)]
    found = chat_tasks.chatcore(scores)
    assert found == {"chatcore": pytest.approx((1 / 3 + .2) / 2, abs=1e-6), "n": 2, "chance": 0,
                     "se": pytest.approx(math.hypot(*errors) / 2, abs=1e-6)}
    assert chat_tasks.chatcore(scores | {"gsm8k": score(GSM8K, 1, 1)})["se"] is None


def test_guessing_is_zero_and_all_right_is_one():
    for task in chat_tasks.TASKS:
        for right, expected in ((round(40 * task.chance), 0), (40, 1)):
            found = chat_tasks.task_score(task, [
                {"correct": i < right, "in_form": True, "calls": 0, "results": 0, "cut_off": False} for i in range(40)])
            assert found["centered"] == expected


# -----------------------------------------------------------------------------
# Questions

def test_what_is_asked():
    arc = {"query": "Question: Which one?", "choices": ["this", "that"], "gold": 1}
    mmlu = {"question": "Which one?", "choices": ["this", "that"], "answer": 1}
    question = "Choose the right answer. Which one?\n- this=A\n- that=B\n\nReply with its letter alone."
    for task, row in ((ARC, arc), (MMLU, mmlu)):
        assert chat_tasks.make_items(task, [(3, row)], data) == [
            chat_tasks.Item(task.label, 3, question, "B", "AB")]
    row = {"question": "How much?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}
    assert chat_tasks.make_items(GSM8K, [(0, row)], data) == [chat_tasks.Item("gsm8k", 0, "How much?", "1200")]


@pytest.mark.parametrize("merges", [(), MERGES], ids=["bytes", "merges"])
def test_what_is_asked_and_scored_is_what_training_shows(merges):
    """The conversations of data/chat.py begin as the prompts do, and go on with the letter's token."""
    tokenizer = sample.Tokenizer(json.loads(chat_json(merges)))
    row = {"question": "The 12 which a\n- cat?", "choices": ["A", "the cat", "=A", "12"], "answer": 2}
    item, = chat_tasks.make_items(MMLU, [(0, row)], data)
    ids, mask = data.render(data.mmlu_messages(row), tokenizer)
    asked = data.prime([{"role": "user", "content": item.question}], tokenizer)
    assert ids == [*asked, *tokenizer.encode("C"), tokenizer.special("<|assistant_end|>")]
    assert mask == [0] * len(asked) + [1, 1]
    row = {"question": "How much?", "answer": "<<1+1=2>>2\n#### 2"}
    item, = chat_tasks.make_items(GSM8K, [(0, row)], data)
    asked = data.prime([{"role": "user", "content": item.question}], tokenizer)
    assert data.render(data.gsm8k_messages(row), tokenizer)[0][:len(asked)] == asked


def test_spellingbee_asks_about_words_that_are_never_trained():
    items = chat_tasks.make_bee_items([], 256, data)
    assert items == chat_tasks.make_bee_items([], 256, data)        # always the same ones
    assert [item.line for item in items] == list(range(256)) and len({item.question for item in items}) == 256
    trained = data.spelling_words(1000, 0)
    tasks = {(word, letter) for word, letter in data.spelling_word_tasks(4 * 256, "evaluate", held_out=True)}
    for item in items:
        words = [word for word, letter in tasks if word in item.question and str(word.count(letter)) == item.gold]
        assert words and any(data.is_held_out(word) for word in words)
    assert not {word for word, _ in tasks} & set(trained)
    assert {item.gold for item in items} >= {"0", "1", "2"}
    assert chat_tasks.make_bee_items([], 20, data) == items[:20]


def test_a_short_word_list_gives_each_of_its_words_once(tmp_path):
    path = tmp_path / "words_alpha.txt"
    path.write_bytes(b"Strawberry\r\nnot a word\r\nx\r\nriver\r\n")
    words = chat_tasks.read_words(path, data)
    assert words == ["river", "strawberry"] and not data.is_held_out("river")
    item, = chat_tasks.make_bee_items(words, 256, data)
    assert "strawberry" in item.question
    path.write_bytes(b"strawberry\nna\xefve\n")
    with pytest.raises(sample.UserError, match="words_alpha.txt has lines that are not UTF-8"):
        chat_tasks.read_words(path, data)
    path.write_text("river\n")
    with pytest.raises(sample.UserError, match="words_alpha.txt has no word .* kept for evaluation; give more words"):
        chat_tasks.read_words(path, data)


@needs_data
def test_the_development_sets_are_read_whole_and_are_refused_as_training_data():
    known = data.test_items()
    for task, count in zip(chat_tasks.TASKS, (2376, 1172, 14042, 1319)):
        rows = evaluate.read_rows(chat_tasks.find_file(SHARED, f"{task.file}.jsonl"), task.kind, 0)
        items = chat_tasks.make_items(task, rows, data)
        assert len(items) == count and {item.line for item in items} == set(range(count))
        if task in (MMLU, GSM8K):
            assert all(data.hash_question(item.question) in known for item in items)
    words = chat_tasks.read_words(chat_tasks.find_file(SHARED, "words_alpha.txt"), data)
    assert len(words) > 360_000 and len(chat_tasks.make_bee_items(words, 256, data)) == 256


# -----------------------------------------------------------------------------
# The command, with a small model of train_gpt.py

def write_checkpoint(run, tokenizer, **changes):
    """Writes a run folder with a checkpoint of a small random model with that tokenizer.json."""
    spec = json.loads(tokenizer)
    vocab = len(spec["ranks"]) + len(spec["special_tokens"])
    cfg = replace(train_gpt.PRESETS["tiny"], vocab_size=vocab, bos_id=spec["bos_id"], attention="plain", compile=False,
                  model_dim=96, head_dim=48, mlp_dim=96, gate_dim=8, bigram_rows=64, bigram_signs=16,
                  final_windows=(96, 512))
    folder = run / "checkpoint" / "step_000007"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = train_gpt.GPT(cfg)
    model.requires_grad_(False)
    for param in model.parameters():     # else every layer adds nothing
        param.add_(0.1 * torch.randn(param.shape))
    model.lm_head.copy_(torch.randn(model.lm_head.shape))
    model.lm_head[len(spec["ranks"]):] = 0                          # it hardly ever writes a special token
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    meta = {"format": 1, "script": "train_gpt", "source_sha256": hashlib.sha256(
        (ROOT / "train_gpt.py").read_bytes()).hexdigest(), "config": asdict(cfg), "step": 7, "stage": 1,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()} | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    (run / "checkpoint" / "latest").write_text(folder.name)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("logs") / "run", chat_json(MERGES), chat=True)


def write_sets(folder):
    """A few items of every task that has a file."""
    rng = random.Random(0)

    def write(name, rows, opener=open):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def text():
        return " ".join(rng.choices("the a house cat = - 12 = Änne sees\n finds".split(" "), k=rng.randint(1, 9)))
    for name in ("arc_easy", "arc_challenge"):
        write(f"core/eval_data/world_knowledge/{name}.jsonl", [
            {"query": f"Question: {text()}", "choices": [text() for _ in range(rng.choice((3, 4, 5)))],
             "gold": rng.randrange(3)} for _ in range(13)])
    write("mmlu/test.jsonl.xz", [{"question": text(), "subject": "x", "choices": [text() for _ in range(4)],
                                  "answer": rng.randrange(4)} for _ in range(12)], lzma.open)
    write("hellaswag_val.jsonl", [{"ctx": text(), "endings": [text() for _ in range(4)], "label": rng.randrange(4)}
                                  for _ in range(12)])
    write("gsm8k/test.jsonl", [{"question": text(), "answer": f"{text()}\n#### {i}"} for i in range(11)])
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("evals"))


@pytest.fixture
def score(run, sets, capsys, tmp_path):
    """Function of flags that runs the command; returns (the JSON line, the console's table, the items' records)."""
    def main(*flags):
        out = tmp_path / "items.jsonl"
        capsys.readouterr()
        code = evaluate.main([f"--checkpoint={run}", f"--evals={sets}", f"--items_out={out}", "--device=cpu",
                              "--threads=1", "--max_tokens=6", *flags])
        console, err = capsys.readouterr()
        assert (code, err.count("evaluate.py")) == (0, 0), err
        *table, last = console.splitlines()
        return json.loads(last), "\n".join(table), [json.loads(line) for line in out.read_text().splitlines()]
    return main


def test_letters_and_texts_are_those_of_a_plain_reference(run, sets, score):
    """One question at a time, by forward passes over the whole text."""
    _, _, records = score("--tasks=arc,mmlu,gsm8k", "--batch=5")
    model, tokenizer, _ = sample.load_checkpoint(sample.resolve_checkpoint(run), "cpu")

    def logits(ids):
        return model(torch.tensor(ids, dtype=torch.int32))[-1, :tokenizer.vocab_size].float()
    choices = set()
    for record in records:
        task = next(task for task in chat_tasks.TASKS if task.label == record["task"])
        rows = evaluate.read_rows(chat_tasks.find_file(sets, f"{task.file}.jsonl"), task.kind, 0)
        item, = chat_tasks.make_items(task, [row for row in rows if row[0] == record["line"]], data)
        special = [tokenizer.special(f"<|{name}|>") for name in ("bos", "user_start", "user_end", "assistant_start")]
        ids = [*special[:2], *tokenizer.encode(item.question), *special[2:]]
        with torch.no_grad():
            if record["kind"] == "letters":
                logprobs = logits(ids).log_softmax(0)
                expected = [float(logprobs[tokenizer.encode(letter)[0]]) for letter in item.letters]
                assert record["logprobs"] == pytest.approx(expected, abs=1e-3)
                assert record["choice"] == item.letters[expected.index(max(expected))]
                choices.add(record["choice"])
            else:
                new = []
                while len(new) < 6:
                    new.append(int(logits(ids + new).argmax()))
                said = b"".join(map(tokenizer.token_bytes, new)).decode(errors="replace")
                assert max(new) < len(tokenizer.ranks) and len(set(new)) > 1
                assert (record["answer"], record["cut_off"], record["tokens"]) == (said, True, 6)
    assert len(records) == 13 + 13 + 12 + 11 and len(choices) > 1


LABELS = {"arc": ["arc_easy", "arc_challenge"], "mmlu": ["mmlu"], "gsm8k": ["gsm8k"], "spellingbee": ["spellingbee"]}


def assert_same(records, expected):
    """All is equal, but for digits that other questions in the batch may change."""
    for record, other in zip(records, expected, strict=True):
        assert record.get("logprobs", []) == pytest.approx(other.get("logprobs", []), abs=1e-3)
        assert record == other | {name: record[name] for name in record if name == "logprobs"}


def without_times(scores):
    scores["chat"].pop("seconds")
    return scores


@pytest.fixture(scope="module")
def everything():
    return {}


@pytest.mark.parametrize("tasks", ["chatcore", "mmlu", "spellingbee,arc", "gsm8k,chatcore", "arc,arc,gsm8k"])
def test_each_combination_of_tasks_gives_the_same_scores_and_items(score, everything, tasks):
    if not everything:
        everything["all"] = score("--tasks=chatcore", "--max_items=5")
    whole, _, items = everything["all"]
    result, table, records = score(f"--tasks={tasks}", "--max_items=5")
    names = list(LABELS) if "chatcore" in tasks else tasks.split(",")
    labels = [task.label for task in chat_tasks.TASKS if task.label in sum((LABELS[name] for name in names), [])]
    found = result["scores"]["chat"]
    assert list(found["tasks"]) == labels and found["missing"] == []
    assert found["words"] == ("made up" if "spellingbee" in labels else "")
    assert {label: whole["scores"]["chat"]["tasks"][label] for label in labels} == found["tasks"]
    assert len(records) == 5 * len(labels)
    assert_same(records, [item for item in items if item["task"] in labels])
    assert ("chatcore" in result["scores"]) == ("ChatCORE, 5 of 5 tasks" in table) == ("chatcore" in tasks)
    assert f"{len(records)} chat questions in " in table and " 0 tokens" not in table


@pytest.mark.parametrize("batch", ["1", "1000"])
def test_scores_are_counted_from_the_items_whatever_the_batch(score, everything, batch):
    if not everything:
        everything["all"] = score("--tasks=chatcore", "--max_items=5")
    result, _, records = score("--tasks=chatcore", "--max_items=5", f"--batch={batch}")
    assert without_times(result["scores"]) == without_times(json.loads(json.dumps(everything["all"][0]["scores"])))
    for label, found in result["scores"]["chat"]["tasks"].items():
        mine = [record for record in records if record["task"] == label]
        assert found["n"] == len(mine) == len({record["line"] for record in mine})
        right = sum(record["choice"] == record["gold"] for record in mine)
        assert found["accuracy"] == pytest.approx(right / len(mine))


def test_spellingbee_has_256_questions(run, sets):
    args = evaluate.parse_args([f"--checkpoint={run}", f"--evals={sets}", "--tasks=spellingbee"])
    assert len(evaluate.read_questions(args).items) == 256


def test_base_scores_and_chat_tasks_together(score):
    """Their items are in one file."""
    result, table, records = score("--tasks=mmlu,hellaswag")
    assert list(result["scores"]) == ["hellaswag", "chat"] and result["tokens"] > 0
    assert [record["task"] for record in records] == 12 * ["hellaswag"] + 12 * ["mmlu"]
    assert table.index("hellaswag norm") < table.index("chat task") and "12 chat questions in " in table


def test_chatcore_names_the_tasks_that_are_left_out(score, tmp_path):
    result, table, records = score("--tasks=chatcore", f"--evals={tmp_path}", "--max_items=3")
    missing = ["arc_easy", "arc_challenge", "mmlu", "gsm8k"]
    assert result["scores"]["chat"]["missing"] == missing and result["scores"]["chatcore"]["n"] == 1
    assert "ChatCORE, 1 of 5 tasks" in table and len(records) == 3
    assert "left out, because their files are missing: arc_easy, arc_challenge, mmlu, gsm8k" in table


FIRST = {"prompt": 'import math\n\ndef half(x):\n    """Half of x."""\n', "entry_point": "half",
         "test": "def check(candidate):\n    assert candidate(3) == 1.5\n", "task_id": "t/0", "canonical_solution": ""}
WRITTEN = [                              # what a model answers to FIRST, whether it is right, in form, and the reason
    ("```python\ndef half(x):\n    return x / 2\n```\nDone.", True, True, ""),
    ("def half(x):\n    return math.ldexp(x, -1)", True, False, ""),
    ("    return x / 2", True, False, ""),
    ("```\ndef half(x):\n    return x / 2", True, True, ""),              # cut off in the block
    ("```python\ndef half(x):\n    return x // 2\n```", False, True, "AssertionError"),
    ("def half(x):\n    return open('/tmp/x', 'w')", False, False, "PermissionError"),
    ("I do not know.", False, False, "SyntaxError"),
    ("", False, False, "AssertionError")]


@pytest.mark.parametrize("said, correct, in_form, reason", WRITTEN, ids=str)
def test_a_program_is_run_with_its_tests(said, correct, in_form, reason):
    item, = chat_tasks.make_items(chat_tasks.HUMANEVAL, [(0, FIRST)], data)
    model = Planted({FIRST["prompt"]: [*said.encode(), END]})
    record = ask(model, [item], max_tokens=80)[0]
    assert (record["correct"], record["in_form"]) == (correct, in_form) and record["reason"].startswith(reason), record
    assert bool(record["reason"]) != correct and record["task"] == "humaneval"


def test_humaneval_is_asked_only_if_code_is_allowed(score, refused, tmp_path, capsys):
    path = tmp_path / "humaneval" / "HumanEval.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(FIRST) + "\n")
    refused("--tasks=humaneval", f"--evals={tmp_path}", words=["--tasks=humaneval runs programs", "--allow_code"])
    result, table, records = score("--tasks=humaneval,spellingbee", "--allow_code", f"--evals={tmp_path}",
                                   "--max_items=1")
    assert list(result["scores"]) == ["chat"] and [record["task"] for record in records] == ["spellingbee", "humaneval"]
    assert records[1]["gold"].endswith("check(half)\n") and "humaneval" in table and records[1]["correct"] is False
    result, _, _ = score("--tasks=humaneval,chatcore", "--allow_code", f"--evals={tmp_path}", "--max_items=1")
    assert result["scores"]["chatcore"]["n"] == 1       # spellingbee
    path.write_text(json.dumps(FIRST | {"entry_point": "half(1)"}) + "\n")
    refused("--tasks=humaneval", "--allow_code", f"--evals={tmp_path}", words=["line 0 is not the name of a function"])
    refused("--tasks=humaneval", "--allow_code", "--evals=nowhere", words=["humaneval/HumanEval.jsonl", "docs/chat.md"])


@needs_data
def test_the_solutions_of_humaneval_pass():
    with lzma.open(SHARED / "humaneval" / "HumanEval.jsonl.xz", "rt") as file:
        rows = [json.loads(line) for line in file]
    items = chat_tasks.make_items(chat_tasks.HUMANEVAL, list(enumerate(rows)), data)
    assert len(items) == 164
    for i in range(0, 164, 41):
        program = chat_tasks.make_program(items[i], rows[i]["canonical_solution"])
        assert contained.run(f"{program}\n\n{items[i].gold}").reason == "", i


def test_a_word_list_is_used_and_named(score, tmp_path):
    (tmp_path / "words_alpha.txt").write_text("strawberry\n")
    result, _, records = score("--tasks=spellingbee", f"--evals={tmp_path}")
    assert result["scores"]["chat"]["words"] == "words_alpha.txt" and "strawberry" in records[0]["question"]
    assert len(records) == 1 and result["scores"]["chat"]["tasks"]["spellingbee"]["se"] is None


# -----------------------------------------------------------------------------
# Bad input

@pytest.fixture
def refused(run, sets, capsys, tmp_path):
    """Function that expects exit code 2 and one line with all the words, and no items file."""
    def check(*flags, words):
        items = tmp_path / "refused.jsonl"
        capsys.readouterr()
        given = [f"--checkpoint={run}"] * (not any("--model" in flag for flag in flags))
        code = evaluate.main([*given, f"--evals={sets}", f"--items_out={items}", "--device=cpu", "--threads=1", *flags])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
        assert err.startswith("evaluate.py: ") and [word for word in words if word not in err] == [], err
        assert not items.exists()
    return check


@pytest.mark.parametrize("flags, words", [
    (["--tasks=mmlu", "--max_tokens=0"], ["--max_tokens=0 must be at least 1"]),
    (["--tasks=mmlu", "--batch=0"], ["--batch=0 must be at least 1"]),
    (["--tasks=mmlu", "--max_items=-1"], ["--max_items=-1 must be 0 (all) or above 0\n"]),
    (["--tasks=mmlu,core", "--max_items=5"], ["--max_items=5 must be 0 (all) or above 10"]),
    (["--model=gpt2", "--tasks=mmlu,gsm8k"], ["--model=gpt2 has no tokens for conversations, which mmlu,gsm8k needs"]),
    (["--tasks=mmlu", f"--evals={ROOT / 'README.md'}"], ["is a file"]),
    (["--tasks=mmlu", "--evals=nowhere"], ["--evals=nowhere has no mmlu/test.jsonl, which mmlu needs; docs/evaluation.md"]),
    (["--tasks=chatcore,arc", "--evals=nowhere"], ["--evals=nowhere has no ", "arc_easy.jsonl, which arc needs; fetch it with"]),
], ids=str)
def test_a_bad_flag_is_refused(refused, flags, words):
    refused(*flags, words=words)


@pytest.mark.parametrize("task", [task for task in chat_tasks.SCORES if task != "humaneval"])
def test_a_base_model_is_refused(refused, tmp_path_factory, task):
    run = tmp_path_factory.getbasetemp() / "base" / "run"
    if not run.exists():
        write_checkpoint(run, tokenizer_json())
    refused(f"--checkpoint={run}", f"--tasks={task}", words=[
        "run/checkpoint/step_000007 is a base model, which has no tokens for conversations",
        "python chat_sft.py --checkpoint="])


def test_a_model_that_has_not_learned_to_chat_is_scored_with_a_note(sets, tmp_path, capsys):
    run = write_checkpoint(tmp_path / "run", chat_json())
    assert evaluate.main([f"--checkpoint={run}", f"--evals={sets}", "--tasks=mmlu", "--device=cpu", "--threads=1"]) == 0
    assert "has not learned to chat; chat_sft.py teaches it\n" in capsys.readouterr().err


BAD = {
    "mmlu/test.jsonl": [
        (b"", "mmlu (ValueError: it is empty)"), (b"{", "cannot be read"), (b"[]", "does not hold items of mmlu"),
        (b'{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2 is not an option"),
        (b'{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True is not an option"),
        (b'{"question": "q", "choices": ["a"], "answer": 0}', "line 0 has no list of 2 to 10 choices"),
        (b'{"question": "q", "choices": "ab", "answer": 0}', "line 0 has no list of 2 to 10 choices"),
        (b'{"question": "q", "choices": ["a", 1], "answer": 0}', "does not hold items of mmlu"),
        (b'{"question": ["q"], "choices": ["a", "b"], "answer": 0}', "the question in line 0 is not a text"),
        (b'{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}', "cannot be read")],
    "gsm8k/test.jsonl": [
        (b'{"question": "q", "answer": "12"}', "line 0 has no number after ####"),
        (b'{"question": "q"}', "gsm8k (KeyError: 'answer')"),
        (b'{"question": ["q"], "answer": "#### 1"}', "the question in line 0 is not a text")]}


@pytest.mark.parametrize("name, content, words", [
    (name, content, words) for name, cases in BAD.items() for content, words in cases], ids=str)
def test_damaged_questions_are_refused(refused, tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(content)
    refused(f"--tasks={path.parent.name}", f"--evals={tmp_path}", words=[words, str(path)])
