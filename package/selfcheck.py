"""`python -m pilotq.selfcheck`: tasks that find out from inside whether they run as was promised."""

import sys

from pilotq.cli.main import call
from pilotq.cli.selfcheck.command import selfcheck_command

if __name__ == "__main__":
    sys.exit(call(command=selfcheck_command, name="python -m pilotq.selfcheck"))
