"""Set expandable segments after torch is imported, and print the settings of torch's allocator."""

import os
import sys

import torch

from m2f.trainer.memory.allocator import enable_expandable_segments

enable_expandable_segments(os.environ)
sys.stdout.write(f"{torch._C._accelerator_getAllocatorSettings()}\n")
