"""Is killed while it has a scratch folder: `killed_with_scratch.py TEMPORARY`."""

import os
import signal
import sys
import tempfile

from m2f.trainer.checkpoint.scratch import ScratchFolder

tempfile.tempdir = sys.argv[1]
(ScratchFolder("m2f-test-").path / "big.bin").write_bytes(b"x")
os.kill(os.getpid(), signal.SIGKILL)
