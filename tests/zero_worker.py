"""A script of `training/`, by its name, with DeepSpeed's shared-memory all-reduce left out, which would be compiled.

Run by `test_zero.py` and `test_zero_unit_lm.py`, once per process. The all-reduce then goes through gloo like all
other traffic.
"""

import importlib
import sys
from pathlib import Path


if any("deepspeed" in argument for argument in sys.argv):
    import deepspeed.comm  # noqa: F401

    # By its name: `import deepspeed.comm.torch` binds torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))

import torch  # noqa: E402


torch.set_num_threads(1)
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
