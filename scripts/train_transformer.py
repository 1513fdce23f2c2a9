"""Train the transformer on a token cache, stage two (paper section 2.2)."""

from dalle.commands.train_transformer import main

if __name__ == "__main__":
    main()
