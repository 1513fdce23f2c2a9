"""Train a small DALL-E on synthetic shapes and generate images for unseen captions."""

from dalle.commands.quickstart import main

if __name__ == "__main__":
    main()
