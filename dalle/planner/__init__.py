"""What a training run will take, before it is started: see dalle/commands/plan.py."""
