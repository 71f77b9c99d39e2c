"""What a run stands on: the device, its checkpoints, the news that the machine will go."""
