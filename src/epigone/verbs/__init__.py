"""What `epigone VERB` does: one file a verb, and what only the verbs need."""
