"""Prints what a step of a plain script costs on the host and on the GPU.

    python dev/profile_plain.py train_gpt_moe.py --train_files=... --val_files=... [other flags of the script]

For train_gpt_simple.py, its relatives, and copies of them. Starts the script as a run does, and ends it after 65 steps.
Nothing is validated or kept: --out_dir, --val_every and --save_every do not count. Prints milliseconds per step:

* the step by the clock, mean of 40;
* what the host needs for it: the loader, and launching (Python calls the kernels and does not wait for them);
* on a GPU, how long kernels run, by kind, mean of 5 more steps. This does not depend on how busy the host is: compare
  it on a machine that others use too. If the host needs longer than the kernels, the host is the limit;
* the 30 kernels that take longest.
"""
import argparse
import contextlib
import io
import signal
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
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="a plain script. All other flags go to it")
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
from profile_step import add_up, show, show_kernels  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample  # noqa: E402

WARM, TIMED, PROFILED = 20, 40, 5        # steps


class Done(Exception):
    """All steps are measured."""


class Meter:
    """Measures the steps of a script. Its two functions stand for the script's `batches` and `training_step`."""

    def __init__(self, module, first: int):
        self.make_batches, self.training_step, self.count = module.batches, module.training_step, first
        self.began = self.loader = self.launching = 0.0             # seconds
        self.out = sys.stdout
        self.profiler = None
        module.batches, module.training_step = self.batches, self.step

    def batches(self, *args):
        batches, began = self.make_batches(*args), time.perf_counter()
        for batch in batches:
            self.loader += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def step(self, *args):
        if args[-1]:                     # the script was interrupted
            raise KeyboardInterrupt
        if self.count == WARM:
            synchronize()
            self.began, self.loader, self.launching = time.perf_counter(), 0.0, 0.0
        if self.count == WARM + TIMED:
            with contextlib.redirect_stdout(self.out):
                self.print_times()
        if self.count == WARM + TIMED + PROFILED:
            with contextlib.redirect_stdout(self.out):
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
        kinds, kernels = add_up(self.profiler, PROFILED)
        show("kernels", kinds)
        show_kernels(kernels)


def cuda() -> bool:
    return torch.cuda.is_initialized()


def synchronize():
    torch.cuda.synchronize() if cuda() else None


def main() -> int:
    """Runs the script until all steps are measured. Returns 0, or the exit code of the script if it ended before."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    steps = WARM + TIMED + PROFILED
    try:
        module = sample.import_script(ARGS.script, ("make_optimizers", "batches", "training_step", "main"),
                                      remedy="name a plain script, as train_gpt_simple.py is")
    except sample.UserError as error:
        fail(str(error))
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [str(ARGS.script), *FLAGS, f"--out_dir={folder}", "--val_every=0"]
        sys.argv += ["--save_every=0"] * hasattr(module.Hyperparameters, "save_every")
        if not any(flag.split("=")[0] == "--num_iterations" for flag in FLAGS):
            sys.argv.append(f"--num_iterations={steps + 1}")        # the default may need more text than there is
        try:
            cfg = module.parse_config(sys.argv[1:])
        except module.UserError as error:
            fail(str(error))
        if 0 < cfg.num_iterations <= steps:
            fail(f"--num_iterations={cfg.num_iterations} are too few steps; use {steps + 1} or more")
        compiled = cfg.compile and cfg.device != "cpu" and torch.cuda.is_available()
        Meter(module, -1 if compiled else 0)                        # a compiled script begins with a step on nothing
        module.validate = lambda *_: 0.0
        try:
            with contextlib.redirect_stdout(io.StringIO()):         # the script's own lines
                code = module.main()
        except Done:
            return 0
    if not code:
        fail(f"the run has no {steps + 1} steps; use --num_iterations={steps + 1}")
    return code


if __name__ == "__main__":
    sys.exit(main())
