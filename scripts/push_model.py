"""Upload a model to the Hugging Face Hub; look first with --dry-run, which uploads nothing.

python scripts/push_model.py runs/quickstart/model --dry-run
python scripts/push_model.py runs/quickstart/model --to owner/name --report runs/quickstart/report.json --license mit
python scripts/push_model.py runs/quickstart/dvae --to owner/name-dvae        the part that a run trained, alone
"""

from dalle.commands.push_model import PushModelArgs, push_model
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        push_model(parse(PushModelArgs, description=__doc__))
