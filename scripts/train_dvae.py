"""Train the dVAE, stage one (paper section 2.1)."""

from dalle.commands.train_dvae import main

if __name__ == "__main__":
    main()
