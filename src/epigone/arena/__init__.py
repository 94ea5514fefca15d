"""The prompt box from both sides: what leaves it, and what that is worth."""
