"""Every test sees eight CPU devices; those that do not ask for them use the first."""

import os

# On few cores, many devices wait for each other in threads: more of them than there are cores.
os.environ.setdefault("NPROC", "32")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
