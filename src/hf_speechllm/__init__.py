"""Speech models of WeNet (and, later, FunASR, CosyVoice, SpeechGPT) as complete HuggingFace models.

`import hf_speechllm` registers every family (see `auto.py`), after which `AutoModel*`, `AutoProcessor`,
`AutoTokenizer` and `AutoFeatureExtractor` load its checkpoints without remote code.
"""

import sys
from pathlib import Path


__version__ = "0.1.0"

# Registration needs the model classes and therefore torch and transformers, seconds of import time. The console script
# prints its help without them, and its commands import `auto` themselves.
if not sys.argv or Path(sys.argv[0]).stem != "hf-speechllm":
    from . import auto  # noqa: F401
