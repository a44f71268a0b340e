"""``python -m resilience.cli``: the command line where the ``resilience`` script is not on the path."""

from resilience.cli.main import main

main(prog_name="resilience")
