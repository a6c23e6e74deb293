"""Print the finding of the check of /dev/shm."""

import sys

from m2f.cluster.doctor.machine import check_shared_memory

finding = check_shared_memory()
sys.stdout.write(f"{finding.state} {finding.detail}\n")
