"""Run a training script as if the GPU had less memory: python dev/cap_memory.py GIB SCRIPT [flags of the script].

The cap is PyTorch's own (torch.cuda.set_per_process_memory_fraction): beyond it, allocations fail.
"""
import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    gib, sys.argv = float(sys.argv[1]), sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))     # where the script finds its companions
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    runpy.run_path(sys.argv[0], run_name="__main__")
