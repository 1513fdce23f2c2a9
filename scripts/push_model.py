"""Upload a model to the Hugging Face Hub; --dry-run uploads nothing."""

from dalle.commands.push_model import main

if __name__ == "__main__":
    main()
