"""Talk to a model that has learned to chat, in the terminal or on a page in your browser.

    python chat.py                                              # the newest chat model under logs/
    python chat.py --checkpoint=logs/<run>
    python chat.py --prompt="How many r are in strawberry?"     # one answer
    python chat.py --web                                        # a page at http://127.0.0.1:8000

chat_sft.py teaches a model to chat. /help in the chat lists the commands. Ctrl-C stops an answer and keeps the chat.
The page is for the browsers of this machine only. Nothing of a conversation is written to disk unless you type /save.
docs/chat.md says more.
"""
import argparse
import bisect
import codecs
import contextlib
import html
import json
import math
import os
import queue
import random
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import sample
from sample import HERE, UserError, one_line

FORMAT = HERE / "data" / "chat.py"       # the format of conversations
PAGE = HERE / "chat.html"
CHAT_TOKENS = tuple(f"<|{name}|>" for name in ("user_start", "user_end", "assistant_start", "assistant_end",
                                               "python_start", "python_end", "output_start", "output_end"))
ROLES = "user", "assistant"
PART_TYPES = "text", "python", "python_output"
MOST_CONTEXT = 1 << 20                   # tokens
MOST_TOKENS = 4096                       # of an answer
MOST_TEMPERATURE = 2.0
MOST_TOP_K = 1 << 20

# What the page's server accepts.
BODY_BYTES = 1 << 20
MOST_MESSAGES = 500
MOST_CHARACTERS = 32_000                 # of a conversation
MESSAGE_CHARACTERS = 8_000               # of a message of the user, or a system message
MOST_CONNECTIONS = 64
MOST_WAITING = 32                        # requests that wait for the model
WAITING_PER_PAGE = 2                     # of them from one page
READ_SECONDS = 15.0                      # for a whole request
SEND_SECONDS = 15.0                      # for the part of an answer that is there
LOOK_SECONDS = 0.5                       # how often a waiting request looks whether its browser is still there

# -----------------------------------------------------------------------------
# Command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as possible without a model; raises UserError."""
    parser = sample.make_parser("chat.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=sample.path_flag, metavar="FOLDER", help="a checkpoint (step_...), or a run, whose latest "
        "checkpoint is taken; default: the newest chat model in --out_dir")
    add("--prompt", metavar="TEXT", help="answer this message and stop; default: a conversation")
    add("--system", metavar="TEXT", default="", help="a system message, which comes before the conversation (default: "
        "none)")
    add("--temperature", type=float, default=0.6, metavar="T", help="below 1: likely tokens become likelier; 0: always "
        "the likeliest token (default: %(default)s)")
    add("--top_k", type=int, default=50, metavar="K", help="draw from the K likeliest tokens; 0: from all (default: "
        "%(default)s)")
    add("--max_tokens", type=int, default=512, metavar="N", help="longest answer in tokens (default: %(default)s)")
    add("--context", type=int, default=2048, metavar="N", help="longest conversation in tokens, with the answer; the "
        "oldest messages of a longer one are left out, and a line says so (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="seed of the first answer; the next answer has the next seed; default: "
        "another one each time")
    add("--web", action="store_true", help="serve a page at 127.0.0.1 (default: off)")
    add("--port", type=int, default=8000, metavar="N", help="port of the page; 0: any free one (default: %(default)s)")
    add("--at_once", type=int, default=4, metavar="N", help="answers that the page's server writes at the same time; "
        "others wait (default: %(default)s)")
    sample.add_model_flags(add, "chat.py")
    args = parser.parse_args(sample.command_line(argv))
    check_args(args)
    return args

def check_args(args: argparse.Namespace):
    """Reads the texts of the flags as UTF-8; raises UserError for a value out of range."""
    def need(good, name, remedy):
        if not good:
            raise UserError(f"--{name}={getattr(args, name)} {remedy}")
    need(0 <= args.temperature <= MOST_TEMPERATURE, "temperature", f"must be between 0 and {MOST_TEMPERATURE:g}")
    need(0 <= args.top_k <= MOST_TOP_K, "top_k", f"must be 0 (all tokens) or a number up to {MOST_TOP_K}")
    need(1 <= args.max_tokens <= MOST_TOKENS, "max_tokens", f"must be between 1 and {MOST_TOKENS}")
    need(16 <= args.context <= MOST_CONTEXT, "context", f"must be between 16 and {MOST_CONTEXT}")
    need(args.seed is None or 0 <= args.seed < 1 << 62, "seed", "must be between 0 and 2^62 - 1")
    need(0 <= args.port <= 65535, "port", "must be 0 (any free one) or a number up to 65535")
    need(1 <= args.at_once <= 64, "at_once", "must be between 1 and 64")
    need(0 <= args.threads <= 1024, "threads", "must be 0 (chosen by trying) or a number up to 1024")
    need(args.prompt is None or args.prompt.strip(), "prompt", "is empty; give it some text, or leave the flag out")
    need(args.prompt is None or not args.web, "prompt", "and --web are both given; give one of them")
    if len(args.system) > MESSAGE_CHARACTERS:
        raise UserError(f"--system has {len(args.system)} characters; at most {MESSAGE_CHARACTERS} are allowed")
    args.system = sample.text_flag("system", args.system)
    if args.prompt is not None:
        args.prompt = sample.text_flag("prompt", args.prompt)

# -----------------------------------------------------------------------------
# Answers

@dataclass(frozen=True)
class Settings:
    """How an answer is made. The flags of the same names say what each field does."""
    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512

class Answer:
    """The parts of an answer as its tokens come: text, calls of the calculator, and their results.

    parts: [{"type": one of PART_TYPES, "text": characters}]. Output markers that the model wrote itself begin no
    result: only the calculator's own tokens do.
    """

    def __init__(self, tool: sample.Tool):
        self.tool = tool
        self.tokenizer = tool.tokenizer
        self.parts = []
        self.tokens = 0
        self.type = "text"
        self.begins = True               # the next characters begin a part
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, forced: bool) -> list[dict]:
        """Takes the next token; returns the new characters as events {"part": index, "type": ..., "text": ...}."""
        self.tokens += 1
        types = {self.tool.begin: "python", self.tool.end: "text"}
        if forced:
            types |= {self.tool.output_begin: "python_output", self.tool.output_end: "text"}
        if token not in types:
            return self.append(self.decoder.decode(self.tokenizer.token_bytes(token)))
        events = self.close()
        self.type = types[token]
        self.begins = True
        return events

    def append(self, text: str) -> list[dict]:
        if not text:
            return []
        if self.begins:
            self.parts.append({"type": self.type, "text": ""})
            self.begins = False
        self.parts[-1]["text"] += text
        return [{"part": len(self.parts) - 1, "type": self.type, "text": text}]

    def close(self) -> list[dict]:
        """Ends the part: half a character that is left over becomes U+FFFD. Returns events, as `add` does."""
        return self.append(self.decoder.decode(b"", final=True))

    def content(self) -> str | list[dict]:
        """The answer as the content of a message: a text, or parts if there is a call among them."""
        if all(part["type"] == "text" for part in self.parts):
            return "".join(part["text"] for part in self.parts)
        return self.parts

class Chat:
    """A model that answers conversations, of up to `context` tokens with the answer.

    format: the module data/chat.py. at_once: the number of answers that can be made at the same time, each with an
    engine of its own.
    """

    def __init__(self, model, tokenizer: sample.Tokenizer, name: str, format, context: int, at_once: int = 1):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.format = format
        self.context = context
        self.at_once = at_once
        self.tool = sample.Tool(tokenizer, format.calculate)
        self.ends = {tokenizer.special(f"<|{name}|>") for name in ("bos", "assistant_end", "user_start")}
        self.idle = []                   # engines that no answer uses
        self.engines = 0

    def take_engine(self, settings: Settings) -> sample.Engine:
        """An engine that draws as the settings say; its caller gives it back to `idle`."""
        draw = sample.Draw(settings.temperature, min(settings.top_k, self.tokenizer.vocab_size))
        for engine in self.idle:
            if engine.draw == draw:
                self.idle.remove(engine)
                return engine
        if self.engines >= self.at_once:
            self.idle.pop()              # frees its memory before the new one takes some
            self.engines -= 1
        engine = sample.Engine(self.model, self.tokenizer.vocab_size, draw, 1, self.context, forcing=True)
        self.engines += 1
        return engine

    def prompt(self, messages: list[dict], max_tokens: int) -> tuple[list[int], int]:
        """(ids of the conversation, number of messages left out): the newest turns that leave room for the answer.

        Raises UserError if the last message alone is too long.
        """
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system):]
        room = self.context - min(max_tokens, self.context // 2)

        def ids(low):
            return self.format.prime([*system, *turns[low:]], self.tokenizer)
        lows = range(0, len(turns), 2)
        found = bisect.bisect_left(lows, True, key=lambda low: len(ids(low)) <= room)
        if found == len(lows):
            raise UserError(f"the message has {len(ids(lows[-1]))} tokens, and {room} fit; shorten it, or start with a "
                            f"larger --context than {self.context}")
        return ids(lows[found]), lows[found]

    def answer(self, messages: list[dict], settings: Settings, seed: int, answer: Answer):
        """Yields a list of events after every token, and fills `answer`.

        Events: {"dropped": messages left out}, those of Answer.add, and at last {"done": "end" or "length", "tokens",
        "seconds", "first": seconds to the first token}. Raises UserError.
        """
        begin = time.perf_counter()
        ids, dropped = self.prompt(messages, settings.max_tokens)
        yield [{"dropped": dropped}] if dropped else []
        engine = self.take_engine(settings)
        calls = sample.ToolCalls(self.tool)
        count = min(settings.max_tokens, self.context - len(ids))
        finish, first = "length", 0.0
        try:
            for tokens, logprobs in engine.steps([ids], [(0, seed)], count, lambda row, token: calls.follow(token)):
                first = first or time.perf_counter() - begin
                if tokens[0] in self.ends:
                    finish = "end"
                    break
                yield answer.add(tokens[0], logprobs[0] is None)
        except Exception:
            self.engines -= 1            # its state is unknown, so nobody uses it again
            engine = None
            raise
        finally:
            if engine:
                self.idle.append(engine)
        yield [*answer.close(), {"done": finish, "tokens": answer.tokens, "seconds": time.perf_counter() - begin,
                                 "first": first}]

def load(args: argparse.Namespace) -> Chat:
    """The model that the flags name; raises UserError if it has no tokens for conversations."""
    given = args.checkpoint
    path = sample.resolve_checkpoint(given) if given else sample.find_checkpoint(args.out_dir, chat=True)
    meta = sample.read_meta(path)
    tokenizer = sample.read_tokenizer(path, meta, args.vocab_dir)
    if any(name not in tokenizer.specials for name in CHAT_TOKENS):
        raise UserError(f"{path} is a base model, which has no tokens for conversations; teach it to chat first: "
                        f"python chat_sft.py --checkpoint={path} --data=data/chat")
    format = sample.import_script(FORMAT, ("prime", "calculate"), "use the data/chat.py that belongs to chat.py")
    model, tokenizer, meta = sample.load_checkpoint(path, args.device, args.script, args.precision, args.vocab_dir)
    if not meta.get("chat"):
        print(f"chat.py: note: {one_line(str(path))} has tokens for conversations, but has not learned to chat; "
              "chat_sft.py teaches it", file=sys.stderr)
    name = f"{path.parent.parent.name or path.name}, {meta['script']} after {meta['step']} steps"
    chat = Chat(model, tokenizer, one_line(name), format, args.context, args.at_once if args.web else 1)
    try:
        engine = chat.take_engine(Settings(args.temperature, args.top_k))
    except ValueError as error:
        raise UserError(f"--context={args.context} is too much for the model ({error}); lower it") from None
    chat.idle.append(engine)
    return chat

def set_threads(chat: Chat, given: int):
    """Sets the number of CPU threads for the steps of the model; prints a choice on stderr."""
    import torch
    engine = chat.idle[0]
    if engine.device.type == "cpu":
        choice = sample.choose_threads(engine.advance, torch.get_num_threads(), given)
        if choice:
            print(f"chat.py: {choice}", file=sys.stderr)

# -----------------------------------------------------------------------------
# Terminal

HELP = """/clear            begin a new conversation
/retry            answer the last message again
/temperature T    below 1: likely tokens become likelier; 0: always the likeliest
/top_k K          draw from the K likeliest tokens; 0: from all
/system TEXT      set the system message; without TEXT: remove it
/save FILE        write the conversation to FILE; without FILE: to a new file here
/help             this list
/quit             end (so does Ctrl-D)
A message that begins with / is written with //. Ctrl-C stops an answer."""

class Printer:
    """Prints an answer as its events come; a call stands in brackets: [calculator: 1 + 1 = 2]."""

    def __init__(self, terminal: bool):
        self.terminal = terminal
        dim = terminal and not os.environ.get("NO_COLOR")
        self.begin_call, self.end_call = ("\x1b[2m", "\x1b[0m") if dim else ("", "")
        self.part = -1
        self.open = ""                   # "python" or "python_output" in a call
        self.last = ""                   # the character before

    def show(self, event: dict):
        text = event["text"]
        if event["part"] != self.part:
            after_call = self.open and event["type"] == "text"
            if event["type"] == "python" and self.last.isalnum():
                print(" ", end="")
            self.part = event["part"]
            self.change(event["type"])
            if after_call and text[0].isalnum():
                print(" ", end="")
        self.last = text[-1]
        if self.terminal:                # a model may write control characters
            text = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
        print(text, end="", flush=True)

    def change(self, type: str):
        """Prints what stands between two parts."""
        if self.open == "python" and type == "python_output":
            print(" = ", end="")
        elif self.open:
            print((" has no result]" if self.open == "python" else "]") + self.end_call, end="")
        if type == "python":
            print(self.begin_call + "[calculator: ", end="")
        self.open = type if type != "text" else ""

    def close(self):
        """Ends the answer with a line end."""
        self.change("text")
        print(flush=True)

class Terminal:
    """A conversation in the terminal, or with a file or a pipe as its input."""

    def __init__(self, chat: Chat, settings: Settings, system: str, seed: int):
        self.chat = chat
        self.settings = settings
        self.system = system
        self.seed = seed
        self.messages = []
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.stopped = False             # by Ctrl-C

    def conversation(self) -> list[dict]:
        """The messages, with the system message before them."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    def say(self, text: str):
        """Prints a line that is not part of an answer."""
        print(f"chat.py: {one_line(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stoppable(self):
        """While it lasts, Ctrl-C sets `stopped`; the second one ends the process as usual."""
        self.stopped = False
        usual = signal.getsignal(signal.SIGINT)

        def stop(*_):
            self.stopped = True
            signal.signal(signal.SIGINT, usual)
        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def ask(self, message: str):
        """Answers the message and keeps both. Raises UserError and keeps nothing if there is no answer."""
        self.messages.append({"role": "user", "content": message})
        answer = Answer(self.chat.tool)
        printer = Printer(sys.stdout.isatty())
        try:
            steps = self.chat.answer(self.conversation(), self.settings, self.seed, answer)
            with self.stoppable(), contextlib.closing(steps):
                for events in steps:
                    for event in events:
                        self.handle(event, printer)
                    if self.stopped:
                        break
        except UserError:
            self.messages.pop()
            raise
        self.seed += 1
        printer.close()
        self.messages.append({"role": "assistant", "content": answer.content()})

    def handle(self, event: dict, printer: Printer):
        """Prints an event of an answer."""
        if "part" in event:
            printer.show(event)
        elif "dropped" in event:
            self.say(f"the conversation is longer than --context={self.chat.context} tokens: its oldest "
                     f"{event['dropped']} messages are left out")

    def command(self, line: str) -> bool:
        """Does what a line that begins with / says; False: the conversation is over. Raises UserError."""
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        commands = {"clear": self.clear, "retry": self.retry, "temperature": self.set_temperature,
                    "top_k": self.set_top_k, "system": self.set_system, "save": self.save, "help": self.help}
        if name in ("quit", "exit"):
            return False
        if name not in commands:
            raise UserError(f"/{name} is not a command; /help lists them")
        commands[name](value)
        return True

    def clear(self, _):
        self.messages = []
        self.say("a new conversation")

    def retry(self, _):
        if not self.messages:
            raise UserError("/retry has no message to answer; write one first")
        before = self.messages
        self.messages = before[:-2]
        try:
            self.ask(before[-2]["content"])
        except UserError:
            self.messages = before
            raise

    def set_number(self, name: str, value: str, kind, most: float):
        """Changes a setting, or shows it if there is no value."""
        if value:
            try:
                number = kind(value)
            except ValueError:
                number = math.nan
            if not 0 <= number <= most:
                raise UserError(f"/{name} {value}: give a number from 0 to {most:g}")
            self.settings = replace(self.settings, **{name: number})
        self.say(f"{name} is {getattr(self.settings, name)}")

    def set_temperature(self, value: str):
        self.set_number("temperature", value, float, MOST_TEMPERATURE)

    def set_top_k(self, value: str):
        self.set_number("top_k", value, int, MOST_TOP_K)

    def set_system(self, value: str):
        self.system = value
        self.say("the system message is set" if value else "there is no system message")

    def save(self, value: str):
        """Writes the conversation as a line of JSON, which data/chat.py reads. Never overwrites a file."""
        path = Path(os.path.expanduser(value or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")))
        if not self.messages:
            raise UserError("/save has no conversation to write; write a message first")
        line = json.dumps({"messages": self.conversation()}, ensure_ascii=False) + "\n"
        try:
            file = open(path, "x", encoding="utf-8")
            try:
                with file:
                    file.write(line)
            except BaseException:
                path.unlink()            # no half of a conversation
                raise
        except FileExistsError:
            raise UserError(f"/save {path}: the file exists; name another one") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"/save {path}: the file cannot be written ({reason}); name another one") from None
        self.say(f"{path} has the conversation")

    def help(self, _):
        print(HELP, file=sys.stderr)

    def read(self) -> str | None:
        """The next line of the input, or None at its end; raises UserError if it is not UTF-8."""
        if self.interactive:
            print(flush=True)
            try:
                line = input("> ")
            except EOFError:
                print(flush=True)
                return None
        else:
            line = sys.stdin.readline()
            if not line:
                return None
        try:
            line.encode()
        except UnicodeEncodeError:
            raise UserError("the message is not UTF-8 text; write it as UTF-8") from None
        return line.strip()

    def turn(self) -> bool:
        """Reads a line and does what it asks for; False: the conversation is over. Raises UserError."""
        line = self.read()
        if line is None:
            return False
        if line.startswith("/") and not line.startswith("//"):
            return self.command(line)
        if line:
            self.ask(line[1:] if line.startswith("//") else line)
            if self.stopped:
                self.say("stopped")
        return True

    def run(self):
        """Reads and answers until the end. Raises the UserError of an input that is not a terminal."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline          # noqa: F401: lines can be edited; it keeps them in memory only
            self.say(f"{self.chat.name}; /help lists the commands, Ctrl-D ends")
        while True:
            try:
                if not self.turn():
                    return
            except UserError as error:
                if not self.interactive:
                    raise
                self.say(str(error))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.say("/quit or Ctrl-D ends")

# -----------------------------------------------------------------------------
# Page: who is answered when

class Busy(Exception):
    """Too many requests wait for the model."""

class Job:
    """A request of a page. events: what the model's thread has to say, a list of events at a time.

    page: a random name that a page gives itself; gone: its browser does not wait for the answer any more.
    """

    def __init__(self, page: str, messages: list[dict], settings: Settings):
        self.page = page
        self.messages = messages
        self.settings = settings
        self.events = queue.SimpleQueue()
        self.gone = False
        self.place = 0                   # among those that wait, from 1
        self.steps = None                # the running generator of Chat.answer

class Desk:
    """Gives the model to the requests of several pages. `run` belongs to the thread that owns the model.

    Up to chat.at_once answers are written at the same time, a token of each in turn. A page has at most one of them,
    and the others wait in the order in which they came.
    """

    def __init__(self, chat: Chat, seed: int):
        self.chat = chat
        self.seed = seed
        self.changed = threading.Condition()
        self.waiting = []
        self.active = []
        self.closed = False

    def submit(self, job: Job):
        """Adds a request; raises Busy."""
        with self.changed:
            if len(self.waiting) >= MOST_WAITING:
                raise Busy("too many requests wait for the model; try again later")
            if Counter(other.page for other in self.waiting)[job.page] >= WAITING_PER_PAGE:
                raise Busy(f"this page already has {WAITING_PER_PAGE} requests that wait; wait for them")
            self.waiting.append(job)
            self.changed.notify()

    def leave(self, job: Job):
        """Says that nobody waits for the answer any more: the model is free for others."""
        with self.changed:
            job.gone = True
            self.changed.notify()

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify()

    def admit(self):
        """Moves requests from `waiting` to `active`, and tells the others their places."""
        self.waiting = [job for job in self.waiting if not job.gone]
        pages = {job.page for job in self.active}
        for job in list(self.waiting):
            if len(self.active) < self.chat.at_once and job.page not in pages:
                self.waiting.remove(job)
                self.active.append(job)
                pages.add(job.page)
                job.steps = self.chat.answer(job.messages, job.settings, self.seed, Answer(self.chat.tool))
                self.seed += 1
        for place, job in enumerate(self.waiting, 1):
            if job.place != place:
                job.place = place
                job.events.put([{"waiting": place}])

    def step(self, job: Job):
        """Makes the next token of a request, and ends it when there is none."""
        try:
            events = None if job.gone else next(job.steps, None)
        except UserError as error:
            events = [{"error": str(error)}]
        except Exception as error:       # such as too little memory: one answer fails, the server goes on
            print(f"chat.py: an answer failed ({type(error).__name__}: {UserError(error)})", file=sys.stderr)
            events = [{"error": f"the answer failed ({type(error).__name__}); the terminal says more"}]
        if events:
            job.events.put(events)
        if events is None or any("done" in event or "error" in event for event in events):
            job.steps.close()
            self.active.remove(job)

    def run(self):
        """Answers requests until `close`."""
        while True:
            with self.changed:
                self.admit()
                while not self.active and not self.closed:
                    self.changed.wait()
                    self.admit()
                if self.closed:
                    return
            for job in list(self.active):
                self.step(job)

# -----------------------------------------------------------------------------
# Page: what is accepted

class Refused(Exception):
    """A request that is not answered. status: of HTTP; the text names the reason and the remedy."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status

def need(good, text: str, status: int = 400):
    if not good:
        raise Refused(status, text)

def check_text(text, name: str, most: int) -> str:
    """The text, if it is one of at most so many characters; raises Refused."""
    need(isinstance(text, str), f"{name} is not a text")
    need(len(text) <= most, f"{name} has {len(text)} characters; at most {most} are allowed", 413)
    need(not re.search("[\ud800-\udfff]", text), f"{name} is not valid Unicode")
    return text

def check_number(value, name: str, kind, low, high):
    """The number, if it is one of this kind and range; raises Refused."""
    good = type(value) in ((int, float) if kind is float else (int,)) and low <= value <= high
    need(good, f"{name} must be a number from {low:g} to {high:g}")
    return kind(value)

def check_content(message, number: int) -> tuple[dict, int]:
    """(message, its characters) of a page's message, rebuilt from the fields that are known; raises Refused."""
    name = f"message {number + 1}"
    role = ROLES[number % 2]
    need(isinstance(message, dict) and message.get("role") == role, f"{name} must be of the role {role}")
    content = message.get("content")
    if role == "user":
        need(check_text(content, name, MESSAGE_CHARACTERS).strip(), f"{name} is empty; write something")
        return {"role": role, "content": content}, len(content)
    if isinstance(content, str):
        return {"role": role, "content": check_text(content, name, MOST_CHARACTERS)}, len(content)
    need(isinstance(content, list) and len(content) <= MOST_TOKENS, f"{name} is neither a text nor a list of parts")
    parts = []
    for part in content:
        need(isinstance(part, dict) and part.get("type") in PART_TYPES, f"{name} has a part of an unknown type")
        parts.append({"type": part["type"], "text": check_text(part.get("text"), name, MOST_CHARACTERS)})
    return {"role": role, "content": parts}, sum(len(part["text"]) for part in parts)

def read_request(body: bytes) -> Job:
    """The request in the body of a POST; raises Refused."""
    def no_number(text):
        raise ValueError(text)
    try:
        data = json.loads(body.decode(), parse_constant=no_number)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    need(isinstance(data, dict), "the body is not a JSON object")
    messages = data.get("messages")
    need(isinstance(messages, list), "messages is not a list")
    need(len(messages) <= MOST_MESSAGES, f"there are {len(messages)} messages; at most {MOST_MESSAGES} are allowed",
         413)
    need(len(messages) % 2, "the last message must be one of the user")
    checked = [check_content(message, number) for number, message in enumerate(messages)]
    system = check_text(data.get("system", ""), "system", MESSAGE_CHARACTERS)
    total = len(system) + sum(size for _, size in checked)
    need(total <= MOST_CHARACTERS, f"the conversation has {total} characters; at most {MOST_CHARACTERS} are allowed",
         413)
    settings = Settings(check_number(data.get("temperature"), "temperature", float, 0, MOST_TEMPERATURE),
                        check_number(data.get("top_k"), "top_k", int, 0, MOST_TOP_K),
                        check_number(data.get("max_tokens"), "max_tokens", int, 1, MOST_TOKENS))
    page = check_text(data.get("page"), "page", 64)
    before = [{"role": "system", "content": system}] * bool(system)
    return Job(page, before + [message for message, _ in checked], settings)

def loopback(host: str) -> bool:
    """Whether a Host header names this machine. A name of another site may lead here, too (DNS rebinding)."""
    return bool(re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", host, re.I))

# -----------------------------------------------------------------------------
# Page: its server

class Handler(BaseHTTPRequestHandler):
    """One request on one connection. Nothing of it is logged."""

    protocol_version = "HTTP/1.1"
    server_version = "minutegpt"
    sys_version = ""
    timeout = READ_SECONDS

    def setup(self):
        super().setup()
        self.deadline = threading.Timer(READ_SECONDS, self.cut)
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def cut(self):
        """Ends the connection of a client that sends its request too slowly."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass

    def handle(self):
        self.close_connection = True     # one request a connection; the base class may not go on after an error
        self.handle_one_request()

    def head(self, status: int, kind: str, length: int | None = None, policy: str = "default-src 'none'"):
        """Sends the status and the headers."""
        self.send_response(status)
        headers = {"Content-Type": kind, "Cache-Control": "no-store", "Connection": "close", "X-Frame-Options": "DENY",
                   "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                   "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
                   "Content-Security-Policy": policy}
        if length is not None:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        """Sends an error as JSON, without a word of the request."""
        text = explain or self.responses.get(code, ("the request is not understood",))[0]
        content = json.dumps({"error": text}).encode()
        self.close_connection = True
        self.requestline = getattr(self, "requestline", "")
        self.request_version = getattr(self, "request_version", "") or "HTTP/1.1"
        self.head(code, "application/json", len(content))
        self.wfile.write(content)
        self.drain()

    def drain(self):
        """Reads what the client still sends; closing at once could take the answer away from it."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            left = 4 * BODY_BYTES
            while left > 0 and (piece := self.connection.recv(1 << 16)):
                left -= len(piece)

    def guarded(self, answer):
        """Calls answer() for a request of this machine's own browsers; sends what was refused as an error."""
        try:
            self.check_sender()
            answer()
        except Refused as error:
            self.send_error(error.status, explain=str(error))

    def check_sender(self):
        """Raises Refused for a request that another site caused."""
        host, origin = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        need(len(host) == 1 and loopback(host[0]), "the Host is not this machine; open the page as "
             f"http://127.0.0.1:{self.server.server_port}", 403)
        need(not origin or origin == [f"http://{host[0]}"], "the request comes from another site; open the page itself",
             403)

    def do_GET(self):
        self.guarded(self.send_page)

    def do_POST(self):
        self.guarded(self.send_answer)

    def send_page(self):
        need(self.path.partition("?")[0] == "/", "there is only the page /", 404)
        self.deadline.cancel()
        nonce = secrets.token_urlsafe(16)
        values = self.server.values | {"nonce": nonce}
        text = re.sub(r"\{\{(\w+)\}\}", lambda found: html.escape(str(values[found[1]])), self.server.page)
        content = text.encode()
        self.head(200, "text/html; charset=utf-8", len(content), f"default-src 'none'; script-src 'nonce-{nonce}'; "
                  f"style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                  "frame-ancestors 'none'")
        self.wfile.write(content)

    def read_body(self) -> bytes:
        """The body of a POST of the page; raises Refused."""
        token = self.headers.get_all("X-Chat-Token", [])
        need(len(token) == 1 and secrets.compare_digest(token[0].encode(errors="replace"),
                                                        self.server.values["token"].encode()),
             "the page is of an earlier server; load it again", 403)
        need(self.headers.get_content_type() == "application/json", "the body must be application/json", 415)
        need("Transfer-Encoding" not in self.headers, "the body must have a Content-Length", 411)
        length = self.headers.get_all("Content-Length", [])
        need(len(length) == 1 and re.fullmatch("[0-9]{1,20}", length[0]), "the body must have a Content-Length", 411)
        size = int(length[0])
        need(size <= BODY_BYTES, f"the body has {size} bytes; at most {BODY_BYTES} are allowed", 413)
        body = self.rfile.read(size)
        need(len(body) == size, "the body is shorter than its Content-Length")
        return body

    def send_answer(self):
        need(self.path == "/chat", "there is only /chat", 404)
        job = read_request(self.read_body())
        try:
            self.server.desk.submit(job)
        except Busy as error:
            raise Refused(503, str(error)) from None
        self.deadline.cancel()
        self.connection.settimeout(SEND_SECONDS)
        try:
            self.head(200, "text/event-stream; charset=utf-8")
            self.stream(job)
        finally:
            self.server.desk.leave(job)

    def stream(self, job: Job):
        """Sends the events of a request until its answer ends or its browser has gone."""
        while not self.browser_gone():
            try:
                events = job.events.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            with contextlib.suppress(queue.Empty):
                while True:              # all that is there goes in one piece
                    events = events + job.events.get_nowait()
            self.wfile.write("".join(f"data: {json.dumps(event)}\n\n" for event in events).encode())
            if any("done" in event or "error" in event for event in events):
                return

    def browser_gone(self) -> bool:
        """Whether the other end has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

class Server(ThreadingHTTPServer):
    """The page at 127.0.0.1. values: what stands in the page for {{name}}."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, port: int, desk: Desk, page: str, values: dict):
        super().__init__(("127.0.0.1", port), Handler)
        self.desk = desk
        self.page = page
        self.values = values | {"token": secrets.token_urlsafe(24)}
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def process_request(self, request, address):
        if self.free.acquire(blocking=False):
            super().process_request(request, address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.free.release()

    def handle_error(self, request, address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):                          # not a browser that has gone
            print(f"chat.py: a request failed ({type(error).__name__})", file=sys.stderr)

def make_server(args: argparse.Namespace, chat: Chat) -> Server:
    """The server of the page, which listens already; raises UserError."""
    try:
        page = PAGE.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{PAGE} cannot be read ({error.strerror}); use the chat.html that belongs to "
                        "chat.py") from None
    values = {"model": chat.name, "system": args.system, "temperature": args.temperature, "top_k": args.top_k,
              "max_tokens": args.max_tokens, "most_messages": MOST_MESSAGES, "most_characters": MOST_CHARACTERS,
              "message_characters": MESSAGE_CHARACTERS, "most_tokens": MOST_TOKENS, "most_top_k": MOST_TOP_K,
              "most_temperature": MOST_TEMPERATURE}
    try:
        return Server(args.port, Desk(chat, args.seed), page, values)
    except OSError as error:
        raise UserError(f"--port={args.port} cannot be used ({error.strerror}); name another one, or 0 for any free "
                        "one") from None

def serve(args: argparse.Namespace, chat: Chat):
    """Serves the page until Ctrl-C. The model works in this thread, so that Ctrl-C reaches it."""
    with make_server(args, chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"chat.py: {chat.name}\nchat.py: open http://127.0.0.1:{server.server_port} in a browser of this "
              "machine; Ctrl-C ends", file=sys.stderr, flush=True)
        try:
            server.desk.run()
        finally:
            server.shutdown()

# -----------------------------------------------------------------------------
# The command

def run(args: argparse.Namespace):
    """Loads the model and chats; raises UserError."""
    chat = load(args)
    set_threads(chat, args.threads)
    args.seed = random.SystemRandom().randrange(1 << 62) if args.seed is None else args.seed
    if args.web:
        serve(args, chat)
        return
    settings = Settings(args.temperature, args.top_k, args.max_tokens)
    terminal = Terminal(chat, settings, args.system, args.seed)
    if args.prompt is None:
        terminal.run()
    else:
        terminal.ask(args.prompt)
        if terminal.stopped:
            raise KeyboardInterrupt

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 an error that the user can correct, 130 interrupted."""
    try:
        sample.prepare_stdout()
        if not sys.stdin.isatty() and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        run(parse_args(argv))
        return 0
    except UserError as error:
        print(f"chat.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nchat.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sample.close_stdout()
        return 0
    except OSError as error:                                        # a name that is too long, a folder without access
        print(f"chat.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not sample.lacks_memory(error):
            raise
        print(f"chat.py: the memory is used up ({UserError(error)}); use another --device or a smaller model",
              file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
