"""Train the text tokenizer on captions (paper section 2.2)."""

from dalle.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
