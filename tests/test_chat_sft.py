"""chat_sft.py: the right targets, nothing lost or trained twice, never NaN, and an ordinary checkpoint at the end.

Proves: which targets are trained; every token of 10,000 random mixtures is in one slot or counted as left out; steps
are finite whatever the mixture; 1, 2 and 3 ranks train the same model; a resumed run ends bit for bit as one that was
not interrupted; the first checkpoint never changes; new special tokens get rows in every table; a mistake gets a line.
Against: targets written out by hand, counts by a plain loop.
Run: python -m pytest tests/test_chat_sft.py
"""
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, join, only_folder, rank_starter, small_flags
from safetensors.torch import load_file, save_file

import chat_sft
import sample
import train_gpt
import train_gpt_simple

chat = sample.import_script(ROOT / "data" / "chat.py", ("render",))
BYTES_CHAT = json.loads(chat.extend_tokenizer(chat.shards.bytes_tokenizer_json()))
TOKENIZER = sample.Tokenizer(BYTES_CHAT)
STEPS = 8
FLAGS = ("--batch_tokens=512", "--val_every=0", "--device=cpu", "--warmup=2", "--chat_items=2",
         "--evals=none")


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversation(messages):
    ids, mask = chat.render(messages, TOKENIZER)
    return chat_sft.Conversation(np.array(ids, np.uint16), np.array(mask, np.uint8))


# -----------------------------------------------------------------------------
# Targets and packing


def test_golden_targets():
    bos, user, user_end, start, end = (TOKENIZER.special(name) for name in chat.SPECIAL_TOKENS[:5])
    one, other = conversation(talk("q", "ab")), conversation(talk("", ""))
    assert one.ids.tolist() == [bos, user, ord("q"), user_end, start, ord("a"), ord("b"), end]
    inputs, targets = chat_sft.fill_slot([one, other], 20, bos, doc_tokens=4)
    assert inputs.tolist() == [*one.ids, bos, user, user_end, start, end, bos, 0, 0, 0, bos, 0, 0]
    assert targets.tolist() == [-1] * 4 + [ord("a"), ord("b"), end, -1] + [-1] * 3 + [end, -1] + [-1] * 7
    assert (inputs.dtype, targets.dtype) == (np.int32, np.int64)


def test_the_output_of_the_calculator_is_no_target():
    word = chat.spellingbee_item("river", "r", 0)
    one = conversation(word)
    _, targets = chat_sft.fill_slot([one], 256, 256)
    names = {token: name for name, token in BYTES_CHAT["special_tokens"].items()}
    text = "".join(names.get(token, chr(token)) for token in targets[targets >= 0].tolist())
    assert text == "<|python_start|>'river'.count('r')<|python_end|>The answer is 2.\n#### 2<|assistant_end|>"


def random_conversation(rng, longest):
    """Tokens and a mask as they may come: without an answer, or an empty one, longer than a slot, in several turns."""
    size = rng.choice((1, 2, 3, rng.randint(1, longest), rng.randint(1, 3 * longest)))
    mask = np.zeros(size, np.uint8)
    for _ in range(rng.randint(0, 3)):
        low = rng.randrange(size)
        mask[low:low + rng.randint(0, size)] = 1
    mask[0] = 0
    return chat_sft.Conversation(np.full(size, rng.randrange(200), np.uint16), mask)


def test_ten_thousand_mixtures_lose_no_token():
    rng = random.Random(0)
    for number in range(10_000):
        limit = rng.choice((8, 16, 40))
        found = [random_conversation(rng, limit) for _ in range(rng.choice((1, 2, 6)))]
        kept, counts = chat_sft.fit(found, limit)
        slots = chat_sft.pack_slots([len(one.ids) for one in kept], limit)
        assert sorted(i for slot in slots for i in slot) == list(range(len(kept)))
        assert counts["untrained"] == len(found) - len(kept)
        trained = [int(one.mask[1:limit].sum()) for one in found]
        for slot in slots:
            size = sum(len(kept[i].ids) for i in slot)
            wanted = sum(int(kept[i].mask[1:].sum()) for i in slot)
            inputs, targets = chat_sft.fill_slot([kept[i] for i in slot], limit, 256)
            assert 0 < size <= limit == len(inputs) and wanted == (targets >= 0).sum() > 0
        cut = sum(max(0, len(one.ids) - limit) for one in found)
        assert counts["tokens_cut"] >= cut and sum(int(one.mask[1:].sum()) for one in kept) <= sum(trained), number


def test_a_long_conversation_ends_with_an_answer_if_one_fits():
    messages = talk("a", "bb") + talk("c", "d" * 40)
    whole, counts = conversation(messages), {}
    kept, counts = chat_sft.fit([whole], 30)
    assert kept[0].ids.tolist() == conversation(messages[:2]).ids.tolist()
    assert counts == {"cut": 1, "tokens_cut": len(whole.ids) - len(kept[0].ids), "untrained": 0}
    kept, counts = chat_sft.fit([conversation(talk("a", "d" * 40))], 30)
    assert len(kept[0].ids) == 30
    kept, counts = chat_sft.fit([conversation(talk("a" * 40, "d"))], 30)
    assert not kept and counts["untrained"] == 1


def test_packing_wastes_little_and_epochs_differ():
    rng = random.Random(1)
    found = [chat_sft.Conversation(np.full(rng.randint(10, 200), 5), np.ones(1)) for _ in range(2000)]
    slots = chat_sft.plan_slots(found, 512, 2, seed=0)
    filled = sum(len(found[i].ids) for slot in slots for i in slot)
    assert filled == 2 * sum(len(one.ids) for one in found) and filled / (512 * len(slots)) > 0.97
    first, second = slots[:len(slots) // 2], slots[len(slots) // 2:]
    assert first[:20] != second[:20] and slots == chat_sft.plan_slots(found, 512, 2, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_out_the_slots(world_size):
    found = [conversation(talk(str(i), "x" * (i % 7))) for i in range(50)]
    slots = chat_sft.plan_slots(found, 32, 1, 0)
    steps = chat_sft.num_steps(len(slots), 4)
    assert steps % 2 == 0 and len(slots) <= 4 * steps < len(slots) + 8
    job = SimpleNamespace(train=found, slots=slots, steps=steps, slot_tokens=32, micro_slots=2, bos_id=256)
    seen = []
    for step in range(steps):
        batches = [chat_sft.step_batches(job, SimpleNamespace(rank=rank, world_size=world_size), step)
                   for rank in range(world_size)]
        assert len({len(groups) for groups, _ in batches}) == 1
        targets = np.concatenate([targets for groups, _ in batches for _, targets in groups])
        assert {count for _, count in batches} == {(targets >= 0).sum()}
        inputs = np.concatenate([inputs for groups, _ in batches for inputs, _ in groups])
        assert all(len(inputs) == 64 for groups, _ in batches for inputs, _ in groups)
        seen += [slot for slot in inputs.reshape(-1, 32).tolist() if slot[1]]
    assert seen == [chat_sft.fill_slot([found[i] for i in slot], 32, 256)[0].tolist() for slot in slots]


def test_the_rate_rises_and_falls_to_nothing():
    args = SimpleNamespace(lr=0.5, warmup=10)
    rates = [chat_sft.rate_factor(args, 100, step) for step in range(100)]
    assert max(rates) == 0.5 and rates[:11] == sorted(rates[:11]) and 0 < rates[-1] < 0.01
    assert all(0 < chat_sft.rate_factor(args, steps, step) <= 0.5 for steps in (2, 4, 20) for step in range(steps))


# -----------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="session")
def parent(data, tmp_path_factory):
    """The run folder of a small model; tests only read it."""
    logs = tmp_path_factory.mktemp("parent")
    argv, sys.argv = sys.argv, ["train_gpt.py", *small_flags(data, num_iterations=4, val_every=0, out_dir=logs)]
    sys.modules["matplotlib.backends.backend_svg"], kept = None, sys.modules.get("matplotlib.backends.backend_svg")
    try:
        assert train_gpt.main() == 0
    finally:
        sys.argv = argv
        del sys.modules["matplotlib.backends.backend_svg"]
        if kept:
            sys.modules["matplotlib.backends.backend_svg"] = kept
    return only_folder(logs)


@pytest.fixture(scope="session")
def talks(tmp_path_factory):
    """Shards of short conversations, for STEPS steps of 512 tokens."""
    folder = tmp_path_factory.mktemp("chat")
    chat.main(["spelling:62", "spellingbee:8", "--tokenizer=bytes", f"--out={folder}", "--val_fraction=0.08"])
    return folder


@pytest.fixture
def run(parent, talks, tmp_path, capsys, monkeypatch):
    """Function of flags that runs chat_sft.py; exit code, output, errors, and the run folder if there is one."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)  # no curve: it takes as long as the steps
    monkeypatch.setattr(chat_sft, "ANSWER_TOKENS", 8)

    def call(*flags, out="logs"):
        argv = [f"--checkpoint={parent}", f"--data={talks}", f"--out_dir={tmp_path / out}", *FLAGS, *flags]
        capsys.readouterr()
        code = chat_sft.main(argv)
        output, errors = capsys.readouterr()
        folders = sorted((tmp_path / out).iterdir()) if (tmp_path / out).exists() else []
        return SimpleNamespace(code=code, out=output, err=errors, folder=folders[-1] if folders else None)
    return call


def weights(folder):
    return load_file(sample.resolve_checkpoint(folder) / "model.safetensors")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_makes_an_ordinary_checkpoint_and_leaves_the_first_as_it_is(run, parent, talks):
    before = contents(parent)
    done = run("--lr=1", "--val_every=4")
    assert (done.code, done.err) == (0, "") and contents(parent) == before
    losses = [float(loss) for loss in re.findall(r"val_loss:(\S+)", (done.folder / "log.txt").read_text())]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    checkpoint = sample.resolve_checkpoint(done.folder)
    meta = json.loads((checkpoint / "meta.json").read_text())
    assert meta["script"] == "train_gpt" and meta["chat"] is True and meta["step"] == STEPS
    assert meta["parent"]["model_sha256"] == hashlib.sha256(
        (sample.resolve_checkpoint(parent) / "model.safetensors").read_bytes()).hexdigest()
    assert (checkpoint / "tokenizer.json").read_bytes() == (talks / "tokenizer.json").read_bytes()
    model, tokenizer, _ = sample.load_checkpoint(checkpoint, "cpu")
    assert model.cfg.vocab_size == tokenizer.vocab_size == 265
    assert model.embed.shape == model.lm_head.shape == (265, 48) and model.value_embeds.shape[1:] == (265, 48)
    assert not any(tensor.isnan().any() for tensor in model.state_dict().values())
    info = json.loads((done.folder / "run.json").read_text())
    assert info["status"] == "finished" and info["tokens_seen"] > 3000
    assert f"next: python {os.path.relpath(ROOT / 'chat.py')} --checkpoint={checkpoint}" in done.out
    assert {path.name for path in done.folder.iterdir()} == {"log.txt", "run.json", "chat_sft.py", "train_gpt.py",
                                                             "checkpoint"}


def test_each_validation_asks_the_chat_tasks_that_have_a_file(run, tmp_path):
    folder = tmp_path / "evals" / "gsm8k"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("--stop_after=2", f"--evals={folder.parent}", "--chat_items=2")
    assert (done.code, done.err) == (130, "")
    found = re.search(r"step:0/.* chatcore:(\S+) of 2 tasks: gsm8k:(\S+) spellingbee:(\S+) tool_calls:\S+ ", done.out)
    assert 2 * float(found[1]) == pytest.approx(float(found[2]) + float(found[3]), abs=1e-3)
    (folder / "test.jsonl").write_text('{"question": "no answer"}\n')
    done = run(f"--evals={folder.parent}", out="none")
    assert done.code == 2 and "test.jsonl does not hold items of gsm8k" in done.err and done.folder is None


def test_the_model_begins_as_the_first_checkpoint(run, parent):
    done = run("--lr=1e-9", "--stop_after=2")
    assert done.code == 130
    before, after = weights(parent), weights(done.folder)
    for name, tensor in before.items():
        if name in ("embed", "lm_head", "value_embeds"):
            new = after[name][..., 257:, :]
            assert torch.allclose(new, tensor[..., :256, :].mean(-2, keepdim=True).expand_as(new), atol=1e-5)
            after[name] = after[name][..., :257, :]
        if name not in ("inv_freq", "attn_scale", "windows"):
            assert torch.allclose(after[name], tensor, atol=1e-5), name
    other = weights(parent)
    model, _, _ = sample.load_checkpoint(sample.resolve_checkpoint(parent), "cpu")
    for name in ("inv_freq", "attn_scale"):                             # those that it was trained with
        assert torch.equal(after[name], model.state_dict()[name]) and torch.equal(after[name], other[name])


def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(run, tmp_path):
    whole = run("--save_every=2", "--val_every=4")
    half = run("--save_every=2", "--val_every=4", "--stop_after=4", out="other")
    assert half.code == 130 and f"without --stop_after, with --resume={half.folder}" in half.out.splitlines()[-1]
    resumed = run("--save_every=2", "--val_every=4", f"--resume={half.folder}", out="other")
    assert (resumed.code, resumed.err) == (0, "") and resumed.folder == half.folder
    for name in ("train_losses", "rng"):                                # the curve is whole, too
        first, second = (load_file(sample.resolve_checkpoint(done.folder) / "optimizer.safetensors")[name]
                         for done in (whole, resumed))
        assert len(first) and torch.equal(first[..., ::2], second[..., ::2]), name      # without the seconds
    first, second = weights(whole.folder), weights(half.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((done.folder / "run.json").read_text())["val_losses"] for done in (whole, half))
    assert [(p["step"], p["val_loss"]) for p in first] == [(p["step"], p["val_loss"]) for p in second]
    before = contents(half.folder)
    over = run(f"--resume={half.folder}", "--save_every=2", out="other")
    assert over.code == 2 and f"--resume={half.folder} has done all of its {STEPS} steps" in over.err
    changed = run(f"--resume={half.folder}", "--lr=0.2", out="other")
    assert changed.code == 2 and "is another run: lr differ" in changed.err
    assert contents(half.folder) == before


def test_a_run_goes_on_only_with_what_it_began_with(run, parent, talks, tmp_path, monkeypatch):
    half = run("--save_every=2", "--stop_after=4")
    before = contents(half.folder)

    def refused(*flags, words):
        done = run(f"--resume={half.folder}", *flags)
        assert done.code == 2 and re.fullmatch(r"chat_sft\.py: [^\n]+\n", done.err), done
        assert all(word in done.err for word in words) and contents(half.folder) == before, done.err
    other = tmp_path / "other parent"
    shutil.copytree(parent, other)
    file = sample.resolve_checkpoint(other) / "meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"config": meta["config"] | {"lr": 3.0}}))
    refused(f"--checkpoint={other}", words=["config differ"])
    with monkeypatch.context() as patch:
        patch.setattr(chat_sft.Run, "program", ("train_gpt.py", "chat.py"))     # as if sample.py had changed
        refused(words=["program differ"])
    swapped = tmp_path / "swapped"
    shutil.copytree(talks, swapped)
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    names = tokenizer["special_tokens"]
    names["<|user_start|>"], names["<|assistant_start|>"] = names["<|assistant_start|>"], names["<|user_start|>"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(f"--data={swapped}", words=[str(swapped / "tokenizer.json"), "train_000000.bin"])
    newest = sample.resolve_checkpoint(half.folder) / "meta.json"
    newest.write_text(newest.read_text()[:100])
    before = contents(half.folder)
    refused(words=["step_000004 has no sound meta.json", "earlier step_*"])


def test_the_next_command_names_the_first_checkpoint_if_that_was_the_newest(parent, talks, tmp_path, capsys, run):
    """A run of a base model that is made between a stop and going on must not become the parent."""
    shutil.copytree(parent, tmp_path / "mine" / "base")
    flags = [f"--data={talks}", f"--out_dir={tmp_path / 'mine'}", *FLAGS]
    assert chat_sft.main([*flags, "--stop_after=2"]) == 130
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    given, = (word for word in words if word.startswith("--checkpoint="))
    resume, = (word for word in words if word.startswith("--resume="))
    shutil.copytree(parent, tmp_path / "mine" / "newer")
    weights = sample.resolve_checkpoint(tmp_path / "mine" / "newer") / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    (tmp_path / "mine" / "newer" / "checkpoint" / "latest").touch()
    assert chat_sft.main([*flags, resume]) == 2 and "--checkpoint, which was left out" in capsys.readouterr().err
    assert chat_sft.main([*flags, resume, given]) == 0


def ranks_main(argv):
    chat_sft.ANSWER_TOKENS = 8
    sys.modules["matplotlib.backends.backend_svg"] = None
    return chat_sft.main(argv)


@pytest.fixture(scope="module")
def one_rank(parent, talks, forkserver, tmp_path_factory):
    return rank_run(1, parent, talks, forkserver, tmp_path_factory.mktemp("ranks_1"))


def rank_run(world_size, parent, talks, forkserver, folder):
    """(losses, weights) of a run with so many ranks."""
    with rank_starter(forkserver, folder) as start:
        processes = start(world_size, ranks_main, [f"--checkpoint={parent}", f"--data={talks}", *FLAGS,
                                                   f"--out_dir={folder / 'logs'}"])
        assert join(processes) == [0] * world_size, [process.output.read_text() for process in processes]
    made = only_folder(folder / "logs")
    return re.findall(r"(?:train|val)_loss:(\S+)", (made / "log.txt").read_text()), weights(made)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_the_same_model(world_size, one_rank, parent, talks, forkserver, tmp_path):
    losses, tensors = rank_run(world_size, parent, talks, forkserver, tmp_path)
    wanted, found = (np.array(texts, float) for texts in (one_rank[0], losses))
    assert len(wanted) == STEPS + 2 and np.allclose(wanted, found, atol=2e-3)
    for name, tensor in one_rank[1].items():
        assert torch.allclose(tensor, tensors[name], atol=2e-2), name


def test_steps_are_finite_whatever_the_mixture(parent):
    """Ten mixtures through the model, among them steps without a single target, at a high rate."""
    args = chat_sft.parse_args([f"--checkpoint={parent}", "--device=cpu"])
    found = chat_sft.find_parent(args)
    shard = SimpleNamespace(vocab_size=265, bos_id=256, path="")
    machine = train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")
    cfg, _ = chat_sft.choose_config(args, found, machine, shard)
    trainer = chat_sft.OwnOptimizer(train_gpt, cfg, machine, print, train_gpt)
    with torch.no_grad():
        chat_sft.load_parent(trainer.model, found, json.dumps(BYTES_CHAT).encode())
    trainer.begin()
    rng = random.Random(0)
    for step in range(10):
        kept, _ = chat_sft.fit([random_conversation(rng, 128) for _ in range(step % 5)], 128)
        slots = chat_sft.pack_slots([len(one.ids) for one in kept], 128) or [[]]
        batches = [chat_sft.fill_slot([kept[i] for i in slot], 128, 256) for slot in slots]
        loss, votes = trainer.step(batches, step, 3.0, (False,)).tolist()
        assert np.isfinite(loss) and votes == 0
    assert all(torch.isfinite(param).all() for param in trainer.model.parameters())


def test_a_vocabulary_with_room_keeps_its_size(run, parent, tmp_path):
    """As GPT-2's: the model has more rows than its vocabulary, and the new tokens take some of them."""
    folder = tmp_path / "wide" / "checkpoint" / "step_000004"
    shutil.copytree(sample.resolve_checkpoint(parent), folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["config"]["vocab_size"] = 288
    (folder / "meta.json").write_text(json.dumps(meta))
    tensors = load_file(folder / "model.safetensors")
    for name in ("embed", "lm_head", "value_embeds"):
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 31), value=-3.0)
    save_file(tensors, folder / "model.safetensors")
    done = run(f"--checkpoint={folder}", "--lr=1e-9", "--stop_after=2")
    assert done.code == 130, done.err
    after = weights(done.folder)["lm_head"]
    assert after.shape == (288, 48) and torch.allclose(after[265:], torch.tensor(-3.0), atol=1e-4)
    assert torch.allclose(after[257:265], tensors["lm_head"][:256].mean(0).expand(8, 48), atol=1e-5)


def test_the_plain_template_needs_no_special_tokens(run, tmp_path):
    chat.main(["spelling:30", "--tokenizer=bytes", "--template=plain", f"--out={tmp_path / 'plain'}"])
    done = run(f"--data={tmp_path / 'plain'}")
    assert (done.code, done.err) == (0, "") and "chatcore" not in done.out
    model, tokenizer, meta = sample.load_checkpoint(sample.resolve_checkpoint(done.folder), "cpu")
    assert meta["chat"] is False and model.cfg.vocab_size == tokenizer.vocab_size == 257


# -----------------------------------------------------------------------------
# What is refused


def test_what_is_refused(run, talks, parent, tmp_path):
    def refused(*flags, words=(), code=2):
        done = run(*flags, out="refused")
        assert done.code == code and re.fullmatch(r"chat_sft\.py: [^\n]+\n", done.err), done
        assert all(word in done.err for word in words), done.err
        assert code == 3 or done.folder is None
    refused("--epochs=0", words=["--epochs=0"])
    refused("--save_every=3", words=["--save_every=3", "even"])
    refused("--lr=nan", words=["--lr=nan"])
    refused("--batch_tokens=100", words=["--batch_tokens=100", "128"])
    refused("--data=absent", words=["absent", "data/chat.py"])
    refused("--checkpoint=absent", words=["absent"])
    refused(f"--resume={parent}", words=["--resume=", "has no checkpoint of chat_sft.py"])
    refused(f"--resume={tmp_path / 'absent'}", words=["absent", "has no checkpoint of chat_sft.py"])
    refused("--typo=1", words=["--typo"])

    damaged = tmp_path / "damaged"
    shutil.copytree(talks, damaged)
    mask = damaged / "train_000000.mask"
    mask.write_bytes(mask.read_bytes()[:-1])
    refused(f"--data={damaged}", words=[str(mask), "not the mask"])
    mask.unlink()
    refused(f"--data={damaged}", words=[str(mask), "cannot be read"])
    tokenizer = json.loads((damaged / "tokenizer.json").read_text())
    (damaged / "tokenizer.json").write_text(json.dumps(tokenizer | {"ranks": tokenizer["ranks"][::-1]}))
    refused(f"--data={damaged}", words=["another vocabulary"])

    broken = tmp_path / "broken" / "step_000004"
    shutil.copytree(sample.resolve_checkpoint(parent), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["mlp"][0, 0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    refused(f"--checkpoint={broken}", words=["loss of step 0 is nan"], code=3)


def test_a_model_of_the_plain_script(run, data, talks, tmp_path):
    flags = ["--preset=tiny", f"--train_files={data}/train_*.bin", f"--val_files={data}/val_*.bin", "--depth=2",
             "--model_dim=96", "--pack_tokens=256", "--batch_tokens=512", "--num_iterations=2", "--val_tokens=2000",
             "--width_rule=none", "--device=cpu", f"--out_dir={tmp_path / 'base'}"]
    assert train_gpt_simple.train(train_gpt_simple.parse_config(flags), flags) == 0
    refused = run(f"--checkpoint={only_folder(tmp_path / 'base')}", "--save_every=2", out="refused")
    assert refused.code == 2 and "--save_every=2" in refused.err and "cannot be resumed" in refused.err
    assert refused.folder is None
    done = run(f"--checkpoint={only_folder(tmp_path / 'base')}", "--lr=1")
    assert (done.code, done.err) == (0, "")
    losses = [float(loss) for loss in re.findall(r"val_loss:(\S+)", (done.folder / "log.txt").read_text())]
    assert losses[-1] < losses[0] - 0.5
    before, after = weights(only_folder(tmp_path / "base")), weights(done.folder)
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items() if tensor.dim() == 2)
    model, tokenizer, meta = sample.load_checkpoint(sample.resolve_checkpoint(done.folder), "cpu")
    assert meta["script"] == "train_gpt_simple" and model.cfg.vocab_size >= tokenizer.vocab_size == 265
    machine = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    trainer = chat_sft.TorchOptimizers(train_gpt_simple, model.cfg, machine, print, train_gpt)
    before = [param.clone() for param in trainer.model.parameters()]
    assert trainer.step([], 0, 1.0, (0, 0)).tolist() == [0, 0, 0]       # fewer slots than steps: nothing to learn from
    assert all(map(torch.equal, before, trainer.model.parameters()))
