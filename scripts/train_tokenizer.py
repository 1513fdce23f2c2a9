"""Learn the text vocabulary from captions (paper section 2.2): the first stage."""

from dalle.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
