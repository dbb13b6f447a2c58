"""Makes `judging`, what attention is compared by, importable from the tests of this folder.

Without a GPU these tests are skipped, but collected; the kernels that they import are then those of Triton's
interpreter, which the tests of `kernels` use later in the same process.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
