"""Places on a disk or in a bucket: paths, folders that appear whole, claims; the only room that knows object stores."""
