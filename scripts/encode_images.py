"""Encode images into tokens with a trained dVAE, once before stage two (paper section 2.2)."""

from dalle.commands.encode_images import main

if __name__ == "__main__":
    main()
