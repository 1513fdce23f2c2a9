"""Train a diffusion model on images and captions: GLIDE's base model, upsampler or inpainting."""

from dalle.commands.train_diffusion import main

if __name__ == "__main__":
    main()
