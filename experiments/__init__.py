"""Check the papers' claims on a laptop: small synthetic tasks, the shipped methods and trainer."""
