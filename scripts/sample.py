"""Generate images for prompts and keep the best by CLIP."""

from dalle.commands.sample import main

if __name__ == "__main__":
    main()
