"""Print the figures of one probe as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import sys

from tools.probes import PROBES

# Libraries print as they load; the answer is the only output.
with contextlib.redirect_stdout(io.StringIO()):
    figures = PROBES[sys.argv[1]]()
print(json.dumps(figures))
