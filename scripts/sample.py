"""Draw images for a caption, rank them by CLIP, write the best (paper section 2.6)."""

from dalle.commands.sample import main

if __name__ == "__main__":
    main()
