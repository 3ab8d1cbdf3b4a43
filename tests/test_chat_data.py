"""data/chat.py: conversations become the right tokens with the right mask, and none of them gets lost.

Proves: which tokens are trained, token by token; the calculator's results and bounds; the forms of the tasks and how
their answers are read; words for evaluation are never trained.
Against: sequences written out by hand, a tokenizer of single bytes.
Run: python -m pytest tests/test_chat_data.py (one test needs ../shared/data and skips without it)
"""
import json
import lzma
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
from sample import import_script  # noqa: E402

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
