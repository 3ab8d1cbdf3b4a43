"""data/chat.py: conversations become the right tokens with the right mask, and none of them gets lost.

Proves: which tokens are trained, token by token; the calculator's results and bounds; the forms of the tasks and how
their answers are read; words for evaluation are never trained.
Against: sequences written out by hand, a tokenizer of single bytes.
Run: python -m pytest tests/test_chat_data.py (two tests need ../shared/data and skip without it)
"""
import gzip
import itertools
import json
import lzma
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
from sample import Tokenizer, import_script  # noqa: E402

chat = import_script(ROOT / "data" / "chat.py", ("render", "prime"))
SHORT = dict(zip(chat.SPECIAL_TOKENS, "B U u A a P p O o".split()))


class Letters:
    """A tokenizer whose ids are characters, so that tokens can be read: special ones have two."""

    def encode(self, text):
        return list(text)

    def special(self, name):
        return "$" + SHORT[name]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def part(kind, text):
    return {"type": kind, "text": text}


CALL = [part("text", "x="), part("python", "1+1"), part("python_output", "2"), part("text", "!")]


@pytest.mark.parametrize("messages, ids, mask", [
    ([user("hi"), assistant("yo")], "$B $U h i $u $A y o $a", "000000111"),
    ([user("a"), assistant("b"), user("c"), assistant("d")],
     "$B $U a $u $A b $a $U c $u $A d $a", "0000011000011"),
    ([user("s"), assistant(CALL)], "$B $U s $u $A x = $P 1 + 1 $p $O 2 $o ! $a",
     "00000" + "11" + "11111" + "000" + "11"),
    ([{"role": "system", "content": "be"}, user("c"), assistant("d")], "$B $U b e \n \n c $u $A d $a", "00000000011"),
    ([user("q")], "$B $U q $u", "0000"),
    ([user(""), assistant("")], "$B $U $u $A $a", "00001"),
    ([user([part("text", "a"), part("text", "b")]), assistant([])], "$B $U a b $u $A $a", "0000001"),
])
def test_golden_ids_and_masks(messages, ids, mask):
    wanted = ids.split(" ")
    assert chat.render(messages, Letters()) == (wanted, [int(bit) for bit in mask])


def test_the_plain_template_writes_markers_as_text():
    ids, mask = chat.render([user("s"), assistant(CALL)], Letters(), "plain")
    assert ids[0] == "$B" and "".join(ids[1:]) == "### User\ns\n\n### Assistant\nx=[[1+1]]((2))!\n\n"
    assert "".join(token for token, bit in zip(ids, mask) if bit) == "x=[[1+1]]!\n\n"


def test_text_that_spells_a_special_token_is_text():
    ids, _ = chat.render([user("<|user_end|>"), assistant("")], Letters())
    assert ids == ["$B", "$U", *"<|user_end|>", "$u", "$A", "$a"]


def test_prime_ends_where_the_answer_begins():
    messages = [user("a"), assistant("b"), user("c")]
    assert chat.prime(messages, Letters()) == "$B $U a $u $A b $a $U c $u $A".split()
    whole, _ = chat.render([*messages, assistant("d")], Letters())
    assert whole[:11] == chat.prime(messages, Letters())
    with pytest.raises(chat.InputError, match="nothing to answer"):
        chat.prime(messages[:2], Letters())


@pytest.mark.parametrize("messages, reason", [
    ([], "not a list"), ("text", "not a list"), ([{"role": "user"}], "lacks"), ([assistant("a")], "turn 1 is of"),
    ([user("a"), user("b")], "turn 2 is of 'user'"), ([{"role": "system", "content": "a"}], "no user message"),
    ([user(3)], "neither a text"), ([user([part("python", "1")])], "a part of 'user'"),
    ([user("a"), assistant([part("image", "1")])], "a part of 'assistant'"),
    ([user("a"), assistant([{"type": "text"}])], "a part of 'assistant'"),
    ([{"role": "system", "content": None}, user("a")], "'system'"),
])
def test_messages_that_are_no_conversation(messages, reason):
    for function in (chat.render, chat.prime):
        with pytest.raises(chat.InputError, match=reason):
            function(messages, Letters())


@pytest.mark.parametrize("expression, result", [
    ("48/2", "24"), ("2*(3+4)-1", "13"), ("-(3+4)*2.5", "-17.5"), ("1,000*3", "3000"), (".5*3", "1.5"),
    ("1/3", "0.3333333333"), ("0.1+0.2", "0.3"), ("10/4", "2.5"), (" 1 + 1 ", "2"), ("-1/10000000000000", "0"),
    ("'strawberry'.count('r')", "3"), ('"strawberry".count("z")', "0"), ("'a,b,c'.count(',')", "2"),
    ("'profile'.count('e')", "1"), ("'a'.count('a')*2", "2"), ("'it'.count('')", "3"), ('"o\'clock".count("\'")', "1"),
])
def test_calculator(expression, result):
    assert chat.calculate(expression) == result


@pytest.mark.parametrize("expression", [
    "", " ", "x", "2**9", "7//2", "7%2", "1/0", "1e9", "'a'", "'a'+'b'", "1.count(2)", "'a'.count(3)", "'a'.upper()",
    "'a'.count('a', 1)", "'a'.count", "__import__('os')", "'a'.__class__", "(1).real", "[1]", "1,2,'a'.count('a')",
    "9" * 400, "9999999999*9999999999", "(" * 200 + "1" + ")" * 200, "(" * 255, "1+" * 127 + "1+", "1 1", "01", "1_0",
    "0x1f", "True", "1if 1else 2", "'\\'.count('a')", "'a\n'.count('a')", "\0", "٣", "'a'.count('a')" * 30,
    "lambda: 1", "f'{1}'",
    "'a'*9", "--" * 127 + "1" * 9,
])
def test_the_calculator_refuses_all_else(expression):
    assert chat.calculate(expression) is None


def test_the_calculator_knows_what_gsm8k_computes():
    path = SHARED / "eval" / "gsm8k" / "train.jsonl.xz"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    with lzma.open(path, "rt") as lines:
        items = [json.loads(line) for line, _ in zip(lines, range(1000))]
    found = [chat.calculate(part["text"]) for item in items for part in chat.gsm8k_messages(item)[1]["content"]
             if part["type"] == "python"]
    assert len(found) > 3000 and found.count(None) < 0.002 * len(found)


def test_task_forms():
    assert chat.multiple_choice("Why?", "AB", ["so", "no"]) == (
        "Choose the right answer. Why?\n- so=A\n- no=B\n\nReply with its letter alone.")
    row = {"question": "Why?", "choices": ["so", "no"], "answer": 1}
    assert chat.mmlu_messages(row) == [user(chat.multiple_choice("Why?", "AB", ["so", "no"])), assistant("B")]
    item = {"question": "How many?", "answer": "He has 4/2=<<4/2=2>>2.\n#### 1,002"}
    assert chat.gsm8k_messages(item) == [user("How many?"), assistant([
        part("text", "He has 4/2="), part("python", "4/2"), part("python_output", "2"),
        part("text", "2.\n#### 1,002")])]
    assert chat.gsm8k_answer(item["answer"]) == "1002"
    assert chat.spelling_item("river", 3)[1] == assistant("river: r,i,v,e,r")
    question, answer = chat.spellingbee_item("river", "r", 1)
    assert "river" in question["content"] and answer["content"][:2] == [
        part("python", "'river'.count('r')"), part("python_output", "2")]
    assert chat.spellingbee_answer(answer["content"][2]["text"]) == "2"


@pytest.mark.parametrize("text, answer", [
    ("#### 12", "12"), ("so\n#### -3.5 apples", "-3.5"), ("#### $1,234.", "1234"), ("####5", "5"),
    ("#### 1 #### 2", "1"),
    ("12", None), ("#### none", None), ("### 12", None), ("#### .5", ".5"), ("", None),
])
def test_answers_are_read(text, answer):
    assert chat.gsm8k_answer(text) == answer


def test_words_for_evaluation_are_not_trained():
    train = {word for word, _ in chat.spelling_word_tasks(3000, seed=0)}
    held_out = {word for word, _ in chat.spelling_word_tasks(200, seed=0, held_out=True)}
    assert len(train) > 2000 and len(held_out) > 100 and not train & held_out
    assert "strawberry" not in train and all(3 <= len(word) <= 12 and word.isascii() for word in train | held_out)
    given = chat.spelling_words(50, 0, words=["river", "strawberry"])
    assert {*given} == {"river"}
    with pytest.raises(chat.InputError, match="for training"):
        chat.spelling_words(5, 0, words=["strawberry"])
    assert chat.spelling_word_tasks(20, 7) == chat.spelling_word_tasks(20, 7) != chat.spelling_word_tasks(20, 8)


# -----------------------------------------------------------------------------
# The command


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talks(count, words=3, seed=0):
    """Conversations with different texts, of one or two exchanges."""
    rng = random.Random(seed)
    return [{"messages": [message for turn in range(1 + i % 2) for message in (
        user(f"q{i} {turn} " + "x" * rng.randint(0, words)), assistant("y" * rng.randint(0, words)))]}
        for i in range(count)]


def read_side(folder, side):
    """[(ids, mask)] of the documents of all shards of a side, read as docs/formats.md says."""
    found = []
    for path in sorted(folder.glob(f"{side}_*.bin")):
        header = np.fromfile(path, "<i4", 256)
        assert header[:2].tolist() == [20240520, 1] and header[5] == 2
        other = np.fromfile(path.with_suffix(".mask"), "<i4", 256)
        assert other[5] == 1 and np.array_equal(np.delete(header, 5), np.delete(other, 5))
        ids, mask = np.fromfile(path, "<u2", offset=1024), np.fromfile(path.with_suffix(".mask"), "u1", offset=1024)
        assert len(ids) == len(mask) == header[2]
        starts = [*np.flatnonzero(ids == header[4]).tolist(), len(ids)]
        assert starts[0] == 0
        found += [(ids[low:high].tolist(), mask[low:high].tolist()) for low, high in itertools.pairwise(starts)]
    return found


@pytest.fixture
def run(tmp_path, capsys):
    """Function of arguments that runs the command into tmp_path/out; its output, and the folder."""
    def call(*argv, tokenizer="bytes"):
        chat.main([f"--tokenizer={tokenizer}", f"--out={tmp_path / 'out'}", *map(str, argv)])
        return capsys.readouterr().out, tmp_path / "out"
    return call


@pytest.fixture
def refused(run, tmp_path, capsys):
    """Function of arguments that must be refused by one line with these words, with nothing written."""
    def call(*argv, words=()):
        with pytest.raises((chat.InputError, SystemExit)) as raised:
            run(*argv)
        line = str(raised.value) if isinstance(raised.value, chat.InputError) else capsys.readouterr().err
        assert all(word in line for word in words) and line.strip().count("\n") == 0, line
        assert not (tmp_path / "out").exists()
    return call


def byte_tokenizer():
    return chat.ChatTokenizer(chat.extend_tokenizer(chat.shards.bytes_tokenizer_json()))


def test_every_token_of_every_conversation_is_used_once_or_counted_as_cut(run, tmp_path):
    rows = talks(120, words=80)
    out, folder = run(write_rows(tmp_path / "my.jsonl", rows), "--max_tokens=100", "--shard_tokens=1000")
    counts = json.loads((folder / "manifest.json").read_text())["made_by"]["counts"]
    written = read_side(folder, "train") + read_side(folder, "val")
    whole = [chat.render(row["messages"], byte_tokenizer()) for row in rows]
    assert counts["read"] == len(written) == len(rows) and len([*folder.glob("train_*.bin")]) > 2
    assert counts["tokens_cut"] == sum(len(ids) for ids, _ in whole) - sum(len(ids) for ids, _ in written) > 0
    assert max(len(ids) for ids, _ in written) <= 100
    by_start = {tuple(ids[:7]): (ids, mask) for ids, mask in whole}     # the number of the conversation is in there
    for ids, mask in written:
        wanted, wanted_mask = by_start.pop(tuple(ids[:7]))
        assert ids == wanted[:len(ids)] and mask == wanted_mask[:len(ids)]
        end = byte_tokenizer().special("<|assistant_end|>")
        assert ids[-1] == end or len(ids) == 100                        # a turn is cut only if no answer fits
    assert f"cut: {counts['cut']:,} conversations, which lost {counts['tokens_cut']:,} tokens" in out


def test_the_result_is_the_same_again_and_the_seed_changes_it(run, tmp_path):
    rows = write_rows(tmp_path / "my.jsonl", talks(30))
    def contents(*argv):
        _, folder = run(rows, "spellingbee:20", "spelling:10", "identity:10", *argv)
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    first = contents()
    assert sorted(first) == ["manifest.json", "tokenizer.json", "train_000000.bin", "train_000000.mask",
                             "val_000000.bin", "val_000000.mask"]
    assert contents() == first and contents("--seed=1")["train_000000.bin"] != first["train_000000.bin"]


def test_made_conversations_are_joined(run, tmp_path):
    rows = write_rows(tmp_path / "my.jsonl", talks(5))
    out, folder = run(rows, "spelling:60", "spellingbee:60", "--turns=4", "--val_fraction=0")
    start = byte_tokenizer().special("<|assistant_start|>")
    written = [ids for ids, _ in read_side(folder, "train")]
    exchanges = Counter(ids.count(start) for ids in written)
    assert f"125 conversations read\n  joined into {len(written)}\n" in out
    assert sum(number * count for number, count in exchanges.items()) == 60 + 60 + 7 and {*exchanges} == {1, 2, 3, 4}
    alone = [{"role": "system", "content": "s"}, *talks(1)[0]["messages"]]
    assert sorted(map(len, chat.join([alone] * 20, 5, 0))) == [3] * 20


def test_weights_repeat_and_thin_out(run, tmp_path):
    twice = write_rows(tmp_path / "a=1.jsonl", talks(40))
    third = write_rows(tmp_path / "b.jsonl", [{"messages": [user(f"b{i}"), assistant("b")]} for i in range(400)])
    _, folder = run(f"{twice}=2.5", f"{third}=0.25", "--val_fraction=0")
    found = Counter(tuple(ids) for ids, _ in read_side(folder, "train"))
    of_b = [count for ids, count in found.items() if ids[2] == ord("b")]
    of_a = [count for ids, count in found.items() if ids[2] == ord("q")]
    assert {*of_a} == {2, 3} and len(of_a) == 40 and {*of_b} == {1} and 60 < len(of_b) < 140
    assert not read_side(folder, "val")


def test_identical_conversations_are_on_one_side(run, tmp_path):
    rows = talks(50) * 3
    out, folder = run(write_rows(tmp_path / "my.jsonl", rows), "--val_fraction=0.2")
    assert "left out: 20 x copy of a validation conversation" in out
    train, val = ([tuple(ids) for ids, _ in read_side(folder, side)] for side in ("train", "val"))
    assert not {*train} & {*val} and len(val) == len({*val}) == 10 and len(train) == 120


def test_the_budget_leaves_conversations_out_and_says_so(run, tmp_path):
    out, folder = run(write_rows(tmp_path / "my.jsonl", talks(60, 30)), "--tokens=800")
    written = read_side(folder, "train")
    assert 700 < sum(len(ids) for ids, _ in written) <= 800
    left = 60 - len(written) - len(read_side(folder, "val"))
    assert f"left out: {left:,} x beyond --tokens" in out


def test_bad_rows_are_counted_and_named(run, tmp_path):
    path = tmp_path / "my.jsonl.gz"
    lines = [b"no json", b"[]", b'{"text": "a"}', b'{"messages": []}', b"\xff", b"", json.dumps(
        {"messages": [user("only a question")]}).encode(), *(json.dumps(row).encode() for row in talks(4))]
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    out, folder = run(path)
    for line in ("2 x line that is not a JSON object", "1 x row that is not of file", "1 x line that is not UTF-8",
                 "1 x no conversation: messages is not a list", "1 x conversation without an answer"):
        assert f"left out: {line}" in out
    assert len(read_side(folder, "train")) + len(read_side(folder, "val")) == 4


def test_half_a_surrogate_pair_is_replaced(run, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", '
                                       '"content": "a"}]}\n' * 2)
    _, folder = run(tmp_path / "my.jsonl", "--val_fraction=0")
    assert bytes(read_side(folder, "train")[0][0][2:-4]).decode() == "\ufffd"


def test_questions_of_test_sets_are_refused(run, tmp_path):
    item = {"question": "Which planet is red?", "subject": "s", "choices": ["Mars", "Venus"], "answer": 0}
    test = write_rows(tmp_path / "test.jsonl", [item, {"question": "How many?", "answer": "<<1+1=2>>2\n#### 2"},
                                                {"prompt": "def f():", "task_id": "x"}])
    arc = {"id": "1", "answerKey": "A", "question": {"stem": "Which planet is red?", "choices": [
        {"text": "Mars", "label": "A"}, {"text": "Venus", "label": "B"}]}}
    assert chat.item_question(arc) == chat.item_question(item)
    rows = [{"messages": [user("how MANY"), assistant("2")]}, {"messages": [user("a"), assistant("b")] * 2},
            {"messages": [user("a"), assistant("b"), user("def  f( ):"), assistant("b")]}, *talks(3)]
    out, folder = run(write_rows(tmp_path / "my.jsonl", rows), f"mmlu:{test}", f"--refuse={test}")
    assert "left out: 3 x conversation with a question of a test set" in out
    assert len(read_side(folder, "train")) + len(read_side(folder, "val")) == 4


def test_the_shipped_list_has_the_test_sets():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data")
    refused = chat.test_items()
    for name in ("gsm8k/test", "arc/ARC-Challenge-Test", "humaneval/HumanEval", "mmlu/test"):
        for row in itertools.islice(chat.read_rows(SHARED / "eval" / f"{name}.jsonl.xz", {}), 200):
            assert chat.hash_question(chat.item_question(row)) in refused
    train = itertools.islice(chat.read_rows(SHARED / "eval" / "gsm8k" / "train.jsonl.xz", {}), 2000)
    assert not any(chat.hash_question(chat.item_question(row)) in refused for row in train)


def test_special_tokens_are_added_once():
    plain = chat.shards.bytes_tokenizer_json()
    extended = chat.extend_tokenizer(plain)
    spec = json.loads(extended)
    assert [spec["special_tokens"][name] for name in chat.SPECIAL_TOKENS] == [*range(256, 265)]
    assert spec["bos_id"] == 256 and spec["name"] == "bytes_chat" and chat.extend_tokenizer(extended) == extended
    read = Tokenizer(spec)
    assert read.vocab_size == 265 and read.encode("é<|bos|>") == chat.ChatTokenizer(extended).encode("é<|bos|>")


def test_show_marks_what_is_trained(run, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "my.jsonl", [{"messages": [user("s\x1b[0m"), assistant(CALL)]}])
    out, folder = run(path, "--show=2", "--val_fraction=0")
    assert out == ("<|bos|><|user_start|>s?[0m<|user_end|><|assistant_start|>[x=<|python_start|>1+1<|python_end|>]"
                   "<|output_start|>2<|output_end|>[!<|assistant_end|>]\n")
    assert not folder.exists()


def test_what_the_command_refuses(refused, tmp_path):
    good, empty = write_rows(tmp_path / "my.jsonl", talks(3)), write_rows(tmp_path / "empty.jsonl", [])
    one = write_rows(tmp_path / "one.jsonl", talks(1))
    refused("absent.jsonl", words=["absent.jsonl", "not a file"])
    refused("gsm8k:absent", words=["absent", "not a file"])
    refused("spelling:many", words=["spelling", "number"])
    refused(f"{good}=0", words=["weight"])
    refused(empty, words=["no conversation"])
    refused(one, words=["--val_fraction"])
    refused(f"spelling:5:{empty}", words=["no word"])
    refused(f"identity:5:{empty}", words=["no conversation"])
    refused(good, "--max_tokens=3", words=["--max_tokens=3", "16"])
    refused(good, "--tokens=1", words=["--tokens=1"])
    refused(good, f"--refuse={good}", words=["--refuse", "GSM8K"])
    refused(good, "--out=--", words=["no value"])
    refused(good, "--tokenizer=absent", words=["absent"])


def test_other_shards_are_not_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_000000.bin").write_bytes(b"x")
    good = write_rows(tmp_path / "my.jsonl", talks(9))
    with pytest.raises(chat.InputError, match="another origin"):
        run(good)
    assert (tmp_path / "out" / "train_000000.bin").read_bytes() == b"x"
    run(good, "--force", "--shard_tokens=10")
    run(good)                            # its own are replaced
    assert [*(path.name for path in (tmp_path / "out").glob("train_*.bin"))] == ["train_000000.bin"]


def test_the_identity_file_holds_conversations():
    rows = [*chat.read_rows(chat.IDENTITY_FILE, {})]
    for row in rows:
        chat.check_messages(row["messages"])
    varied = [chat.identity_messages(rows[0]["messages"], i)[0]["content"] for i in range(50)]
    assert len({*varied}) > 10 and all("who are you" in question.lower() for question in varied)
