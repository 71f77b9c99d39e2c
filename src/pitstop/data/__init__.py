"""From photos on a disk to batches: find, pack, read, decode, load."""
