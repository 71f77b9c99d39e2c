"""Models and what is done to them: losses, mixing, parameter groups, EMA, freezing."""
