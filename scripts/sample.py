"""Draw images for a caption, rank them by CLIP, write the best (paper section 2.6).

python scripts/sample.py --model runs/quickstart/model --prompt "a red circle above a blue square on a white background"
python scripts/sample.py --prompt "..." --best-of 64 --keep 8       joins the newest parts under runs/
python scripts/sample.py --model 1.3B --prompt "..."                minDALL-E's folder, or its 1.3B.tar.gz
python scripts/sample.py --model pytorch_model_v3.bin --tokenizer bpe.model \\
    --dvae vqgan.gumbelf8-sber.model.ckpt --prompt "..."            ruDALL-E
"""

from dalle.commands.sample import SampleArgs, sample
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        sample(parse(SampleArgs, description=__doc__))
