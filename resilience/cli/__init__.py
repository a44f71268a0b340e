"""The command line: ``resilience run | status | history | verify | logs | demo``.

Start-up is light: a command's module is imported when it is used, and Ray, torch, DuckDB or Zarr only where it
needs them.
"""

from resilience.cli.main import main

__all__ = ["main"]
