"""Say what a checkpoint is, of this library or another, without running anything that is in it.

python scripts/inspect_checkpoint.py dalle.pt                       family, sizes, licence, what is missing, hash
python scripts/inspect_checkpoint.py runs/dvae --json report.json   also a run, a checkpoint or a model directory
"""

from dalle.commands.inspect_checkpoint import InspectCheckpointArgs, inspect_checkpoint
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        inspect_checkpoint(parse(InspectCheckpointArgs, description=__doc__))
