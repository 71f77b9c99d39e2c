"""What a run will be, told before it starts: from the timeline alone, without torch."""
