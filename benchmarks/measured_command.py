"""Runs a command and prints, as JSON, its exit code, wall and CPU seconds and peak RSS.

    python -I -S measured_command.py COMMAND ARGUMENT...

A process of its own, because Linux counts the memory of the process that starts a command towards the command's peak
(ru_maxrss survives exec): the benchmark has torch and weights loaded, this file has nothing.
"""

import json
import os
import sys
import time

started = time.monotonic()
# The command's own output goes to stderr: stdout carries the JSON.
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
print(
    json.dumps(
        {
            "exit_code": os.waitstatus_to_exitcode(status),
            "wall_seconds": time.monotonic() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
    )
)
