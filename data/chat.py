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

import ast
import hashlib
import random
import re
import sys
from pathlib import Path

from text import InputError

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
# --template=plain writes these texts instead of the special tokens, for vocabularies that have none
PLAIN_MARKERS = {"<|user_start|>": "### User\n", "<|user_end|>": "\n\n", "<|assistant_start|>": "### Assistant\n",
                 "<|assistant_end|>": "\n\n", "<|python_start|>": "[[", "<|python_end|>": "]]",
                 "<|output_start|>": "((", "<|output_end|>": "))"}
TEMPLATES = ("chat", "plain")
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
    """A word of 3 to 12 letters: made of syllables, or of any letters, or a common one."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(COMMON_WORDS)
    if kind < 0.5:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 12)))
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
