"""Tests. Threads that wait sleep soon, as the command line's do: time limits hold beside others' work."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
