"""Loss functions, for any number of spatial dimensions."""
