"""evaluate.py: each score is what its definition says, whatever the packing and the number of ranks.

Against: straightforward references written here, which take one prompt at a time, encode it whole and look at all its
logits; the validation loss that the training script logged; the published scores of GPT-2. Items of CORE come from the
development data (those tests skip without it) and are scored by a stand-in model that is quick, depends on the whole
document and now and then gives an exact answer; the rest runs on small sets written here with a small model of
train_gpt.py. Run: python -m pytest tests/test_evaluate.py
"""
import base64
import csv
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, join, make_data, make_text, only_folder, small_flags, tokenizer_json, write_shard
from safetensors.torch import save_file

sys.path.append(str(ROOT / "data"))

import evaluate  # noqa: E402
import gpt2  # noqa: E402
import sample  # noqa: E402
import text  # noqa: E402
import train_gpt  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
CORE = SHARED / "eval" / "core"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="no development data beside the project")
MERGES = [b"\n\n", b"  ", b" a", b"th", b"the", b" the", b"!\n", b"a ", b"\n ", b".\n\n", b" \n", b"a\n", b" t", b"e\n"]


def bpe_spec(merges=MERGES):
    """The content of a tokenizer.json with GPT-2's pattern and tokens that would cross words if that let them."""
    ranks = [base64.b64encode(text).decode() for text in [*(bytes([i]) for i in range(256)), *merges]]
    return {"name": "gpt2", "pattern": evaluate.GPT2_PATTERN, "ranks": ranks,
            "special_tokens": {"<|endoftext|>": len(ranks)}, "bos_id": len(ranks)}


# -----------------------------------------------------------------------------
# CORE, item by item

class StandIn(torch.nn.Module):
    """Logits from the token, the mean of its document so far, and what followed the same token before in it."""

    def __init__(self, vocab_size):
        super().__init__()
        self.cfg, generator = SimpleNamespace(vocab_size=vocab_size, bos_id=vocab_size - 1), np.random.default_rng(0)
        self.token, self.mean, self.out = (generator.normal(size=(vocab_size, 8)) for _ in range(3))

    def logits(self, tokens, rows):
        """Logits (rows, V) at some positions of a packed stream, or of one document."""
        ids, index = tokens.numpy(), np.arange(len(tokens))
        start = np.maximum.accumulate(np.where(ids == self.cfg.bos_id, index, 0))
        total = np.concatenate([np.zeros((1, 8)), self.mean[ids].cumsum(0)])
        x = self.token[ids] + 3 * (total[1:] - total[start]) / (index - start + 1)[:, None]
        order = np.lexsort((index, ids, start))
        again = (ids[order[1:]] == ids[order[:-1]]) & (start[order[1:]] == start[order[:-1]])
        copied = np.full(len(ids), -1)
        copied[order[1:][again]] = ids[order[:-1][again] + 1]
        logits, copied = torch.from_numpy((x[rows] @ self.out.T).astype(np.float32)), torch.from_numpy(copied[rows])
        logits[copied >= 0, copied[copied >= 0]] += 20
        return logits

    def score(self, tokens, targets):
        """The family's score, only where there is a target."""
        rows, losses, likeliest = torch.nonzero(targets >= 0)[:, 0], torch.zeros(len(tokens)), torch.zeros_like(targets)
        logits = self.logits(tokens, rows.numpy())
        losses[rows] = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
        likeliest[rows] = logits.argmax(1)
        return losses, likeliest


def reference_prompts(task, data, i):
    """The prompts of item i, and for lm the one without the answer, put together as one text each."""
    picked = random.Random(1234 + i).sample([other for j, other in enumerate(data) if j != i], task.shots)

    def solved(row):
        if task.kind == "lm":
            return row["context"].strip() + task.delimiter + row["continuation"]
        if task.kind == "choice":
            return row["query"] + task.delimiter + row["choices"][row["gold"]]
        return row["context_options"][row["gold"]] + task.delimiter + row["continuation"]
    examples = "".join(solved(row) + "\n\n" for row in picked)
    row = data[i]
    if task.kind == "lm":
        question = examples + row["context"].strip() + task.delimiter
        return [question + row["continuation"]], question.strip()
    if task.kind == "choice":
        return [examples + row["query"] + task.delimiter + choice for choice in row["choices"]], None
    return [examples + context + task.delimiter + row["continuation"] for context in row["context_options"]], None


def reference_item(model, tokenizer, task, data, i):
    """What evaluate's record of item i should hold."""
    texts, without = reference_prompts(task, data, i)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    if task.kind == "lm":
        known = [tokenizer.bos_id, *tokenizer.encode(without)]
        assert prompts[0][:len(known)] == known and len(prompts[0]) > len(known)
        starts = [len(known)]
    elif task.kind == "choice":
        starts = [len(os.path.commonprefix(prompts))] * len(prompts)
    else:
        starts = [len(prompt) - len(os.path.commonprefix([prompt[::-1] for prompt in prompts])) for prompt in prompts]
    losses, exact = [], []
    for prompt, start in zip(prompts, starts):
        logits = model.logits(torch.tensor(prompt), np.arange(start - 1, len(prompt) - 1))
        answer = torch.tensor(prompt[start:])
        losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none").double())
        exact.append(bool((logits.argmax(1) == answer).all()))
    record = {"task": task.label, "kind": task.kind, "losses": [float(loss.sum()) for loss in losses],
              "tokens": [len(loss) for loss in losses]}
    if task.kind == "lm":
        return record | {"correct": exact[0]}
    means = [float(loss.mean()) for loss in losses]
    choice = means.index(min(means))
    return record | {"gold": data[i]["gold"], "choice": choice, "correct": choice == data[i]["gold"]}


def reference_data(task):
    """The items of a task in the order of the evaluation: (line, item)."""
    rows = list(enumerate(json.loads(line) for line in lzma.open(evaluate.task_file(SHARED / "eval", task))))
    random.Random(1337).shuffle(rows)
    return rows


def same(found, expected, tolerance=1e-3):
    """Whether two lists of records agree: everything but the losses exactly."""
    for one, other in zip(found, expected, strict=True):
        assert {**one, "losses": 0} == {**other, "losses": 0}
        assert np.allclose(one["losses"], other["losses"], atol=tolerance), (one, other)
    return True


@needs_data
def test_every_task_of_core_is_scored_as_by_the_reference(monkeypatch):
    """20 items of each available task; as the number is limited, their examples come from these 20, too."""
    spec = json.loads(text.gpt2_tokenizer_json(SHARED / "gpt2_bpe"))
    spec |= {"ranks": spec["ranks"][:2048], "special_tokens": {"<|endoftext|>": 2048}, "bos_id": 2048}
    tokenizer, model = sample.Tokenizer(spec), StandIn(2049)
    subject = evaluate.Subject("stand-in", model, tokenizer, {"script": "none", "step": 0}, True, train_gpt,
                               train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu"), 16_384)
    monkeypatch.setattr(evaluate, "load_subject", lambda args: subject)
    args = evaluate.parse_args(["--tasks=core", f"--evals={SHARED / 'eval'}", "--max_items=20"])
    result, records = evaluate.evaluate(args)
    assert result["scores"]["core"]["missing"] == ["coqa"] and result["cut_documents"] == 0
    expected = []
    for task in evaluate.TASKS:
        if task.label != "coqa":
            rows = reference_data(task)[:20]
            data = [row for _, row in rows]
            expected += [reference_item(model, tokenizer, task, data, i) | {"line": rows[i][0]} for i in range(20)]
    assert len(expected) == 21 * 20 and same(records, expected)
    right = [record["correct"] for record in expected if record["kind"] == "lm"]
    assert 5 < sum(right) < len(right) - 5, "the stand-in should be right now and then"


@needs_data
def test_the_examples_of_whole_tasks_are_those_of_the_definition():
    for label, kind in (("hellaswag", "choice"), ("piqa", "choice"), ("jeopardy", "lm"), ("winograd", "schema")):
        task = next(task for task in evaluate.TASKS if task.label == label)
        rows = reference_data(task)
        items = evaluate.render(task, rows, True)
        assert len(items) == len(rows)
        for i in (0, 1, 17, len(rows) - 1):
            texts, without = reference_prompts(task, [row for _, row in rows], i)
            assert ["".join(prompt) for prompt in items[i].prompts] == texts
            assert (items[i].line, "".join(items[i].before)) == (rows[i][0], without or "")


@needs_data
def test_the_table_of_tasks_is_that_of_the_bundle():
    entries = (CORE / "core.yaml").read_text().split("\n-\n")[1:]
    field = lambda entry, name, default=None: next(iter(re.findall(rf"^  {name}: (.*)$", entry, re.M)), default)  # noqa
    kinds = {"multiple_choice": "choice", "schema": "schema", "language_modeling": "lm"}
    told = {row["Eval Task"]: row for row in csv.DictReader(open(CORE / "eval_meta_data.csv"))}
    published = [{row[0].strip(): row[1].strip() for row in csv.reader(open(CORE / f"openai-community-gpt2{size}.csv"))}
                 for size in ("", "-medium", "-large", "-xl")]
    assert len(entries) == len(evaluate.TASKS) == 22
    for entry, task in zip(entries, evaluate.TASKS):
        assert field(entry, "label") == task.label
        assert field(entry, "dataset_uri") == f"{task.category}/{task.file or task.label}.jsonl"
        assert field(entry, "num_fewshot") == f"[{task.shots}]"
        assert kinds[field(entry, "icl_task_type")] == task.kind
        assert json.loads(field(entry, "continuation_delimiter", '" "')) == task.delimiter
        assert float(told[task.label]["Random baseline"]) == pytest.approx(100 * task.baseline)
        assert [float(scores[task.label]) for scores in published] == list(task.gpt2)


def test_core_of_the_published_accuracies_is_the_published_core():
    for size, published in enumerate((0.113891, 0.184903, 0.214641, 0.256525)):
        scores = {task.label: {"accuracy": task.gpt2[size], "se": 0.01} for task in evaluate.TASKS}
        found = evaluate.core_score(scores)
        assert found["core"] == pytest.approx(published, abs=2e-6) and found["gpt2"][size] == found["core"]
        expected = sum((0.01 / (1 - task.baseline)) ** 2 for task in evaluate.TASKS) ** 0.5 / 22
        assert (found["n"], found["missing"], found["se"]) == (22, [], pytest.approx(expected, abs=1e-6))


# -----------------------------------------------------------------------------
# Parts

@pytest.mark.parametrize("i", [0, 3, 29])
def test_examples_are_drawn_among_all_other_items(i):
    others = [j for j in range(30) if j != i]
    assert evaluate.few_shot(i, 30, 10) == random.Random(1234 + i).sample(others, 10)


def test_texts_are_cut_only_where_the_tokens_stay_the_same():
    tokenizer, generator = sample.Tokenizer(bpe_spec()), random.Random(0)
    alphabet, pieces = ["the", "a", " ", "\n", "\n\n", "!", "'s", "1", "é", "\t", "\u2003", "\x1c"], 0
    for _ in range(3000):
        texts = ["".join(generator.choices(alphabet, k=generator.randint(0, 4))) for _ in range(4)]
        joined = evaluate.join(texts, True)
        assert "".join(joined) == "".join(texts)
        assert sum(map(tokenizer.encode, joined), []) == tokenizer.encode("".join(texts)), texts
        pieces += len(joined)
    assert pieces > 3500
    assert evaluate.join(["a", " b", "\nc"], False) == ("a b\nc",)


def documents_of(kind, prompts, before=(), merges=MERGES):
    tokenizer = sample.Tokenizer(bpe_spec(merges))
    encoded = {text: np.array(tokenizer.encode(text), np.int32) for prompt in [*prompts, before] for text in prompt}
    item = evaluate.Item("t", kind, 7, 0, prompts, before)
    return evaluate.item_documents(item, encoded, np.array([tokenizer.bos_id], np.int32)), tokenizer


@pytest.mark.parametrize("kind, prompts, before, spans", [
    ("choice", [("q", " xa"), ("q", " xbc")], (), ["a", "bc"]),                     # what differs, not the whole answer
    ("choice", [("q", " x"), ("q", " xy")], (), ["", "y"]),
    ("choice", [("q", " x"), ("q", " xy")], ("q",), [" x", " xy"]),                 # one goes on from the other
    ("choice", [("q", " x"), ("q", " xy"), ("q", " z")], ("q",), ["x", "xy", "z"]),
    ("choice", [("the", "n"), ("the", "n m")], ("th",), ["then", "then m"]),        # its token joins the question's end
    ("choice", [("q", " x"), ("q", " x")], ("q",), [" x", " x"]),
    ("schema", [("one", " end."), ("two", " end.")], (), [" end.", " end."]),
    ("schema", [("cat", " end."), ("rat", " end.")], (), ["at end.", "at end."]),
    ("lm", [("q", "\nA: x y")], ("q", "\nA:"), [" x y"]),
    ("ending", [("ctx ", " end"), ("ctx ", " fin")], ("ctx ",), [" end", " fin"]),
], ids=str)
def test_what_is_scored(kind, prompts, before, spans):
    documents, tokenizer = documents_of(kind, prompts, before)
    for (tokens, start, end), prompt, span in zip(documents, prompts, spans, strict=True):
        assert (tokens[0], end) == (tokenizer.bos_id, len(tokens))
        assert b"".join(map(tokenizer.token_bytes, tokens[1:])) == "".join(prompt).encode()
        assert b"".join(map(tokenizer.token_bytes, tokens[start:end])).decode() == span


@pytest.mark.parametrize("choices, whole", [
    (["a", "ab"], True), (["b c", "x", "b"], True), (["a", "b", "a"], True), (["a", "b a"], False), (["", "b"], True)])
def test_an_answer_that_begins_another_one_is_noticed(choices, whole):
    task = next(task for task in evaluate.TASKS if task.label == "copa")
    item, = evaluate.render(task, [(0, {"query": "q ", "choices": choices, "gold": 0})], True)
    assert item.before == (("q",) if whole else ())


@needs_data
def test_in_piqa_four_items_have_an_answer_that_goes_on_from_the_other():
    """Whole answers are scored there. In item 101 one text begins the other, too, but their last tokens differ."""
    task = next(task for task in evaluate.TASKS if task.label == "piqa")
    tokenizer, whole = sample.Tokenizer(json.loads(text.gpt2_tokenizer_json(SHARED / "gpt2_bpe"))), []
    items = [item for item in evaluate.render(task, reference_data(task), True) if item.before]
    for item in items:
        texts = [piece for prompt in [*item.prompts, item.before] for piece in prompt]
        encoded = evaluate.encode_all(tokenizer, sorted(set(texts)), 1)
        documents = evaluate.item_documents(item, encoded, np.array([50256], np.int32))
        answers = [b"".join(map(tokenizer.token_bytes, tokens[start:end])).decode() for tokens, start, end in documents]
        assert all(answers)
        if all("".join(prompt).endswith("\nAnswer:" + answer) for prompt, answer in zip(item.prompts, answers)):
            whole.append(item.line)
    assert sorted(item.line for item in items) == [101, 178, 355, 987, 1028]
    assert sorted(whole) == [178, 355, 987, 1028]


def test_an_answer_that_is_no_suffix_of_tokens_is_an_error():
    with pytest.raises(evaluate.UserError, match="item 7 of t merges question and answer"):
        documents_of("lm", [("the",)], ("th",))


@pytest.mark.parametrize("label, row, answers", [
    ("lambada_openai", {"context": "it is", "continuation": "done"}, [" done"]),
    ("jeopardy", {"context": "Who? ", "continuation": "me "}, [" me "]),
    ("copa", {"query": "it is", "choices": ["done", "so", "do"], "gold": 1}, [" done", " so", " do"]),
    ("winograd", {"context_options": ["it is", "that was"], "continuation": "done so", "gold": 0}, [" done so"] * 2)])
def test_question_and_answer_are_encoded_apart_for_a_tokenizer_that_joins_words(label, row, answers):
    """The same text; without this a token such as `is done` would belong to both."""
    task = replace(next(task for task in evaluate.TASKS if task.label == label), shots=0)
    joined, = evaluate.render(task, [(0, row)], False)
    item, = evaluate.render(task, [(0, row)], False, apart=True)
    assert ["".join(prompt) for prompt in item.prompts] == ["".join(prompt) for prompt in joined.prompts]
    assert [prompt[-1] for prompt in item.prompts] == answers
    assert "".join(item.before) == "".join(joined.before)
    merges = [b"is done", b"is so", b"is do", b"s d", b": m", b"do", b"done"]
    tokenizer = sample.Tokenizer(bpe_spec([b"is", b" d", b"on", b"is d", *merges])
                                 | {"pattern": sample.gpt4_pattern(2, joined=True)})
    encoded = {piece: np.array(tokenizer.encode(piece), np.int32)
               for prompt in [*item.prompts, item.before] for piece in prompt}
    documents = evaluate.item_documents(item, encoded, np.array([tokenizer.bos_id], np.int32))
    scored = [b"".join(map(tokenizer.token_bytes, tokens[start:end])).decode() for tokens, start, end in documents]
    assert all(map(str.endswith, answers, scored)) and all(scored)
    assert task.kind != "lm" or scored == answers


def test_a_long_document_keeps_its_first_and_its_last_tokens():
    tokens, start, end = evaluate.cut((np.arange(10), 7, 10), 6)
    assert (tokens.tolist(), start, end) == ([0, 5, 6, 7, 8, 9], 3, 6)
    assert evaluate.cut((np.arange(10), 2, 10), 6)[1:] == (1, 6)
    assert evaluate.cut((tokens, start, end), 6) == (tokens, start, end)


def test_streams_hold_every_document_once_with_its_targets():
    generator = np.random.default_rng(0)
    documents = [(np.concatenate([[BOS], generator.integers(0, 256, n - 1)]), s := int(generator.integers(1, n)),
                  int(generator.integers(s, n + 1))) for n in generator.integers(2, 60, 200)]
    seen = []
    for stream in evaluate.pack(iter(documents), 128):
        tokens, targets, spans = evaluate.fill(stream, 128, BOS)
        assert (len(tokens), tokens.dtype, targets.dtype) == (128, np.int32, np.int64)
        scored = np.zeros(128, bool)
        for number, low, high in spans:
            ids, start, end = documents[number]
            assert targets[low:high].tolist() == ids[start:end].tolist()
            assert tokens[low - start + 1:low - start + 1 + len(ids)].tolist() == ids.tolist()
            scored[low:high] = True
            seen.append(number)
        assert (targets[~scored] == -1).all()
    assert seen == list(range(200))


def judged(kind, sums, counts, gold=0, prompts=None, wrong=0):
    item = evaluate.Item("t", kind, 0, gold, prompts or [(str(i),) for i in range(len(sums))])
    return evaluate.judge([item], np.array([[total, n, wrong] for total, n in zip(sums, counts)], float))[0]


def test_the_lowest_mean_loss_decides():
    assert judged("choice", [6, 5, 9], [2, 1, 4])["choice"] == 2
    assert judged("schema", [1, 1], [1, 1], gold=1)["correct"] is False              # the first of equals
    assert judged("choice", [0, 5], [0, 2])["choice"] == 1                           # an answer without a token
    assert judged("choice", [0, 0], [0, 0])["choice"] == 0
    assert judged("choice", [2, 1], [1, 1], prompts=[("same",)] * 2)["choice"] == 0  # whatever the rounding
    ending = judged("ending", [6, 5, 9], [2, 1, 4], gold=1)
    assert (ending["correct"], ending["plain_correct"]) == (False, True)
    assert judged("lm", [3], [2])["correct"] is True and judged("lm", [3], [2], wrong=1)["correct"] is False


def test_standard_errors():
    sums, weights = np.random.default_rng(0).gamma(2, size=(2, 400, 300))
    found = [evaluate.ratio(s, w) for s, w in zip(sums, weights)]
    spread = np.std([mean for mean, _ in found])
    assert found[0][0] == pytest.approx(sums[0].sum() / weights[0].sum())
    assert 0.85 < np.mean([se for _, se in found]) / spread < 1.15
    score = evaluate.task_score(evaluate.HELLASWAG, [{"correct": i < 30} for i in range(101)])
    assert score["se"] == pytest.approx(np.std([1] * 30 + [0] * 71) / 10, abs=1e-6)


def test_there_is_no_standard_error_of_one():
    assert evaluate.ratio(np.array([6.0]), np.array([4.0])) == (1.5, None)
    score = evaluate.task_score(evaluate.TASKS[5], [{"correct": True}])
    core = evaluate.core_score({"copa": score, "winograd": {"accuracy": 0.5, "se": 0.1}})
    assert (score["accuracy"], score["se"], core["se"], core["core"]) == (1, None, None, 0.5)
    result = {"scores": {"val": {"loss": 1.25, "se": None, "n": 1, "tokens": 7}}, "max_items": 0, "cut_documents": 0,
              "answers_apart": False,
              "tokens": 7, "score_seconds": 0.0042, "seconds": 1.5, "compile_seconds": 0.0, "model": "m\x1b",
              "script": "s", "step": 3}
    assert [line.split() for line in evaluate.table(result).splitlines()[2:]] == [
        "val loss, 7 tokens 1.250000 - 1 -".split(), "7 tokens in 0.0042 s, 1.5 s with loading".split()]
    assert evaluate.table(result).startswith("m?, s after 3 steps\n")
    assert evaluate.table(result | {"seconds": 132.06, "compile_seconds": 31.5}).endswith(
        "132.1 s with loading; compilation took 31.5 s more")


# -----------------------------------------------------------------------------
# The command on a small model and small sets

def write_evals(folder):
    """Items of every kind for five tasks of CORE and HellaSwag, some with answers that are the same."""
    generator, words = random.Random(0), "the a old new cat dog house river stone sees finds keeps".split()

    def phrase(n):
        return " ".join(generator.choices(words, k=n))

    def options(n):
        return [phrase(generator.randint(1, 3)) for _ in range(n)]

    def gold(n):
        return generator.randrange(n)
    sets = {
        "commonsense_reasoning/copa": lambda: {"query": phrase(4), "choices": options(2), "gold": gold(2)},
        "world_knowledge/arc_easy":
            lambda: {"query": phrase(2) + " " * gold(2), "choices": options(3), "gold": gold(3)},
        "world_knowledge/jeopardy_all": lambda: {"context": phrase(3), "continuation": "a"},
        "language_understanding/winograd_wsc":
            lambda: {"context_options": options(2), "continuation": phrase(3), "gold": gold(2)},
        "reading_comprehension/coqa": lambda: {"context": phrase(20), "continuation": phrase(1)}}
    for name, make in sets.items():
        path = folder / "core" / "eval_data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(make()) + "\n" for _ in range(14)))
    with lzma.open(folder / "hellaswag_val.jsonl.xz", "wt") as file:
        for _ in range(16):
            row = {"ctx": phrase(4), "endings": options(4), "label": generator.randint(0, 3)}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def evals(tmp_path_factory):
    return write_evals(tmp_path_factory.mktemp("evals"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shards"), train_tokens=60_000)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """The folder of a finished training run of a second."""
    logs = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gpt.py", *small_flags(shards, out_dir=logs, val_every=0, num_iterations=6)])
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setitem(sys.modules, "matplotlib", None)              # no curve, which takes longer than the steps
        assert train_gpt.main() == 0
    return only_folder(logs)


@pytest.fixture
def score(run, evals, capsys, tmp_path):
    """Function of flags that runs the command and returns (the JSON line, the console's table, the items' records)."""
    def main(*flags):
        out = tmp_path / "items.jsonl"
        capsys.readouterr()
        code = evaluate.main([f"--checkpoint={run}", f"--evals={evals}", f"--items_out={out}", "--device=cpu",
                              "--threads=1", *flags])
        console, err = capsys.readouterr()
        assert code == 0, err
        *table, last = console.splitlines()
        return json.loads(last), "\n".join(table), [json.loads(line) for line in out.read_text().splitlines()]
    return main


def test_val_is_the_loss_that_training_logged(run, shards, score):
    logged = json.loads((run / "run.json").read_text())["val_losses"][-1]
    result, table, _ = score("--tasks=val")
    found = result["scores"]["val"]
    assert (found["loss"], found["tokens"]) == (logged["val_loss"], logged["tokens"])
    assert f"val loss, {logged['tokens']:,} tokens" in table and f"{logged['val_loss']:.6f}" in table
    assert 0 < found["se"] < 0.5 and found["n"] > 2
    assert result["tokens"] == logged["tokens"] and 0 < result["score_seconds"] < result["seconds"]
    *_, last = table.splitlines()
    assert last.startswith(f"{logged['tokens']:,} tokens in ") and " 0 s" not in table and "compil" not in table
    one = score("--tasks=val", f"--shards={shards}/val_*.bin")[0]["scores"]["val"]
    assert one == found


@pytest.mark.parametrize("stream_tokens", [256, 4096])
def test_bpb_is_nats_over_the_bytes_of_the_text(run, shards, score, stream_tokens):
    """Documents have up to about 330 tokens, so that the shorter stream also splits some."""
    model, _, _ = sample.load_checkpoint(sample.resolve_checkpoint(run), "cpu")
    nats, size, count, taken = 0, 0, 0, 0
    ids = np.fromfile(shards / "val_000000.bin", "<u2", offset=1024).astype(np.int64)
    for doc in np.split(ids, np.flatnonzero(ids == BOS))[1:]:
        if taken >= 2000:
            break
        taken += len(doc)
        for low in range(1, len(doc), stream_tokens - 1):
            tokens = torch.from_numpy(np.concatenate([[BOS], doc[low:low + stream_tokens - 1]])).int()
            nats += torch.nn.functional.cross_entropy(model(tokens)[:-1].double(), tokens[1:].long(), reduction="sum")
            size, count = size + len(tokens) - 1, count + 1
    result, table, _ = score("--tasks=bpb", "--bpb_tokens=2000", f"--stream_tokens={stream_tokens}")
    found = result["scores"]["bpb"]
    assert (found["bytes"], found["tokens"], found["n"]) == (size, size, count)
    assert found["bpb"] == pytest.approx(float(nats) / size / np.log(2), abs=1e-5) and 0 < found["se"] < 0.5
    assert f"bits per byte, {size:,} bytes" in table
    whole = score("--tasks=bpb", "--bpb_tokens=0", f"--shards={shards}/val_*.bin")[0]["scores"]["bpb"]
    assert whole["bytes"] == len(ids) - (ids == BOS).sum()


def test_bytes_are_those_of_the_raw_tokens():
    tokenizer = sample.Tokenizer(bpe_spec())
    documents = [(np.array([tokenizer.bos_id, *tokenizer.encode(words), tokenizer.bos_id]), 1, 0)
                 for words in ("the é", "!")]
    found = evaluate.bits_per_byte(documents, np.array([[6 * np.log(2), 3, 0], [np.log(2), 2, 0]]), tokenizer)
    assert (found["bytes"], found["bpb"]) == (len("the é!".encode()), 1.0)


def test_all_scores_with_what_one_needs_to_judge_them(score):
    result, table, records = score("--tasks=hellaswag,core")
    scores, core = result["scores"], result["scores"]["core"]
    assert scores["hellaswag"]["norm"]["n"] == 16 and scores["hellaswag"]["plain"]["chance"] == 0.25
    assert core["tasks"].keys() == {"arc_easy", "copa", "jeopardy", "winograd", "coqa"} and core["n"] == 5
    assert len(core["missing"]) == 17
    assert "5 of 22 tasks; missing: hellaswag_zeroshot, bigbench_qa_wikidata, " in table
    mean = np.mean([(core["tasks"][task.label]["accuracy"] - task.baseline) / (1 - task.baseline)
                    for task in evaluate.TASKS if task.label in core["tasks"]])
    assert core["core"] == pytest.approx(mean, abs=2e-6)
    for name, own in {"hellaswag": scores["hellaswag"]["norm"], **core["tasks"]}.items():
        correct = [record["correct"] for record in records if record["task"] == name]
        assert (own["n"], own["accuracy"]) == (len(correct), round(sum(correct) / len(correct), 6))
        assert {"se", "chance"} < own.keys() and len(own["gpt2"]) == 4
    assert result["compile_seconds"] == 0 and result["tokens"] > 1000 and "0.2565" not in table


def test_two_packings_give_the_same_items(score):
    first = score("--tasks=hellaswag,core", "--stream_tokens=512")
    second = score("--tasks=hellaswag,core", "--stream_tokens=8192")
    assert first[0]["cut_documents"] == second[0]["cut_documents"] == 0
    assert same(first[2], second[2]) and first[0]["scores"] == second[0]["scores"]


def test_prompts_beyond_the_stream_are_cut_and_counted(score):
    result, table, _ = score("--tasks=core", "--stream_tokens=256")
    assert result["cut_documents"] > 14 and f"{result['cut_documents']} prompts were too long" in table


def test_max_items_says_so(score):
    result, table, records = score("--tasks=hellaswag", "--max_items=11")
    assert result["scores"]["hellaswag"]["norm"]["n"] == 11 == len(records) and "only 11 items" in table
    assert [record["line"] for record in records] != sorted(record["line"] for record in records)


def test_hellaswag_takes_the_ending_with_the_lowest_loss(run, evals, score):
    model, tokenizer, _ = sample.load_checkpoint(sample.resolve_checkpoint(run), "cpu")
    _, _, records = score("--tasks=hellaswag")
    rows = [json.loads(line) for line in lzma.open(evals / "hellaswag_val.jsonl.xz")]
    for record in records:
        row, sums, means = rows[record["line"]], [], []
        for ending in row["endings"]:
            answer = tokenizer.encode(" " + ending)
            tokens = torch.tensor([BOS, *tokenizer.encode(row["ctx"]), *answer], dtype=torch.int32)
            losses = torch.nn.functional.cross_entropy(model(tokens)[-len(answer) - 1:-1], torch.tensor(answer),
                                                       reduction="none")
            sums, means = [*sums, float(losses.sum())], [*means, float(losses.mean())]
        assert np.allclose(record["losses"], sums, atol=1e-3)
        assert record["choice"] == int(np.argmin(means)) and record["gold"] == row["label"]
        assert record["plain_correct"] == (int(np.argmin(sums)) == row["label"])


def test_nothing_changes_but_the_items_file(run, evals, shards, score):
    def state():
        files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for folder in (run, evals, shards)
                 for path in folder.rglob("*") if path.is_file()}
        return (files, {path: path.stat().st_mtime_ns for path in files}, torch.get_rng_state().tolist(),
                str(np.random.get_state()), random.getstate())
    before = state()
    score("--tasks=val,bpb,hellaswag,core")
    assert state() == before


def rank_main(flags):
    """The command of one rank."""
    torch.set_num_threads(1)
    return evaluate.main(flags)


def test_two_ranks_give_the_same_items_and_scores(run, evals, score, start_ranks, tmp_path):
    flags = ["--tasks=val,bpb,hellaswag,core", "--stream_tokens=512"]
    result, _, records = score(*flags, f"--losses_out={tmp_path / 'one.npz'}")
    out = tmp_path / "two.jsonl"
    processes = start_ranks(2, rank_main, [f"--checkpoint={run}", f"--evals={evals}", f"--items_out={out}",
                                           f"--losses_out={tmp_path / 'two.npz'}", "--device=cpu", *flags])
    assert join(processes) == [0, 0], [process.output.read_text() for process in processes]
    two = json.loads(processes[0].output.read_text().splitlines()[-1])
    assert out.read_bytes() == (tmp_path / "items.jsonl").read_bytes() and len(records) == 16 + 5 * 14
    assert two["world_size"] == 2 and two["scores"]["val"].pop("loss") == pytest.approx(
        result["scores"]["val"].pop("loss"), abs=2e-6)
    assert two["scores"] == result["scores"] and processes[1].output.read_text() == ""
    one, both = (np.load(tmp_path / f"{name}.npz", allow_pickle=False) for name in ("one", "two"))
    assert len(one["losses"]) == result["scores"]["bpb"]["tokens"] and (one["tokens"] == both["tokens"]).all()
    assert np.allclose(one["losses"], both["losses"], atol=1e-5)


def test_original_weights_are_evaluated_too(evals, shards, tmp_path, monkeypatch, capsys):
    """Their context is short, so that some prompts are cut."""
    spec = json.loads(tokenizer_json())
    monkeypatch.setattr(gpt2, "read_tokenizer", lambda folder: tokenizer_json())
    cfg = gpt2.Config(257, 128, 2, 2, 32, 1e-5, spec["bos_id"])
    save_file({name: 0.02 * (tensor.T.contiguous() if ".c_" in name and tensor.dim() == 2 else tensor)
               for name, tensor in gpt2.GPT2(cfg).state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": 257, "n_positions": 128, "n_layer": 2, "n_head": 2, "n_embd": 32,
        "layer_norm_epsilon": 1e-5, "bos_token_id": 256, "activation_function": "gelu_new"}))
    assert evaluate.main([f"--model={tmp_path}", f"--evals={evals}", "--tasks=bpb,hellaswag,core", "--device=cpu",
                          f"--shards={shards}/val_*.bin", "--bpb_tokens=1000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["script"] == "gpt2" and result["cut_documents"] > 14
    scores = result["scores"]
    assert scores["bpb"]["bpb"] == pytest.approx(np.log2(257), abs=0.1) and scores["hellaswag"]["norm"]["n"] == 16


# -----------------------------------------------------------------------------
# Bad input

@pytest.fixture
def refused(run, evals, capsys, tmp_path):
    """Function that expects exit code 2 and one line with all the words, and no items file."""
    def check(*flags, words, checkpoint=True):
        given = [f"--checkpoint={run}"] * checkpoint + [f"--evals={evals}", "--device=cpu", "--threads=1"]
        items = tmp_path / "refused.jsonl"
        capsys.readouterr()
        code = evaluate.main([*given, f"--items_out={items}", *map(str, flags)])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
        assert err.startswith("evaluate.py: ") and [word for word in words if str(word) not in err] == [], err
        assert not items.exists()
    return check


@pytest.mark.parametrize("flags, words", [
    (["--tasks=val,coqa"], ["--tasks=coqa does not exist; choose from val,bpb,hellaswag,core,arc,mmlu"]),
    (["--tasks="], ["--tasks= does not exist"]),
    (["--evals=nowhere"], ["--evals=nowhere has no data of hellaswag", "python data/evals.py", "--tasks=val,bpb"]),
    (["--evals=nowhere", "--checkpoint=no_run"], ["--checkpoint=no_run is not a folder"]),
    (["--stream_tokens=1000"], ["--stream_tokens=1000 must be a multiple of 128"]),
    (["--max_items=10"], ["--max_items=10 must be 0 (all) or above 10"]),
    (["--bpb_tokens=-1"], ["--bpb_tokens=-1 must be"]),
    (["--model=gpt2"], ["--model=gpt2 and --checkpoint=", "give one of them"]),
    (["--threads=2000"], ["--threads=2000 must be 0"]),
    (["--vocab_dir="], ["--vocab_dir", "the path is empty"]),
    (["--items_out=nowhere/x.jsonl"], ["--items_out=nowhere/x.jsonl is in a folder that does not exist"]),
    (["--tasks=val", "--shards=nowhere/*.bin"], ["--shards=nowhere/*.bin matches no file"]),
    (["--checkpoint=nowhere"], ["--checkpoint=nowhere is not a folder"]),
    (["--frobnicate"], ["--frobnicate", "--help lists the flags"]),
], ids=str)
def test_a_bad_flag_is_refused(refused, flags, words):
    refused(*flags, words=words)


@pytest.mark.parametrize("flags, words", [
    (["--model=gpt2", "--tasks=val"], ["--model=gpt2 has no training script"]),
    (["--model=gpt2", "--tasks=bpb"], ["--model=gpt2 needs --shards=GLOB"]),
    (["--model=gpt3", "--tasks=hellaswag"], ["--model=gpt3 is neither a folder nor one of gpt2, "]),
    (["--model=gpt2", "--tasks=core", "--vocab_dir=x"], ["--model=gpt2 and --vocab_dir=x are both given"]),
], ids=str)
def test_a_bad_model_is_refused(refused, flags, words):
    refused(*flags, words=words, checkpoint=False)


def test_a_folder_without_a_checkpoint_and_one_with_several_are_refused(run, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(f"--out_dir={tmp_path / 'empty'}", words=["has no run with a checkpoint"], checkpoint=False)
    refused(f"--checkpoint={tmp_path / 'empty'}", words=["holds no checkpoint"], checkpoint=False)
    for name in ("one", "two"):
        (tmp_path / "logs" / name / "checkpoint").mkdir(parents=True)
        (tmp_path / "logs" / name / "checkpoint" / "latest").write_text("step_000006")
    words = ["is not a checkpoint, but it holds", "logs/one/checkpoint", "logs/two/checkpoint", "name one of them"]
    refused(f"--checkpoint={tmp_path / 'logs'}", words=words, checkpoint=False)


def test_the_newest_run_is_evaluated_and_named(run, evals, tmp_path, capsys):
    for name, stamp in (("a", 3e9), ("b", 1e9)):
        shutil.copytree(run, tmp_path / name)
        os.utime(tmp_path / name / "checkpoint" / "latest", (stamp, stamp))
    assert evaluate.main([f"--out_dir={tmp_path}", f"--evals={evals}", "--tasks=hellaswag", "--device=cpu",
                          "--threads=1"]) == 0
    out, err = capsys.readouterr()
    newest = sample.resolve_checkpoint(tmp_path / "a")
    assert err == f"evaluate.py: {newest}\n" and out.startswith(f"{newest}, train_gpt after 6 steps\n")
    assert json.loads(out.splitlines()[-1])["model"] == str(newest)


def test_paths_may_have_brackets_blanks_and_a_home_folder(run, evals, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my [1]*"
    folder.mkdir()
    for name, source in (("run", run), ("evals", evals), ("shards", shards)):
        (folder / name).symlink_to(source)
    wanted = evaluate.main([f"--checkpoint={run}", f"--evals={evals}", "--tasks=val", "--threads=1"])
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    for shard in ("val_*.bin", "val_000000.bin"):
        code = evaluate.main(["--checkpoint=~/my [1]*/run", "--evals=~/my [1]*/evals", "--tasks=val", "--threads=1",
                              f"--shards=~/my [1]*/shards/{shard}", "--items_out=~/my [1]*/items [2].jsonl"])
        out, err = capsys.readouterr()
        assert (wanted, code) == (0, 0), err
        assert json.loads(out.splitlines()[-1])["scores"] == expected and (folder / "items [2].jsonl").is_file()


def test_items_out_may_not_be_a_folder(refused, tmp_path):
    refused(f"--items_out={tmp_path}", words=[f"--items_out={tmp_path} is a folder; name a file"])


@pytest.mark.parametrize("env, words", [
    ({"RANK": ""}, ["RANK='' in the environment is not a number"]),
    ({"WORLD_SIZE": "two"}, ["WORLD_SIZE='two' in the environment is not a number"]),
    ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK='-1' in the environment is not a number"]),
    ({"LOCAL_WORLD_SIZE": "1.0"}, ["LOCAL_WORLD_SIZE='1.0' in the environment is not a number"]),
    ({"RANK": "\u0663"}, ["RANK=", "is not a number"]),
    ({"RANK": "1"}, ["RANK=1 and LOCAL_RANK=0", "must be below WORLD_SIZE=1"]),
    ({"RANK": "0", "LOCAL_RANK": "2", "WORLD_SIZE": "2"}, ["LOCAL_RANK=2", "must be below WORLD_SIZE=2"]),
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 is in the environment without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"]),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, ["without MASTER_ADDR, MASTER_PORT"]),
], ids=str)
def test_ranks_that_torchrun_did_not_set_are_refused(refused, monkeypatch, env, words):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    refused(words=[*words, "start evaluate.py with torchrun, or unset RANK"])


def test_ranks_that_cannot_meet_are_reported(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("connection refused")
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(evaluate.UserError, match="the 2 ranks cannot reach each other .connection refused.; start"):
        evaluate.join_ranks(SimpleNamespace(world_size=2, device=torch.device("cpu")))


def test_val_needs_no_tokenizer_and_the_other_scores_say_where_to_get_it(run, refused, score, tmp_path, monkeypatch):
    """As for a model trained on published shards, whose vocabulary is GPT-2's."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    folder = sample.resolve_checkpoint(copy)
    (folder / "tokenizer.json").unlink()
    meta = json.loads((folder / "meta.json").read_text())
    monkeypatch.setattr(sample, "GPT2_TOKENIZER_SHA256", meta["tokenizer_sha256"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    assert score(f"--checkpoint={copy}", "--tasks=val")[0]["scores"] == score("--tasks=val")[0]["scores"]
    for task in ("bpb", "hellaswag"):
        flags = f"--checkpoint={copy}", f"--tasks={task}"
        refused(*flags, words=[folder / "tokenizer.json", "is missing", "--vocab_dir="])
        refused(*flags, f"--vocab_dir={tmp_path}", words=["--vocab_dir=", tmp_path])


def test_the_threads_are_chosen_by_a_short_stream(run, evals, monkeypatch, capsys):
    asked = []

    def choose(step, most, given):
        asked.append((step(), given))
        return "CPU threads: 1"
    monkeypatch.setattr(sample, "choose_threads", choose)
    flags = [f"--checkpoint={run}", f"--evals={evals}", "--tasks=hellaswag", "--device=cpu"]
    assert evaluate.main([*flags, "--threads=3"]) == 0
    assert asked == [(None, 3)] and capsys.readouterr().err == "evaluate.py: CPU threads: 1\n"


@pytest.mark.parametrize("module", [sample, evaluate])
def test_docs_name_every_flag_and_no_other(module, capsys):
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    flags = {"--help"} | set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.M))
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split(f"## Flags of {module.__name__}.py")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(--\w+)", section, re.M)) == flags


def test_shards_of_another_tokenizer_are_refused(refused, tmp_path):
    other = tokenizer_json([bytes([255 - i]) for i in range(256)])
    write_shard(tmp_path / "val_000000.bin", make_text(3000, 0), sha256=hashlib.sha256(other).digest())
    for task in ("val", "bpb"):
        words = ["val_000000.bin is in another vocabulary than ", "--shards="]
        refused(f"--tasks={task}", f"--shards={tmp_path}/val_*.bin", words=words)


def test_a_model_with_more_special_tokens_reads_the_same_shards(shards):
    """A model that learned to chat has its base model's vocabulary and a few special tokens more."""
    first = train_gpt.open_shards(f"{shards}/val_*.bin", f"{shards}/val_*.bin")[0][0]
    base = json.loads(train_gpt.read_tokenizer(first))

    def reads(shard=first, special=None, **changes):
        tokenizer = sample.Tokenizer(base | {"special_tokens": base["special_tokens"] | (special or {})} | changes)
        return evaluate.has_ids_of(SimpleNamespace(module=train_gpt, tokenizer=tokenizer), shard)
    assert reads() and reads(special={"<|user_start|>": 257})
    assert not reads(special={"<|bos|>": 257, "<|user_start|>": 256}, bos_id=257)
    assert not reads(ranks=base["ranks"][::-1])
    assert not reads(replace(first, tokenizer="ab" * 32))           # the file beside the shard is not its tokenizer
    assert not evaluate.has_ids_of(SimpleNamespace(module=train_gpt, tokenizer=None), first)


@pytest.mark.parametrize("content, words", [
    (b"{", "cannot be read"), (b"[]", "does not hold items of hellaswag"),
    (b'{"ctx": "x"}', "does not hold items of hellaswag (KeyError: 'endings')"),
], ids=str)
def test_damaged_items_are_refused(refused, tmp_path, content, words):
    (tmp_path / "hellaswag_val.jsonl").write_bytes(content)
    refused("--tasks=hellaswag", f"--evals={tmp_path}", words=[words, "python data/evals.py --force"])


def test_a_model_that_is_broken_is_refused(run, refused, tmp_path):
    folder = tmp_path / "step_000001"
    shutil.copytree(sample.resolve_checkpoint(run), folder)
    model, _, _ = sample.load_checkpoint(folder, "cpu")
    model.lm_head.fill_(float("nan"))
    save_file(model.state_dict(), folder / "model.safetensors")
    for task, words in (("val", "the validation loss of"), ("hellaswag", "the losses of")):
        refused(f"--checkpoint={folder}", f"--tasks={task}", words=[words, "step_000001"])
