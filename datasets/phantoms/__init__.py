"""Generated images, the data that need no download."""
