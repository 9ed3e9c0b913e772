"""What every training script shares: options, devices, the loop, checkpoints, monitoring."""
