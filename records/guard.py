"""The metric guard: is what a training script reports the loss of an honest predictor on the whole validation text?

    python records/guard.py train_gpt.py                       # with the tables of its default preset
    python records/guard.py SCRIPT --run=FOLDER/run.json       # with the tables of a run; did SCRIPT make that run?
    python records/guard.py SCRIPT --run=A/run.json --run=B/run.json       # of several; equal tables are examined once
    python records/guard.py SCRIPT --device=cuda               # with the attention of the GPU instead of the plain one

The guard imports the script, so it runs the script's code. It trains a model of a few channels on made-up text, and
looks at it from outside, through main(), GPT and the files of the run. Exit code 0: all of this holds. Exit code 1: a
line says what does not.

    normalised   over all tokens that may follow, the probabilities that the loss implies sum to 1
    causal       no loss up to a token changes with the tokens and targets after it, across documents and windows
    complete     the reported loss is the mean over exactly the first val_tokens tokens, computed again in float64 with
                 a plain softmax from the checkpoint that the run wrote
    harmless     a run that validates at every step trains bit for bit like one that validates at its end only

The guard cannot see code that behaves differently in a large run, or in kernels that do not run on this device.
"""
import argparse
import contextlib
import hashlib
import io
import json
import re
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from runs import UserError, read_run, user_path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample                                       # loads scripts; it imports PyTorch when that is needed, as here

BOS, STREAM, VAL_TOKENS, STEPS = 8, 256, 500, 4     # 8 tokens of one byte and a begin-of-document id
PARTS = ("PRESETS", "GPT", "parse_config", "config_from_dict", "main")     # what a script must have
# what a run fills in itself
FROM_MACHINE = {"vocab_size", "bos_id", "attention", "compile", "kernels", "float8", "host_state"}
# values of the small run; fields that a script lacks are skipped, some have one name in older scripts
SMALL = {"val_tokens": VAL_TOKENS, "val_stream_tokens": STREAM, "pack_tokens": 128, "slot_tokens": 128,
         "micro_batch_tokens": 0, "batch_tokens": 256, "windows": [24, 64],
         "num_iterations": STEPS, "stop_after": 0, "final_windows": [24, 64], "vocab_size": 0,
         "vocab_multiple": 1, "vocab_dir": "", "bos_id": -1, "precision": "fp32", "attention": "auto", "kernels": False,
         "float8": False, "compile": False, "seed": 0, "resume": "", "init_from": "", "save_every": 0,
         "compile_cache": ""}
SIZES = {"head_dim": 16, "qk_dim": 8, "mlp_dim": 64, "gate_dim": 8, "bigram_rows": 61, "bigram_signs": 8}  # 0 stays 0
STAGE = {"batch_tokens": 256, "max_doc_tokens": 90}


class Dishonest(Exception):
    """What the guard found, in one line."""


def need(good: bool, sentence: str):
    """Raises Dishonest with the sentence unless `good`."""
    if not good:
        raise Dishonest(sentence)


def as_flag(name: str, value) -> str:
    """`--name=value` as a user would type it: tables as JSON, pairs with commas."""
    if isinstance(value, (list, tuple)):
        table = value and isinstance(value[0], (list, dict))
        return f"--{name}={json.dumps(value) if table else ','.join(map(str, value))}"
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def small_flags(config: dict, folder: Path, device: str, **changes) -> list[str]:
    """Command line of a run on the shards in `folder` with the tables of `config`, everything else a few numbers.

    Only fields of `config` are set, and a size of 0, which means that a part of the model is off, stays 0.
    """
    small = SMALL | {name: size if config.get(name) else 0 for name, size in SIZES.items()}
    small |= {"device": device, "out_dir": str(folder / "logs"), "train_files": f"{folder}/train_*.bin",
              "val_files": f"{folder}/val_*.bin"}
    if config.get("head_dim") and config.get("model_dim"):
        small["model_dim"] = SIZES["head_dim"] * (config["model_dim"] // config["head_dim"])
    if device == "cuda":
        small |= {"precision": "bf16", "attention": "flex", "compile": True}
    small["stages"] = [small_stage(row, i) for i, row in enumerate(config.get("stages", []))]
    return [as_flag(name, value) for name, value in (config | small | changes).items() if name in config]


def small_stage(row: dict, index: int) -> dict:
    """A row of the table of stages with short windows and documents, which grow with the index."""
    small = STAGE | {"short": 8 + 4 * index, "long": 24 + 12 * index}
    return {name: small.get(name, value) for name, value in row.items()}


def write_shards(folder: Path) -> np.ndarray:
    """Shards of documents that are easy to learn, and their tokenizer; returns the validation tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, tokenizer = np.random.default_rng(0), {"name": "bytes", "pattern": "", "bos_id": BOS, "special_tokens": {
        "<|bos|>": BOS}, "ranks": [f"{letter}A==" for letter in "ABCDEFGH"]}    # base64 of one byte each
    text = json.dumps(tokenizer, sort_keys=True, separators=(",", ":")).encode()
    (folder / "tokenizer.json").write_bytes(text)
    for name, size in (("train", 8000), ("val", VAL_TOKENS + 200)):
        tokens = []
        while len(tokens) < size:
            tokens += [BOS, *np.cumsum(rng.integers(1, 4, rng.integers(20, 150))) % BOS]
        header = np.zeros(256, "<i4")
        header[:6] = 20240520, 1, len(tokens), BOS + 1, BOS, 2
        header[8:16] = np.frombuffer(hashlib.sha256(text).digest(), "<i4")
        (folder / f"{name}_000000.bin").write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return np.array(tokens, np.int64)


def train(module, flags: list[str], folder: Path) -> SimpleNamespace:
    """Runs main() with the flags; its run.json, its log, its checkpoint folder and the bytes of the weights."""
    argv, sys.argv = sys.argv, [Path(module.__file__).name, *flags]
    known, output, hidden = set(folder.glob("logs/*")), io.StringIO(), "matplotlib" not in sys.modules
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    if hidden:
        sys.modules["matplotlib"] = None            # a second less: without it a run draws no curve
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = module.main()
    except Exception as error:                      # whatever a script raises
        raise Dishonest(f"a small run ends with {type(error).__name__}: {str(error)[:200]}") from None
    finally:
        sys.argv = argv
        if hidden:
            del sys.modules["matplotlib"]
        for name, handler in handlers.items():
            signal.signal(name, handler)
    need(code == 0, f"a small run ends with exit code {code}: {' '.join(output.getvalue().split())[-200:]}")
    run = (set(folder.glob("logs/*")) - known).pop()
    checkpoint = run / "checkpoint" / (run / "checkpoint" / "latest").read_text(encoding="utf-8")
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return SimpleNamespace(info=info, log=(run / "log.txt").read_text(encoding="utf-8"), checkpoint=checkpoint,
                           weights=(checkpoint / "model.safetensors").read_bytes())


def load_model(module, checkpoint: Path, device: str):
    """The model of a checkpoint, in its last stage."""
    import torch
    from safetensors.torch import load_file

    meta = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    with torch.device(device):
        model = module.GPT(module.config_from_dict(meta["config"]))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model.set_stage(meta["stage"], final=True)
    return model


def check_harmless(often, seldom):
    """The two runs differ in when they validated, and in nothing else."""
    losses = [re.findall(r"step:(\d+)/\d+ train_loss:(\S+)", run.log) for run in (often, seldom)]
    for (step, one), (_, other) in zip(*losses):
        need(one == other, f"validating changes training: the loss of step {step} is {one} with and {other} without")
    need(often.weights == seldom.weights, "validating changes training: the weights differ with and without")


def check_complete(forward, tokens: np.ndarray, reported: float, device: str, tolerance: float):
    """The reported loss is the mean over the first VAL_TOKENS tokens, document by document, in float64."""
    import torch

    starts = [*np.flatnonzero(tokens == BOS), len(tokens)]
    total = 0.0
    for start, end in zip(starts, starts[1:]):
        targets = torch.from_numpy(tokens[start + 1:min(end, VAL_TOKENS) + 1])
        if start >= VAL_TOKENS:
            break
        document = np.full(STREAM, BOS)             # one shape for all; what follows a document cannot change it
        document[:end - start] = tokens[start:end]
        logits = forward(torch.from_numpy(document).to(device))[:len(targets)].double().cpu()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    mean = total / VAL_TOKENS
    need(abs(mean - reported) < tolerance, f"a small run reports a validation loss of {reported:.6f}, a softmax over "
         f"the logits of its checkpoint gives {mean:.6f} on the same {VAL_TOKENS} tokens")


def check_normalised(forward, tokens, positions, tolerance: float, vocab_size: int):
    """The probabilities exp(-loss) of all tokens that may follow each position sum to 1.

    vocab_size: of the model, which may have more than the shards, to make its tables fast.
    """
    import torch

    for position in positions:
        targets = torch.full_like(tokens, -1)
        total = 0.0
        for token in range(vocab_size):
            targets[position] = token
            total += torch.exp(-forward(tokens, targets).double()).item()
        need(abs(total - 1) < tolerance, f"the probabilities of the {vocab_size} tokens that may follow position "
             f"{position} sum to {total:.4f}: the loss is not that of a normalised distribution")


def check_causal(forward, tokens, targets, positions, tolerance: float):
    """Losses and logits up to each position stay as they are when tokens and targets after it change."""
    import torch

    generator, index = torch.Generator().manual_seed(1), torch.arange(tokens.numel(), device=tokens.device)
    logits, total = forward(tokens), forward(tokens, targets)
    for last in positions:
        later = torch.randint(0, BOS + 1, tokens.shape, generator=generator).to(tokens.device)
        changed, before = torch.where(index > last, later, tokens), torch.where(index > last, -1, targets)
        moved = (forward(changed) - logits)[:last + 1].abs().amax(1).cpu()
        seen, loss = int(torch.argmax((moved > tolerance).int())), forward(tokens, before)
        need(moved.max() <= tolerance, f"the prediction at position {seen} changes with tokens after position {last}: "
             "the script looks at future tokens")
        need(abs(loss - forward(changed, before)) <= tolerance * (last + 1), f"the loss up to position {last} changes "
             "with tokens after it: the script looks at future tokens")
        rest = forward(tokens, torch.where(index > last, targets, -1))
        need(abs(loss + rest - total) <= tolerance * tokens.numel(), f"the loss up to position {last} changes with the "
             "targets after it: the script looks at future tokens")


def disturb(model):
    """Moves every parameter, so that no path through the model is silent because it starts at zero."""
    import torch

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator).to(param)


def same_to_the_guard(config: dict, device: str) -> str:
    """What is the same for two configurations if and only if they make the same small runs."""
    return json.dumps(small_flags(config, Path(), device, val_every=0))


def check_script(module, config: dict, device: str = "cpu"):
    """All that the guard knows, for the tables of one configuration; raises Dishonest."""
    import torch

    torch.set_num_threads(1)
    tolerance = 1e-4 if device == "cpu" else 0.02
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_shards(folder)
        run = train(module, small_flags(config, folder, device, val_every=1), folder)
        if device == "cpu":                         # a GPU sums gradients in another order each time
            check_harmless(run, train(module, small_flags(config, folder, device, val_every=0), folder))
        honest, disturbed = (load_model(module, run.checkpoint, device) for _ in range(2))
    stream, targets = (torch.from_numpy(tokens[i:STREAM + i]).to(device) for i in (0, 1))
    border = int(np.flatnonzero(tokens == BOS)[1])
    disturb(disturbed)
    forward, compiled = (torch.compile(model, dynamic=False, fullgraph=True) if device == "cuda" else model
                         for model in (disturbed, honest))
    with torch.no_grad():
        check_causal(forward, stream, targets, (border - 1, border, 127, 201), tolerance)
        check_normalised(forward, stream, (border - 1, 201), 10 * tolerance, honest.cfg.vocab_size)
        check_complete(compiled, tokens, run.info["val_losses"][-1]["val_loss"], device, tolerance)


def made_config(module, info: dict):
    """The config that the script makes of the flags of a run."""
    cfg = module.parse_config(info["argv"])
    if hasattr(module, "dial"):                     # the plain script: vocabulary and depth give sizes and steps
        cfg = module.dial(replace(cfg, vocab_size=info["config"]["vocab_size"]))
    return cfg


def number_of_steps(module, cfg) -> int:
    """Steps of a run that goes to its end, or to --stop_after."""
    if not hasattr(cfg, "total_steps"):             # the plain script
        return len(module.plan(cfg))
    return min(getattr(cfg, "stop_after", 0) or cfg.total_steps, cfg.total_steps)


def check_run(module, info: dict):
    """The script makes the recorded configuration from the recorded flags, and its schedule ends where the run did."""
    try:
        cfg = made_config(module, info)
    except Exception as error:                      # whatever a script raises for flags that it does not know
        raise Dishonest(f"the script refuses the flags of the log: {error}") from None
    made = json.loads(json.dumps(asdict(cfg)))
    for name in sorted(made.keys() | info["config"].keys() - FROM_MACHINE):
        if name not in FROM_MACHINE:
            one, other = (json.dumps(values.get(name))[:60] for values in (info["config"], made))
            need(one == other, f"the log has {name} {one}, the script makes {other} from its flags")
    steps, last = number_of_steps(module, cfg), info["val_losses"][-1]["step"]
    need(steps == last, f"the schedule of the script ends at step {steps}, the run at step {last}")


def main() -> int:
    """Runs the command line. Exit code: 0 all holds, 1 something does not, 2 the user can put it right."""
    parser = argparse.ArgumentParser(prog="guard.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=user_path, help="a training script")
    parser.add_argument("--run", type=user_path, metavar="RUN.JSON", action="append", default=[],
                        help="run.json of a run that the script made; may be repeated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")

    def refuse(message):
        raise UserError(f"{message}; see --help")
    parser.error = refuse
    try:
        args = parser.parse_args()
        for path in (args.script, *args.run):
            if not path or not path.is_file():                      # argparse reads --run=-- as a list
                raise UserError(f"{path or '--'} is not a file; name a training script, and with --run a run.json")
        examine(args.script.resolve(), args.run, args.device)
    except Dishonest as found:
        print(f"{args.script}: {UserError(found)}", file=sys.stderr)
        return 1
    except (UserError, sample.UserError) as error:
        print(f"guard.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"guard.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    print(f"{args.script}: the loss is normalised, causal, complete, and validating changes nothing")
    return 0


def examine(script: Path, runs: list[Path], device: str):
    """Checks a script with the tables of its runs, or of its first preset; raises Dishonest or UserError."""
    module = sample.import_script(script, PARTS, "name a training script")
    configs = [] if runs else [json.loads(json.dumps(asdict(next(iter(module.PRESETS.values())))))]
    for path in runs:
        info = read_run(path.parent).info
        check_run(module, info)
        configs.append(info["config"])
    for config in {same_to_the_guard(config, device): config for config in configs}.values():
        check_script(module, config, device)


if __name__ == "__main__":
    sys.exit(main())
