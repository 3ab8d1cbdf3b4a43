"""chat.py: answers with tool calls, the terminal's commands, and the page with its guards.

The model is a chain, in which each token says what follows it, so that every answer is known; or train_gpt.py's tiny
preset made smaller, with random weights, in a checkpoint folder. The server is spoken to by raw sockets, as a hostile
program would, and its page is opened in a headless Chromium where there is one.

Run: python -m pytest tests/test_chat.py
"""
import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tokenizer_json
from safetensors.torch import save_file

import sample
import train_gpt

# Not `import chat`: data/chat.py has the same name.
chat = sample.import_script(ROOT / "chat.py", ("Chat", "Terminal", "Desk", "Server"))
conversations = sample.import_script(chat.FORMAT, ("prime", "calculate"))

SPECIAL = ["<|bos|>", *chat.CHAT_TOKENS]
BOS, USER, USER_END, ASSISTANT, END, CALL, CALLED, OUTPUT, SHOWN = range(256, 265)
EMOJI = "é漢😀"                           # two, three and four bytes
SETTINGS = chat.Settings(temperature=0, max_tokens=100)


def chat_tokenizer_json():
    data = json.loads(tokenizer_json()) | {"special_tokens": {name: 256 + n for n, name in enumerate(SPECIAL)}}
    return (json.dumps(data, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode()


TOKENIZER = sample.Tokenizer(json.loads(chat_tokenizer_json()))


class Chain(torch.nn.Module):
    """Stands in for a model: follow[a] is by far the likeliest after a. prompts: those that it read.

    seconds: what a step takes; on_step: called with the number of each step.
    """

    def __init__(self, *chains, seconds=0.0, on_step=lambda number: None):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.cfg = SimpleNamespace(bos_id=BOS)
        self.prompts, self.seconds, self.on_step, self.number = [], seconds, on_step, 0
        self.table = torch.zeros(265, 265)
        for chain in chains:
            for left, right in zip(chain, chain[1:]):
                self.table[left, right] = 99

    def new_cache(self, batch, max_tokens, chunk=256):
        return SimpleNamespace(fill=lambda other, rows: None)

    def decode(self, tokens, cache, lengths=None, last=False):
        if lengths is not None:
            self.prompts += tokens.tolist()
        else:
            self.number += 1
            self.on_step(self.number)
            time.sleep(self.seconds)
        return self.table[tokens[:, -1:].long()]


CALLING = [ASSISTANT, *b"Hm ", CALL, *b"1+2", CALLED, 120, 120], [OUTPUT, 120], [*b"3", 120], [SHOWN, *b"!", END]
ENDLESS = [[ASSISTANT, 101, 101]]
CALLED_PARTS = [{"type": "text", "text": "Hm "}, {"type": "python", "text": "1+2"},
                {"type": "python_output", "text": "3"}, {"type": "text", "text": "!"}]


def make_chat(*chains, context=2048, at_once=4, **options):
    return chat.Chat(Chain(*(chains or CALLING), **options), TOKENIZER, "a chain", conversations, context, at_once)


def ids(*messages):
    """What the model reads for a conversation of these texts, written out by hand."""
    found = [BOS]
    for n, text in enumerate(messages):
        found += [(USER, ASSISTANT)[n % 2], *text.encode(), (USER_END, END)[n % 2]]
    return [*found, ASSISTANT]


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


# -----------------------------------------------------------------------------
# Answers

def answered(model, messages=(user("Hi"),), settings=SETTINGS):
    """(answer, all events) of a conversation."""
    answer = chat.Answer(model.tool)
    return answer, [event for events in model.answer([*messages], settings, 0, answer) for event in events]


def test_an_answer_has_text_calls_and_results_as_parts():
    model = make_chat()
    answer, events = answered(model)
    assert answer.parts == answer.content() == CALLED_PARTS and model.model.prompts == [ids("Hi")]
    assert events[-1]["done"] == "end" and events[-1]["tokens"] == answer.tokens == 12
    for number, part in enumerate(CALLED_PARTS):                    # the events give the same
        pieces = [event for event in events if event.get("part") == number]
        assert {event["type"] for event in pieces} == {part["type"]}
        assert "".join(event["text"] for event in pieces) == part["text"]


def test_markers_that_the_model_writes_itself_begin_no_result():
    answer, _ = answered(make_chat([ASSISTANT, 97, OUTPUT, *b"42", SHOWN, *b".", END]))
    assert answer.content() == "a42."
    answer, _ = answered(make_chat([ASSISTANT, CALL, 43, CALLED, 97, END]))         # "+" has no result
    assert answer.content() == [{"type": "python", "text": "+"}, {"type": "text", "text": "a"}]


@pytest.mark.parametrize("end", [BOS, END, USER])
def test_what_ends_an_answer(end):
    answer, events = answered(make_chat([ASSISTANT, 97, 98, end, 99]))
    assert (answer.content(), events[-1]["done"]) == ("ab", "end")


def test_characters_come_whole_and_half_ones_are_replaced():
    answer, events = answered(make_chat([ASSISTANT, *EMOJI.encode(), END]))
    assert [event["text"] for event in events[:-1]] == [*EMOJI]
    answer, _ = answered(make_chat([ASSISTANT, 0xf0, CALL, 0xe6, END]))
    assert [part["text"] for part in answer.parts] == ["\ufffd", "\ufffd"]


def test_the_longest_answer_and_the_room_end_it():
    assert [answered(make_chat(*ENDLESS, context=context), settings=replace(SETTINGS, max_tokens=most))[1][-1]["tokens"]
            for context, most in ((2048, 7), (16, 100))] == [7, 10]                 # "Hi" is 6 tokens


def test_the_oldest_turns_are_left_out_when_the_conversation_is_too_long():
    model = make_chat([ASSISTANT, 97, END], context=40)
    turns = [user("first"), assistant("one"), user("second"), assistant("two"), user("third")]
    system = {"role": "system", "content": "Be kind."}
    model.answer(turns, SETTINGS, 0, None)
    for before, wanted, dropped in ((turns, ids("second", "two", "third"), 2),
                                    ([system, *turns], ids("Be kind.\n\nthird"), 4), (turns[-1:], ids("third"), 0)):
        model.model.prompts.clear()
        _, events = answered(model, before, replace(SETTINGS, max_tokens=16))
        assert model.model.prompts == [wanted]
        assert [event["dropped"] for event in events if "dropped" in event] == [dropped] * bool(dropped)
    with pytest.raises(chat.UserError, match="has 34 tokens, and 20 fit"):
        answered(model, [*turns[:4], user("x" * 30)])


def test_engines_are_used_again_and_are_never_more_than_answers_at_once():
    model = make_chat(at_once=2)
    hot, cold = chat.Settings(1.0), chat.Settings(0.5)
    first, second = model.take_engine(hot), model.take_engine(cold)
    model.idle += [first, second]
    assert model.take_engine(cold) is second and model.take_engine(hot) is first
    model.idle += [first, second]
    third = model.take_engine(chat.Settings(0.1))
    assert model.engines == 2 and len(model.idle) == 1 and third not in (first, second)
    assert model.take_engine(chat.Settings(0.6, top_k=10 ** 6)).draw.top_k == TOKENIZER.vocab_size


def test_an_engine_that_failed_is_not_used_again():
    def fail(number):
        raise RuntimeError("out of memory")
    model = make_chat(on_step=fail)
    with pytest.raises(RuntimeError):
        answered(model)
    assert (model.engines, model.idle) == (0, [])


# -----------------------------------------------------------------------------
# Terminal

def talk(capsys, monkeypatch, text, model=None, system="", settings=SETTINGS):
    """(terminal, stdout, lines of stderr) after a conversation that is read from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    terminal = chat.Terminal(model or make_chat([ASSISTANT, *b"ok", END]), settings, system, 5)
    terminal.interactive = False
    terminal.run()
    out, err = capsys.readouterr()
    return terminal, out, err.splitlines()


def test_the_terminal_answers_with_the_history(capsys, monkeypatch):
    terminal, out, err = talk(capsys, monkeypatch, "one\n\n  two \n//three\n")
    assert (out, err) == ("ok\nok\nok\n", [])
    assert terminal.chat.model.prompts == [ids("one"), ids("one", "ok", "two"), ids("one", "ok", "two", "ok", "/three")]


def test_calls_are_shown_as_such_and_stay_in_the_history(capsys, monkeypatch):
    terminal, out, _ = talk(capsys, monkeypatch, "a\nb\n", make_chat())
    assert out == "Hm [calculator: 1+2 = 3]!\n" * 2
    again = [*ids("a"), *b"Hm ", CALL, *b"1+2", CALLED, OUTPUT, *b"3", SHOWN, *b"!", END, *ids("b")[1:]]
    assert terminal.chat.model.prompts[1] == again
    for chain, shown in (([CALL, 43, CALLED, 97], "[calculator: + has no result] a\n"),
                         ([CALL, 49], "[calculator: 1 has no result]\n"),
                         ([97, CALL, 49, CALLED, OUTPUT], "a [calculator: 1 = 1] b\n")):
        model = make_chat([ASSISTANT, *chain, END], [SHOWN, 98, END])
        assert talk(capsys, monkeypatch, "a\n", model)[1] == shown


def test_clear_retry_and_system(capsys, monkeypatch):
    text = "one\n/retry\n/clear\ntwo\n/system Be brief.\n/retry\n/system\n/retry\n"
    terminal, out, err = talk(capsys, monkeypatch, text)
    assert terminal.chat.model.prompts == [ids("one"), ids("one"), ids("two"), ids("Be brief.\n\ntwo"), ids("two")]
    assert (out, len(err), terminal.seed) == ("ok\n" * 5, 3, 10)
    assert talk(capsys, monkeypatch, "one\n", system="S")[0].chat.model.prompts == [ids("S\n\none")]


def test_settings_change_what_is_drawn(capsys, monkeypatch):
    terminal, _, err = talk(capsys, monkeypatch, "/temperature 1.5\n/temperature\n/top_k 3\nx\n/quit\nnever\n")
    assert terminal.settings == replace(SETTINGS, temperature=1.5, top_k=3)
    assert err == ["chat.py: temperature is 1.5"] * 2 + ["chat.py: top_k is 3"]
    assert terminal.chat.idle[0].draw == sample.Draw(1.5, 3) and len(terminal.messages) == 2


@pytest.mark.parametrize("line", ["/temperature 3", "/temperature nan", "/temperature x", "/top_k -1", "/top_k 1.5",
                                  "/retry", "/save", "/nonsense", "/top_k 9999999999", "bad \udcff text", "x" * 3000])
def test_a_bad_line_is_refused_and_a_terminal_goes_on(capsys, monkeypatch, line):
    with pytest.raises(chat.UserError) as error:
        talk(capsys, monkeypatch, line + "\nnever\n")
    assert "\n" not in str(error.value) and (line.split()[0] in str(error.value) or not line.startswith("/"))
    lines = iter([line, "and on"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    terminal = chat.Terminal(make_chat([ASSISTANT, *b"ok", END]), SETTINGS, "", 0)
    terminal.interactive = True
    capsys.readouterr()
    terminal.run()
    out, err = capsys.readouterr()
    assert terminal.messages == [user("and on"), assistant("ok")]
    assert len(err.splitlines()) == 2 and err.splitlines()[1] == f"chat.py: {error.value}"


def test_save_writes_what_the_format_reads_and_overwrites_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = f"{EMOJI}\n/system S\n/save a [1].jsonl\n/clear\nx\n/save\n"
    talk(capsys, monkeypatch, text, make_chat())
    first, second = sorted(tmp_path.iterdir())
    saved = json.loads(first.read_text(encoding="utf-8"))
    assert saved == {"messages": [{"role": "system", "content": "S"}, user(EMOJI), assistant(CALLED_PARTS)]}
    conversations.render(saved["messages"], TOKENIZER)
    assert re.fullmatch(r"chat-\d{8}-\d{6}\.jsonl", second.name)
    for path, reason in ((first, "exists"), (tmp_path / "no" / "such", "No such file"), (tmp_path, "exists"),
                         ("a\0b", "null")):
        with pytest.raises(chat.UserError, match=reason):
            talk(capsys, monkeypatch, f"x\n/save {path}\n")
    assert sorted(tmp_path.iterdir()) == [first, second] and json.loads(first.read_text(encoding="utf-8")) == saved


def test_save_leaves_no_half_of_a_file(capsys, monkeypatch, tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "saved.jsonl"
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, usual[1]))
    try:
        with pytest.raises(chat.UserError, match="cannot be written"):
            talk(capsys, monkeypatch, f"x\n/save {path}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not path.exists()


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(capsys, monkeypatch):
    def interrupt(number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
    usual = signal.getsignal(signal.SIGINT)
    terminal, out, err = talk(capsys, monkeypatch, "one\ntwo\n", make_chat(*ENDLESS, on_step=interrupt))
    assert (out, err) == ("eeee\n" + "e" * 100 + "\n", ["chat.py: stopped"])
    assert terminal.messages[:2] == [user("one"), assistant("eeee")] and len(terminal.messages) == 4
    assert signal.getsignal(signal.SIGINT) is usual


def test_ctrl_c_twice_in_an_answer_ends_the_chat(capsys, monkeypatch):
    def interrupt(number):
        stop = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is stop:             # two signals that wait are one
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk(capsys, monkeypatch, "one\n", make_chat(*ENDLESS, on_step=interrupt))


def test_a_long_chat_says_what_it_leaves_out(capsys, monkeypatch):
    _, out, err = talk(capsys, monkeypatch, "one\ntwo\nthree\n", make_chat([ASSISTANT, *b"ok", END], context=32))
    assert out == "ok\n" * 3
    assert err == ["chat.py: the conversation is longer than --context=32 tokens: its oldest 4 messages are left out"]


def test_a_model_cannot_write_control_characters_to_a_terminal(capsys):
    for terminal, expected in ((True, "a\ufffd[2J\n\tb"), (False, "a\x1b[2J\n\tb")):
        printer = chat.Printer(terminal)
        printer.show({"part": 0, "type": "text", "text": "a\x1b[2J\n\tb"})
        assert capsys.readouterr().out == expected


# -----------------------------------------------------------------------------
# The command

def write_checkpoint(run, tokenizer, **changes):
    """Writes run/checkpoint/step_000007 of a small random model with that tokenizer.json; returns the folder."""
    vocab = sample.Tokenizer(json.loads(tokenizer)).vocab_size
    cfg = replace(train_gpt.PRESETS["tiny"], vocab_size=vocab, bos_id=256, attention="plain", compile=False,
                  model_dim=96, head_dim=48, mlp_dim=96, gate_dim=8, bigram_rows=64, bigram_signs=16,
                  final_windows=(96, 512))
    folder = run / "checkpoint" / "step_000007"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(train_gpt.GPT(cfg).state_dict(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    meta = {"format": 1, "script": "train_gpt", "source_sha256": hashlib.sha256(
        (ROOT / "train_gpt.py").read_bytes()).hexdigest(), "config": asdict(cfg), "step": 7, "stage": 1,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()} | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    (run / "checkpoint" / "latest").write_text(folder.name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a chat model, which no test changes."""
    run = tmp_path_factory.mktemp("logs") / "run"
    write_checkpoint(run, chat_tokenizer_json(), chat=True)
    return run


def run_main(capsys, *flags):
    """(exit code, stdout, stderr) of the command line in this process."""
    code = chat.main(["--device=cpu", "--threads=1", *map(str, flags)])
    return code, *capsys.readouterr()


def test_one_answer_goes_to_stdout_and_a_seed_repeats_it(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--checkpoint={trained}", "--prompt=How many?", "--max_tokens=20"
    first = run_main(capsys, *flags, "--seed=3")
    assert first[::2] == (0, "") and len(first[1]) > 3
    assert run_main(capsys, *flags, "--seed=3") == first
    assert len({run_main(capsys, *flags)[1] for _ in range(3)}) > 1                 # else another seed each time
    assert list(tmp_path.iterdir()) == []


def test_the_answer_is_the_argmax_of_forward(capsys, trained):
    code, out, _ = run_main(capsys, f"--checkpoint={trained}", "--prompt=Hi", "--max_tokens=12", "--temperature=0")
    model, tokenizer, _ = sample.load_checkpoint(trained / "checkpoint" / "step_000007", "cpu")
    tokens = ids("Hi")
    while len(tokens) < len(ids("Hi")) + 12 and tokens[-1] not in (BOS, END, USER):
        tokens.append(int(model(torch.tensor(tokens))[-1, :265].argmax()))
    expected = b"".join(map(tokenizer.token_bytes, tokens[len(ids("Hi")):])).decode(errors="replace")
    assert (code, out) == (0, expected + "\n") and not {CALL, CALLED} & set(tokens)


def test_a_base_model_is_refused_in_one_line_that_names_chat_sft(capsys, tmp_path):
    folder = write_checkpoint(tmp_path / "run", tokenizer_json())
    code, out, err = run_main(capsys, f"--checkpoint={tmp_path / 'run'}", "--prompt=x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"python chat_sft.py --checkpoint={folder} " in err


def test_a_model_with_the_tokens_that_has_not_learned_to_chat_gets_a_note(capsys, tmp_path):
    write_checkpoint(tmp_path / "run", chat_tokenizer_json())
    code, out, err = run_main(capsys, f"--checkpoint={tmp_path / 'run'}", "--prompt=x", "--max_tokens=2")
    assert code == 0 and err.count("\n") == 1 and "chat_sft.py teaches it" in err


@pytest.mark.parametrize("flag", ["--temperature=3", "--temperature=nan", "--top_k=-1", "--max_tokens=0", "--seed=-1",
                                  "--max_tokens=5000", "--context=3", "--port=70000", "--at_once=0", "--prompt= ",
                                  "--threads=-1", "--nonsense", "--prompt", "--system=\udcff", "--web",
                                  "--system=" + "x" * 9000], ids=lambda flag: ascii(flag)[:30])
def test_bad_flags_are_refused_in_one_line(capsys, flag):
    code, out, err = run_main(capsys, "--checkpoint=none", *(["--prompt=x"] if flag == "--web" else []), flag)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("chat.py: ") and flag.split("=")[0] in err, err


def test_a_message_that_is_too_long_is_refused(capsys, trained):
    code, out, err = run_main(capsys, f"--checkpoint={trained}", "--prompt=" + "x" * 99, "--context=64")
    assert (code, out, err.count("\n")) == (2, "", 1) and "103 tokens, and 32 fit" in err


def test_a_pipe_is_a_conversation_and_nothing_is_written(trained, fast_run, tmp_path):
    done = fast_run([sys.executable, str(ROOT / "chat.py"), f"--checkpoint={trained}", "--max_tokens=5", "--seed=1",
                     "--device=cpu"], input="Hi\n/top_k 1\nHi\n", cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, []), done
    assert done.stdout.decode() and b"chat.py: top_k is 1\n" in done.stderr


def test_help_lists_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit):
        chat.parse_args(["--help"])
    out = capsys.readouterr().out
    for flag in ("checkpoint", "prompt", "system", "temperature", "top_k", "max_tokens", "context", "seed", "web",
                 "port", "at_once", "device", "precision", "threads", "script", "vocab_dir", "out_dir"):
        assert "default:" in " ".join(out.split(f"  --{flag} ")[1].split("\n  --")[0].split()), flag


# -----------------------------------------------------------------------------
# Who is answered when

def make_desk(model):
    return chat.Desk(model, 0)


def submit(desk, page, text="Hi"):
    job = chat.Job(page, [user(text)], SETTINGS)
    desk.submit(job)
    return job


def test_pages_take_turns_and_each_has_one_answer_at_a_time():
    desk = make_desk(make_chat(*ENDLESS, at_once=2))
    jobs = [submit(desk, page) for page in ("a", "a", "b", "c")]
    desk.admit()
    assert desk.active == [jobs[0], jobs[2]] and desk.waiting == [jobs[1], jobs[3]]
    assert [job.place for job in jobs] == [0, 1, 0, 2]
    assert jobs[3].events.get_nowait() == [{"waiting": 2}]
    desk.leave(jobs[0])                                             # its browser has gone: the model is free
    desk.step(jobs[0])
    desk.admit()
    assert desk.active == [jobs[2], jobs[1]] and desk.waiting == [jobs[3]]
    desk.leave(jobs[3])                                             # one that waits leaves
    desk.admit()
    assert desk.waiting == [] and desk.chat.engines <= 2


def test_too_many_requests_are_refused(monkeypatch):
    desk = make_desk(make_chat())
    for _ in range(chat.WAITING_PER_PAGE):
        submit(desk, "a")
    with pytest.raises(chat.Busy, match="this page"):
        submit(desk, "a")
    monkeypatch.setattr(chat, "MOST_WAITING", chat.WAITING_PER_PAGE)
    with pytest.raises(chat.Busy, match="too many"):
        submit(desk, "b")


# -----------------------------------------------------------------------------
# The page, by raw sockets

@contextlib.contextmanager
def serving(model):
    """A server of the page with a model in a thread of its own."""
    args = chat.parse_args(["--port=0", "--seed=0"])
    server = chat.make_server(args, model)
    threads = [threading.Thread(target=server.desk.run, daemon=True),
               threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.desk.close()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server():
    with serving(make_chat()) as server:
        yield server


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def read_all(connection):
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


def send(server, content):
    """(status, headers, body) that the server answers to these bytes."""
    with connect(server) as connection:
        connection.sendall(content)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def request(server, body=None, path="/chat", method="POST", drop=(), **headers):
    """The bytes of a request that the page could send, with changed headers."""
    body = json.dumps(body if body is not None else question()).encode() if not isinstance(body, bytes) else body
    fields = {"Host": f"127.0.0.1:{server.server_port}", "Origin": f"http://127.0.0.1:{server.server_port}",
              "Content-Type": "application/json", "X-Chat-Token": server.values["token"],
              "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if name not in drop]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


def question(*messages, **changes):
    return {"messages": [*(messages or [user("Hi")])], "system": "", "page": "p", "temperature": 0, "top_k": 0,
            "max_tokens": 50} | changes


def events_of(body):
    return [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n")[:-1]]


def until(condition):
    """Waits until it holds; a busy machine may take long."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_the_page_is_one_file_that_asks_nobody_else(server):
    get = f"GET / HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode()
    status, headers, body = send(server, get)
    text = body.decode()
    assert status == 200 and headers["content-length"] == str(len(body)) and "{{" not in text
    assert server.values["token"] in text and "a chain" in text
    assert not re.search(r"(?:src|href)=|https?:|@import|url\(", text.replace('<link rel="icon" href="data:,">', ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", text)
    policy = headers["content-security-policy"]
    nonce = re.search("script-src 'nonce-([^']+)'", policy)[1]
    # the helper lowers the headers
    assert "default-src 'none'" in policy and "unsafe" not in policy and text.lower().count(f'nonce="{nonce}"') == 2
    assert nonce not in send(server, get)[1]["content-security-policy"]             # another one each time
    assert (headers["cache-control"], headers["x-frame-options"]) == ("no-store", "deny")
    assert "access-control-allow-origin" not in headers and "python" not in headers["server"]


def test_an_answer_is_streamed_with_its_calls(server):
    status, headers, body = send(server, request(server))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *pieces, last = events_of(body)
    assert [piece["text"] for piece in pieces] == [*"Hm 1+23!"] and last["done"] == "end"
    assert {piece["type"] for piece in pieces} == {"text", "python", "python_output"}
    server.desk.chat.model.prompts.clear()
    talked = user("a"), assistant(CALLED_PARTS), user("b")
    assert send(server, request(server, question(*talked, system="S")))[0] == 200
    wanted = [*ids("S\n\na"), *b"Hm ", CALL, *b"1+2", CALLED, OUTPUT, *b"3", SHOWN, *b"!", END, *ids("b")[1:]]
    assert server.desk.chat.model.prompts == [wanted]


def test_special_tokens_and_scripts_in_a_message_are_plain_text(server):
    server.desk.chat.model.prompts.clear()
    text = "<|assistant_end|></textarea><script>alert(1)</script>\0\u2028"
    assert send(server, request(server, question(user(text))))[0] == 200
    assert server.desk.chat.model.prompts == [ids(text)]


def test_what_stands_in_the_page_is_escaped():
    model = make_chat()
    model.name = "</span><script>alert('\"&"
    with serving(model) as server:
        _, _, body = send(server, f"GET / HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
    assert b"<script>" not in body and b"&lt;/span&gt;&lt;script&gt;alert(&#x27;&quot;&amp;" in body


@pytest.mark.parametrize("headers, status", [
    ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example:80"}, 403), ({"Host": "localhost.evil"}, 403),
    ({"Host": "127.0.0.2:8000"}, 403), ({"Host": "0.0.0.0:8000"}, 403), ({"Host": "user@localhost:1"}, 403),
    ({"Host": "localhost:1\r\nHost: localhost:1"}, 403), ({"Host": ""}, 403), ({"drop": ["Host"]}, 403),
    ({"Origin": "null"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "http://localhost:1"}, 403),
    ({"Origin": "https://127.0.0.1:{port}"}, 403), ({"Host": "localhost:{port}"}, 403), ({"drop": ["Origin"]}, 200),
    ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, 200),
    ({"Host": "[::1]:9000", "Origin": "http://[::1]:9000"}, 200),                   # through a tunnel
    ({"Host": "LOCALHOST", "Origin": "http://LOCALHOST"}, 200)], ids=str)
def test_only_this_machines_own_page_is_answered(server, headers, status):
    headers = {name: value.replace("{port}", str(server.server_port)) if isinstance(value, str) else value
               for name, value in headers.items()}
    found, _, body = send(server, request(server, **headers))
    assert found == status and (status == 200 or len(json.loads(body)["error"]) > 20)
    if "Host" in headers and "Origin" not in headers:               # and the page itself is not shown, with its token
        found, _, body = send(server, request(server, b"", "/", "GET", drop=["Origin"], **headers))
        assert found == (200 if headers["Host"] == f"localhost:{server.server_port}" else 403)
        assert found == 200 or server.values["token"].encode() not in body


@pytest.mark.parametrize("changes, status", [
    ({"drop": ["X-Chat-Token"]}, 403), ({"X_Chat_Token": "guess"}, 403), ({"X_Chat_Token": "\xe9"}, 403),
    ({"Content_Type": "text/plain"}, 415), ({"drop": ["Content-Type"]}, 415), ({"drop": ["Content-Length"]}, 411),
    ({"Content_Length": "-1"}, 411), ({"Content_Length": "+5"}, 411), ({"Content_Length": "\u0665"}, 411),
    ({"Content_Length": "5\r\nContent-Length: 6"}, 411), ({"Transfer_Encoding": "chunked"}, 411),
    ({"Content_Length": str(chat.BODY_BYTES + 1)}, 413), ({"Content_Length": "9" * 20}, 413),
    ({"Content_Length": "9" * 30}, 411), ({"path": "/etc/passwd"}, 404), ({"path": "/../chat"}, 404),
    ({"method": "GET", "path": "/chat.py"}, 404), ({"method": "PUT"}, 501), ({"method": "OPTIONS"}, 501),
    ({"X_Long": "x" * 70_000}, 431)], ids=lambda value: str(value)[:50])
def test_requests_that_the_page_never_sends_are_refused(server, changes, status):
    content = request(server, **changes)
    with connect(server) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}


@pytest.mark.parametrize("content", [b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\0\0", b"\r\n\r\n",
                                     b"x" * 70_000 + b"\r\n", b"POST /chat HTTP/1.1\r\n: x\r\n\r\n", b"\0" * 100])
def test_what_is_no_request_gets_no_answer(server, content):
    with connect(server) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert b"200" not in answer.split(b"\r\n")[0] and server.values["token"].encode() not in answer


LONG = "x" * (chat.MESSAGE_CHARACTERS + 1)
DEEP = b"[" * 100_000


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"\xff", 400), (DEEP, 400), (b'{"a":' + DEEP, 400), (b"1" * 9000, 400),
    (question(temperature=float("nan")), 400), (question(temperature=-0.1), 400), (question(temperature=2.1), 400),
    (question(temperature=True), 400), (question(temperature="1"), 400), (question(temperature=None), 400),
    (question(top_k=-1), 400), (question(top_k=1.5), 400), (question(max_tokens=0), 400),
    (question(max_tokens=chat.MOST_TOKENS + 1), 400), (question(max_tokens=10 ** 400), 400), (question(page=3), 400),
    (question(page="x" * 65), 413), (question(system=LONG), 413), (question(system=None), 400),
    (question(messages=None), 400), (question(messages=[]), 400), (question(messages={"0": user("x")}), 400),
    (question(user("")), 400), (question(user(" \n")), 400), (question(user(LONG)), 413), (question(user(["x"])), 400),
    (question("x"), 400), (question({}), 400), (question({"role": "system", "content": "x"}), 400),
    (question(assistant("x")), 400), (question(user("x"), assistant("x")), 400),
    (question(user("x"), user("x"), user("x")), 400),
    (question(user("\ud800")), 400), (question(user("x"), assistant(3), user("x")), 400),
    (question(user("x"), assistant([{"type": "image", "text": "x"}]), user("x")), 400),
    (question(user("x"), assistant([{"type": "text"}]), user("x")), 400),
    (question(user("x"), assistant(["x"]), user("x")), 400),
    (question(*[user("x"), assistant("x")] * 250, user("x")), 413),
    (question(*[user("x" * 7000), assistant("x")] * 4, user("x" * 7000)), 413),
    (question(user("x"), assistant("x" * 40_000), user("x")), 413)], ids=lambda value: str(value)[:40])
def test_bodies_that_are_no_conversation_are_refused(server, body, status):
    found, _, answer = send(server, request(server, body))
    assert found == status, answer
    error = json.loads(answer)["error"]
    assert 10 < len(error) < 200 and "\n" not in error


def test_the_limits_themselves_are_accepted(server):
    turns = [*[user("x"), assistant("")] * 249, user("x" * chat.MESSAGE_CHARACTERS)]
    assert len(turns) == 499 and send(server, request(server, question(*turns, max_tokens=1)))[0] == 200


def test_a_message_that_does_not_fit_is_an_error_in_the_stream():
    with serving(make_chat(context=32)) as server:
        status, _, body = send(server, request(server, question(user("x" * 99))))
        error, = events_of(body)
        assert status == 200 and "103 tokens, and 16 fit" in error["error"]


def test_an_answer_that_fails_is_an_error_in_the_stream_and_the_server_goes_on(capsys):
    def fail(number):
        if number == 3:
            raise RuntimeError("out of\nmemory")
    with serving(make_chat(on_step=fail)) as server:
        *_, last = events_of(send(server, request(server))[2])
        assert "RuntimeError" in last["error"] and "done" not in last
        assert events_of(send(server, request(server))[2])[-1]["done"] == "end"
    assert capsys.readouterr().err.count("\n") == 1


def test_four_browsers_at_once_get_what_each_would_get_alone(server):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(4)]
        for n, connection in enumerate(connections):
            connection.sendall(request(server, question(page=f"page {n}")))
        bodies = [read_all(connection).partition(b"\r\n\r\n")[2] for connection in connections]
    assert all([event["text"] for event in events_of(body)[:-1]] == [*"Hm 1+23!"] for body in bodies)


def first_event(connection):
    """The first event of a stream, which goes on."""
    found = b""
    while b"data: " not in found or not found.endswith(b"\n\n"):
        found += connection.recv(1 << 16)
    return events_of(found.partition(b"\r\n\r\n")[2])[0]


def test_a_browser_that_leaves_frees_the_model():
    with serving(make_chat(*ENDLESS, at_once=1, seconds=0.02)) as server:
        endless = question(max_tokens=chat.MOST_TOKENS)
        with connect(server) as first, connect(server) as second, connect(server) as third:
            first.sendall(request(server, endless | {"page": "1"}))
            assert first_event(first)["text"] == "e"
            second.sendall(request(server, endless | {"page": "2"}))
            assert first_event(second) == {"waiting": 1}
            third.sendall(request(server, endless | {"page": "3"}))
            assert first_event(third) == {"waiting": 2}
            second.close()                                          # while it waits
            until(lambda: len(server.desk.waiting) == 1 and server.desk.waiting[0].page == "3")
            first.close()                                           # in the middle of its answer
            until(lambda: [job.page for job in server.desk.active] == ["3"])
        until(lambda: not server.desk.active)
        assert server.desk.chat.model.number < chat.MOST_TOKENS


def test_a_request_that_comes_too_slowly_is_cut(monkeypatch):
    monkeypatch.setattr(chat, "READ_SECONDS", 0.4)
    with serving(make_chat()) as server, connect(server) as connection:
        content = request(server)
        begin = time.monotonic()
        with contextlib.suppress(OSError):                          # a byte now and then keeps no connection open
            for n in range(200):
                connection.sendall(content[n:n + 1])
                if select.select([connection], [], [], 0.1)[0]:
                    break
            assert not connection.recv(100)
        assert 0.3 < time.monotonic() - begin < 15


def test_a_browser_that_reads_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(chat, "SEND_SECONDS", 0.2)
    left = threading.Event()

    class Generous:
        """Has a large answer at once."""

        def submit(self, job):
            job.events.put([{"part": 0, "type": "text", "text": "x" * 50_000_000}])

        def leave(self, job):
            left.set()
    with serving(make_chat()) as server:
        desk, server.desk = server.desk, Generous()
        with connect(server) as connection:
            connection.sendall(request(server))
            assert left.wait(20)
        server.desk = desk


def test_connections_beyond_the_most_are_closed_at_once(monkeypatch):
    monkeypatch.setattr(chat, "MOST_CONNECTIONS", 3)
    with serving(make_chat()) as server:
        idle = [connect(server) for _ in range(3)]
        until(lambda: not server.free._value)
        with connect(server) as refused, contextlib.suppress(ConnectionResetError):
            assert refused.recv(1) == b""
        for connection in idle:
            connection.close()
        until(lambda: server.free._value == 3)
        assert send(server, request(server))[0] == 200


def test_only_this_machine_can_connect(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_page_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "PAGE", tmp_path / "chat.html")
    with pytest.raises(chat.UserError, match="use the chat.html that belongs to chat.py"):
        chat.make_server(chat.parse_args(["--port=0"]), make_chat())


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(chat.UserError, match=f"--port={server.server_port} cannot be used"):
        chat.make_server(chat.parse_args([f"--port={server.server_port}"]), make_chat())


def test_the_command_serves_the_page_until_ctrl_c(trained, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "chat.py"), f"--checkpoint={trained}", "--web", "--port=0",
                                "--device=cpu", "--threads=1"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               cwd=tmp_path)
    try:
        process.stderr.readline()
        port = int(re.search(rb"http://127\.0\.0\.1:(\d+) ", process.stderr.readline())[1])
        there = SimpleNamespace(server_port=port, values={"token": ""})
        _, _, body = send(there, request(there, b"", "/", "GET"))
        there.values["token"] = re.search(rb'chat-token" content="([^"]+)', body)[1].decode()
        status, _, body = send(there, request(there, question(temperature=0.6, max_tokens=9)))
        assert status == 200 and "done" in events_of(body)[-1]
        process.send_signal(signal.SIGINT)
        assert (process.wait(20), process.stderr.read()) == (130, b"\nchat.py: stopped\n")
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# The page, in a browser

class Browser:
    """A page in a headless Chromium, which is told what to do through a pipe. errors: what its console complains of."""

    def __init__(self, program, folder):
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs, self.ours = (ends[0], ends[3]), (ends[1], ends[2])

        def place():                     # Chromium reads from 3 and writes to 4
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)
        self.process = subprocess.Popen([
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"], pass_fds=(3, 4), preexec_fn=place,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in theirs:
            os.close(end)
        self.number, self.buffer, self.errors, self.session = 0, b"", [], {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self.session = {}
            self.do("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for end in self.ours:
            os.close(end)

    def do(self, method, **params):
        """The result of a command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.ours[0], json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.ours[1]], [], [], 60)[0], "the browser does not answer"
                piece = os.read(self.ours[1], 1 << 20)
                assert piece, "the browser has gone"
                self.buffer += piece
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.errors.append(answer["params"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def texts(self, selector):
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(found => found.textContent)")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "Escape": 27, "ArrowUp": 38}[key]
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def write(self, text):
        self.do("Input.insertText", text=text)
        self.press("Enter")

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    def click(self, text):
        self.value(f"[...document.querySelectorAll('button')].filter(found => found.textContent === {text!r}).at(-1)"
                   ".click()")


@pytest.fixture
def browser(tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("no Chromium is installed (Debian's package: chromium)")
    browser = Browser(program, tmp_path / "browser")
    yield browser
    browser.close()


def test_the_page_in_a_browser(browser, tmp_path):
    """Keyboard alone: ask, edit, regenerate, stop, ask again; then dark on a phone. CHAT_PICTURES keeps pictures."""
    pictures = Path(os.environ.get("CHAT_PICTURES", tmp_path))
    with serving(make_chat()) as server:
        model = server.desk.chat.model
        browser.do("Emulation.setDeviceMetricsOverride", width=900, height=700, deviceScaleFactor=1, mobile=False)
        browser.do("Page.navigate", url=f"http://localhost:{server.server_port}/")
        until(lambda: browser.value("document.activeElement && document.activeElement.id") == "message")

        def ready(count):
            until(lambda: len(browser.texts("article")) == count and browser.texts("#send:not([hidden])"))
        hostile = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
        browser.write(hostile)
        ready(2)
        assert browser.texts("article.user .content") == [hostile]
        assert browser.texts("article.assistant .content") == ["Hm calculator1+2 = 3!"]
        assert browser.texts(".call strong") == [" = 3"]
        assert re.fullmatch(r"12 tokens, \d+ tokens/s, first after \d+\.\d\d s", browser.texts(".note-text")[0])
        assert browser.value("window.hacked") is None and browser.texts("article img, article script") == []

        browser.write("and then?")                                  # the calls before are part of the history
        ready(4)
        assert model.prompts[-1] == [*ids(hostile), *b"Hm ", CALL, *b"1+2", CALLED, OUTPUT, *b"3", SHOWN, *b"!", END,
                                     *ids("and then?")[1:]]
        browser.picture(pictures / "light.png")
        browser.press("ArrowUp")                                    # edits the last message
        browser.do("Input.insertText", text=" Now")
        browser.press("Enter")
        until(lambda: model.prompts[-1][-14:-2] == [*b"nd then? Now"])
        ready(4)
        browser.click("Regenerate")
        until(lambda: len(model.prompts) == 4)
        ready(4)
        assert model.prompts[3] == model.prompts[2]

        gate = threading.Event()
        model.on_step = lambda number: gate.wait(60)
        browser.write("slowly")
        until(lambda: browser.texts(".content")[-1] == "H")
        browser.press("Escape")
        ready(6)
        assert browser.texts(".note-text")[-1] == "stopped"
        gate.set()
        until(lambda: not server.desk.active)
        browser.click("New chat")
        until(lambda: "Nothing of this conversation" in browser.texts("main")[0])

        browser.do("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
        browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        until(lambda: browser.value("document.documentElement.dataset.theme") == "dark")
        browser.click("Settings")
        browser.write("How many is 1 + 2? " + "x" * 80)
        ready(2)
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
        browser.picture(pictures / "dark.png")
        assert browser.errors == []
    assert (pictures / "dark.png").stat().st_size > 5_000


def test_the_page_says_what_is_wrong(browser):
    with serving(make_chat(context=32)) as server:
        browser.do("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
        until(lambda: browser.value("document.activeElement && document.activeElement.id") == "message")
        browser.write("x" * 99)
        until(lambda: "103 tokens, and 16 fit" in "".join(browser.texts(".error")))
        browser.value("document.getElementById('top_k').value = ''")
        browser.click("Regenerate")
        until(lambda: "top_k must be a number" in "".join(browser.texts(".error")))
    browser.click("Regenerate")
    until(lambda: "is it still running?" in "".join(browser.texts(".error")))
