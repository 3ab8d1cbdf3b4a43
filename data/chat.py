"""Conversations to shards for chat_sft.py: tokens, and beside them a mask that says which tokens are trained.

    python data/chat.py identity:600 spellingbee:20000 --tokenizer=bytes --out=data/chat
    python data/chat.py my.jsonl=2 gsm8k:train.jsonl=0.5 --tokenizer=gpt2       # a source with its weight
    python data/chat.py my.jsonl --tokenizer=gpt2 --show=3                      # prints three, trained text coloured

A source is one of

    FILE                    .jsonl, also packed (.gz, .xz, .zst): {"messages": [{"role": ..., "content": ...}, ...]}
    gsm8k:FILE              GSM8K, whose <<48/2=24>> become calls of the calculator
    mmlu:FILE               multiple-choice questions: question, choices, answer (0 for the first choice)
    identity:N[:FILE]       N conversations about minutegpt, from data/identity.jsonl or your own file
    spelling:N[:FILE]       N words to spell, made up or from a file with one word a line
    spellingbee:N[:FILE]    N questions how often a letter occurs in a word, answered with the calculator

SOURCE=2 takes each conversation twice, SOURCE=0.3 three of ten. Roles alternate: user, assistant, user, ... A system
message may come first; it becomes the beginning of the first user message. Content is a text, or a list of parts
{"type": "text" | "python" | "python_output", "text": ...}, where python is an expression for the calculator.

Only what the assistant writes is trained: its text, its calls, and the end of its turn. The calculator's output is not.
Every token of every conversation is in a shard or counted as cut. Questions of known test sets are refused.
Needs numpy, tqdm; tiktoken for all tokenizers but bytes.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports needs no traceback

import argparse
import ast
import base64
import hashlib
import io
import json
import math
import random
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import text as shards
from text import InputError
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
# --template=plain writes these texts instead of the special tokens, for vocabularies that have none
PLAIN_MARKERS = {"<|user_start|>": "### User\n", "<|user_end|>": "\n\n", "<|assistant_start|>": "### Assistant\n",
                 "<|assistant_end|>": "\n\n", "<|python_start|>": "[[", "<|python_end|>": "]]",
                 "<|output_start|>": "((", "<|output_end|>": "))"}
TEMPLATES = ("chat", "plain")
IDENTITY_FILE = HERE / "identity.jsonl"
TEST_ITEMS_FILE = HERE / "test_items.bin"  # hashes of the questions of known test sets, see hash_question
OUR_FILES = re.compile(r"(train|val)_\d{6}\.(bin|mask)")

Source = namedtuple("Source", "given kind path count weight")  # count: of conversations to make; path: None, no file
Rendered = namedtuple("Rendered", "ids mask key weight")  # arrays of one length; key: 64 bits of the sha256 of both
PART_MARKERS = {"python": ("<|python_start|>", "<|python_end|>"),
                "python_output": ("<|output_start|>", "<|output_end|>")}


# -----------------------------------------------------------------------------
# The conversation format


def check_messages(messages):
    """Raises InputError, with the reason, unless this is a conversation."""
    if not isinstance(messages, list) or not messages:
        raise InputError("messages is not a list with something in it")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError("a message lacks role or content")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, message in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if message["role"] != wanted:
            raise InputError(f"turn {i + 1} is of {message['role']!r}, not of {wanted!r}")
        _check_content(message["content"], wanted)
    if not turns:
        raise InputError("there is no user message")
    if len(turns) < len(messages):
        _check_content(messages[0]["content"], "system")


def _check_content(content, role):
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InputError(f"content of {role!r} is neither a text nor a list of parts")
    kinds = ("text", *PART_MARKERS) if role == "assistant" else ("text",)
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise InputError(f"a part of {role!r} is not of type {', '.join(kinds)} with a text")


def _parts(content):
    """[(type, text)] of a message's content."""
    return [("text", content)] if isinstance(content, str) else [(part["type"], part["text"]) for part in content]


def _text(content):
    return "".join(text for _, text in _parts(content))


def merge_system(messages):
    """The turns after the system message, whose text becomes the beginning of the first user message."""
    if messages[0]["role"] != "system":
        return messages
    first = f"{_text(messages[0]['content'])}\n\n{_text(messages[1]['content'])}"
    return [{"role": "user", "content": first}, *messages[2:]]


def _marker(name, tokenizer, template):
    """Ids of a marker: the special token, or the text that stands for it in the plain template."""
    return [tokenizer.special(name)] if template == "chat" else tokenizer.encode(PLAIN_MARKERS[name])


def _render_turn(message, tokenizer, template):
    """(ids, mask) of one turn."""
    ids, mask = [], []

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))
    role = message["role"]
    add(_marker(f"<|{role}_start|>", tokenizer, template), False)
    for kind, text in _parts(message["content"]):
        trained = role == "assistant" and kind != "python_output"
        markers = [_marker(name, tokenizer, template) for name in PART_MARKERS.get(kind, ())] or [[], []]
        for tokens in (markers[0], tokenizer.encode(text), markers[1]):
            add(tokens, trained)
    add(_marker(f"<|{role}_end|>", tokenizer, template), role == "assistant")
    return ids, mask


def render_turns(messages, tokenizer, template="chat"):
    """[(ids, mask)] of the turns; the first one also holds the begin-of-document token. See render."""
    check_messages(messages)
    turns = [_render_turn(message, tokenizer, template) for message in merge_system(messages)]
    ids, mask = turns[0]
    return [([tokenizer.special("<|bos|>"), *ids], [0, *mask]), *turns[1:]]


def render(messages, tokenizer, template="chat"):
    """(ids, mask) of a conversation, two lists of one length. mask: 1 where the token is trained, as a target, else 0.

    tokenizer: an object with encode(text) -> list of ids, in which special tokens are ordinary text, and special(name)
    -> id of one of SPECIAL_TOKENS. special("<|bos|>") is the begin-of-document id, whatever name it has in the
    vocabulary. template: "chat", or "plain" for vocabularies without special tokens. Raises InputError for messages
    that are not a conversation.
    """
    turns = render_turns(messages, tokenizer, template)
    return [token for ids, _ in turns for token in ids], [trained for _, mask in turns for trained in mask]


def prime(messages, tokenizer, template="chat"):
    """Ids of a conversation that ends with a user message, and the start of the answer, which the model writes next.

    The answer ends with <|assistant_end|>. Raises InputError.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise InputError("the last message is not of 'user', so there is nothing to answer")
    return render(messages, tokenizer, template)[0] + _marker("<|assistant_start|>", tokenizer, template)


# -----------------------------------------------------------------------------
# The calculator


MAX_EXPRESSION = 256  # characters; evaluating one then takes microseconds
MAX_NUMBER = 1e15  # whole numbers up to here are exact as floats
QUOTED = r"'[^'\\\n]*'|\"[^\"\\\n]*\""


def calculate(expression):
    """The result of an expression as a text, None if it has none.

    It knows numbers, + - * /, brackets and 'text'.count('text'), with quotes of either kind. 1,000 is 1000.
    Results beyond MAX_NUMBER, expressions beyond MAX_EXPRESSION characters and everything else give None.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    outside = re.sub(QUOTED, "", expression)
    if re.fullmatch(r"(?:[\d.+\-*/() ]|\.count\()*", outside.replace(",", ""), re.A) is None:
        return None
    if outside == expression:
        expression = expression.replace(",", "")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    value = round(value, 10)
    return str(int(value)) if value == int(value) else f"{value:.10f}".rstrip("0")


def _value(node):
    """The number that a node of the syntax tree stands for; raises ValueError or ArithmeticError."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            value = _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            value = _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            value = _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            value = _value(left) / _value(right)
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
                      args=[ast.Constant(value=str(part))], keywords=[]):
            value = text.count(part)
        case _:
            raise ValueError("not an expression of the calculator")
    if not abs(value) <= MAX_NUMBER:
        raise ValueError("the number is too large")
    return value


# -----------------------------------------------------------------------------
# Tasks


def _conversation(question, answer):
    """The messages of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def multiple_choice(question, letters, choices):
    """The user message of a multiple-choice question. The answer is one letter.

    The letter comes after its choice, straight after "=": so it is the token that the answer consists of, too.
    """
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([f"Choose the right answer. {question}", *lines, "", "Reply with its letter alone."])


def mmlu_messages(item):
    """The conversation of a row of MMLU: question, choices, answer (0 for the first choice)."""
    letters = "ABCDEFGHIJ"[:len(item["choices"])]
    return _conversation(multiple_choice(item["question"], letters, item["choices"]), letters[item["answer"]])


def gsm8k_messages(item):
    """The conversation of a row of GSM8K; each <<expression=result>> becomes a call and its output."""
    parts = []
    for i, piece in enumerate(re.split("<<(.*?)>>", item["answer"])):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return _conversation(item["question"], parts)


def gsm8k_answer(text):
    """The number after the first "#### ", without commas, as a text; None if there is none. Also for a reference."""
    found = re.search(r"#### ?\$?(-?\d[\d,]*(?:\.\d+)?|-?\.\d+)", text, re.A)
    return found[1].replace(",", "") if found else None


spellingbee_answer = gsm8k_answer  # the same form

ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sl sp st str t th tr v w y z".split()
VOWELS = "a e i o u ai ea ee ie oa oo ou".split()
CODAS = ["", "", "", *"ck ct l ll m n nd ng nt p r rd rn s ss st t tt x".split()]
COMMON_WORDS = """
about above again animal answer apple autumn balloon banana bottle bread bridge butter candle carrot castle cheese
cherry chicken circle coffee corner cotton country dinner dragon dream eleven engine evening family farmer feather
finger flower forest garden ginger giraffe hammer happy harbour honey island jacket kettle kitchen kitten ladder
lantern lemon letter little lizard market meadow middle minute mirror monkey morning mountain needle nothing number
orange paper parrot pebble pencil pepper people picture pillow planet pocket potato puzzle rabbit raven ribbon river
rocket sailor school season seven shadow silver sister spider spring summer sunset thunder ticket tiger tomato tunnel
turtle umbrella valley velvet village violin wagon water weather whistle window winter wonder yellow zebra
""".split()
BEE_FORMS = ("How many {letter} are in {word}", "How many {letter} are there in {word}",
             "How many times does {letter} occur in {word}", "How often does {letter} appear in {word}",
             "Count the letter {letter} in {word}", "How many letters {letter} does {word} have",
             "How many {letter} do you see in the word {word}", "What is the number of {letter} in {word}")
SPELL_FORMS = ("Spell {word}", "Spell the word {word}", "How do you spell {word}", "How is {word} spelled",
               "What are the letters of {word}")


def is_held_out(word):
    """Whether a word is for evaluation, as is one in 16 and "strawberry": the spelling tasks never train on it."""
    return word == "strawberry" or hashlib.sha256(word.encode()).digest()[0] < 16


def make_word(rng):
    """A word of 3 to 12 letters: a common one, or made of any letters, of repeated parts, or of syllables."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(COMMON_WORDS)
    if kind < 0.4:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 12)))
    if kind < 0.6:  # as mississippi: where to go on after a part that comes twice is the hardest of copying
        parts = ["".join(rng.choices("aeioubdlmnprst", k=rng.randint(1, 3))) for _ in range(2)]
        return "".join(rng.choices(parts, k=rng.randint(3, 5)))[:12]
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.randint(1, 4)))
    return "".join(syllables)[:12].ljust(3, "e")


def spelling_words(count, seed, held_out=False, words=()):
    """`count` words for the spelling tasks, drawn from `words`, or made up if there are none. They may repeat.

    held_out: words for evaluation instead of words for training; the two have none in common.
    """
    pool = [word for word in words if is_held_out(word) == held_out]
    if words and not pool:
        raise InputError(f"none of the {len(words)} words is for {'evaluation' if held_out else 'training'}; "
                         "give more words")
    found = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"word {seed} {number}")
        word = rng.choice(pool) if pool else make_word(rng)
        if is_held_out(word) == held_out:
            found.append(word)
        number += 1
    return found


def spelling_item(word, seed):
    """The conversation in which a word is spelled. The answer: `river: r,i,v,e,r`."""
    question = _vary(SPELL_FORMS, random.Random(f"spelling {seed} {word}"), word=word)
    return _conversation(question, f"{word}: {','.join(word)}")


def spellingbee_item(word, letter, seed):
    """The conversation that counts a letter in a word.

    seed: of the phrasing. The answer calls the calculator first, so the model has to copy the word and the letter, and
    then the result: spellingbee_answer reads it.
    """
    question = _vary(BEE_FORMS, random.Random(f"spellingbee {seed} {word} {letter}"), letter=letter, word=word)
    count = str(word.count(letter))
    return _conversation(question, [
        {"type": "python", "text": f"'{word}'.count('{letter}')"}, {"type": "python_output", "text": count},
        {"type": "text", "text": f"The answer is {count}.\n#### {count}"}])


def spelling_word_tasks(count, seed, held_out=False, words=()):
    """[(word, letter)] for spellingbee_item. Nine letters of ten are letters of their word; the others are any."""
    tasks = []
    for i, word in enumerate(spelling_words(count, seed, held_out, words)):
        rng = random.Random(f"letter {seed} {i} {word}")
        tasks.append((word, rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")))
    return tasks


def _vary(forms, rng, **values):
    """A question in one of its forms; its words may be quoted, it may begin small, and it may have no question mark."""
    form = rng.choice(forms)
    for name, value in values.items():
        quote = rng.choice(("", "", "", "'", '"'))
        form = form.replace("{" + name + "}", quote + value + quote)
    if rng.random() < 0.3:
        form = form[0].lower() + form[1:]
    ending = "?" if form[0] in "HhWw" else "."
    return form + (ending if rng.random() < 0.6 else "")


GREETINGS = ("", "", "", "", "Hi! ", "Hello. ", "Please tell me: ", "One question: ")


def identity_messages(conversation, seed):
    """The conversation with its first question varied: a greeting before it, a small letter, no final mark."""
    rng = random.Random(f"identity {seed}")
    question = conversation[0]["content"]
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.3:
        question = question.rstrip("?.!")
    return [{"role": "user", "content": rng.choice(GREETINGS) + question}, *conversation[1:]]


# -----------------------------------------------------------------------------
# Questions of test sets


def item_question(item):
    """The user message that a row of GSM8K, MMLU, ARC or HumanEval becomes; None for a row of another kind."""
    try:
        question = item.get("question", item.get("prompt"))
        if isinstance(question, dict):  # ARC
            letters, choices = zip(*((choice["label"], choice["text"]) for choice in question["choices"]))
            return multiple_choice(question["stem"], letters, choices)
        if "choices" in item:
            return mmlu_messages(item)[0]["content"]
        return question if isinstance(question, str) else None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return None


def hash_question(question):
    """32 bits of the sha256 of the letters and digits of a question, without regard to case."""
    plain = "".join(letter for letter in question.casefold() if letter.isalnum())
    return int.from_bytes(hashlib.sha256(plain.encode("utf-8", "replace")).digest()[:4], "little")


def test_items(files=()):
    """The hashes of the questions that are refused: of known test sets, and of the rows of `files`."""
    found = {*np.fromfile(TEST_ITEMS_FILE, "<u4").tolist()}
    for path in files:
        questions = [item_question(row) for row in read_rows(path, {})]
        if None in questions or not questions:
            raise InputError(f"--refuse={path}: a row is not of GSM8K, MMLU, ARC or HumanEval; name another file")
        found |= {hash_question(question) for question in questions}
    return found


# -----------------------------------------------------------------------------
# Sources


def parse_source(given):
    """The Source that an argument names; raises InputError."""
    name, equals, weight = given.rpartition("=")
    if not equals or re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight, re.A) is None:
        name, weight = given, "1"
    if not 0 < float(weight) <= 1000:
        raise InputError(f"{given}: the weight must be above 0 and at most 1000")
    kind, colon, rest = name.partition(":")
    if kind in ("gsm8k", "mmlu") and colon:
        return Source(given, kind, _file(rest, given), 0, float(weight))
    if kind in MAKERS and colon:
        count, colon, file = rest.partition(":")
        if re.fullmatch(r"[1-9]\d{0,7}", count, re.A) is None:
            raise InputError(f"{given}: {kind}: needs a number of conversations from 1 to 99999999, as in {kind}:1000")
        return Source(given, kind, _file(file, given) if colon else None, int(count), float(weight))
    return Source(given, "file", _file(name, given), 0, float(weight))


def _file(name, given):
    path = shards.path_argument(name) if name else Path()
    if not name or not path.is_file():
        raise InputError(f"{given}: {name or 'the path'} is not a file; name a .jsonl file, or one of gsm8k:FILE, "
                         "mmlu:FILE, identity:N, spelling:N, spellingbee:N")
    return path


def read_lines(path, skipped):
    """Yields the lines of a file, packed or not, without their ends; what cannot be read is noted in `skipped`."""
    try:
        with open(path, "rb") as file:
            unpacked = shards.Unpacked(file, path)
            lines = io.BufferedReader(unpacked)
            while line := lines.readline(shards.LINE_BYTES):
                try:
                    yield line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    shards.note(skipped, "line that is not UTF-8", path.name)
            if unpacked.damage:
                raise InputError(f"{path}: {unpacked.damage}; unpack it yourself, or get the file again")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name another file") from None


def read_rows(path, skipped):
    """Yields the objects of a .jsonl file; see read_lines."""
    for line in read_lines(path, skipped):
        if line and not line.isspace():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                shards.note(skipped, "line that is not a JSON object", path.name)


def _from_rows(convert, source, skipped):
    """Yields convert(row) for each row of a source's file; a row that it cannot take is noted."""
    for row in read_rows(source.path, skipped):
        try:
            messages = convert(row)
            check_messages(messages)
        except InputError as error:
            shards.note(skipped, f"no conversation: {error}", source.path.name)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            shards.note(skipped, f"row that is not of {source.kind}", source.path.name)
        else:
            yield messages


def _identity(source, seed, skipped):
    path = source.path or IDENTITY_FILE
    known = [*_from_rows(lambda row: row["messages"], source._replace(path=path), skipped)]
    if not known:
        raise InputError(f"{source.given}: {path} holds no conversation; name another file")
    return (identity_messages(known[i % len(known)], f"{seed} {i}") for i in range(source.count))


def _words(source, skipped):
    if not source.path:
        return ()
    words = {line.strip().lower() for line in read_lines(source.path, skipped)}
    words = sorted(word for word in words if re.fullmatch("[a-z]{2,20}", word))
    if not words:
        raise InputError(f"{source.given}: {source.path} has no word of 2 to 20 letters a-z; give one word a line")
    return words


def _spelling(source, seed, skipped):
    words = spelling_words(source.count, seed, words=_words(source, skipped))
    return (spelling_item(word, f"{seed} {i}") for i, word in enumerate(words))


def _spellingbee(source, seed, skipped):
    tasks = spelling_word_tasks(source.count, seed, words=_words(source, skipped))
    return (spellingbee_item(*task, f"{seed} {i}") for i, task in enumerate(tasks))


MAKERS = {"identity": _identity, "spelling": _spelling, "spellingbee": _spellingbee}
READERS = {"file": lambda row: row["messages"], "gsm8k": gsm8k_messages, "mmlu": mmlu_messages}


def conversations(source, seed, skipped):
    """The conversations of a source, each a list of messages. What is left out is noted in `skipped`."""
    if source.kind in MAKERS:
        return MAKERS[source.kind](source, seed, skipped)
    return _from_rows(READERS[source.kind], source, skipped)


# -----------------------------------------------------------------------------
# Tokens


def extend_tokenizer(tokenizer_json):
    """The tokenizer.json (bytes) with the special tokens of conversations after its last id, if it lacks some.

    Its begin-of-document token keeps its name and id.
    """
    spec = json.loads(tokenizer_json)
    special = spec["special_tokens"]
    missing = [name for name in SPECIAL_TOKENS[1:] if name not in special]
    if not missing:
        return tokenizer_json
    first = len(spec["ranks"]) + len(special)
    special |= {name: first + i for i, name in enumerate(missing)}
    return shards.canonical_json(spec | {"name": f"{spec['name']}_chat"})


class ChatTokenizer:
    """A tokenizer.json as render needs it; see there."""

    def __init__(self, tokenizer_json):
        spec = json.loads(tokenizer_json)
        self.encoder = shards.Encoder(tokenizer_json)
        self.ids = spec["special_tokens"] | {"<|bos|>": spec["bos_id"]}
        self.vocab_size = len(spec["ranks"]) + len(spec["special_tokens"])

    def special(self, name):
        return self.ids[name]

    def encode(self, text):
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raw = text.encode()
        return self.encoder.encode(raw, text).tolist()


def cut(turns, limit):
    """(ids, mask, tokens cut off) of a conversation of at most `limit` tokens, from what render_turns returns.

    It ends with an answer if one ends within the limit; else the first answer is cut.
    """
    ends = np.cumsum([len(ids) for ids, _ in turns]).tolist()
    ids, mask = ([value for turn in turns for value in turn[part]] for part in (0, 1))
    if len(ids) <= limit:
        return ids, mask, 0
    whole = [end for i, end in enumerate(ends) if i % 2 and end <= limit]
    kept = whole[-1] if whole else limit
    return ids[:kept], mask[:kept], len(ids) - kept


def join(made, turns, seed):
    """The conversations in another order, some joined: each result has up to `turns` of them, one after the other.

    Two of five stay alone, and so do those that begin with a system message.
    """
    rng = random.Random(f"join {seed}")
    made = rng.sample(made, len(made))
    joined = []
    room = 0
    for messages in made:
        if room and messages[0]["role"] == "user":
            joined[-1] = joined[-1] + messages
            room -= 1
        else:
            joined.append(messages)
            room = 0 if rng.random() < 0.4 else rng.randrange(turns)
    return joined


def read_sources(sources, args, counts, skipped):
    """Yields (messages, Source) of all conversations; those that are made are joined if --turns is more than 1."""
    made = {}
    for source in sources:
        for messages in tqdm(conversations(source, args.seed, skipped), source.given, leave=False, disable=None):
            counts["read"] += 1
            if source.kind in MAKERS and args.turns > 1:
                made.setdefault(source.weight, (source, []))[1].append(messages)
            else:
                yield messages, source
    for weight, (source, found) in made.items():
        joined = join(found, args.turns, f"{args.seed} {weight}")
        counts["joined"] += len(found) - len(joined)
        yield from ((messages, source) for messages in joined)


def render_sources(sources, tokenizer, args):
    """([Rendered] of all conversations, counts by name, skipped by reason); what is refused or left out is counted."""
    found, counts, skipped = [], Counter(), {}
    refused = test_items(args.refuse)
    id_type = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
    for messages, source in read_sources(sources, args, counts, skipped):
        if any(hash_question(_text(message["content"])) in refused for message in messages
               if message["role"] == "user"):
            shards.note(skipped, "conversation with a question of a test set", source.given)
            continue
        ids, mask, lost = cut(render_turns(messages, tokenizer, args.template), args.max_tokens)
        if not any(mask):
            shards.note(skipped, f"conversation without an answer in its first {args.max_tokens} tokens", source.given)
            continue
        counts["cut"] += lost > 0
        counts["tokens_cut"] += lost
        ids, mask = np.array(ids, id_type), np.array(mask, np.uint8)
        key = int.from_bytes(hashlib.sha256(ids.tobytes() + mask.tobytes()).digest()[:8], "little")
        found.append(Rendered(ids, mask, key, source.weight))
    return found, counts, skipped


def draw_copies(found, seed):
    """How often training takes each conversation. A weight of 2.5: each twice, and half of them a third time."""
    drawn = np.random.default_rng((seed, 1)).random(len(found)).tolist()
    return [math.floor(one.weight) + (value < one.weight % 1) for one, value in zip(found, drawn)]


def split(found, val_fraction):
    """(training, validation) indexes of the conversations. Identical ones are on one side, chosen by their sha256.

    Validation has each conversation once, because a second time would measure the same.
    """
    keys = sorted({one.key for one in found})
    if val_fraction and len(keys) < 2:
        raise InputError("there is one conversation, which cannot be divided into training and validation; give more, "
                         "or --val_fraction=0")
    number = min(max(1, round(val_fraction * len(keys))), len(keys) - 1) if val_fraction else 0
    held_out = {*keys[:number]}
    sides = [], []
    seen = set()
    for i, one in enumerate(found):
        if one.key not in held_out:
            sides[0].append(i)
        elif one.key not in seen:
            sides[1].append(i)
            seen.add(one.key)
    return sides


def mix(found, indexes, copies, seed, budget):
    """(order, left out): the indexes, each as often as `copies` says, shuffled; and how many did not fit the budget."""
    listed = [i for i in indexes for _ in range(copies[i])]
    order = [listed[place] for place in np.random.default_rng(seed).permutation(len(listed)).tolist()]
    if not budget:
        return order, 0
    ends = np.cumsum([len(found[i].ids) for i in order])
    fitting = int(np.searchsorted(ends, budget, "right"))
    return order[:fitting], len(order) - fitting


# -----------------------------------------------------------------------------
# Files


def write_side(folder, name, found, order, tokenizer, sha256, shard_tokens):
    """Writes the shards and masks of one side into the folder; returns {file name: its manifest entry}."""
    files, start = {}, 0
    while start < len(order):
        end, size = start, 0
        while end < len(order) and (end == start or size + len(found[order[end]].ids) <= shard_tokens):
            size += len(found[order[end]].ids)
            end += 1
        ids, mask = (np.concatenate([found[i][part] for i in order[start:end]]) for part in (0, 1))
        stem = f"{name}_{len(files) // 2:06d}"
        for ending, values in (("bin", ids), ("mask", mask)):
            header = np.zeros(256, "<i4")
            header[:6] = (shards.MAGIC, shards.VERSION, size, tokenizer.vocab_size, tokenizer.special("<|bos|>"),
                          values.itemsize)
            header[8:16] = np.frombuffer(bytes.fromhex(sha256), "<i4")
            content = header.tobytes() + values.astype(f"<u{values.itemsize}").tobytes()
            (folder / f"{stem}.{ending}").write_bytes(content)
            files[f"{stem}.{ending}"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        files[f"{stem}.bin"] |= {"tokens": size, "documents": end - start, "trained_tokens": int(mask.sum())}
        start = end
    return files


def check_out_dir(out_dir, force):
    """Raises InputError if the folder holds shards that this command has not made."""
    ours = [path.name for path in out_dir.glob("*") if path.suffix in (".bin", ".mask")]
    try:
        manifest = json.loads((out_dir / "manifest.json").read_bytes())
        mine = manifest["made_by"]["script"] == "chat.py"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        mine = False
    if not force and (ours and not mine or any(not OUR_FILES.fullmatch(name) for name in ours)):
        raise InputError(f"--out={out_dir}: holds shards of another origin ({min(ours)}); choose another folder, or "
                         "--force")


def publish(building, out_dir, names):
    """Moves the finished files into the folder; the manifest goes first and comes last, so it never tells a lie."""
    (out_dir / "manifest.json").unlink(missing_ok=True)
    for old in out_dir.glob("*"):
        if OUR_FILES.fullmatch(old.name) and old.name not in names:
            old.unlink()
    for name in (*names, "tokenizer.json", "manifest.json"):
        os.replace(building / name, out_dir / name)


def write_shards(out_dir, found, sides, tokenizer, tokenizer_json, made_by, shard_tokens):
    """Writes shards, masks, tokenizer.json and manifest.json; returns the manifest."""
    sha256 = hashlib.sha256(tokenizer_json).hexdigest()
    out_dir.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=out_dir))
    try:
        files = {}
        for name, order in zip(("train", "val"), sides):
            files |= write_side(building, name, found, order, tokenizer, sha256, shard_tokens)
        spec = json.loads(tokenizer_json)
        manifest = {"format": 1, "files": files, "made_by": made_by, "tokenizer": {
            "name": spec["name"], "sha256": sha256, "vocab_size": tokenizer.vocab_size, "bos_id": spec["bos_id"]}}
        (building / "tokenizer.json").write_bytes(tokenizer_json)
        (building / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        publish(building, out_dir, files)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


# -----------------------------------------------------------------------------
# Command line


def show(one, tokenizer_json, colour):
    """A conversation as one text, in which the trained tokens are green, or between [ and ] without colours."""
    spec = json.loads(tokenizer_json)
    names = {token: name for name, token in spec["special_tokens"].items()}
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    written, raw, last = [], b"", 0

    def flush():
        if raw:
            shown = raw.decode(errors="replace")
            shown = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in shown)
            written.append(before + shown + after if last else shown)
    for token, trained in zip(one.ids.tolist(), one.mask.tolist()):
        if trained != last:
            flush()
            raw, last = b"", trained
        raw += names[token].encode() if token in names else base64.b64decode(spec["ranks"][token])
    flush()
    return "".join(written)


def fail(message):
    """Prints one line to stderr and ends with exit code 2."""
    print(f"chat.py: {shards.one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    """The checked command line as a namespace; a mistake ends in `fail`."""
    parser = argparse.ArgumentParser(prog="chat.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists the options")
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="conversations to read or to make, see above")
    add("--tokenizer", required=True, metavar="gpt2|bytes|FILE",
        help="the vocabulary of the model that will learn from them; FILE: a tokenizer.json, such as the one in the "
             "checkpoint. Special tokens that it lacks are added after its last id")
    add("--vocab_dir", type=shards.path_argument,
        help="folder with GPT-2's vocab.bpe and encoder.json; default: tiktoken's cache")
    add("--out", type=shards.path_argument, default=HERE / "chat", help="folder to write to; default: data/chat")
    add("--template", choices=TEMPLATES, default="chat",
        help="chat: special tokens between the turns; plain: texts such as '### User' (default: %(default)s)")
    add("--max_tokens", type=int, default=2048,
        help="a longer conversation is cut after the last answer that fits (default: %(default)s)")
    add("--turns", type=int, default=1, metavar="N",
        help="join up to N of the conversations that are made (identity, spelling, spellingbee) into one, so that the "
             "model learns to go on after an answer (default: %(default)s)")
    add("--tokens", type=int, default=0, help="training tokens to write, at most; 0: all (default)")
    add("--val_fraction", type=float, default=0.02,
        help="share of the conversations held out for validation, chosen by their sha256 (default: %(default)s)")
    add("--refuse", type=shards.path_argument, action="append", default=[], metavar="FILE",
        help="also refuse the questions of this file of GSM8K, MMLU, ARC or HumanEval; may be given several times")
    add("--show", type=int, default=0, metavar="N", help="print N conversations and write nothing")
    add("--seed", type=int, default=0, help="of the made conversations and the order (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard, at most (default: %(default)s)")
    add("--force", action="store_true", help="write beside shards of another origin")
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--.*=--", arg, re.S)]:  # argparse may read it as a list
        fail(f"{empty[0]} has no value")
    args = parser.parse_args(argv)
    for name, low, high in (("max_tokens", 16, 1 << 24), ("turns", 1, 1000), ("tokens", 0, 1 << 40),
                            ("val_fraction", 0, 0.5), ("show", 0, 1 << 20), ("seed", 0, 1 << 62),
                            ("shard_tokens", 1, 1 << 31)):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name}={getattr(args, name)}: must be {low} to {high}")
    if not shards.shown(args.out).isprintable():
        fail(f"--out={args.out}: the name holds characters that cannot be typed; choose another folder")
    return args


def load_tokenizer(args):
    """tokenizer.json (bytes) with the special tokens of conversations; raises InputError."""
    name = args.tokenizer if args.tokenizer in ("gpt2", "bytes") else shards.path_argument(args.tokenizer)
    try:
        plain = shards.load_tokenizer(name, args.vocab_dir)
    except LookupError as error:
        raise InputError(f"--tokenizer={args.tokenizer}: {error}; pass --vocab_dir=FOLDER with GPT-2's vocab.bpe and "
                         "encoder.json, or use --tokenizer=bytes") from None
    return extend_tokenizer(plain) if args.template == "chat" else plain


def summarize(manifest, out_dir):
    """Prints what was read, what was left out, and what was written."""
    counts, files = manifest["made_by"]["counts"], manifest["files"]
    print(f"{counts['read']:,} conversations read")
    if counts["joined"]:
        print(f"  joined into {counts['read'] - counts['joined']:,}")
    for reason, (count, example) in sorted(manifest["made_by"]["skipped"].items()):
        print(shards.one_line(f"  left out: {count:,} x {reason} ({example})"))
    if counts["thinned_out"]:
        print(f"  left out: {counts['thinned_out']:,} x by a weight below 1")
    if counts["repeated"]:
        print(f"  repeated: {counts['repeated']:,} x by a weight above 1")
    if counts["copies_in_validation"]:
        print(f"  left out: {counts['copies_in_validation']:,} x copy of a validation conversation")
    if counts["over_budget"]:
        print(f"  left out: {counts['over_budget']:,} x beyond --tokens")
    if counts["cut"]:
        print(f"  cut: {counts['cut']:,} conversations, which lost {counts['tokens_cut']:,} tokens")
    for side in ("train", "val"):
        entries = [entry for name, entry in files.items() if name.startswith(side) and "tokens" in entry]
        tokens, documents, trained = (sum(entry[key] for entry in entries)
                                      for key in ("tokens", "documents", "trained_tokens"))
        print(f"{side}: {documents:,} conversations, {tokens:,} tokens, of which {trained:,} are trained")
    print(shards.one_line(f"wrote {shards.shown(out_dir)}/: {', '.join(sorted(files)[:4])}, tokenizer.json, "
                          "manifest.json"))
    words = ["python", shards.shown(HERE.parent / "chat_sft.py"), f"--data={shards.shown(out_dir)}"]
    print(f"next: {shlex.join(words)} --checkpoint=RUN")


def main(argv=None):
    args = parse_args(argv)
    sources = [parse_source(given) for given in args.sources]
    tokenizer_json = load_tokenizer(args)
    tokenizer = ChatTokenizer(tokenizer_json)
    if not args.show:
        check_out_dir(args.out, args.force)
    found, counts, skipped = render_sources(sources, tokenizer, args)
    if not found:
        raise InputError(f"the sources hold no conversation to train on ({'; '.join(skipped) or 'empty'}); name others")
    copies = draw_copies(found, args.seed)
    counts["thinned_out"] = copies.count(0)
    found, copies = [one for one, n in zip(found, copies) if n], [n for n in copies if n]
    if not found:
        raise InputError("the weights leave no conversation to train on; raise them")
    train, val = split(found, args.val_fraction)
    order, counts["over_budget"] = mix(found, train, copies, args.seed, args.tokens)
    counts["repeated"] = sum(copies[i] - 1 for i in train)
    if not order:
        raise InputError(f"--tokens={args.tokens} leaves no conversation to train on; raise it")
    if args.show:
        colour = sys.stdout.isatty()
        print("\n\n".join(show(found[i], tokenizer_json, colour) for i in order[:args.show]))
        return
    options = {name: getattr(args, name) for name in "template max_tokens turns tokens val_fraction seed".split()}
    counts["copies_in_validation"] = len(found) - len(train) - len(val)
    names = "read joined cut tokens_cut thinned_out repeated copies_in_validation over_budget".split()
    made_by = {"script": "chat.py", "sources": args.sources, "options": options, "skipped": skipped,
               "counts": {name: counts[name] for name in names}}
    summarize(write_shards(args.out, found, (order, val), tokenizer, tokenizer_json, made_by, args.shard_tokens),
              args.out)


if __name__ == "__main__":
    shards.run_command(main, fail, "nothing was written")
