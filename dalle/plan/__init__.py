"""What a training run will take, before it is started: see dalle/stages/plan.py."""
