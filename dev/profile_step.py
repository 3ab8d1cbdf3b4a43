"""Prints where a training step spends its time on the GPU.

    python dev/profile_step.py --train_files=... --val_files=... [other flags of train_gpt.py] [--stage=0]

Compiles as the script does, and runs a few steps of one stage on real tokens under PyTorch's profiler. Prints
milliseconds per step, by kind of kernel:

* the whole step;
* the head with its loss, and the optimizer, each run alone;
* the rest of the step, which is the difference;
* the loader on the CPU, which works ahead of the GPU;
* the 30 kernels that take longest.

The kernels are launched one by one here. A training run may replay them as CUDA graphs, with fewer gaps between them.
"""
import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and those for the training script."""
    parser = argparse.ArgumentParser(prog="profile_step.py", usage="python dev/profile_step.py [-h] [--stage=N] "
                                     "[flags of train_gpt.py]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--stage", type=int, default=0, metavar="N", help="row of the stage table (default: 0). All "
                        "other flags go to train_gpt.py, see its --help")
    return parser.parse_known_args(argv)


def fail(message: str):
    print(f"profile_step.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    ARGS, FLAGS = parse_args()           # before PyTorch is imported, so that --help answers at once

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

STEPS = 4                                # steps that are measured; Adam works in every other one
KINDS = (("attention", ("flex", "tem_fused")),
         ("matrix products", ("gemm", "cutlass", "nvjet", "cublas", "xmma", "relu2")),
         ("cross-entropy", ("cross_entropy", "target_grad")), ("copies", ("memcpy", "memset", "direct_copy")),
         ("communication", ("nccl",)), ("elementwise and reductions", ("triton",)))


def kind_of(name: str) -> str:
    """The first of KINDS that has a word which occurs in the kernel's name, else "other"."""
    return next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")


def profile(function) -> tuple[dict, dict]:
    """Milliseconds per call by kind of kernel, and (milliseconds, launches) by kernel, over STEPS calls."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            function()
        torch.cuda.synchronize()
    return add_up(profiler, STEPS)


def add_up(profiler, steps: int) -> tuple[dict, dict]:
    """What `profile` returns, from a profiler that has seen this many steps."""
    kinds, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms = event.self_device_time_total / 1000 / steps
            kinds[kind_of(event.name)] += ms
            kernels[event.name][0] += ms
            kernels[event.name][1] += 1 / steps
    return kinds, kernels


def show_kernels(kernels: dict):
    """Prints the 30 kernels that take longest."""
    for name, (ms, launches) in sorted(kernels.items(), key=lambda item: -item[1][0])[:30]:
        print(f"{ms:9.3f} ms  {launches:6.1f} x  {name[:110]}")


def show(title: str, kinds: dict):
    parts = [f"{kind} {ms:.2f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])]
    print(f"{sum(kinds.values()):9.2f} ms  {title}: {', '.join(parts)}")


@dataclass(frozen=True)
class Setup:
    """A model ready to train, and the batches of one step late in the stage."""
    cfg: "train_gpt.Hyperparameters"
    machine: "train_gpt.Machine"
    backward: "train_gpt.Backward"
    optimizer: "train_gpt.Optimizer"
    micro_packs: int
    step: int
    batches: list
    loader_ms: float                     # on the CPU, for one step

    def train(self, i: int):
        """Trains on the batches, as step number `step + i`."""
        step = self.step + i
        plan = train_gpt.schedule(self.cfg, step)
        train_gpt.training_step(self.backward, self.optimizer, self.batches, step, plan, self.machine)


def set_up(stage: int, flags: list[str]) -> Setup:
    """Does what train() of the script does before its first step; raises train_gpt.UserError."""
    cfg = train_gpt.parse_config(flags)
    if not 0 <= stage < len(cfg.stages):
        fail(f"--stage={stage}: the stage table has the rows 0 to {len(cfg.stages) - 1}")
    machine = train_gpt.setup_machine(cfg)
    cfg, data = train_gpt.load_data(cfg, machine)
    cfg, tried = train_gpt.choose_attention(cfg, machine)
    backward, optimizer = train_gpt.build(cfg, machine)
    model, cfg = optimizer.model, optimizer.model.cfg
    if model.kernels:
        tried.append(train_gpt.check_kernels(model, machine))
    print("\n".join(tried))
    micro_packs = train_gpt.largest_micro_batch(backward, optimizer, machine)
    train_gpt.initialize(model, optimizer, machine)
    model.set_stage(stage)
    step = max(round(cfg.stages[stage].until * cfg.num_iterations) - 8, 0) // 2 * 2     # even: Adam rests at first
    started = time.perf_counter()
    loader = train_gpt.training_batches(cfg, data.train, 0, 1, micro_packs, step)
    batches = [next(loader)[0] for _ in range(4)]
    loader_ms = 1000 * (time.perf_counter() - started) / len(batches)
    return Setup(cfg, machine, backward, optimizer, micro_packs, step, batches[0], loader_ms)


def seconds_of(run: Setup, steps: int) -> float:
    """Wall time of this many steps, without the profiler."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for i in range(steps):
        run.train(i)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def head_kinds(run: Setup) -> dict:
    """Milliseconds of a step by kind of kernel in the head and its loss, with gradients; empty without the kernel."""
    cfg, model = run.cfg, run.optimizer.model
    if "head_loss" not in model.kernels:
        return {}
    tokens, device = run.micro_packs * cfg.pack_tokens, run.machine.device
    weights = torch.tensor(train_gpt.schedule(cfg, run.step).loss_weights, device=device)
    targets = torch.randint(0, cfg.vocab_size, (tokens, len(weights)), device=device)
    x = train_gpt.norm(torch.randn(tokens, cfg.model_dim, device=device)).bfloat16().requires_grad_()
    kinds, _ = profile(lambda: model.kernels["head_loss"](x, model.lm_head, targets, weights, None).backward())
    return {kind: ms * len(run.batches) for kind, ms in kinds.items()}


def optimizer_kinds(run: Setup) -> dict:
    """Milliseconds of a step by kind of kernel in the optimizer, on gradients of zero."""
    params = list(run.optimizer.model.parameters())
    zeros = [torch.zeros_like(param) for param in params]
    numbers = cycle(range(STEPS))

    def update():
        for param, zero in zip(params, zeros):
            param.grad = zero
        step = run.step + next(numbers)
        run.optimizer.step(step, train_gpt.schedule(run.cfg, step))
    return profile(update)[0]


def main():
    if not torch.cuda.is_available():
        fail("PyTorch finds no CUDA GPU, and this profiles one; run it on such a machine")
    try:
        run = set_up(ARGS.stage, FLAGS)
    except train_gpt.UserError as error:
        fail(str(error))
    print(f"compiled in {seconds_of(run, STEPS):.1f} s")
    step_ms = 1000 * seconds_of(run, STEPS) / STEPS
    numbers = cycle(range(STEPS))
    whole, kernels = profile(lambda: run.train(next(numbers)))
    show("the whole step", whole)
    head = head_kinds(run)
    if head:
        show("head and loss over the whole vocabulary, forward and backward", head)
    update = optimizer_kinds(run)
    show("optimizer", update)
    show("the rest", {kind: ms - head.get(kind, 0) - update.get(kind, 0) for kind, ms in whole.items()})
    batch_tokens = run.cfg.stages[ARGS.stage].batch_tokens
    print(f"{step_ms:9.2f} ms  a step of stage {ARGS.stage}, {batch_tokens} tokens, without the profiler; for "
          f"{step_ms - sum(whole.values()):.2f} ms of it no kernel runs")
    print(f"{run.loader_ms:9.2f} ms  loader on the CPU, for the batch of a step")
    show_kernels(kernels)


if __name__ == "__main__":
    main()
