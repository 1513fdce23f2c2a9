"""Train the dVAE on images (paper section 2.1): stage one."""

from dalle.commands.train_dvae import main

if __name__ == "__main__":
    main()
