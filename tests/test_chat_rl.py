"""chat_rl.py: answers that are right become likelier, nothing else is trained, and a run is the same however it is cut.

Proves: the sign of the gradient on a toy with two arms; equal rewards change no bit; forced tokens get no gradient; the
engines sample with the newest weights; an interrupted run ends as one that was not, bit for bit; 1, 2 and 3 ranks train
the same model; questions, advantages and micro-batches are what they should be; a mistake gets a line.
Against: an untrained model, for which all tokens are about equally likely, and rewards that are planted in it.
Run: python -m pytest tests/test_chat_rl.py
"""
import json
import math
import re
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import join, only_folder, rank_starter
from safetensors.torch import load_file

import chat_rl
import chat_sft
import chat_tasks
import sample
import train_gpt
import train_gpt_simple

data = chat_tasks.load_data()
CHAT_JSON = data.extend_tokenizer(data.shards.bytes_tokenizer_json())
TOKENIZER = sample.Tokenizer(json.loads(CHAT_JSON))
BOS, USER, USER_END, ASSISTANT, END, CALL, CALLED, OUTPUT, SHOWN = range(256, 265)
FLAGS = ("--task=spellingbee", "--questions=4", "--samples=4", "--max_tokens=3", "--eval_questions=3", "--device=cpu",
         "--eval_every=0", "--warmup=1")


def judge(format, item, answer):
    """A record as chat_tasks.judge_answer makes them: an answer is right if its first token is below 128.

    None counts as cut off, although the limits of these tests are a few tokens.
    """
    return {"correct": answer.tokens[0] < 128, "calls": answer.calls.made, "cut_off": False,
            "tokens": len(answer.tokens)}


def same_reward(format, item, answer):
    return judge(format, item, answer) | {"correct": True}


def write_parent(folder, script, cfg):
    """A run folder with an untrained chat model of the config."""
    model = script.GPT(cfg)
    model.set_stage(0, final=True)
    meta = {"format": 1, "script": script.__name__, "config": asdict(cfg), "step": 2, "stage": 0, "chat": True,
            "source_sha256": "", "tokenizer_sha256": data.hashlib.sha256(CHAT_JSON).hexdigest()}
    train_gpt.write_checkpoint(folder / "checkpoint", meta, {"model.safetensors": dict(model.state_dict())}, CHAT_JSON,
                               1)
    return folder


@pytest.fixture(scope="session")
def own_parent(data, tmp_path_factory):
    from conftest import small_flags
    cfg = train_gpt.parse_config(small_flags(data))
    machine = train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")
    cfg = train_gpt.resolve_config(cfg, machine, train_gpt.open_shards(cfg.train_files, cfg.val_files)[0][0])
    return write_parent(tmp_path_factory.mktemp("rl") / "parent", train_gpt, replace(cfg, vocab_size=265))


@pytest.fixture(scope="session")
def plain_parent(tmp_path_factory):
    cfg = train_gpt_simple.parse_config(["--preset=tiny", "--depth=2", "--model_dim=96", "--width_rule=none",
                                         "--pack_tokens=256", "--batch_tokens=512", "--num_iterations=2"])
    cfg = replace(cfg, vocab_size=265, bos_id=256, compile=False, attention="plain")
    return write_parent(tmp_path_factory.mktemp("rl") / "plain", train_gpt_simple, cfg)


@pytest.fixture
def run(own_parent, tmp_path, capsys, monkeypatch):
    """Function of flags that runs chat_rl.py; exit code, output, errors, and the run folder if there is one."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)  # no curve: it takes as long as the steps
    monkeypatch.setattr(chat_rl, "POOL", 50)
    monkeypatch.setattr(chat_tasks, "judge_answer", judge)

    def call(*flags, out="logs", parent=own_parent):
        argv = [f"--checkpoint={parent}", f"--out_dir={tmp_path / out}", *FLAGS, *flags]
        capsys.readouterr()
        code = chat_rl.main(argv)
        output, errors = capsys.readouterr()
        folders = sorted((tmp_path / out).iterdir()) if (tmp_path / out).exists() else []
        return SimpleNamespace(code=code, out=output, err=errors, folder=folders[-1] if folders else None)
    return call


def weights(folder):
    return load_file(sample.resolve_checkpoint(folder) / "model.safetensors")


def logged(folder, name):
    return [float(value) for value in re.findall(rf"\b{name}:(\S+)", (folder / "log.txt").read_text())]


# -----------------------------------------------------------------------------
# The loss


class Arms(torch.nn.Module):
    """A model whose next token is drawn from the same two arms, whatever came before."""

    def __init__(self):
        super().__init__()
        self.arms = torch.nn.Parameter(torch.zeros(2))

    def score(self, tokens, targets):
        logits = self.arms.expand(len(tokens), 2)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none"), None


def answers(*rows):
    """A question's answers of single tokens 0 or 1, with their rewards; a third entry: the token was forced."""
    rollouts = [SimpleNamespace(tokens=[row[0]], logprobs=[None if row[2:] else -0.7]) for row in rows]
    return [0], rollouts, [{"correct": bool(row[1])} for row in rows]


@pytest.mark.parametrize("right, cut_off, worth", [(True, False, True), (True, True, False), (False, False, False)])
def test_an_answer_is_right_only_if_it_ended(right, cut_off, worth, monkeypatch):
    monkeypatch.setattr(chat_tasks, "judge_answer", lambda *_: {"correct": right, "cut_off": cut_off, "calls": 1})
    assert chat_rl.judge(None, None, None) == {"correct": worth, "cut_off": cut_off, "calls": 1}


def gradient(*groups, std=False):
    model = Arms()
    for batch in chat_rl.training_batches(SimpleNamespace(std=std), groups, 4, 128, bos_id=1):
        chat_rl.policy_loss(model, *map(torch.from_numpy, batch)).backward()
    return model.arms.grad


def test_the_right_arm_becomes_likelier():
    descent = -gradient(answers((0, 0), (1, 1), (1, 1), (0, 0)))
    # by hand: d log p(arm) / d logits is 1/2 for the arm and -1/2 for the other; advantages are -1/2 and 1/2; 4 tokens
    assert descent.tolist() == pytest.approx([-0.25, 0.25])
    assert (-gradient(answers((0, 1), (1, 0), (1, 0), (1, 0)))).tolist() == pytest.approx([0.1875, -0.1875])


def test_std_divides_by_the_spread_of_the_rewards():
    plain, scaled = (gradient(answers((0, 0), (1, 1), (1, 1), (1, 1)), std=std) for std in (False, True))
    assert torch.allclose(scaled * math.sqrt(3) / 4, plain)
    assert chat_rl.advantages([1, 0, 0, 1], False) == [0.5, -0.5, -0.5, 0.5]
    assert chat_rl.advantages([1, 1], True) == [0, 0]


def test_equal_rewards_and_forced_tokens_have_no_gradient():
    assert gradient(answers((0, 1), (1, 1)), answers((0, 0), (1, 0))).tolist() == [0, 0]
    assert gradient(answers((0, 0, "forced"), (1, 1, "forced"))).tolist() == [0, 0]
    mixed = answers((0, 0, "forced"), (1, 1))
    assert gradient(mixed, answers((0, 1), (1, 1))).tolist() == gradient(mixed).tolist() != [0, 0]


def test_kl_draws_the_model_back_to_the_reference():
    model, reference = Arms(), Arms()
    model.arms.data = torch.tensor([0.0, 2.0])
    inputs, targets = torch.tensor([0, 0]), torch.tensor([1, 0])
    loss = chat_rl.policy_loss(model, inputs, targets, torch.zeros(2), reference, kl=0.5)
    before, now = (one.arms.log_softmax(0) for one in (reference, model))
    assert loss.item() == pytest.approx(0.25 * ((now - before) ** 2).sum().item())
    loss.backward()
    assert model.arms.grad[1] > 0 > model.arms.grad[0] and reference.arms.grad is None


def test_micro_batches_hold_every_answer_once():
    rng = np.random.default_rng(0)
    samples = []
    for n in range(60):
        size = int(rng.integers(2, 300))
        ids = np.array([7, *rng.integers(0, 200, size - 1)], np.int32)
        samples.append((chat_sft.Conversation(ids, np.array([0] + [1] * (size - 1), np.uint8)), n + 1.0))
    batches = chat_rl.pack(samples, 512, bos_id=7)
    seen = {}
    for inputs, targets, values in batches:
        assert len(inputs) == len(targets) == len(values) <= 512 and len(inputs) % 128 == 0
        for value in set(values[targets >= 0].tolist()):
            seen[value] = targets[(values == value) & (targets >= 0)].tolist()
    assert seen == {value: one.ids[1:].tolist() for one, value in samples}
    assert [len(batch[0]) for batch in chat_rl.pack(samples[:1], 16, 7)] == [math.ceil(len(samples[0][0].ids) / 128)
                                                                             * 128]


def test_every_epoch_asks_all_questions_once():
    seen = [index for step in range(10) for index in chat_rl.step_questions(20, 6, 0, step)]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20)) and seen[:20] != seen[20:40]
    assert seen[:6] != chat_rl.step_questions(20, 6, 1, 0)
    assert len(chat_rl.step_questions(2, 7, 0, 3)) == 7


# -----------------------------------------------------------------------------
# Questions


def test_long_words_are_new_and_on_their_side(monkeypatch):
    args = SimpleNamespace(eval_questions=40, letters_range=(13, 16))
    monkeypatch.setattr(chat_rl, "POOL", 100)
    train, fixed = chat_rl.spellingbee_items(args, data)
    assert (len(train), len(fixed)) == (100, 40) and (train, fixed) == chat_rl.spellingbee_items(args, data)
    words = [max(re.findall("[a-z]+", item.question), key=len) for item in (*train, *fixed)]
    assert all(13 <= len(word) <= 16 for word in words)
    assert not any(map(data.is_held_out, words[:100])) and all(map(data.is_held_out, words[100:]))


def test_gsm8k_leaves_out_questions_of_test_sets(tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(9)]
    for side, part in (("train", rows[:6]), ("test", rows[5:])):
        (tmp_path / "gsm8k" / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.setattr(data, "test_items", lambda: {data.hash_question(rows[5]["question"])})
    train, fixed = chat_rl.gsm8k_items(SimpleNamespace(evals=tmp_path, eval_questions=3), data)
    assert sorted(item.gold for item in train) == list("12345") and len(fixed) == 3


# -----------------------------------------------------------------------------
# Runs


def test_a_run_raises_the_reward_and_makes_an_ordinary_checkpoint(run, own_parent):
    before = weights(own_parent)
    done = run("--steps=12", "--lr=8", "--eval_every=6", "--questions=8")
    assert (done.code, done.err) == (0, "")
    rewards, scores = logged(done.folder, "reward"), logged(done.folder, "pass1")
    assert len(rewards) == 12 and len(scores) == 3 and np.mean(rewards[:2]) < 0.7 and np.mean(rewards[-2:]) > 0.9
    assert scores[-1] > 0.9 and all(0 <= value <= 1 for value in logged(done.folder, "pass8"))
    model, _, meta = sample.load_checkpoint(sample.resolve_checkpoint(done.folder), "cpu")
    assert (meta["script"], meta["chat"], meta["step"], meta["val_loss"]) == ("train_gpt", True, 12, None)
    assert [one["step"] for one in meta["evaluations"]] == [0, 6, 12]
    assert before.keys() == model.state_dict().keys() and weights(own_parent)["mlp"].equal(before["mlp"])
    lines = (done.folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2 * 3 and {json.loads(line)["step"] for line in lines} == {0, 6, 12}
    assert {path.name for path in done.folder.iterdir()} == {
        "log.txt", "run.json", "samples.jsonl", "chat_rl.py", "chat_sft.py", "chat_tasks.py", "train_gpt.py",
        "checkpoint"}


def test_no_step_only_measures(run):
    done = run("--steps=0", "--letters=13-14")
    assert (done.code, done.err) == (0, "") and "next:" not in done.out
    info = json.loads((done.folder / "run.json").read_text())
    assert info["status"] == "finished" and [one["step"] for one in info["evaluations"]] == [0]
    assert not (done.folder / "checkpoint").exists()
    assert [len(one["rights"].split()) for one in info["evaluations"]] == [3]


def test_a_model_of_the_plain_script(run, plain_parent):
    done = run("--steps=8", "--lr=8", "--questions=8", parent=plain_parent)
    assert (done.code, done.err) == (0, "")
    rewards = logged(done.folder, "reward")
    assert np.mean(rewards[:2]) < 0.7 and np.mean(rewards[-2:]) > 0.9
    model, _, meta = sample.load_checkpoint(sample.resolve_checkpoint(done.folder), "cpu")
    assert meta["script"] == "train_gpt_simple" and model.cfg.vocab_size == 265
    refused = run(f"--resume={done.folder}", parent=plain_parent)
    assert refused.code == 2 and "cannot be resumed" in refused.err


def test_equal_rewards_change_no_bit(run, own_parent, monkeypatch):
    monkeypatch.setattr(chat_tasks, "judge_answer", same_reward)
    done = run("--steps=10", "--questions=2")
    assert done.code == 0 and set(logged(done.folder, "no_signal")) == {1.0}
    assert "note: 100.0% of the questions" in done.out and "loss:none" in (done.folder / "log.txt").read_text()
    before, after = weights(own_parent), weights(done.folder)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_killed_run_goes_on_bit_for_bit(run, monkeypatch):
    flags = ("--steps=20", "--save_every=10", "--kl=0.01", "--questions=2", "--eval_questions=1", "--eval_every=6")
    whole = run(*flags)
    assert whole.code == 0
    one = chat_rl.train_one

    def dies(args, folder, trainer, sampler, reference, clock, step, *others):
        if step == 13:
            raise SystemExit(9)
        return one(args, folder, trainer, sampler, reference, clock, step, *others)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(chat_rl, "train_one", dies)
        run(*flags, out="other")
    folder = only_folder(whole.folder.parent.parent / "other")
    with open(folder / "samples.jsonl", "a") as file:
        file.write('{"step": 12, "quest')               # killed while it wrote
    resumed = run(*flags, f"--resume={folder}", out="other")
    assert (resumed.code, resumed.err, resumed.folder) == (0, "", folder)
    first, second = (load_file(sample.resolve_checkpoint(path) / "optimizer.safetensors")
                     for path in (whole.folder, folder))
    assert first.keys() == second.keys() and len(first["train_losses"]) == 20
    first["train_losses"][:, 1], second["train_losses"][:, 1] = 0, 0    # the seconds
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = weights(whole.folder), weights(folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((path / "run.json").read_text())["evaluations"] for path in (whole.folder, folder))
    assert [(one["step"], one["pass1"]) for one in first] == [(one["step"], one["pass1"]) for one in second]
    assert len(first) == 5
    assert (whole.folder / "samples.jsonl").read_bytes() == (folder / "samples.jsonl").read_bytes()
    for flag, name in (("--lr=0.2", "lr"), ("--micro_tokens=64", "micro_tokens")):
        changed = run(*flags, flag, f"--resume={folder}", out="other")
        assert changed.code == 2 and f"is another run: {name} differ" in changed.err
    with monkeypatch.context() as patch:
        patch.setattr(chat_rl.Run, "program", chat_rl.Run.program[:-1])         # as if a file had changed
        changed = run(*flags, f"--resume={folder}", out="other")
        assert changed.code == 2 and "is another run: program differ" in changed.err
    over = run(*flags, f"--resume={folder}", out="other")
    assert over.code == 2 and "has done all of its 20 steps" in over.err


def test_engines_sample_with_the_newest_weights(own_parent, monkeypatch):
    """What the engine says of the tokens that it draws is what training computes, also after an update."""
    argv = [f"--checkpoint={own_parent}", *FLAGS, "--lr=0.5", "--max_tokens=6"]
    args = chat_rl.parse_args(argv)
    monkeypatch.setattr(chat_rl, "POOL", 20)
    monkeypatch.setattr(chat_tasks, "judge_answer", judge)
    parent, machine, trainer, _, format = chat_rl.load(args, train_gpt)
    items = chat_rl.spellingbee_items(args, data)
    sampler = chat_rl.Sampler(args, trainer.model, format, *items, machine)
    trainer.model.window_lengths = {"short": 16, "long": 512}           # one is shorter than a document
    chat_rl.shorten_windows(trainer.model, sampler.longest)
    assert trainer.model.window_lengths == {"short": 16, "long": 64} and sampler.longest <= 64
    sampler = chat_rl.Sampler(args, trainer.model, format, *items, machine)
    for step in range(3):
        groups = sampler.step(step)
        prompt, rollouts, _ = groups[0]
        for rollout in rollouts:
            ids = torch.tensor([*prompt, *rollout.tokens])
            losses = trainer.model.score(ids[:-1], ids[1:])[0][len(prompt) - 1:]
            assert torch.allclose(-losses, torch.tensor(rollout.logprobs), atol=1e-4), step
        chat_rl.learn(args, trainer, groups, 40, step, None, 4096, train_gpt)
        sampler.refresh()


def test_the_calculators_tokens_are_not_trained():
    """A planted engine writes a call; what the calculator answers is in the text, but is no target."""
    script = [CALL, *b"1+2", CALLED, None, None, None, ord("#"), END, 0]
    chat = SimpleNamespace(tool=sample.Tool(TOKENIZER, data.calculate), ends={BOS, END, USER}, tokenizer=TOKENIZER)

    class Planted:
        batch = 2

        def steps(self, prompts, rows, count, force):
            forced = [None] * len(rows)
            for token in script[:count]:
                row = [token if value is None else value for value in forced]
                yield row, [None if value is not None else -1.0 for value in forced]
                forced = [force(i, token) for i, token in enumerate(row)]
    rollout, other = chat_rl.write_rollouts(Planted(), SimpleNamespace(chat=chat), [[BOS]], [(0, "a"), (0, "b")], 20)
    assert rollout.tokens == other.tokens == [CALL, *b"1+2", CALLED, OUTPUT, *b"3", SHOWN, ord("#"), END]
    assert rollout.finish == "end" and rollout.calls.made == 1
    records = [{"correct": True}, {"correct": False}]
    (_, targets, _), = chat_rl.training_batches(SimpleNamespace(std=False), [([BOS], [rollout, other], records)], 1,
                                                4096, BOS)
    assert targets[targets >= 0].tolist() == [CALL, *b"1+2", CALLED, ord("#"), END] * 2
    cut, = chat_rl.write_rollouts(Planted(), SimpleNamespace(chat=chat), [[BOS]], [(0, "a")], 4)
    assert cut.finish == "length" and cut.tokens == [CALL, *b"1+2"]


def ranks_main(argv):
    chat_tasks.judge_answer = judge
    chat_rl.POOL = 50
    sys.modules["matplotlib.backends.backend_svg"] = None
    return chat_rl.main(argv)


def results(folder):
    """(rewards and scores, weights) of a run."""
    return logged(folder, "reward") + logged(folder, "pass1") + logged(folder, "greedy"), weights(folder)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_the_same_model(run, own_parent, forkserver, tmp_path, world_size):
    flags = ["--steps=3", "--lr=0.02"]
    one, tensors = results(run(*flags).folder)
    with rank_starter(forkserver, tmp_path) as start:
        processes = start(world_size, ranks_main, [f"--checkpoint={own_parent}", *FLAGS, *flags,
                                                   f"--out_dir={tmp_path / 'ranks'}"])
        assert join(processes) == [0] * world_size, [process.output.read_text() for process in processes]
    found, others = results(only_folder(tmp_path / "ranks"))
    assert found == one and len(one) == 7
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, others[name], atol=2e-3), name


def test_what_is_refused(run, own_parent, tmp_path):
    def refused(*flags, words=(), parent=own_parent):
        done = run(*flags, out="refused", parent=parent)
        assert done.code == 2 and re.fullmatch(r"chat_rl\.py: [^\n]+\n", done.err), done
        assert all(word in done.err for word in words) and done.folder is None, done.err
    refused("--samples=1", words=["--samples=1", "2 to"])
    refused("--letters=16-13", words=["--letters=16-13"])
    refused("--questions=1000000", words=["--questions=1000000", "--samples="])
    refused("--letters=long", words=["--letters=long"])
    refused("--task=chess", words=["chess"])
    refused("--kl=nan", words=["--kl=nan"])
    refused("--task=gsm8k", f"--evals={tmp_path}", words=[str(tmp_path), "gsm8k/train.jsonl"])
    refused(f"--resume={own_parent}", words=["--resume=", "chat_rl.py"])
    base = tmp_path / "base" / "checkpoint" / "step_000002"
    base.parent.mkdir(parents=True)
    import shutil
    shutil.copytree(sample.resolve_checkpoint(own_parent), base)
    meta = json.loads((base / "meta.json").read_text())
    (base / "meta.json").write_text(json.dumps(meta | {"chat": False}))
    refused(parent=base, words=["has not learned to chat", "chat_sft.py"])
