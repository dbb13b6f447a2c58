"""Makes `judging` importable from the tests of this folder; without a GPU Triton's kernels run in its interpreter."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are imported, which no test has done yet
