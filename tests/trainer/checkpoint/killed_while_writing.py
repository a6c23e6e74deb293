"""Begin to write a file and kill this process: `killed_while_writing.py FILE`."""

import os
import signal
import sys
from pathlib import Path

from m2f.data_pipeline.storage.local import replacing

with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
