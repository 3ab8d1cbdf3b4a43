"""--export_hf of sample.py: the folder it writes is the model, the vocabulary and the chat format, for transformers.

Against: transformers' Qwen3 and AutoTokenizer, the model itself, the Engine of sample.py, render and prime of
data/chat.py. Run: python -m pytest tests/test_export_hf.py
"""
import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BOS, ROOT, VOCAB, assert_close, tokenizer_json
from safetensors.torch import load_file, save_file

import export_hf
import sample
import train_gpt_simple as simple

chat, vocabulary = (sample.import_script(ROOT / "data" / name, ()) for name in ("chat.py", "tokenizer.py"))
PIECES = b"th he the and in er  the  an  and ing ' s 's How ow  many ell Hello\n\n un  pro str aw raw ber".split(b" ")
MERGED = [bytes([byte]) for byte in range(256)] + [b" t", b" a", *dict.fromkeys(p for p in PIECES if len(p) > 1)]
TOKENIZERS = {"bytes": tokenizer_json(), "bytes_chat": chat.extend_tokenizer(tokenizer_json()),
              "gpt2": vocabulary.describe("own", sample.GPT2_PATTERN, MERGED),
              "gpt4": vocabulary.describe("own", sample.gpt4_pattern(2), MERGED),
              "joined": vocabulary.describe("own", sample.gpt4_pattern(2, joined=True), [*MERGED, b" a the"])}
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"}
QUESTION = {"role": "user", "content": "How many r are in strawberry?"}
ANSWER = {"role": "assistant", "content": [
    {"type": "text", "text": "Let me count. "}, {"type": "python", "text": "'strawberry'.count('r')"},
    {"type": "python_output", "text": "3"}, {"type": "text", "text": "\n\n#### 3 "}]}
THANKS = {"role": "user", "content": [{"type": "text", "text": " Thanks\n\n\u00e9\u4f60 {{ bos_token }} <b>&amp; "}]}
SYSTEM = {"role": "system", "content": "Be short.\n"}
CONVERSATIONS = {"question": [QUESTION], "system": [SYSTEM, QUESTION], "empty": [{"role": "user", "content": ""}],
                 "tool": [QUESTION, ANSWER], "long": [SYSTEM, QUESTION, ANSWER, THANKS, ANSWER | {"content": " No. "}],
                 "parts": [{"role": "system", "content": THANKS["content"]}, THANKS, ANSWER, QUESTION]}
BAD = {"nothing": [], "only system": [SYSTEM], "begins with an answer": [ANSWER], "two questions": [QUESTION, QUESTION],
       "late system": [QUESTION, SYSTEM], "call of a user": [QUESTION | {"content": ANSWER["content"]}],
       "unknown part": [QUESTION, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}]}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")


def make_checkpoint(folder, tokenizer=TOKENIZERS["bytes"], changes=None, **meta):
    """A checkpoint of a small model with random weights, and that model."""
    spec = json.loads(tokenizer)
    cfg = replace(simple.PRESETS["tiny"], **{
        "depth": 3, "model_dim": 32, "head_dim": 8, "windows": (8, 0), "mlp": "swiglu", "pack_tokens": 2048,
        "vocab_size": len(spec["ranks"]) + len(spec["special_tokens"]), "bos_id": spec["bos_id"], "compile": False,
        "attention": "plain"} | (changes or {}))
    model, generator = simple.GPT(cfg).requires_grad_(False), torch.Generator().manual_seed(1)
    for param in model.parameters():
        param += 0.3 * torch.randn(param.shape, generator=generator)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    source = hashlib.sha256((ROOT / "train_gpt_simple.py").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps({
        "format": 1, "script": "train_gpt_simple", "config": asdict(cfg), "step": 7, "stage": 0, "val_loss": 5.5,
        "source_sha256": source, "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "tokens_seen": 14336} | meta))
    return model


def export(folder, *flags):
    """Exports the checkpoint `step` in a folder to `hf` beside it, which is returned."""
    assert sample.main([f"--checkpoint={folder / 'step'}", f"--export_hf={folder / 'hf'}", *flags]) == 0
    return folder / "hf"


def some_tokens(count):
    generator = torch.Generator().manual_seed(2)
    return torch.cat([torch.tensor([BOS]), torch.randint(0, BOS, (count - 1,), generator=generator)])


# -----------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("changes, longest", [
    ({}, 2048), ({"windows": (8,)}, 2048), ({"windows": (0,)}, 2048), ({"windows": (8, 8, 24)}, 25),
    ({"width_rule": "mup", "vocab_size": 320}, 2048), ({"precision": "bf16", "head_dim": 16}, 2048)], ids=str)
def test_transformers_gives_the_same_logits(changes, longest, tmp_path, transformers):
    model = make_checkpoint(tmp_path / "step", changes=changes)
    model.dtype = torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(tmp_path), attn_implementation="eager")
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.dtype == torch.float32
    assert theirs.config.max_position_embeddings == longest and theirs.config.vocab_size == VOCAB
    tokens = some_tokens(min(longest, 120))
    with torch.no_grad():
        found = theirs(tokens[None]).logits[0]
    assert_close(found, model(tokens)[:, :VOCAB], 1e-4)


def test_transformers_writes_the_same_text(tmp_path, transformers):
    """100 tokens, the likeliest at each step, with the caches of both; the smaller window ends after 8."""
    make_checkpoint(tmp_path / "step")
    model, tokenizer, _ = sample.load_checkpoint(tmp_path / "step", "cpu")
    prompt = [BOS, *b"the old house "]
    engine = sample.Engine(model, VOCAB, sample.Draw(0.0), 1, 128)
    wanted = [tokens[0] for tokens, _ in engine.steps([prompt], [(0, 0)], 100)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(tmp_path))
    found = theirs.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=100, max_new_tokens=100, top_k=None,
                            temperature=None, top_p=None, eos_token_id=None)[0].tolist()
    assert found[len(prompt):] == wanted and len(set(wanted)) > 20


def test_stacked_and_single_matrices_give_the_same_weights():
    q, k, v = (torch.full((4, 4), float(value)) for value in range(3))
    single = {f"b.{name}.weight": weight for name, weight in zip("qkv", (q, k, v))}
    for weights in (single, {"b.qkv": torch.stack([q, k, v])}):
        assert [part.unique().item() for part in export_hf.query_key_value(weights, "b")] == [0, 1, 2]
        assert weights == {}


def test_a_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch, capsys):
    """The script may change after export_hf.py was written."""
    make_checkpoint(tmp_path / "step")
    rotary = simple.rotary
    monkeypatch.setattr(simple, "rotary", lambda x, cos, sin: 0.8 * rotary(x, cos, sin))
    assert_refused(tmp_path, capsys, "other logits")


@pytest.mark.parametrize("name, word", [("blocks.0.gain", "blocks.0.gain"), (None, "lm_head.weight")])
def test_weights_without_a_place_are_named(name, word):
    head = {name: torch.ones(3), "lm_head.weight": torch.ones(4, 2)} if name else {}
    model = SimpleNamespace(state_dict=lambda: {"embed.weight": torch.ones(4, 2)} | head,
                            cfg=SimpleNamespace(model_dim=2, head_dim=2, depth=0, width_rule="none"))
    with pytest.raises(export_hf.UserError, match=word):
        export_hf.convert_weights(model, 4)


# -----------------------------------------------------------------------------
# The vocabulary and the chat format

@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_vocabulary_gives_the_same_ids(name, tmp_path, transformers):
    make_checkpoint(tmp_path / "step", TOKENIZERS[name])
    own = sample.Tokenizer(json.loads(TOKENIZERS[name]))
    theirs = transformers.AutoTokenizer.from_pretrained(export(tmp_path))
    for line in ("The cat's  house\n\n", " the and\tstring 12345", "", "\u00e9\u4f60\U0001f600 e\u0301", "Hello a the"):
        ids = theirs(line).input_ids
        assert ids == [own.bos_id, *own.encode(line)]
        assert theirs.decode(ids, skip_special_tokens=True) == line
    assert theirs.bos_token_id == own.bos_id and len(theirs) == own.vocab_size
    assert (theirs.chat_template is not None) == (name != "bytes")


@pytest.fixture(scope="module")
def chat_folders(tmp_path_factory, transformers):
    """name of a vocabulary -> (folder of an exported chat model, transformers' tokenizer, that of data/chat.py)."""
    found = {}
    for name in ("bytes_chat", "gpt4", "joined"):
        folder = tmp_path_factory.mktemp(name)
        make_checkpoint(folder / "step", TOKENIZERS[name], chat=True)
        hf = export(folder)
        found[name] = hf, transformers.AutoTokenizer.from_pretrained(hf), chat.ChatTokenizer(TOKENIZERS[name])
    return found


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["bytes_chat", "gpt4", "joined"])
def test_the_chat_template_gives_the_ids_of_render_and_prime(name, conversation, chat_folders):
    _, theirs, own = chat_folders[name]
    messages = CONVERSATIONS[conversation]
    assert theirs.apply_chat_template(messages, return_dict=False) == chat.render(messages, own)[0]
    if messages[-1]["role"] == "user":
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == chat.prime(messages, own)
    else:
        with pytest.raises(Exception, match="nothing to answer"):
            theirs.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("conversation", BAD)
def test_the_chat_template_refuses_what_is_not_a_conversation(conversation, chat_folders):
    _, theirs, own = chat_folders["gpt4"]
    with pytest.raises(chat.InputError):
        chat.render(BAD[conversation], own)
    with pytest.raises(Exception):
        theirs.apply_chat_template(BAD[conversation])


def test_a_chat_model_gives_the_answer_of_chat_py(chat_folders, transformers):
    """The same ids, up to the end of the answer, with no flags but greedy drawing."""
    hf, theirs, own = chat_folders["bytes_chat"]
    model, tokenizer, _ = sample.load_checkpoint(hf.parent / "step", "cpu")
    ids = chat.prime([SYSTEM, QUESTION], own)
    ends = {tokenizer.special(f"<|{name}|>") for name in ("bos", "assistant_end", "user_start")}
    wanted = []
    for tokens, _ in sample.Engine(model, tokenizer.vocab_size, sample.Draw(0.0), 1, 256).steps([ids], [(0, 0)], 100):
        wanted.append(tokens[0])
        if tokens[0] in ends:
            break
    network = transformers.AutoModelForCausalLM.from_pretrained(hf)
    assert set(network.generation_config.eos_token_id) == ends
    given = theirs.apply_chat_template([SYSTEM, QUESTION], add_generation_prompt=True, return_tensors="pt")
    found = network.generate(**given, max_new_tokens=100, do_sample=False)[0].tolist()
    assert found == ids + wanted


# -----------------------------------------------------------------------------
# The folder and the command

@pytest.mark.parametrize("knows, name", [(False, "bytes"), (False, "gpt4"), (True, "gpt4")])
def test_what_the_folder_holds(knows, name, tmp_path, capsys):
    make_checkpoint(tmp_path / "step", TOKENIZERS[name], {"windows": (8, 24)}, chat=knows)
    folder = export(tmp_path)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"step", "hf"}
    assert capsys.readouterr().err.endswith("in texts of up to 25 tokens; its README.md says how to load it\n")
    config, drawing = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert config["sliding_window"] == 9 and config["torch_dtype"] == "float32"
    assert all(weight.dtype == torch.float32 for weight in load_file(folder / "model.safetensors").values())
    special = json.loads(TOKENIZERS[name])["special_tokens"]
    assert drawing["eos_token_id"][-1] == special["<|bos|>"] and drawing["temperature"] == (0.6 if knows else 1.0)
    assert (special.get("<|assistant_end|>") in drawing["eos_token_id"]) == knows
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "25 tokens; in longer ones" in card
    assert "on `local/train_*.bin`: 7 steps, 14336 tokens, validation loss 5.5000" in card
    assert ("apply_chat_template" in card) == knows and "{" not in card.split("```")[2]


def test_the_example_of_the_model_card_runs(chat_folders, transformers, tmp_path, capsys):
    make_checkpoint(tmp_path / "step")
    for folder in (chat_folders["gpt4"][0], export(tmp_path)):
        example = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
        exec(compile(example.replace("FOLDER", str(folder)).replace("=100", "=5"), "example", "exec"), {})
        assert "|>" in capsys.readouterr().out


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    make_checkpoint(tmp_path / "step")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert_refused(tmp_path, capsys, "tokenizers", "pip install")


def test_a_folder_whose_name_is_not_text(tmp_path):
    make_checkpoint(tmp_path / "step")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff {b}")
    assert sample.main([f"--checkpoint={tmp_path / 'step'}", f"--export_hf={name}"]) == 0
    assert "# a? {b}\n" in Path(name, "README.md").read_text()


def assert_refused(folder, capsys, *words, flags=()):
    """Exit code 2, one line with the words, and nothing written."""
    capsys.readouterr()
    before = sorted(folder.rglob("*"))
    assert sample.main([f"--checkpoint={folder / 'step'}", f"--export_hf={folder / 'new' / 'hf'}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("changes, words", [
    ({"mlp": "relu2"}, ["--mlp=relu2", "--mlp=swiglu"]), ({"gate": "head"}, ["--gate=head"]),
    ({"value_residual": True}, ["--value_residual=true", "--value_residual=false"]),
    ({"norm_scaling": True}, ["--norm_scaling=true"]), ({"softcap": 15.0}, ["--softcap=15.0"]),
    ({"windows": (4, 8, 16)}, ["--windows", "4, 8, 16"])], ids=str)
def test_settings_that_qwen3_lacks_are_named(changes, words, tmp_path, capsys):
    make_checkpoint(tmp_path / "step", changes=changes)
    assert_refused(tmp_path, capsys, *words)


@pytest.mark.parametrize("script, word", [("train_gpt", "relu2"), ("my_idea", "my_idea.py")])
def test_other_scripts_are_refused(script, word, tmp_path, capsys):
    make_checkpoint(tmp_path / "step", script=script)
    assert_refused(tmp_path, capsys, word, "train_gpt_simple.py")


@pytest.mark.parametrize("flag", ["--prompt=The", "--json", "--benchmark", "--model=gpt2", "--logprobs"])
def test_flags_that_have_no_use_are_refused(flag, tmp_path, capsys):
    make_checkpoint(tmp_path / "step")
    assert_refused(tmp_path, capsys, flag.partition("=")[0], flags=[flag])


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path, capsys):
    make_checkpoint(tmp_path / "step")
    for name in ("full", "file", "empty"):
        (tmp_path / name).mkdir() if name != "file" else (tmp_path / name).write_text("mine")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name, word in (("full", "not empty"), ("file", "not a folder")):
        assert_refused(tmp_path, capsys, word, flags=[f"--export_hf={tmp_path / name}"])
    assert sample.main([f"--checkpoint={tmp_path / 'step'}", f"--export_hf={tmp_path / 'empty'}"]) == 0
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


# -----------------------------------------------------------------------------
# And back

def run_import(source, out):
    return export_hf.main([f"--import={source}", f"--out={out}"])


@pytest.mark.parametrize("changes", [{}, {"windows": (0,)}, {"windows": (8,)},
                                     {"width_rule": "mup", "vocab_size": 320}], ids=str)
def test_an_exported_model_comes_back(changes, tmp_path, capsys):
    """The printed flags make a model that takes the weights and gives the same logits."""
    model = make_checkpoint(tmp_path / "step", changes=changes)
    hf = export(tmp_path)
    capsys.readouterr()
    assert run_import(hf, tmp_path / "back") == 0
    flags = capsys.readouterr().out.split("train_gpt_simple.py ")[1].split()
    cfg = replace(simple.parse_config(["--preset=tiny", *flags]), vocab_size=320, bos_id=BOS, compile=False)
    again = simple.GPT(cfg).requires_grad_(False)
    again.load_state_dict(load_file(tmp_path / "back" / "model.safetensors"))
    tokens = some_tokens(60)
    assert [block.window for block in again.blocks] == [block.window for block in model.blocks]
    assert_close(again(tokens)[:, :VOCAB], model(tokens)[:, :VOCAB], 1e-4)


def test_gains_become_part_of_the_products(tmp_path):
    make_checkpoint(tmp_path / "step")
    hf = export(tmp_path)
    config, weights = json.loads((hf / "config.json").read_text()), load_file(hf / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            weight.copy_(torch.linspace(0.5, 1.5, len(weight)))
    tokens = some_tokens(40)
    wanted = export_hf.qwen3_logits(config, weights, tokens)
    cfg = replace(simple.PRESETS["tiny"], depth=3, model_dim=32, head_dim=8, mlp="swiglu", vocab_size=320, bos_id=BOS,
                  windows=export_hf.import_windows(config))
    model = simple.GPT(replace(cfg, compile=False)).requires_grad_(False)
    model.load_state_dict(export_hf.import_weights(config, weights))
    assert_close(model(tokens)[:, :VOCAB], wanted, 1e-3)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llama"}, ["qwen3"]), ({"num_key_value_heads": 1}, ["num_key_value_heads=1", "4"]),
    ({"rope_theta": 1e6}, ["rope_theta=1000000.0"]), ({"intermediate_size": 96}, ["intermediate_size=96", "80"]),
    ({"num_hidden_layers": 4}, ["layers.3"]), ({"num_hidden_layers": 2}, ["layers.2"]),
    ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, ["last layer"]), (None, ["cannot be read"])],
    ids=str)
def test_what_cannot_be_imported_gets_one_line(changes, words, tmp_path, capsys):
    make_checkpoint(tmp_path / "step")
    hf = export(tmp_path)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes) if changes else "{")
    capsys.readouterr()
    assert run_import(hf, tmp_path / "back") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in ["--import", *words]), err
    assert not (tmp_path / "back").exists()


def test_an_import_overwrites_nothing(tmp_path, capsys):
    make_checkpoint(tmp_path / "step")
    hf = export(tmp_path)
    capsys.readouterr()
    assert run_import(hf, hf) == 2 and "--out" in capsys.readouterr().err
