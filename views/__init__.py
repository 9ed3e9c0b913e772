"""Views: what a batch of textures or volumes becomes before a network sees it."""
