"""Runs a training script as if the GPU had less memory.

    python dev/cap_memory.py 24 train_gpt.py --preset=single        # as on a GPU with 24 GiB

PyTorch keeps the limit (torch.cuda.set_per_process_memory_fraction): an allocation beyond it fails as on a smaller GPU.
"""
import argparse
import os
import runpy
import sys
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a bad one ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="cap_memory.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("gib", type=float, metavar="GIB", help="memory that the script may use, in GiB")
    parser.add_argument("script", type=os.path.expanduser, metavar="SCRIPT", help="the training script")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="flags of the script")
    args = parser.parse_args(argv)
    if not args.gib > 0:
        fail(f"GIB={args.gib} must be more than 0")
    if not Path(args.script).is_file():
        fail(f"SCRIPT={args.script} is not a file; name a training script, such as train_gpt.py")
    return args


def fail(message: str):
    print(f"cap_memory.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def main():
    args = parse_args()
    import torch                         # not before: --help answers at once
    if not torch.cuda.is_available():
        fail("PyTorch finds no CUDA GPU, so there is no memory to limit; run the script itself")
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if args.gib > total:
        fail(f"GIB={args.gib} is more than the {total:.1f} GiB of this GPU; give less")
    torch.cuda.set_per_process_memory_fraction(args.gib / total)
    sys.argv = [args.script, *args.flags]
    sys.path.insert(0, str(Path(args.script).resolve().parent))     # where the script finds triton_kernels.py
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
