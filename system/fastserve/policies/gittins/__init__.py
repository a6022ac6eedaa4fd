"""The `gittins` policy: its index, the lengths it learns, and the queue it keeps."""
