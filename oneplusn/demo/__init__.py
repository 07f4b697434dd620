"""A small base model and its task clusters, trained from nothing on two CPU cores."""
