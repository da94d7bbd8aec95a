"""``make bench``: time, memory and accuracy of the overlap operation; see README.md."""

import os

# Kineto would write two lines to the terminal for every profiled call; read at torch's import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
