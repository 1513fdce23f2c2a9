"""Turn images into tokens with a trained dVAE (paper section 2.2), once, before stage two."""

from dalle.commands.encode_images import main

if __name__ == "__main__":
    main()
