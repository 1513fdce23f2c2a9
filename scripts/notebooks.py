"""Run the notebooks anew and keep their images in them.

python scripts/notebooks.py                                        all of notebooks/, with the quick start's model
python scripts/notebooks.py notebooks/1_caption_to_image.ipynb   one
python scripts/notebooks.py --quickstart runs/quickstart-1         with the model of another quick start

To read or change one, open it: pip install jupyterlab && jupyter lab notebooks/1_caption_to_image.ipynb
"""

from dalle.commands.notebooks import NotebooksRun, run_notebooks
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        run_notebooks(parse(NotebooksRun, description=__doc__))
