"""From what a user says a plan shall hold to the plan. Importing this costs no PyTorch."""
