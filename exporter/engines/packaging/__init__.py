"""What a finished model is put into to be served elsewhere."""
