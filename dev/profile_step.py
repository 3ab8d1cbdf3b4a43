"""Where a training step spends its time on the GPU, by kind of kernel.

    python dev/profile_step.py --train_files=... --val_files=... [flags of train_gpt.py] [--stage=0]

Compiles as the script does, runs a few steps of a stage on synthetic tokens under PyTorch's profiler and prints
milliseconds per step for attention, matrix products, optimizer and so on, then the 30 longest kernels.
"""
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

STEPS = 4
KINDS = (("attention", ("flex", "tem_fused_flex")), ("matmul", ("gemm", "cutlass", "nvjet", "cublas", "xmma")),
         ("cross-entropy", ("cross_entropy", "target_grad")), ("copies", ("memcpy", "memset", "direct_copy")),
         ("communication", ("nccl",)), ("elementwise and reductions", ("triton",)))


def kind_of(name: str) -> str:
    """The first kind one of whose words occurs in the kernel's name."""
    return next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")


def main():
    argv = [arg for arg in sys.argv[1:] if not arg.startswith("--stage=")]
    stage = int(next((arg.split("=")[1] for arg in sys.argv[1:] if arg.startswith("--stage=")), 0))
    cfg = train_gpt.parse_config(argv)
    machine = train_gpt.setup_machine(cfg)
    shards, _ = train_gpt.open_shards(cfg.train_files, cfg.val_files)
    cfg = train_gpt.resolve_config(cfg, machine, shards[0])
    slots, plan = train_gpt.memory_plan(cfg, machine)
    print(plan)
    with torch.device(machine.device):
        model = train_gpt.GPT(cfg)
    optimizer = train_gpt.Optimizer(model)
    forward = torch.compile(model, dynamic=False, fullgraph=True)
    model.set_stage(stage)
    step = round(cfg.stages[stage].until * cfg.num_iterations) - STEPS
    loader = train_gpt.training_batches(cfg, shards, 0, 1, slots)
    batches, _ = next(loader)
    batches = (batches * 8)[:train_gpt.micro_steps(cfg, cfg.stages[stage], 1, slots)]
    started = time.perf_counter()
    for i in range(4):
        train_gpt.training_step(forward, optimizer, batches, step + i, machine)
    torch.cuda.synchronize()
    print(f"compiled in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    for i in range(STEPS):
        train_gpt.training_step(forward, optimizer, batches, step + i, machine)
    torch.cuda.synchronize()
    print(f"stage {stage}: {1000 * (time.perf_counter() - started) / STEPS:.1f} ms per step of "
          f"{cfg.stages[stage].batch_tokens} tokens, without the profiler")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(STEPS):
            train_gpt.training_step(forward, optimizer, batches, step + i, machine)
        torch.cuda.synchronize()
    kinds, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms = event.self_device_time_total / 1000 / STEPS
            kinds[kind_of(event.name)] += ms
            kernels[event.name][0] += ms
            kernels[event.name][1] += 1
    for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{ms:9.2f} ms  {kind}")
    print(f"{sum(kinds.values()):9.2f} ms  all kernels")
    for name, (ms, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:45]:
        print(f"{ms:9.3f} ms  {count / STEPS:6.1f} x  {name[:110]}")


if __name__ == "__main__":
    main()
