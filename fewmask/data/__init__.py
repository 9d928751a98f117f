"""From files on a disk to batches in memory; nothing is imported here, so that reading a picture loads no torch."""
