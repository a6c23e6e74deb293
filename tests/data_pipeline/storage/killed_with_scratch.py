"""Creates a scratch folder and kills itself: `killed_with_scratch.py TEMPORARY`."""

import os
import signal
import sys

from m2f.data_pipeline.storage.scratch import ScratchFolder

(ScratchFolder("test", sys.argv[1]).path / "big.bin").write_bytes(b"x")
os.kill(os.getpid(), signal.SIGKILL)
