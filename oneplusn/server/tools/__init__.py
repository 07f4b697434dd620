"""Tools to look into the engine; nothing that serves imports them."""
