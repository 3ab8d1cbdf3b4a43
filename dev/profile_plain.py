"""Prints what a step of a plain script costs on the host and on the GPU.

    python dev/profile_plain.py train_gpt_moe.py --train_files=... --val_files=... [other flags of the script]

For train_gpt_simple.py, its relatives, and copies of them. Starts the script as a run does, and ends it after 65 steps.
Nothing is validated or kept. Prints milliseconds per step, means over 40 steps:

* the step by the clock;
* what the host needs for it: the loader, and launching (Python calls the kernels and does not wait for them);
* how long kernels run, by kind, over 5 more steps. This does not depend on how busy the host is, so compare it on a
  machine that others use too. If the host needs longer than the kernels, the host is the limit;
* the 30 kernels that take longest.

Without a GPU it prints the first two lines only.
"""
import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The script, and the flags for it."""
    parser = argparse.ArgumentParser(prog="profile_plain.py", usage="python dev/profile_plain.py [-h] SCRIPT [flags of "
                                     "SCRIPT]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="a plain script. All flags go to it, see its --help")
    args, flags = parser.parse_known_args(argv)
    if not args.script.is_file():
        fail(f"SCRIPT={args.script} is not a file; name a training script")
    return args, flags


def fail(message: str):
    print(f"profile_plain.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    ARGS, FLAGS = parse_args()           # before PyTorch is imported, so that --help answers at once

import torch  # noqa: E402
from profile_step import kind_of, show  # noqa: E402

WARM, TIMED, PROFILED = 20, 40, 5        # steps


class Done(Exception):
    """All steps are measured."""


class Meter:
    """Measures the steps of a script. Its two functions stand for the script's `batches` and `training_step`."""

    def __init__(self, module, first: int):
        self.make_batches, self.training_step, self.count = module.batches, module.training_step, first
        self.began = self.loader = self.launching = 0.0             # seconds
        self.profiler = None
        module.batches, module.training_step = self.batches, self.step

    def batches(self, *args):
        batches, began = self.make_batches(*args), time.perf_counter()
        for batch in batches:
            self.loader += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def step(self, *args):
        if self.count == WARM:
            synchronize()
            self.began, self.loader, self.launching = time.perf_counter(), 0.0, 0.0
        if self.count == WARM + TIMED:
            self.print_times()
        if self.count == WARM + TIMED + PROFILED:
            self.print_kernels()
            raise Done
        began = time.perf_counter()
        result = self.training_step(*args)
        self.launching += time.perf_counter() - began
        self.count += 1
        return result

    def print_times(self):
        """Prints the times of the steps since WARM, and starts the profiler if there is a GPU."""
        synchronize()
        step = 1000 * (time.perf_counter() - self.began) / TIMED
        print(f"{step:9.2f} ms  a step\n{1000 * self.loader / TIMED:9.2f} ms  loader on the host\n"
              f"{1000 * self.launching / TIMED:9.2f} ms  " + ("launching on the host" if cuda() else "training"))
        if cuda():
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()

    def print_kernels(self):
        """Prints the kernels of the steps since print_times."""
        if not self.profiler:
            return
        synchronize()
        self.profiler.stop()
        kinds, kernels = {}, {}
        for event in self.profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                ms, kind = event.self_device_time_total / 1000 / PROFILED, kind_of(event.name)
                kinds[kind] = kinds.get(kind, 0) + ms
                before = kernels.get(event.name, (0, 0))
                kernels[event.name] = before[0] + ms, before[1] + 1 / PROFILED
        show("kernels", kinds)
        for name, (ms, launches) in sorted(kernels.items(), key=lambda item: -item[1][0])[:30]:
            print(f"{ms:9.3f} ms  {launches:6.1f} x  {name[:110]}")


def cuda() -> bool:
    return torch.cuda.is_initialized()


def synchronize():
    torch.cuda.synchronize() if cuda() else None


def main():
    spec = importlib.util.spec_from_file_location(ARGS.script.stem, ARGS.script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[ARGS.script.stem] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "make_optimizers"):
        fail(f"SCRIPT={ARGS.script} is no plain script; dev/profile_step.py is for train_gpt.py")
    module.validate = lambda *_: 0.0
    with tempfile.TemporaryDirectory() as folder:
        try:
            cfg = module.parse_config([*FLAGS, f"--out_dir={folder}", "--val_every=0"])
            compiled = cfg.compile and cfg.device != "cpu" and torch.cuda.is_available()
            Meter(module, -1 if compiled else 0)                    # a compiled script begins with a step on nothing
            module.train(cfg, FLAGS)
        except Done:
            return
        except module.UserError as error:
            fail(str(error))
    steps = WARM + TIMED + PROFILED
    fail(f"the run ended before {steps} steps; use --num_iterations={steps + 1}")


if __name__ == "__main__":
    main()
