"""One thread for everything, before anything imports torch: the suite shares its machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")
