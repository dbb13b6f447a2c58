"""Speed: attention kernels and whole training steps, each checked before it is timed."""
