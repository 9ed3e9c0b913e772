"""What fine-tuning and judging share."""
