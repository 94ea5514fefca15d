"""Files of others: Hugging Face folders and GGUF files, read and written over the one decoder."""
