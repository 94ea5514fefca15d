"""Text: corpora as TFDS data sets, tokenizers, and the pipeline from documents to batches."""
