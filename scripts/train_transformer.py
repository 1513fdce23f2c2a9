"""Train the transformer on a token cache (paper section 2.2): stage two."""

from dalle.commands.train_transformer import main

if __name__ == "__main__":
    main()
