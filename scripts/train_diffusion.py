"""Train a small CLIP to rank images (paper section 2.6)."""

from dalle.commands.train_diffusion import main

if __name__ == "__main__":
    main()
