"""Print the state and the detail of the /dev/shm check."""

import sys

from m2f.cluster.doctor.machine import check_shared_memory

finding = check_shared_memory()
sys.stdout.write(f"{finding.state} {finding.detail}\n")
