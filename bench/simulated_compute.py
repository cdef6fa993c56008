"""The compute service, with all it is but its device.

python -m bench.simulated_compute STEP_MS [flags of the compute service]
"""

from __future__ import annotations

import sys

from bench.simulated_device import simulated_device
from compute_service.__main__ import end, main

if __name__ == "__main__":
    with simulated_device(float(sys.argv.pop(1)) * 1e-3):
        end(main())
