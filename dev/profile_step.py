"""Where a training step spends its time on the GPU.

    python dev/profile_step.py --train_files=... --val_files=... [flags of train_gpt.py] [--stage=0]

Compiles as the script does, runs a few steps of a stage on real tokens under PyTorch's profiler and prints milliseconds
per step: of the whole step by kind of kernel, of the head with its loss and of the optimizer, each run alone, what the
others of the step have by subtraction, and the loader's time on the CPU, where it works ahead; last the 30 longest
kernels.
"""
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

STEPS = 4
KINDS = (("attention", ("flex", "tem_fused")),
         ("matrix products", ("gemm", "cutlass", "nvjet", "cublas", "xmma", "relu2")),
         ("cross-entropy", ("cross_entropy", "target_grad")), ("copies", ("memcpy", "memset", "direct_copy")),
         ("communication", ("nccl",)), ("elementwise and reductions", ("triton",)))


def kind_of(name: str) -> str:
    """The first kind one of whose words occurs in the kernel's name."""
    return next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")


def profile(function) -> tuple[dict, dict]:
    """Milliseconds per call by kind of kernel, and (milliseconds, launches) by kernel, over STEPS calls."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            function()
        torch.cuda.synchronize()
    kinds, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms = event.self_device_time_total / 1000 / STEPS
            kinds[kind_of(event.name)] += ms
            kernels[event.name][0] += ms
            kernels[event.name][1] += 1 / STEPS
    return kinds, kernels


def show(title: str, kinds: dict):
    print(f"{sum(kinds.values()):9.2f} ms  {title}: " + ", ".join(
        f"{kind} {ms:.2f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])))


def main():
    argv = [arg for arg in sys.argv[1:] if not arg.startswith("--stage=")]
    stage = int(next((arg.split("=")[1] for arg in sys.argv[1:] if arg.startswith("--stage=")), 0))
    cfg = train_gpt.parse_config(argv)
    machine = train_gpt.setup_machine(cfg)
    cfg, data = train_gpt.load_data(cfg, machine)
    cfg, tried = train_gpt.choose_attention(cfg, machine)
    print("\n".join(tried))
    backward, optimizer = train_gpt.build(cfg, machine)
    model, cfg = optimizer.model, optimizer.model.cfg
    if model.kernels:
        print(train_gpt.check_kernels(model, machine))
        train_gpt.initialize(model, optimizer, machine)
    begun = time.perf_counter()
    packs = train_gpt.largest_micro_batch(backward, optimizer, machine)
    print(f"{packs * cfg.pack_tokens} tokens per forward")
    model.set_stage(stage)
    step = (round(cfg.stages[stage].until * cfg.num_iterations) - 8) // 2 * 2
    started = time.perf_counter()
    loader = train_gpt.training_batches(cfg, data.train, 0, 1, packs)
    batches = [next(loader)[0] for _ in range(4)]
    loader_ms = 1000 * (time.perf_counter() - started) / 4          # of first-stage batches
    batches = (batches[0] * 16)[:train_gpt.micro_steps(cfg, cfg.stages[stage], 1, packs)]

    def train(i):                        # Adam works at odd steps
        train_gpt.training_step(backward, optimizer, batches, step + i, train_gpt.schedule(cfg, step + i), machine)
    for i in range(4):
        train(i)
    torch.cuda.synchronize()
    print(f"compiled in {time.perf_counter() - begun:.1f} s")
    started = time.perf_counter()
    for i in range(STEPS):
        train(i)
    torch.cuda.synchronize()
    step_ms = 1000 * (time.perf_counter() - started) / STEPS
    count = iter(range(1 << 20))
    whole, kernels = profile(lambda: train(next(count) % 4))
    show("the whole step", whole)

    targets = torch.randint(0, cfg.vocab_size, (packs * cfg.pack_tokens, 4), device="cuda")
    weights = torch.tensor(train_gpt.loss_weights(cfg, step), device="cuda")
    x = train_gpt.norm(torch.randn(len(targets), cfg.model_dim, device="cuda")).bfloat16().requires_grad_()

    def head():
        model.kernels["head_loss"](x, model.lm_head, targets, weights, None).backward()
    head_kinds = {}
    if "head_loss" in model.kernels:
        head_kinds = {kind: ms * len(batches) for kind, ms in profile(head)[0].items()}
        show("head and loss over the whole vocabulary, forward and backward", head_kinds)
    zeros = [torch.zeros_like(param) for param in model.parameters()]

    def update():
        for param, zero in zip(model.parameters(), zeros):
            param.grad = zero
        i = step + next(count) % 4
        optimizer.step(i, train_gpt.schedule(cfg, i))
    update_kinds, _ = profile(update)
    show("optimizer", update_kinds)
    body = {kind: ms - head_kinds.get(kind, 0) - update_kinds.get(kind, 0) for kind, ms in whole.items()}
    show("the others", body)
    print(f"{step_ms:9.2f} ms  stage {stage}, a step of {cfg.stages[stage].batch_tokens} tokens without the profiler, "
          f"{step_ms - sum(whole.values()):.2f} of them without a kernel")
    print(f"{loader_ms:9.2f} ms  loader, for a batch of {cfg.stages[0].batch_tokens} tokens, ahead on the CPU")
    for name, (ms, launches) in sorted(kernels.items(), key=lambda item: -item[1][0])[:30]:
        print(f"{ms:9.3f} ms  {launches:6.1f} x  {name[:110]}")


if __name__ == "__main__":
    main()
